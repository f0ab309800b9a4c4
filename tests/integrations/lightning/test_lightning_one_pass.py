"""One pass in Lightning is the loop by hand, with an optimizer that the module returns and with the callback."""

from __future__ import annotations

import contextlib

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit
from tests.helpers.cases import asam_epsilon, bits, sam_epsilon, same_bits
from tests.helpers.one_pass import CLIPPED_NORM, DIRECTIONS, FRAMEWORK_CASES, hand_step

pytestmark = pytest.mark.lightning

VARIANTS = {
    "sam": (samopt.SAM, sam_epsilon, 0.2),
    "asam": (samopt.ASAM, asam_epsilon, 0.5),
    "momentum-sam": (samopt.MomentumSAM, sam_epsilon, 0.1),
}
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
OVERFLOW = 3


def slow_sgd(parameters):
    """So slow that the rounding of a perturbation, fp64 by hand and fp32 in the engine, stays rounding."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class Overflowing(lit.Module):
    """Its fourth step overflows in fp16."""

    def __init__(self, precision):
        super().__init__(slow_sgd)
        self.precision = precision

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        return {"loss": output["loss"] * overflow(self.precision, self.trainer.global_step)}


class Returning(Overflowing):
    """Returns a one-pass optimizer."""

    def __init__(self, variant, direction, precision):
        super().__init__(precision)
        self.variant, self.direction = variant, direction

    def configure_optimizers(self):
        sam, _, rho = VARIANTS[self.variant]
        return sam(self.base(self.parameters()), rho=rho, model=self, **chosen(self.variant, self.direction))


def chosen(variant, direction):
    return {} if variant == "momentum-sam" else {"direction": direction}


def overflow(precision, step):
    return float("inf") if precision == "16-mixed" and step == OVERFLOW else 1.0


def make_scaler(precision):
    return torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None


def train_by_hand(module, variant, direction, accumulate, clip, precision):
    """Plain torch: move along the momentum, one backward a batch, move back, unscale, clip, step."""
    _, epsilon, rho = VARIANTS.get(variant, (None, sam_epsilon, 0.0))
    scaler, autocast, batches = make_scaler(precision), PRECISIONS[precision], list(lit.loader())
    base = slow_sgd(module.net.parameters())
    windows = [
        (epoch, range(first, min(first + accumulate, len(batches))))
        for epoch in range(2)
        for first in range(0, len(batches), accumulate)
    ]
    skipped = []
    module.net.train()
    for step, (epoch, window) in enumerate(windows):

        def backward(step=step, epoch=epoch, window=window):
            for index in window:
                module.noise = lit.draw_noise(index, epoch)
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    loss = module.loss(batches[index]) * overflow(precision, step) / accumulate
                (loss if scaler is None else scaler.scale(loss)).backward()

        start = bits(module.net)
        options = {"epsilon": epsilon, "sign": DIRECTIONS[direction], "rho": rho, "scaler": scaler}
        hand_step(base, backward, clip_norm=CLIPPED_NORM if clip else None, **options)
        skipped.append(same_bits(module.net, start))
    return skipped


COMPARED = [
    *((precision, case) for precision in PRECISIONS for case in ("sam", "asam, clipped")),
    *(("32-true", case) for case in ("sam, uphill", "momentum-sam")),
]


@pytest.mark.parametrize(("precision", "case"), COMPARED)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("form", ["returned", "callback", "returned, with the callback"])
def test_one_pass_is_the_hand_written_loop(form, precision, accumulate, case, tmp_path):
    variant, direction, clip = FRAMEWORK_CASES[case]
    expected = lit.Module()
    module = Overflowing(precision) if form == "callback" else Returning(variant, direction, precision)
    if form == "callback":
        callback = SharpnessAwareTraining(variant, rho=VARIANTS[variant][2], **chosen(variant, direction))
    else:
        callback = Callback() if form == "returned" else SharpnessAwareTraining()
    scaler = make_scaler(precision)
    mixed = {} if precision == "32-true" else {"plugins": [MixedPrecision(precision, "cpu", scaler)]}
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": CLIPPED_NORM if clip else None}
    lit.fit(tmp_path, module, callback, **options, **mixed)
    skipped = train_by_hand(expected, variant, direction, accumulate, clip, precision)
    assert [step for step, was in enumerate(skipped) if was] == ([OVERFLOW] if precision == "16-mixed" else [])
    for (name, ours), theirs in zip(module.net.state_dict().items(), expected.net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    if scaler is not None:
        assert scaler.get_scale() == 512.0


def test_the_comparison_tells_one_pass_from_the_base():
    nets = []
    for variant in ("sam", "base"):
        module = lit.Module()
        train_by_hand(module, variant, "momentum", 1, False, "32-true")
        nets.append(bits(module.net))
    assert max(float((ours - theirs).abs().max()) for ours, theirs in zip(*nets, strict=True)) > 1e-3
