"""A zero-shot classifier of supersenses, the line from it to a fine-tuned one, and which layers lag on that line."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.rows import Row
from benchmarks.harness.wordnet import SUPERSENSES, Classifier, Encoded, Example
from samopt import sharpness

State = Mapping[str, Tensor]

_LAYER = "sharpness, "
_KINDS = {"adj": "adjective", "adv": "adverb", "noun": "noun", "verb": "verb"}
_SCALE = 3.0  # of the zero-shot logits: the one of 1, 2, 3 and 5 with the least loss on validation definitions


def zero_shot(encoder: Any) -> Classifier:
    """Return a classifier whose head holds the encoder's own vectors of the 45 class names.

    The vectors have one length and the biases are 0, so the class is the one whose name is closest by its cosine.

    Args:
        encoder: An ``Encoder``.
    """
    names = [name.split(".") for name in SUPERSENSES]
    model: Classifier = encoder.classifier(0)
    head = model.head
    model.add_module("head", nn.Identity())  # to read the vectors
    with torch.no_grad():
        texts = encoder.encode([Example(_KINDS[kind], sense, 0) for kind, sense in names])
        texts = texts.take(torch.arange(len(names)))
        vectors = functional.normalize(model.eval()(texts.hidden, texts.attention_mask), dim=1)
        head.weight.copy_(_SCALE * vectors)
        head.bias.zero_()
    model.head = head
    return model


def as_batch(examples: Encoded) -> dict[str, Tensor]:
    """Return all examples as one batch for ``samopt.sharpness``."""
    part = examples.take(torch.arange(len(examples.labels)))
    return {"hidden": part.hidden, "attention_mask": part.attention_mask, "labels": part.labels}


def batch_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a batch's mean loss."""
    return functional.cross_entropy(model(batch["hidden"], batch["attention_mask"]), batch["labels"])


def layer_names(model: Classifier) -> list[str]:
    """Return the parts of the trained layers that have weights (attention, intermediate, output), and the head."""
    parts = [
        f"layers.{index}.{name}"
        for index, layer in enumerate(model.layers)
        for name, part in layer.named_children()
        if any(True for _ in part.parameters())
    ]
    return [*parts, "head"]


def place(model: nn.Module, start: State, end: State, at: float) -> None:
    """Move all weights to ``(1 - at) start + at end``."""
    model.load_state_dict({name: torch.lerp(start[name], end[name], at) for name in start})


def gains_alone(
    model: nn.Module, start: State, end: State, names: Sequence[str], batches: Sequence[Any]
) -> dict[str, float]:
    """Return how much the loss falls when one layer alone goes from ``start`` to ``end``, for each layer.

    Args:
        model: Of that architecture; its weights do not matter, and stay.
        start: Weights at the start of the line.
        end: Weights at its end.
        names: Names of the layers.
        batches: What the loss is of.
    """
    line = sharpness.interpolate(model, batch_loss, batches, end, start=start, points=2, per_layer=names)
    return {name: losses[0] - losses[1] for name, losses in (line.layers or {}).items()}


def stragglers_and_leaders(gains: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Return the quarter of the layers, rounded up, that gain least alone, and as many that gain most.

    This definition of a straggler layer is ours: the paper's authors have published none in code.

    Args:
        gains: See ``gains_alone``.
    """
    ordered = sorted(gains, key=lambda name: gains[name])
    count = math.ceil(len(ordered) / 4)
    return ordered[:count], ordered[-count:]


def sparsified(start: State, end: State, names: Sequence[str], kept: float) -> dict[str, Tensor]:
    """Return ``end`` with only the largest changes in some layers; their other weights are those of ``start``.

    Args:
        start: Weights before the change.
        end: Weights after it.
        names: The layers to make sparse, each on its own.
        kept: The fraction of a layer's weights that keep their change, at least one weight.
    """
    result = dict(end)
    for layer in names:
        inside = [name for name in end if name.startswith(f"{layer}.")]
        changes = {name: (end[name] - start[name]).abs() for name in inside}
        sizes = torch.cat([change.flatten() for change in changes.values()])
        threshold = sizes.topk(max(1, round(kept * len(sizes)))).values[-1]
        for name, change in changes.items():
            result[name] = torch.where(change >= threshold, end[name], start[name])
    return result


def tau(rows: Sequence[Row], what: str, metric: str) -> float:
    """Return Kendall's tau of sharpness and accuracy over the positions of all these lines.

    Args:
        rows: A line each, with curves "sharpness" and "sharpness, LAYER", and its stragglers among the settings.
        what: "all weights", which move together; or "stragglers" or "other layers", the mean of each alone.
        metric: Curve of the accuracy.
    """
    values = [value for row in rows for value in _sharpness(row, what)]
    return float(stats.kendalltau(values, [value for row in rows for value in row.curves[metric]]).statistic)


def layers_of(row: Row) -> list[str]:
    """Return the layers whose sharpness a row has."""
    return [name.removeprefix(_LAYER) for name in row.curves if name.startswith(_LAYER)]


def _sharpness(row: Row, what: str) -> list[float]:
    if what == "all weights":
        return row.curves["sharpness"]
    lagging = what == "stragglers"
    curves = [row.curves[_LAYER + name] for name in layers_of(row) if (name in row.settings["stragglers"]) == lagging]
    return [statistics.fmean(values) for values in zip(*curves, strict=True)]
