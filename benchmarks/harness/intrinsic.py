"""Pairs of classes: their properties, and a small network trained and attacked on each."""

from __future__ import annotations

import itertools
import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.harness.data import Pool, stream
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.training import build_model
from samopt import sharpness

SIZES = (60, 125, 250, 500)
"""Training examples of a pair, half of each class; the last one is also the number of test examples."""
ATTACKS = (0.1, 0.3)
"""Sizes of FGSM, in root mean squares of a feature."""
RATE, BATCH, WIDTH = 1e-3, 32, 64
_PAIRS = 45


def pairs_of(pool: Pool) -> list[tuple[int, int]]:
    """Return every pair of classes, at most 45 of them, drawn once."""
    pairs = list(itertools.combinations(range(int(pool.labels.max()) + 1), 2))
    order = torch.randperm(len(pairs), generator=stream(0, "pairs of classes")).tolist()
    return sorted(pairs[index] for index in order[:_PAIRS])


def examples_of(pool: Pool, pair: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and labels (0 and 1) to train on, and to test on, 500 each, the classes in turns.

    Inputs are flat, less the training mean, and divided by one number: the root mean square of a training feature. So
    pairs of all sets have a root mean squared distance between examples of about ``sqrt(2 d)``, for d features.
    """
    random, half = stream(seed, f"examples of {pair}"), SIZES[-1] // 2
    chosen = []
    for label in pair:
        there = (pool.labels == label).nonzero().flatten()
        chosen.append(there[torch.randperm(len(there), generator=random)[: 2 * half]])
    order = torch.stack(chosen, dim=1).flatten()  # the first class, the second, the first, ...
    inputs, labels = pool.inputs[order].flatten(1), (pool.labels[order] == pair[1]).long()
    inputs = inputs - inputs[: 2 * half].mean(dim=0)
    inputs = inputs / inputs[: 2 * half].square().mean().sqrt()
    return inputs[: 2 * half], labels[: 2 * half], inputs[2 * half :], labels[2 * half :]


def properties_of(inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the properties of training examples; distances are in units of ``sqrt(2 d)``."""
    points = inputs / math.sqrt(2 * inputs.shape[1])
    steep = sharpness.label_sharpness(points, labels)
    if math.isinf(steep.value):
        raise BenchmarkError(
            f"examples {steep.pair} are equal and of two classes, so that K_F is infinite; leave one out"
        )
    mle, twonn = (sharpness.intrinsic_dimension(points, method=method).value for method in ("mle", "twonn"))
    return {
        "label_sharpness": steep.value,
        "label_sharpness_median": statistics.median(steep.per_example),
        "dimension_mle": mle,
        "dimension_twonn": twonn,
        "bound": steep.value * len(labels) ** (-1 / mle),
    }


def train(inputs: Tensor, labels: Tensor, seed: int, steps: int) -> nn.Module:
    """Return a network of two hidden layers, trained with Adam."""
    model = build_model(lambda: _network(inputs.shape[1]), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule, random = CosineAnnealingLR(optimizer, steps), stream(seed, "batches of a pair")
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), generator=random)
        take_step(optimizer, lambda x=inputs[batch], y=labels[batch]: functional.cross_entropy(model(x), y))
        schedule.step()
    return model.eval()


def errors_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return error and loss on the test examples, and what FGSM adds to each."""
    found = sharpness.fgsm(
        model, sharpness.cross_entropy, [(inputs, labels)], sizes=ATTACKS, accuracy_fn=sharpness.accuracy
    )
    assert found.accuracies is not None
    metrics = {"error": 1 - found.accuracies[0], "loss": found.loss}
    for size, accuracy, rise in zip(ATTACKS, found.accuracies[1:], found.rises, strict=True):
        metrics |= {f"lost_{size:g}": found.accuracies[0] - accuracy, f"rise_{size:g}": rise}
    return metrics


def _network(features: int) -> nn.Module:
    hidden = (nn.Linear(features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 2))
