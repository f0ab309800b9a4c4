"""Under a ``GradScaler`` a run is the loop by hand, and an overflow in either pass does what it does in one."""

from __future__ import annotations

import functools

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining, is_second_pass
from tests.helpers import cases, lit

pytestmark = pytest.mark.lightning

SCALE = 1024.0


def make_scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=SCALE, **options)


def fit(folder, module, callback, scaler, **options):
    return lit.fit(folder, module, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


VARIANTS = {
    "sam": ({"rho": 0.1}, functools.partial(samopt.SAM, rho=0.1)),
    "asam": ({}, samopt.ASAM),
    "tram": ({"scale": 20.0}, functools.partial(samopt.TRAM, scale=20.0)),
    "functional-sam": ({"rho": 0.3}, functools.partial(samopt.FunctionalSAM, rho=0.3)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loop_by_hand(variant, clip, accumulate, tmp_path):
    options, by_hand = VARIANTS[variant]
    module, expected = lit.Module(), lit.Module()
    scalers = make_scaler(growth_interval=3), make_scaler(growth_interval=3)
    callback = SharpnessAwareTraining(variant, **options)
    fit(tmp_path, module, callback, scalers[0], gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    history = lit.train_by_hand(
        expected,
        list(lit.loader()),
        sam=by_hand,
        accumulate=accumulate,
        clip_norm=clip,
        autocast=torch.float16,
        scaler=scalers[1],
    )
    lit.assert_same_state(module.net, expected.net)
    assert scalers[0].get_scale() == scalers[1].get_scale() > SCALE
    assert float(callback.last_step.sharpness) == history.sharpness[-1]


def test_fisher_meets_unscaled_gradients(tmp_path):
    """Its metric depends on their size; in fp32 under a scaler, the run is the one without a scaler."""
    module, expected = lit.Module(), lit.Module()
    plugin = MixedPrecision("16-mixed", "cpu", make_scaler())
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    lit.fit(tmp_path, module, SharpnessAwareTraining("fisher-sam", eta=10.0), plugins=[plugin])
    lit.train_by_hand(expected, list(lit.loader()), sam=functools.partial(samopt.FisherSAM, eta=10.0))
    lit.assert_same_state(module.net, expected.net)


def test_gradient_norms_are_measured_without_the_scale(tmp_path):
    norms = {}
    for name, base in {"adamw": lit.adamw, "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)}.items():
        module, callback = lit.Module(base), SharpnessAwareTraining()
        fit(tmp_path, module, callback, make_scaler(), max_steps=1)
        norms[name] = callback.last_step
    callback = SharpnessAwareTraining()
    lit.fit(tmp_path, lit.Module(), callback, max_steps=1)
    for step in norms.values():
        for field in ("grad_norm", "perturbed_grad_norm"):
            assert float(getattr(step, field)) == pytest.approx(float(getattr(callback.last_step, field)), rel=1e-2)


def test_a_fused_base_unscales_itself(tmp_path):
    """Lightning then unscales nothing, and refuses to clip."""

    def fused(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

    module, expected = lit.Module(fused), lit.Module(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))
    fit(tmp_path, module, SharpnessAwareTraining(), make_scaler())
    lit.train_by_hand(expected, list(lit.loader()), autocast=torch.float16, scaler=make_scaler())
    for ours, theirs in zip(module.net.parameters(), expected.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **cases.TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="Fisher.*AdamW"):
        fit(tmp_path, lit.Module(fused), SharpnessAwareTraining("fisher-sam"), make_scaler())


class Overflowing(lit.Module):
    """The gradient of step 2 is infinite, in one of the passes."""

    def __init__(self, which, base=lit.sgd):
        super().__init__(base)
        self.which = which

    def loss(self, batch):
        loss = super().loss(batch)
        if self.trainer.global_step == 2 and is_second_pass(self.trainer) == (self.which == "second"):
            return loss * torch.inf
        return loss


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("which", ["first", "second"])
def test_an_overflow_in_either_pass_skips_the_step_and_halves_the_scale(which, clip, tmp_path):
    module, plain, scaler = Overflowing(which), Overflowing("first"), make_scaler()

    class Weights(Callback):
        def __init__(self):
            self.kept = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.kept.append([p.detach().clone() for p in pl_module.parameters()])

    weights = Weights()
    fit(tmp_path, module, None, scaler, callbacks=[weights], gradient_clip_val=clip, max_epochs=1)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(weights.kept, weights.kept[1:], strict=False)
    ]
    assert moved == [True, False, True, True, True, True]
    assert scaler.get_scale() == SCALE / 2
    reference = make_scaler()
    trainer = fit(tmp_path, plain, Callback(), reference, gradient_clip_val=clip, max_epochs=1)
    assert reference.get_scale() == SCALE / 2
    assert module.trainer.global_step == trainer.global_step


def test_a_skipped_training_step_skips_the_update(tmp_path):
    """Lightning neither unscales nor steps where the last training step of a window returned nothing."""

    class Skipping(lit.Module):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else output

    module, plain = Skipping(), Skipping()
    for made, callback in ((module, SharpnessAwareTraining("sam", rho=0.0)), (plain, Callback())):
        fit(tmp_path, made, callback, make_scaler(), accumulate_grad_batches=2, max_epochs=1)
    lit.assert_same_state(module.net, plain.net)
