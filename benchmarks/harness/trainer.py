"""One run of a Lightning Trainer: what the study ``lightning`` compares, and how a run is made."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.harness.data import Split, stream_seed
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.optimizers import Choice, parse_choice
from benchmarks.harness.rows import Row
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import build_model, epoch_order

try:
    import pytorch_lightning as pl

    from samopt.integrations.lightning import SharpnessAwareTraining, SharpnessCallback
except ImportError as missing:
    raise BenchmarkError(str(missing)) from missing


MEASURES: dict[str, dict[str, Any]] = {
    "worst_case": {"rho": 0.5, "steps": 5},
    "average_case": {"rho": 0.05, "samples": 5},
    "per_layer": {"rho": 0.5, "steps": 1},
}
"""Adaptive sharpness, on four training batches."""

METHODS: dict[str, tuple[str, str | None, dict[str, float]]] = {
    "sgd": ("sgd", None, {}),
    "sgd+sam": ("sgd", "sam", {"rho": 0.05}),
    "sgd+asam": ("sgd", "asam", {"rho": 0.5}),
    "adamw": ("adamw", None, {}),
    "adamw+sam": ("adamw", "sam", {"rho": 0.05}),
    "adamw+asam": ("adamw", "asam", {"rho": 0.5}),
}
"""What the module returns, the callback's variant and its options: the papers' usual radii, nothing chosen here."""

TASK = "fashion_small"
SHARPNESS_BATCHES = 4
_EVALUATION_BATCH = 1000


class _Batches:
    """A task's training batches, an epoch at every iteration, in an order that the seed alone decides."""

    def __init__(self, split: Split, seed: int, batch_size: int) -> None:
        self._split, self._seed, self._batch_size = split, seed, batch_size
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._split.labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self._split.labels), self._seed, self._epoch)
        self._epoch += 1
        for batch in torch.split(order, self._batch_size)[: len(self)]:
            yield self._split.inputs[batch], self._split.labels[batch]


class _Classifier(pl.LightningModule):
    """A network and its optimizer; nothing in it knows of sharpness."""

    def __init__(self, net: nn.Module, base: Choice, steps: int) -> None:
        super().__init__()
        self.net = net
        self._base, self._steps = base, steps

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
        optimizer = self._base.build(self)
        scheduler = CosineAnnealingLR(optimizer, self._steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Watch(pl.Callback):
    """Times steps, and keeps what is logged after each epoch; first of the callbacks, so that it times no other's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.curves: dict[str, list[float]] = {"accuracy": [], "train_loss": []}

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, curve in self.curves.items():
            curve.append(float(trainer.callback_metrics[name]))


def train(
    name: str, split: Split, seed: int, label_noise: float, epochs: int, batch_size: int, plot: Path | None = None
) -> Row:
    """Train a network, monitored, and return its row."""
    base_name, variant, options = METHODS[name]
    base = parse_choice(base_name)
    batches = _Batches(split, seed, batch_size)
    parts = (torch.split(part, _EVALUATION_BATCH) for part in (split.test_inputs, split.test_labels))
    tests: DataLoader[Any] = DataLoader(list(zip(*parts, strict=True)), batch_size=None)
    watch = _Watch()
    examples = min(SHARPNESS_BATCHES, len(batches)) * batch_size
    monitor = SharpnessCallback(MEASURES, every=len(batches), examples=examples, max_fraction=None, plot=plot or False)
    aware = [] if variant is None else [SharpnessAwareTraining(variant, **options)]
    for logger in ("pytorch_lightning", "lightning.pytorch"):  # the package logs under both names
        logging.getLogger(logger).setLevel(logging.ERROR)
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"), False
    )
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        torch.manual_seed(stream_seed(seed, "training"))
        trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[watch, *aware, monitor], **silent)
        net = build_model(TASKS[TASK].build_model, seed)
        trainer.fit(_Classifier(net, base, epochs * len(batches)), batches, tests)
    budget = monitor.monitor.state_dict()["budget"]
    curves = watch.curves | {
        each: [values[f"sharpness/{each}"] for values in monitor.history.values()]
        for each in ("worst_case", "average_case")
    }
    times = {
        "seconds_per_step": statistics.median(watch.seconds),
        "monitor_share": budget["spent"] / budget["elapsed"],
    }
    return Row(
        "lightning", name, base_name, seed, label_noise, "test",
        {**base.settings, **options, "epochs": epochs, "batch_size": batch_size},
        {"train": len(split.labels), "randomised": split.randomised, "test": len(split.test_labels)},
        {each: curve[-1] for each, curve in curves.items()} | times, curves,
        [str(w.message) for w in caught if "samopt" in w.filename or "integrations" in w.filename], describe(), now(),
    )  # fmt: skip
