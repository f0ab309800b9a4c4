"""What a module keeps in objects of its own: at a learning rate of 0 every number is that of a run without SAM."""

from __future__ import annotations

import collections
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit

pytestmark = pytest.mark.lightning


class Statistics:
    """Of a user's own class, with objects in it."""

    def __init__(self) -> None:
        self.batches = 0
        self.by_label: collections.Counter[int] = collections.Counter()
        self.inner = types.SimpleNamespace(total=torch.zeros(()), of=self)


class Keeping(lit.Module):
    """Keeps numbers in objects, and in modules that torch does not know of."""

    def __init__(self, base: lit.Base) -> None:
        super().__init__(base)
        self.statistics = Statistics()
        self.lists: dict[str, list[int]] = collections.defaultdict(list)
        self.unregistered = [SumMetric()]
        object.__setattr__(self, "hidden", MeanMetric())
        notes: list[int] = []
        self.note = lambda labels: notes.extend(labels)

    def training_step(self, batch: lit.Batch, batch_idx: int) -> dict[str, Tensor]:
        labels = batch[1].tolist()
        self.statistics.batches += 1
        self.statistics.by_label.update(labels)
        self.statistics.inner.total += len(labels)
        self.lists["labels"].extend(labels)
        self.note(labels)
        self.unregistered[0].update(len(labels))
        output = super().training_step(batch, batch_idx)
        self.hidden.update(output["loss"].detach())
        return output

    @property
    def numbers(self) -> Any:
        (cell,) = self.note.__closure__
        return (
            self.statistics.batches,
            dict(self.statistics.by_label),
            float(self.statistics.inner.total),
            dict(self.lists),
            float(self.unregistered[0].compute()),
            float(self.hidden.compute()),
            list(cell.cell_contents),
        )


def zero(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_objects_of_a_module_count_each_batch_once(accumulate, tmp_path):
    plain, sam = Keeping(zero), Keeping(zero)
    lit.fit_by_hand(tmp_path, plain, accumulate_grad_batches=accumulate)
    callback = SharpnessAwareTraining(rho=0.5)
    lit.fit(tmp_path, sam, callback, accumulate_grad_batches=accumulate)
    assert float(callback.last_step.sharpness) != 0.0
    assert sam.numbers == plain.numbers
    assert sam.numbers[0] == 14


class Inherited:
    """Logs past a ``log`` of its own, as a class that puts a prefix before every name."""

    def log(self, name: str, *args: Any, **options: Any) -> None:
        super().log(f"train/{name}", *args, **options)

    def training_step(self, batch: lit.Batch, batch_idx: int) -> dict[str, Tensor]:
        output = super().training_step(batch, batch_idx)
        super().log("raw", output["loss"], on_step=True, on_epoch=True, reduce_fx="sum")
        super().log_dict({"largest raw": output["loss"]}, on_step=False, on_epoch=True, reduce_fx="max")
        return output


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_parent_class_logs_is_logged_once(accumulate, tmp_path):
    plain, sam = (type("Logging", (Inherited, lit.Module), {})(zero) for _ in range(2))
    theirs = lit.fit_by_hand(tmp_path, plain, accumulate_grad_batches=accumulate)
    ours = lit.fit(tmp_path, sam, SharpnessAwareTraining(rho=0.5), accumulate_grad_batches=accumulate)
    assert {"raw_epoch", "train/largest raw", "train/loss_step"} <= set(ours.callback_metrics)
    lit.assert_same_run(ours, theirs)


class Masking:
    """Keeps the first row of a weight where it is, by its gradient, and counts."""

    masked = 0

    def on_after_backward(self) -> None:
        self.masked += 1
        self.net[0].weight.grad[0] = 0.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_module_that_masks_gradients_masks_those_of_both_passes(accumulate, tmp_path):
    """A hook on the weight masks each gradient as it is made: the same masks, without ``on_after_backward``."""
    ours, theirs = type("Masked", (Masking, lit.Module), {})(lit.sgd), lit.Module(lit.sgd)
    start = ours.net[0].weight[0].clone()
    mask = torch.ones_like(theirs.net[0].weight)
    mask[0] = 0.0
    theirs.net[0].weight.register_hook(lambda gradient: gradient * mask)
    lit.fit(tmp_path, ours, SharpnessAwareTraining(rho=0.5), accumulate_grad_batches=accumulate)
    lit.fit(tmp_path, theirs, SharpnessAwareTraining(rho=0.5), accumulate_grad_batches=accumulate)
    assert torch.equal(ours.net[0].weight[0], start)
    assert ours.masked == 14
    lit.assert_same_state(ours, theirs)


class Skipping:
    """Steps the optimizer for every second batch, and leaves out what the others accumulated."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_a_window_that_was_given_up_leaves_nothing_to_the_next(tmp_path):
    """The noise of the batch before would be that of the second pass, if its window had begun there."""

    def module(*bases: type) -> Any:
        class Noisy(*bases):
            def loss(self, batch: lit.Batch) -> Tensor:
                x, y = batch
                self.logits = self.net(x * (1 + 10 * self.noise))
                return nn.functional.cross_entropy(self.logits, y)

        return Noisy(lit.sgd)

    ours, theirs = module(Skipping, lit.Module), module(Skipping, lit.ByHand)
    lit.fit(tmp_path, ours)
    lit.fit_by_hand(tmp_path, theirs)
    lit.assert_same_state(ours, theirs)
