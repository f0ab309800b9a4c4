"""A ``training_step`` of one's own is repeated as a whole, wherever its class stands beside the sharpness-aware one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import samopt
from samopt.integrations.transformers import SAMTrainer, SAMTrainerMixin, make_sharpness_aware
from tests.helpers import hf

pytestmark = pytest.mark.hf


def penalty(model: nn.Module) -> Tensor:
    return 0.005 * sum(parameter.square().sum() for parameter in model.parameters())


class Penalised:
    """Adds a loss that has a backward of its own, and counts."""

    calls = 0

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        self.calls += 1
        loss = super().training_step(model, inputs, *rest)
        more = penalty(model)
        more.backward()
        return loss + more.detach()


class OverPlain(Penalised, transformers.Trainer):
    pass


class BeforeOurs(Penalised, SAMTrainer):
    pass


class BeforeOursTwice(BeforeOurs):
    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        return super().training_step(model, inputs, *rest)


class AfterOurs(SAMTrainerMixin, OverPlain):
    pass


KINDS = {
    "a class before ours": BeforeOurs,
    "a subclass of that": BeforeOursTwice,
    "a class after ours": AfterOurs,
    "an instance": OverPlain,
}


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_training_step_adds_belongs_to_both_passes(kind, accumulate, tmp_path):
    model, expected = hf.norms(), hf.norms()
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "base": hf.momentum_sgd}
    if KINDS[kind] is OverPlain:
        options["arguments"] = transformers.TrainingArguments
    else:
        options["sam_rho"] = 0.3
    trainer = hf.make_trainer(tmp_path, model, hf.points(), kind=KINDS[kind], **options)
    if KINDS[kind] is OverPlain:
        make_sharpness_aware(trainer, sam="sam", sam_rho=0.3)
    trainer.train()

    def loss_of(model: nn.Module, batch: hf.Batch, count: Tensor | None, parts: int) -> Tensor:
        return hf.mean_loss(model, batch, count, parts) + penalty(model)

    history = hf.train_by_hand(
        expected,
        hf.batches_of(hf.points()),
        loss_of,
        sam=functools.partial(samopt.SAM, rho=0.3),
        base=hf.momentum_sgd,
        accumulate=accumulate,
    )
    for ours, theirs in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hf.logged(trainer, "loss"), history.losses, rtol=1e-4, atol=1e-5)
    assert trainer.calls == 14


def test_a_training_step_before_ours_without_sam_is_left_alone(tmp_path):
    runs = []
    for kind, more in ((BeforeOurs, {"sam": "none"}), (OverPlain, {"arguments": transformers.TrainingArguments})):
        trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=kind, **more)
        trainer.train()
        runs.append(trainer)
    for ours, theirs in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        assert torch.equal(ours, theirs)
    assert runs[0].calls == runs[1].calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_training_step_leaves_out(accumulate, tmp_path):
    """As a step that catches an out-of-memory error: no gradient comes of it."""

    class Skipping(SAMTrainer):
        seen = 0

        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
            self.seen += 1
            if self.seen in (3, 4):
                return torch.zeros(())
            return super().training_step(model, inputs, *rest)

    model, expected = hf.norms(), hf.norms()
    options = {"gradient_accumulation_steps": accumulate, "base": hf.momentum_sgd, "num_train_epochs": 1}
    trainer = hf.make_trainer(
        tmp_path, model, hf.points(24), kind=Skipping, sam_rho=0.3, lr_scheduler_type="constant", **options
    )
    trainer.train()
    assert trainer.seen == 6
    optimizer = samopt.SAM(hf.momentum_sgd(expected), rho=0.3, model=expected)
    expected.train()
    windows = [
        [index for index in range(first, first + accumulate) if index not in (2, 3)]
        for first in range(0, 6, accumulate)
    ]
    batches = hf.batches_of(hf.points(24))
    for step, window in enumerate(windows):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        for index in window:
            optimizer.backward(
                lambda index=index: expected(**batches[index])["loss"] / accumulate, last=index == window[-1]
            )
        if window:
            optimizer.step()
    for ours, theirs in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def by_layer(model: nn.Module) -> torch.optim.Optimizer:
    """A learning rate for each layer."""
    layers = [layer for layer in model.layers if list(layer.parameters())]
    return torch.optim.SGD([{"params": layer.parameters(), "lr": 0.1 / (1 + n)} for n, layer in enumerate(layers)])


class LayerWise(transformers.Trainer):
    """Makes its optimizer in a method without arguments, as the Trainer calls it."""

    def create_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = by_layer(self.model)
        return self.optimizer


class LayerWiseAfterOurs(SAMTrainerMixin, LayerWise):
    pass


@pytest.mark.parametrize("kind", [LayerWise, LayerWiseAfterOurs])
def test_an_optimizer_that_a_subclass_makes_without_arguments(kind, tmp_path):
    model, expected = hf.norms(), hf.norms()
    is_instance = kind is LayerWise
    options = {"arguments": transformers.TrainingArguments} if is_instance else {"sam_rho": 0.3}
    trainer = hf.make_trainer(tmp_path, model, hf.points(), kind=kind, base=None, **options)
    if is_instance:
        make_sharpness_aware(trainer, sam="sam", sam_rho=0.3)
    trainer.train()
    hf.train_by_hand(expected, hf.batches_of(hf.points()), sam=functools.partial(samopt.SAM, rho=0.3), base=by_layer)
    for ours, theirs in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_plain_trainer_with_a_sharpness_aware_optimizer_is_told_what_to_use(tmp_path):
    model = hf.norms()
    trainer = hf.make_trainer(
        tmp_path,
        model,
        hf.points(),
        kind=transformers.Trainer,
        arguments=transformers.TrainingArguments,
        base=lambda model: samopt.SAM(hf.momentum_sgd(model), rho=0.3, model=model),
    )
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no perturbed pass.*use SAMTrainer or make_sharpness_aware"):
        trainer.train()
    for ours, theirs in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
