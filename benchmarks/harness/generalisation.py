"""Small models of shrunk MNIST images with varied settings: what the study of sharpness and generalisation measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.data import Pool, Split, make_split, stream, stream_seed
from benchmarks.harness.datasets import shrink_to_digits
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.tasks import VisionTransformer, conv_net
from benchmarks.harness.training import build_model, epoch_order

TRAIN_SIZE, LABEL_NOISE = 1000, 0.2


@dataclass(frozen=True)
class Network:
    """A kind of model and how it varies.

    Attributes:
        build: Makes a model with fresh weights.
        base: Its base optimizer.
        rates: Learning rates, which the models take in turns.
        decays: Weight decays that the models draw from.
        steps: Optimizer steps of one training run.
        models: How many to train.
    """

    build: Callable[[], nn.Module]
    base: str
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    steps: int
    models: int


def _mlp() -> nn.Module:
    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {
    "convnet": Network(partial(conv_net, 8, 10), "sgd", (0.01, 0.02, 0.05, 0.1, 0.2), (0.0, 5e-4, 2e-3), 400, 80),
    "mlp": Network(_mlp, "sgd", (0.02, 0.05, 0.1, 0.15, 0.2), (0.0, 5e-4, 2e-3), 800, 80),
    "transformer": Network(
        partial(VisionTransformer, 8, 10), "adamw", (1e-3, 2e-3, 3e-3, 5e-3, 8e-3), (0.0, 0.1, 1.0), 600, 60
    ),
}
_RADII, _BATCH_SIZES = (0.0, 0.05, 0.2), (16, 64)


@dataclass(frozen=True)
class Recipe:
    """One model's settings: the learning rate and label noise by its number, in turns, the others drawn.

    Args:
        name: Name of the network.
        number: Number of the model; also the seed of its weights, its batches and the draws.
        steps: Optimizer steps of one training run.
    """

    name: str
    number: int
    steps: int

    @property
    def label_noise(self) -> float:
        """The fraction of randomised labels."""
        return LABEL_NOISE * (self.number // len(NETWORKS[self.name].rates) % 2)

    @property
    def settings(self) -> dict[str, float]:
        """What a row says."""
        network, source = NETWORKS[self.name], stream(self.number, f"recipe of {self.name}")

        def draw(values: Sequence[float]) -> float:
            return values[int(torch.randint(len(values), (), generator=source))]

        return {
            "lr": network.rates[self.number % len(network.rates)],
            "weight_decay": draw(network.decays),
            "rho": draw(_RADII),
            "batch_size": draw(_BATCH_SIZES),
            "augment": draw((0, 1)),
            "steps": self.steps,
        }

    def choice(self) -> Choice:
        """Return the optimizer."""
        settings, base = self.settings, NETWORKS[self.name].base
        of_base = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
        of_base |= {"momentum": 0.9} if base == "sgd" else {}
        if settings["rho"] == 0:
            return Choice(base, base, of_base)
        return Choice(f"sam:rho={settings['rho']:g}", base, of_base, "sam", {"rho": settings["rho"]})


def split_of(pool: Pool, label_noise: float) -> Split:
    """Return 1,000 shrunk images to train on, and the others to test on; the same for all models."""
    order = torch.randperm(len(pool.labels), generator=stream(0, "generalisation"))
    images, labels = shrink_to_digits(pool.inputs[order]), pool.labels[order]
    parts = Pool(images[:TRAIN_SIZE], labels[:TRAIN_SIZE], images[TRAIN_SIZE:], labels[TRAIN_SIZE:])
    return make_split(parts, 0, classes=10, label_noise=label_noise)


def train(recipe: Recipe, choice: Choice, split: Split) -> nn.Module:
    """Return a trained model in evaluation mode."""
    model = build_model(NETWORKS[recipe.name].build, recipe.number)
    optimizer, size = choice.build(model), int(recipe.settings["batch_size"])
    schedulers, count = choice.schedulers(optimizer, recipe.steps), len(split.labels)
    orders = [epoch_order(count, recipe.number, epoch) for epoch in range(-(-recipe.steps * size // count))]
    torch.manual_seed(stream_seed(recipe.number, "generalisation"))
    for batch in torch.cat(orders)[: recipe.steps * size].split(size):
        inputs, labels = split.inputs[batch], split.labels[batch]
        if recipe.settings["augment"]:
            inputs = shift(inputs, torch.randint(3, (2, len(inputs))))
        take_step(optimizer, lambda x=inputs, y=labels: functional.cross_entropy(model(x), y))
        for scheduler in schedulers:
            scheduler.step()
    return model.eval()


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixel down and right, zeros coming in, for offsets 2, 1 and 0 of shape (2, n)."""
    height, width = images.shape[2:]
    windows = functional.pad(images, (1, 1, 1, 1)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, offsets[0], offsets[1]]
