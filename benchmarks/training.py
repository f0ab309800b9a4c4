"""One run: a model trained by one optimizer from one seed, and measured after every epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import samopt
from benchmarks.choice import Choice
from benchmarks.data import Split
from benchmarks.errors import BenchmarkError
from benchmarks.seeds import stream, stream_seed
from benchmarks.sharpness import one_step_sharpness

__all__ = ["Curves", "Run", "build_model", "epoch_order"]

_SHARPNESS_BATCHES = 4
_EVALUATION_BATCH = 1000


@dataclass
class Curves:
    """What was measured after each epoch.

    Attributes:
        accuracy: Fraction of the test examples classified rightly.
        train_loss: Mean over the epoch's steps of the loss before the step, at unperturbed weights.
        sharpness: See ``one_step_sharpness``.
    """

    accuracy: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)


class Run:
    """A model in training.

    Two runs with the same split and seed start from the same weights and see the same batches in the same order,
    whatever their optimizers draw: each epoch starts from its own random state, and the caller's is left alone.

    Args:
        make_model: Makes the model.
        choice: The optimizer and its settings. The learning rate falls to 0 along half a cosine; a setting
            ``rho_warmup`` makes rho rise linearly during that fraction of the steps, ``rho_from`` keeps it 0 during
            that fraction, or with ``rho_every`` it is 0 but for every so manyth step. With ``ascent_part`` the first
            pass is of that fraction of each batch.
        split: The data, moved to ``device``.
        seed: Decides everything random.
        epochs: How many epochs there will be.
        batch_size: Examples a step; an incomplete last batch of an epoch is left out.
        sharpness_rho: Radius of the sharpness measure.
        device: Where to train.
        clock: What steps are timed by.

    Raises:
        BenchmarkError: If a setting is out of range, or there is not one whole batch.

    Attributes:
        curves: What was measured so far.
        step_seconds: How long each step took.
        warnings: Texts of the warnings given so far.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        choice: Choice,
        split: Split,
        seed: int,
        *,
        epochs: int,
        batch_size: int,
        sharpness_rho: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.choice = choice
        self.seed = seed
        self.curves = Curves()
        self.step_seconds: list[float] = []
        self.warnings: list[str] = []
        self._split = split
        self._batch_size = batch_size
        self._device = device
        self._clock = clock
        self._sharpness_rho = sharpness_rho
        self._steps_per_epoch = len(split.labels) // batch_size
        self._epoch = 0
        if not 1 <= batch_size <= len(split.labels):
            raise BenchmarkError(
                f"--batch-size must be between 1 and the {len(split.labels)} training examples, got {batch_size}; "
                "choose a smaller one"
            )
        self.model = build_model(make_model, seed).to(device)
        try:
            self._optimizer = choice.case.build(self.model, choice.settings)
            self._schedulers = _schedulers(self._optimizer, choice, epochs * self._steps_per_epoch)
        except ValueError as error:
            raise BenchmarkError(f"optimizer {choice.label!r} cannot be made: {error}") from error

    def train_epoch(self, *, measure: bool = True) -> None:
        """Train for one epoch, then measure.

        Args:
            measure: Whether to measure accuracy and sharpness, which leave the training as it is.
        """
        devices = [] if self._device.type == "cpu" else [self._device]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with torch.random.fork_rng(devices, device_type=self._device.type if devices else "cuda"):
                torch.manual_seed(stream_seed(self.seed, f"epoch {self._epoch}"))
                losses = list(self.steps())
                self.curves.train_loss.append(float(torch.stack(losses).double().mean()))
                if measure:
                    self.curves.accuracy.append(self._accuracy())
                    self.curves.sharpness.append(
                        one_step_sharpness(self.model, self._sharpness_batches(), self._sharpness_rho)
                    )
        self.warnings += [text for warning in caught if (text := str(warning.message)) not in self.warnings]

    def steps(self) -> Iterator[Tensor]:
        """Take the steps of an epoch, one whenever the iterator is asked for the next loss."""
        self.model.train()
        order = epoch_order(len(self._split.labels), self.seed, self._epoch).to(self._device)
        self._epoch += 1
        for step in range(self._steps_per_epoch):
            batch = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield self._step(self._split.inputs[batch], self._split.labels[batch])
            for scheduler in self._schedulers:
                scheduler.step()

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        closures = [partial(self._gradient, inputs, labels)]
        if "ascent_part" in self.choice.settings:
            part = max(1, round(self.choice.settings["ascent_part"] * len(labels)))
            closures.append(partial(self._gradient, inputs[:part], labels[:part]))
        _wait_for(self._device)
        start = self._clock()
        loss: Any = self._optimizer.step(*closures)  # type: ignore[arg-type]  # a tensor is torch's custom
        _wait_for(self._device)
        self.step_seconds.append(self._clock() - start)
        return torch.as_tensor(loss).detach()

    def _gradient(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return loss

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        inputs, labels = self._split.test_inputs, self._split.test_labels
        predictions = torch.cat([self.model(part).argmax(dim=1) for part in torch.split(inputs, _EVALUATION_BATCH)])
        return int((predictions == labels).sum()) / len(labels)

    def _sharpness_batches(self) -> list[tuple[Tensor, Tensor]]:
        count = min(_SHARPNESS_BATCHES, self._steps_per_epoch) * self._batch_size
        chosen = torch.randperm(len(self._split.labels), generator=stream(self.seed, "sharpness"))[:count]
        return [(self._split.inputs[part], self._split.labels[part]) for part in torch.split(chosen, self._batch_size)]


def build_model(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a model whose initial weights depend on the seed alone; torch's random stream is left alone.

    Args:
        make_model: Makes the model.
        seed: The run's seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "model"))
        return make_model()


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the training examples, shape ``(count,)``.

    Args:
        count: Number of training examples.
        seed: The run's seed.
        epoch: From 0.
    """
    return torch.randperm(count, generator=stream(seed, f"order of epoch {epoch}"))


def _schedulers(optimizer: Optimizer, choice: Choice, steps: int) -> list[CosineAnnealingLR | samopt.RhoScheduler]:
    schedulers: list[CosineAnnealingLR | samopt.RhoScheduler] = [CosineAnnealingLR(optimizer, max(steps, 1))]
    if not isinstance(optimizer, samopt.SharpnessAwareOptimizer):
        return schedulers
    settings = choice.settings
    warmup = round(settings.get("rho_warmup", 0.0) * steps)
    first = round(settings.get("rho_from", 0.0) * steps)
    every = int(settings.get("rho_every", 1))
    if warmup > 0:
        schedulers.append(samopt.RhoScheduler.linear_warmup(optimizer, steps=warmup))
    elif first > 0:
        schedulers.append(samopt.RhoScheduler.late(optimizer, start=first))
    elif every > 1:
        schedulers.append(samopt.RhoScheduler.every(optimizer, every))
    return schedulers


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
