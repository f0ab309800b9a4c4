"""One fine-tune of the WordNet classifier by one optimizer from one seed, step by step."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import samopt
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.seeds import stream, stream_seed
from benchmarks.harness.wordnet import Encoded

__all__ = ["FineTune"]

_WARMUP = 0.1
_EVALUATION_BATCH = 256


class FineTune:
    """A classifier in training; equal seeds give equal weights, batches and dropout masks with every optimizer.

    Args:
        model: The classifier.
        choice: The optimizer; its learning rate rises in the first tenth of the steps and falls linearly to 0.
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

    def __init__(self, model: Any, choice: Choice, train: Encoded, seed: int, steps: int, batch_size: int) -> None:
        count = len(train.labels)
        if batch_size > count:
            raise BenchmarkError(f"--batch-size must be at most the {count} training examples, got {batch_size}")
        self.model = model
        self.curves: defaultdict[str, list[float]] = defaultdict(list)
        self.step_seconds: list[float] = []
        self.warnings: list[str] = []
        self._train, self._seed = train, seed
        self.optimizer = choice.build(model)
        warmup = max(1, round(_WARMUP * steps))
        self._schedule = LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
        )
        per_epoch = count // batch_size
        orders = [
            torch.randperm(count, generator=stream(seed, f"wordnet order of epoch {epoch}"))[: per_epoch * batch_size]
            for epoch in range(math.ceil(steps / per_epoch))
        ]
        self._batches = [batch for order in orders for batch in torch.split(order, batch_size)]

    def step(self) -> None:
        """Take the next step, from a random state of its own; the caller's is left alone."""
        number = len(self.step_seconds)
        batch = self._train.take(self._batches[number])
        self.model.train()

        def compute_loss() -> Tensor:
            return functional.cross_entropy(self.model(batch.hidden, batch.attention_mask), batch.labels)

        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("default")
            torch.manual_seed(stream_seed(self._seed, f"wordnet step {number}"))
            start = time.perf_counter()
            self.curves["train_loss"].append(float(take_step(self.optimizer, compute_loss)))
            self.step_seconds.append(time.perf_counter() - start)
            self._schedule.step()
        self.warnings += [text for warning in caught if (text := str(warning.message)) not in self.warnings]
        if isinstance(self.optimizer, samopt.SharpnessAwareOptimizer):
            measured = self.optimizer.last_step.to_dict()
            for name in {"distance", "radius"} & measured.keys():
                self.curves[name].append(measured[name])

    @torch.no_grad()
    def accuracy(self, examples: Encoded) -> float:
        """Return the fraction of examples classified rightly, without dropout."""
        self.model.eval()
        right = 0
        for part in torch.split(torch.arange(len(examples.labels)), _EVALUATION_BATCH):
            batch = examples.take(part)
            right += int((self.model(batch.hidden, batch.attention_mask).argmax(1) == batch.labels).sum())
        return right / len(examples.labels)
