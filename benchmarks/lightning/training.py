"""One run of a Lightning Trainer."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.data import Split
from benchmarks.lightning.measures import MEASURES
from benchmarks.lightning.methods import Method
from benchmarks.registry import OPTIMIZERS
from benchmarks.seeds import stream_seed
from benchmarks.training import build_model, epoch_order
from samopt.integrations.lightning import SharpnessAwareTraining, SharpnessCallback

__all__ = ["Outcome", "train"]

_SHARPNESS_BATCHES = 4
_EVALUATION_BATCH = 1000
_LOGGERS = ("pytorch_lightning", "lightning.pytorch")  # the package speaks under both names


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        curves: After each epoch: "accuracy" on the test examples, "train_loss", "worst_case", "average_case".
        seconds_per_step: Median over the steps, between the hooks before and after them.
        tested: Number of test examples.
        monitor_share: Fraction of the run's time that the monitor took.
        warnings: Texts of the warnings of ours during it.
    """

    curves: dict[str, list[float]]
    seconds_per_step: float
    tested: int
    monitor_share: float
    warnings: list[str]


class _Batches:
    """A task's training batches, an epoch at every turn, in an order that the seed alone decides."""

    def __init__(self, split: Split, seed: int, batch_size: int) -> None:
        self._split, self._seed, self._batch_size = split, seed, batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._split.labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self._split.labels), self._seed, self._epoch)
        self._epoch += 1
        for index in range(len(self)):
            batch = order[index * self._batch_size : (index + 1) * self._batch_size]
            yield self._split.inputs[batch], self._split.labels[batch]


class _Classifier(pl.LightningModule):
    """A network and its optimizer, written without a thought of sharpness."""

    def __init__(self, net: nn.Module, base: str, settings: Mapping[str, float], steps: int) -> None:
        super().__init__()
        self.net = net
        self._base, self._settings, self._steps = base, settings, steps

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self._base].build(self, self._settings)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, self._steps), "interval": "step"},
        }


@dataclass
class _Watch(pl.Callback):
    """Times steps, and keeps what is logged after each epoch; first of the callbacks, so that it times no other's."""

    seconds: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=lambda: {"accuracy": [], "train_loss": []})

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, curve in self.curves.items():
            curve.append(float(trainer.callback_metrics[name]))


def train(
    method: Method,
    split: Split,
    net: Callable[[], nn.Module],
    settings: Mapping[str, float],
    seed: int,
    *,
    epochs: int,
    batch_size: int,
    test_size: int | None = None,
    plot: Path | None = None,
) -> Outcome:
    """Train a network, monitored, and return what that gave.

    Args:
        method: How.
        split: The data.
        net: Makes the network.
        settings: Of the base optimizer; its learning rate falls to 0 along half a cosine.
        seed: Decides everything random.
        epochs: How many.
        batch_size: Examples a step.
        test_size: Test examples; None for all there are.
        plot: Where the monitor's own picture goes, or None.
    """
    batches = _Batches(split, seed, batch_size)
    images, labels = split.test_inputs[:test_size], split.test_labels[:test_size]
    parts = list(zip(torch.split(images, _EVALUATION_BATCH), torch.split(labels, _EVALUATION_BATCH), strict=True))
    tests: DataLoader[Any] = DataLoader(parts, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    watch = _Watch()
    monitor = SharpnessCallback(
        MEASURES,
        every=len(batches),
        examples=min(_SHARPNESS_BATCHES, len(batches)) * batch_size,
        max_fraction=None,
        plot=plot or False,
    )
    callbacks = [watch, monitor]
    if method.variant is not None:
        callbacks.insert(1, SharpnessAwareTraining(method.variant, **method.options))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "training"))
            trainer.fit(
                _Classifier(build_model(net, seed), method.base, settings, epochs * len(batches)), batches, tests
            )
    assert monitor.monitor is not None
    budget = monitor.monitor.state_dict()["budget"]
    measured = {
        name: [values[f"sharpness/{name}"] for values in monitor.history.values()]
        for name in ("worst_case", "average_case")
    }
    return Outcome(
        curves=watch.curves | measured,
        seconds_per_step=statistics.median(watch.seconds),
        tested=len(labels),
        monitor_share=budget["spent"] / budget["elapsed"],
        warnings=[str(w.message) for w in caught if "samopt" in w.filename or "integrations" in w.filename],
    )
