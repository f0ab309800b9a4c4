"""A monitor for the Lightning tests, and what its numbers are compared with."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from samopt import sharpness
from samopt.integrations.lightning import SharpnessCallback
from tests.helpers import lit

MEASURES = {
    "worst": functools.partial(sharpness.worst_case, rho=0.1, adaptive=True, steps=3),
    "average": functools.partial(sharpness.average_case, rho=0.1, adaptive=True, samples=3),
}
FREE = {"sam", "perturbed_loss", "grad_norm", "perturbed_grad_norm", "radius", "applied_radius"}


def monitor(**options: Any) -> SharpnessCallback:
    """Return one that measures every three steps on eight examples, unless told otherwise."""
    return SharpnessCallback(**{"measures": MEASURES, "every": 3, "examples": 8, "max_fraction": None} | options)


class Quiet(lit.Module):
    """Without noise of its own in the loss, so that an oracle can compute it."""

    def loss(self, batch: lit.Batch) -> Tensor:
        self.logits = self(batch[0])
        return nn.functional.cross_entropy(self.logits, batch[1])


class KeepWeights(Callback):
    """Keeps a copy of the network as it is after each step."""

    def __init__(self) -> None:
        self.nets: dict[int, nn.Sequential] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        net = lit.network()
        net.load_state_dict(pl_module.net.state_dict())
        self.nets.setdefault(trainer.global_step, net)  # BatchNorm's statistics go on within a window


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a CSVLogger's file."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected_values(net: nn.Module, batches: Sequence[lit.Batch]) -> dict[str, float]:
    """Return what the measures give."""
    return {
        f"sharpness/{name}": measure(net, sharpness.cross_entropy, batches).value for name, measure in MEASURES.items()
    }
