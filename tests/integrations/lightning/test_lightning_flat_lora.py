"""Flat-LoRA in Lightning is the loop by hand, returned by the module or with the callback, and resumes bit for bit."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit
from tests.helpers.adapters import differing, frozen, hand_step, own, own_layers, trained
from tests.helpers.cases import bits, same_bits

pytestmark = pytest.mark.lightning

PERTURBATIONS = pytest.mark.parametrize("perturbation", ["noise", "gradient"])
RHO = 0.2


def slow_sgd(parameters):
    """So slow that the rounding of the perturbation stays rounding."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class Adapted(lit.Module):
    """The test module with adapters; it returns an optimizer of samopt, or its base."""

    def __init__(self, perturbation=None):
        super().__init__(slow_sgd)
        self.net = own(dtype=torch.float32, dropout=0.1)
        self.perturbation = perturbation

    def configure_optimizers(self):
        base = self.base(trained(self.net))
        if self.perturbation is None:
            return base
        return samopt.FlatLoRA(base, rho=RHO, perturbation=self.perturbation, model=self)


def train_by_hand(module, perturbation, accumulate):
    base, layers, batches = slow_sgd(trained(module.net)), own_layers(module.net), list(lit.loader())
    windows = [
        (epoch, range(first, min(first + accumulate, len(batches))))
        for epoch in range(2)
        for first in range(0, len(batches), accumulate)
    ]
    for step, (epoch, window) in enumerate(windows):

        def backward(epoch=epoch, window=window):
            for index in window:
                module.noise = lit.draw_noise(index, epoch)
                (module.loss(batches[index]) / accumulate).backward()

        hand_step(base, layers, backward, perturbation=perturbation, rho=RHO, step=step)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("form", "perturbation"), [("returned", "noise"), ("callback", "noise"), ("callback", "gradient")]
)
def test_a_run_is_the_loop_by_hand(form, perturbation, accumulate, tmp_path):
    expected, module = Adapted(), Adapted(perturbation if form == "returned" else None)
    before = frozen(module)
    callback = Callback()
    if form == "callback":
        callback = SharpnessAwareTraining("flat-lora", rho=RHO, perturbation=perturbation)
    lit.fit(tmp_path, module, callback, accumulate_grad_batches=accumulate)
    train_by_hand(expected, perturbation, accumulate)
    for (name, ours), theirs in zip(module.net.state_dict().items(), expected.net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert not same_bits(module.net, bits(own(dtype=torch.float32)))
    assert differing(module, before) == 0


@PERTURBATIONS
def test_a_resumed_run_is_bit_identical(perturbation, tmp_path):
    def callback():
        return SharpnessAwareTraining("flat-lora", rho=RHO, perturbation=perturbation)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Adapted(), Adapted()
    lit.fit(tmp_path / "whole", whole, callback(), callbacks=[keep], enable_checkpointing=True)
    lit.fit(tmp_path / "resumed", resumed, callback(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same_bits(resumed.net, bits(whole.net))
