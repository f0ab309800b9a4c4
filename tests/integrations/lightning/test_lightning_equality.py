"""A run with the callback is the loop that a person would write by hand, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import cases, lit

pytestmark = pytest.mark.lightning


@pytest.mark.parametrize("clip", ["none", "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("base", [lit.sgd, lit.adamw])
def test_accumulation_and_clipping(base, accumulate, clip, tmp_path):
    """26 rows, 7 batches: the last batch of an epoch is partial, and so is its last window."""
    options, by_hand = {
        "none": ({}, {}),
        "norm": ({"gradient_clip_val": 0.3}, {"clip_norm": 0.3}),
        "value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"clip_value": 0.01}),
    }[clip]
    module, expected = lit.Module(base), lit.Module(base)
    trainer = lit.fit(tmp_path, module, accumulate_grad_batches=accumulate, **options)
    history = lit.train_by_hand(expected, list(lit.loader()), accumulate=accumulate, **by_hand)
    lit.assert_same_state(module.net, expected.net)
    assert module.losses == history.losses
    assert trainer.global_step == len(history.sharpness)


@pytest.mark.parametrize("scheduler", ["step", "epoch"])
def test_schedules(scheduler, tmp_path):
    module, expected = lit.Module(scheduler=scheduler), lit.Module(scheduler=scheduler)
    trainer = lit.fit(tmp_path, module, accumulate_grad_batches=2, max_epochs=3)
    lit.train_by_hand(expected, list(lit.loader()), accumulate=2, epochs=3)
    lit.assert_same_state(module.net, expected.net)
    steps = {"step": 12, "epoch": 3}[scheduler]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**steps)


VARIANTS = {
    "sam": ({"rho": 0.2}, functools.partial(samopt.SAM, rho=0.2)),
    "asam": ({"rho": 0.7, "eta": 0.1}, functools.partial(samopt.ASAM, rho=0.7, eta=0.1)),
    "fisher-sam": ({"rho": 0.2, "norm": "linf"}, functools.partial(samopt.FisherSAM, rho=0.2, norm="linf")),
    "tram": ({"scale": 20.0, "trust_region": "ema"}, functools.partial(samopt.TRAM, scale=20.0, trust_region="ema")),
    "functional-sam": ({"rho": 0.3}, functools.partial(samopt.FunctionalSAM, rho=0.3)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, accumulate, tmp_path):
    options, by_hand = VARIANTS[variant]
    module, expected = lit.Module(), lit.Module()
    callback = SharpnessAwareTraining(variant, **options)
    lit.fit(tmp_path, module, callback, accumulate_grad_batches=accumulate)
    history = lit.train_by_hand(expected, list(lit.loader()), sam=by_hand, accumulate=accumulate)
    lit.assert_same_state(module.net, expected.net)
    assert float(callback.last_step.sharpness) == history.sharpness[-1]


RELATIVES = {
    "asam": functools.partial(samopt.ASAM, rho=0.3),
    "gsam": samopt.GSAM,
    "wsam": samopt.WSAM,
    "friendly": samopt.FriendlySAM,
    "look": functools.partial(samopt.LookSAM, every=3),
    "le": samopt.LESAM,
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", RELATIVES)
def test_an_optimizer_of_ones_own(name, accumulate, tmp_path):
    module, expected = lit.Module(), lit.Module()
    lit.fit(tmp_path, module, SharpnessAwareTraining(RELATIVES[name]), accumulate_grad_batches=accumulate)
    lit.train_by_hand(expected, list(lit.loader()), sam=RELATIVES[name], accumulate=accumulate)
    lit.assert_same_state(module.net, expected.net)


def test_clipping_reaches_what_goes_past_the_base(tmp_path):
    module, expected = lit.Module(), lit.Module()
    lit.fit(tmp_path, module, SharpnessAwareTraining(samopt.WSAM), gradient_clip_val=0.3)
    lit.train_by_hand(expected, list(lit.loader()), sam=samopt.WSAM, clip_norm=0.3)
    lit.assert_same_state(module.net, expected.net)
    unclipped = lit.Module()
    lit.train_by_hand(unclipped, list(lit.loader()), sam=samopt.WSAM)
    assert not torch.equal(module.net[0].weight, unclipped.net[0].weight)


def test_one_pass_needs_a_model(tmp_path):
    make = functools.partial(samopt.SAM, direction="momentum")
    with pytest.raises(ValueError, match=r"SAM in one pass, without model=.*write samopt.SAM\(.*model=self\)"):
        lit.fit(tmp_path, lit.Module(), SharpnessAwareTraining(lambda base: make(base, model=None)))


def test_options_in_parameter_groups(tmp_path):
    """SAM-ON: only the normalisation layers move."""

    def base(parameters):
        parameters = list(parameters)
        norms = [p for p in parameters if p.dim() == 1]
        others = [p for p in parameters if p.dim() > 1]
        return torch.optim.SGD([{"params": norms, "rho": 0.3}, {"params": others, "perturb": False}], lr=0.1)

    module, expected = lit.Module(base), lit.Module(base)
    callback = SharpnessAwareTraining("sam", rho=0.1)
    trainer = lit.fit(tmp_path, module, callback)
    history = lit.train_by_hand(expected, list(lit.loader()))
    lit.assert_same_state(module.net, expected.net)
    assert history.sharpness[0] > 0
    assert [sorted(set(group) & {"rho", "eta", "perturb"}) for group in trainer.optimizers[0].param_groups] == [
        ["rho"],
        ["perturb"],
    ]


@pytest.mark.parametrize("only", ["norm", r"^net\.[15]\.", lambda name, parameter: name[:6] in ("net.1.", "net.5.")])
def test_only_moves_what_groups_with_perturb_would(tmp_path, only):
    norms = (2, 3, 6, 7)  # places of the normalisation layers' parameters

    def base(perturbs):
        return lambda parameters: torch.optim.SGD(
            [{"params": [p], "perturb": perturbs(place)} for place, p in enumerate(parameters)], lr=0.1
        )

    module, expected = lit.Module(base(lambda place: True)), lit.Module(base(norms.__contains__))
    lit.fit(tmp_path / "only", module, SharpnessAwareTraining("sam", rho=0.3, only=only))
    lit.fit(tmp_path / "groups", expected, SharpnessAwareTraining("sam", rho=0.3))
    lit.assert_same_state(module.net, expected.net)


class Deterministic(lit.Module):
    """Without noise and dropout, in fp64."""

    def __init__(self):
        super().__init__()
        self.net.double()[3].p = 0.0

    def loss(self, batch):
        self.logits = self(batch[0])
        return nn.functional.cross_entropy(self.logits, batch[1])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_hand_written_loop_is_the_textbook(accumulate, tmp_path):
    """The engine aside: plain torch with the perturbation in fp64 gives the same weights up to rounding."""
    module, expected = Deterministic(), Deterministic()
    data = lit.loader(dtype=torch.float64)
    lit.fit(tmp_path, module, data=data, accumulate_grad_batches=accumulate, max_epochs=1, precision="64-true")
    net, batches = expected.net, list(data)
    base = lit.sgd(net.parameters())
    for first in range(0, len(batches), accumulate):
        buffers = []

        def backward(window=batches[first : first + accumulate], buffers=buffers):
            losses = [expected.loss(batch) / accumulate for batch in window]
            for loss in losses:
                loss.backward()
            buffers.append([buffer.clone() for buffer in net.buffers()])
            return torch.stack(losses).sum()

        cases.second_gradient(list(net.parameters()), backward, cases.sam_epsilon, 0.05)
        for buffer, value in zip(net.buffers(), buffers[0], strict=True):
            buffer.copy_(value)
        base.step()
    for (name, ours), theirs in zip(module.net.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_mixed_bf16(tmp_path):
    module, expected = lit.Module(), lit.Module()
    lit.fit(tmp_path, module, accumulate_grad_batches=2, gradient_clip_val=0.3, precision="bf16-mixed")
    lit.train_by_hand(expected, list(lit.loader()), accumulate=2, clip_norm=0.3, autocast=torch.bfloat16)
    lit.assert_same_state(module.net, expected.net)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precision(precision, tmp_path):
    """Perturbed bf16 and fp16 weights are rounded stochastically, in both loops with the same seed."""
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    module, expected = lit.Module(), lit.Module()
    lit.fit(tmp_path, module, data=lit.loader(), precision=precision)
    lit.compute_in(expected, dtype)
    lit.train_by_hand(expected, [(x.to(dtype), y) for x, y in lit.loader()])
    lit.assert_same_state(module.net, expected.net)
