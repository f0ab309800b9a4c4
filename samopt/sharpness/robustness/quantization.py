"""The loss after the weights are rounded to few bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import widen
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.robustness.result import Robustness, rises_at

__all__ = ["quantization", "round_to_bits"]


def quantization(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (8, 4, 3),
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    parameters: Selection = None,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> Robustness:
    """Return the rise of the loss after rounding the weights to the nearest of ``2^bits - 1`` even steps.

    Each row of a weight (its first dimension: an output channel) has a scale of its own, so that its largest
    magnitude is the largest step; tensors of dim <= 1 stay as they are. Real and imaginary parts are rounded apart.
    Activations are not rounded. This is what post-training quantisation does before any correction.

    The rise is ``L(round(w)) - L(w)``.

    Misleads: real quantisation also rounds activations, and corrects what it rounds.

    Cost: ``(len(bits) + 1) / 3`` gradients a batch, twice that with accuracies. Memory: one copy of the weights.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; means weigh examples.
        bits: Numbers of bits, each >= 2; the last one decides ``value``.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, such as ``sharpness.accuracy``.
        parameters: Names or patterns of the parameters to round; None for every trainable one.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.

    Returns:
        The rise at each number of bits.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the loss at the weights is not finite.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 1.0]])
        >>> def loss_fn(model, batch):
        ...     return model.weight.sum()
        >>> sharpness.quantization(model, loss_fn, [None], bits=[3, 2]).rises  # 2 bits: 3, 0 and -3
        (0.0, -1.0)
    """
    if not bits or any(number < 2 for number in bits):
        raise ValueError(f"bits must be numbers of at least 2, got {list(bits)}")
    losses, accuracies = [], []
    with measuring(
        model,
        loss_fn,
        batches,
        name="quantization",
        parameters=parameters,
        mode=mode,
        cost_per_batch=(len(bits) + 1) * FORWARD * (2 if accuracy_fn else 1),
        progress=progress,
    ) as measured:
        if all(weight.dim() < 2 for weight in measured.weights):
            warnings.warn(
                "quantization rounds tensors of two and more dimensions, but there is none among the parameters "
                f"{', '.join(measured.names[:4])}{', ...' if len(measured.names) > 4 else ''}, so no loss rises",
                stacklevel=2,
            )
        before = [measured.checked(measured.loss(batch), n) for n, batch in enumerate(measured.batches)]
        if accuracy_fn is not None:
            accuracies.append(measured.mean_of(accuracy_fn))
        with measured.movable_weights() as movable:
            for number in bits:
                for index, weight in enumerate(movable.origin):
                    movable.put(index, round_to_bits(weight, number))
                losses.append([float(measured.loss(batch)) for batch in measured.batches])
                if accuracy_fn is not None:
                    accuracies.append(measured.mean_of(accuracy_fn))
        fields = rises_at(losses, before, measured.sizes)
        cost = measured.progress.cost
    return Robustness(
        measure="quantization",
        cost=cost,
        settings={"levels": "bits a weight", **measured.settings},
        levels=tuple(float(number) for number in bits),
        accuracies=tuple(accuracies) if accuracy_fn is not None else None,
        **fields,
    )


def round_to_bits(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to ``2^bits - 1`` even steps, each row scaled by its largest magnitude.

    Args:
        weight: The weight; of dim <= 1, it is returned as it is.
        bits: Number of bits, >= 2.
    """
    wide = widen(weight.detach())
    if wide.dim() < 2 or wide.numel() == 0:
        return wide.clone()
    if wide.is_complex():
        return torch.view_as_complex(round_to_bits(torch.view_as_real(wide), bits))
    rows = wide.flatten(1)
    steps = 2 ** (bits - 1) - 1
    scale = rows.abs().amax(dim=1, keepdim=True) / steps
    rounded = torch.where(scale > 0, torch.round(rows / scale) * scale, 0.0)
    return rounded.view(wide.shape)
