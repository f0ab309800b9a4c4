"""One fine-tune: a classifier trained by one optimizer from one seed, step by step."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import samopt
from benchmarks.errors import BenchmarkError
from benchmarks.seeds import stream, stream_seed
from benchmarks.wordnet.encoder import Encoded, Encoder
from benchmarks.wordnet.methods import Method

__all__ = ["FineTune"]

_WARMUP = 0.1
_EVALUATION_BATCH = 256


class FineTune:
    """A classifier in training; equal seeds give equal weights, batches and dropout masks, whatever the optimizer.

    Args:
        encoder: Where the pretrained layers come from.
        method: The optimizer.
        lr: Learning rate; it rises linearly during the first tenth of the steps and falls linearly to 0.
        value: The method's setting.
        train: Training examples.
        seed: Decides everything random.
        steps: How many there will be.
        batch_size: Examples a step.

    Raises:
        BenchmarkError: If there are fewer training examples than one batch needs.

    Attributes:
        curves: For each step "train_loss" and, where the optimizer has them, "distance" and "radius".
        step_seconds: How long each step took.
        warnings: Texts of the warnings given.
    """

    def __init__(
        self,
        encoder: Encoder,
        method: Method,
        lr: float,
        value: float,
        train: Encoded,
        seed: int,
        *,
        steps: int,
        batch_size: int,
    ) -> None:
        if batch_size > len(train.labels):
            raise BenchmarkError(
                f"--batch-size must be at most the {len(train.labels)} training examples, got {batch_size}"
            )
        self.model = encoder.classifier(seed)
        self.curves: defaultdict[str, list[float]] = defaultdict(list)
        self.step_seconds: list[float] = []
        self.warnings: list[str] = []
        self._train = train
        self._seed = seed
        self._steps = steps
        self._optimizer = method.build(self.model, lr, value)
        self._schedule = LambdaLR(self._optimizer, self._share_of_lr)
        self._batches = _batches(len(train.labels), seed, steps, batch_size)

    @property
    def is_finished(self) -> bool:
        """Whether every step was taken."""
        return len(self.step_seconds) == self._steps

    def step(self) -> None:
        """Take the next step, from a random state of its own; the caller's is left alone."""
        number = len(self.step_seconds)
        batch = self._train.take(self._batches[number])
        self.model.train()
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("default")
            torch.manual_seed(stream_seed(self._seed, f"wordnet step {number}"))
            start = time.perf_counter()
            loss = self._update(batch)
            self.step_seconds.append(time.perf_counter() - start)
            self._schedule.step()
        self.warnings += [text for warning in caught if (text := str(warning.message)) not in self.warnings]
        self.curves["train_loss"].append(float(loss))
        if isinstance(self._optimizer, samopt.SharpnessAwareOptimizer):
            measured = self._optimizer.last_step.to_dict()
            for name in ("distance", "radius"):
                if name in measured:
                    self.curves[name].append(measured[name])

    @torch.no_grad()
    def accuracy(self, examples: Encoded) -> float:
        """Return the fraction of examples classified rightly.

        Args:
            examples: To classify, without dropout.
        """
        self.model.eval()
        right = 0
        for part in torch.split(torch.arange(len(examples.labels)), _EVALUATION_BATCH):
            batch = examples.take(part)
            predictions = self.model(batch.hidden, batch.attention_mask).argmax(1)
            right += int((predictions == batch.labels).sum())
        return right / len(examples.labels)

    def _update(self, batch: Encoded) -> Tensor:
        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(batch.hidden, batch.attention_mask), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            return loss

        loss: Tensor = self._optimizer.step(closure)  # type: ignore[assignment, arg-type]  # a tensor is torch's custom
        return loss.detach()

    def _share_of_lr(self, step: int) -> float:
        warmup = max(1, round(_WARMUP * self._steps))
        return min((step + 1) / warmup, max(0.0, (self._steps - step) / max(1, self._steps - warmup)))


def _batches(count: int, seed: int, steps: int, batch_size: int) -> list[Tensor]:
    """Return the examples of each step: every epoch in an order of its own, its incomplete last batch left out."""
    per_epoch = count // batch_size
    batches: list[Tensor] = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = torch.randperm(count, generator=stream(seed, f"wordnet order of epoch {epoch}"))
        batches += torch.split(order[: per_epoch * batch_size], batch_size)
    return batches[:steps]
