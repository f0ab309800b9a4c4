"""Training in fp16 under a GradScaler, which the tests put in place, since accelerate has none for the CPU."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import samopt
from samopt.integrations.transformers import SAMTrainer
from tests.helpers import cases, hf

pytestmark = pytest.mark.hf

STEPS = 8


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate shares its state between instances."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


class Scaled(SAMTrainer):
    """Trains in fp16 with a scaler, and makes the loss infinite in the passes (step, is second) of ``overflow``."""

    overflow: set = set()

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = make_scaler()
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.scales = []

    def compute_loss(self, model, inputs, **options):
        loss = super().compute_loss(model, inputs, **options)
        if (self.state.global_step, self.is_second_pass) in self.overflow:
            loss = loss * float("inf")
        return loss

    def training_step(self, model, *args, **options):
        loss = super().training_step(model, *args, **options)
        self.scales.append(self.accelerator.scaler.get_scale())
        return loss


def by_hand(model, batches, overflow, max_grad_norm):
    """Both passes with scaled losses, then unscaling, clipping and the scaler's step."""
    base = hf.adamw(model)
    optimizer = samopt.SAM(base, model=model)
    scaler = make_scaler()
    scales, skipped = [], []
    model.train()
    for step, batch in enumerate(batches):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        scales.append(scaler.get_scale())

        def one_pass(second, batch=batch, step=step):
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch)["loss"].float()
            if (step, second) in overflow:
                loss = loss * float("inf")
            scaler.scale(loss).backward()

        one_pass(False)
        with optimizer.perturbed() as second:
            if second.is_needed:
                one_pass(True)
        scaler.unscale_(optimizer)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        before = cases.bits(model)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(cases.same_bits(model, before))
    return scales, skipped


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize(
    "overflow",
    [set(), {(2, False)}, {(2, True)}, {(0, False), (1, True), (5, True), (6, False)}],
    ids=["finite", "inf in the first pass", "inf in the second pass", "both, at several steps"],
)
def test_a_scaled_run_is_the_hand_written_one(overflow, max_grad_norm, tmp_path):
    data = hf.points(4 * STEPS)
    model, plain = hf.norms(), hf.norms()
    options = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    trainer = hf.make_trainer(tmp_path, model, data, kind=Scaled, logging_nan_inf_filter=False, **options)
    trainer.overflow = overflow
    trainer.train()
    scales, skipped = by_hand(plain, hf.batches_of(data), overflow, max_grad_norm)
    assert sum(skipped) == len({step for step, _ in overflow})
    assert trainer.scales == scales
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_logged_norms_are_those_of_unscaled_gradients(tmp_path):
    data = hf.points(4 * STEPS)
    options = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "base": hf.momentum_sgd}
    scaled = hf.make_trainer(tmp_path, hf.norms(), data, kind=Scaled, **options)
    scaled.train()
    AcceleratorState._reset_state(True)
    plain = hf.make_trainer(tmp_path, hf.norms(), data, **options)
    plain.train()
    for name in ("sharpness/grad_norm", "sharpness/perturbed_grad_norm", "grad_norm"):
        assert hf.logged(scaled, name)[0] == pytest.approx(hf.logged(plain, name)[0], rel=1e-2)  # fp16 forward
        assert hf.logged(scaled, "sharpness/perturbed_grad_norm") == pytest.approx(hf.logged(scaled, "grad_norm"))
