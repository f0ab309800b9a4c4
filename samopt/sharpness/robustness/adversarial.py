"""The loss under an attack on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.batches import label_key
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import FORWARD, GRADIENT, MeasuredModel, measuring
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness.robustness.result import Robustness, rises_at

__all__ = ["fgsm"]


def fgsm(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    sizes: Sequence[float] = (0.01, 0.03, 0.1),
    bounds: tuple[float, float] | None = None,
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> Robustness:
    """Return the rise of the loss at the inputs ``x + size * sign(dL/dx)``, the fast gradient sign method.

    Source: Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples". The label sharpness of a data set
    predicts it (Konz & Mazurowski 2024).

    Misleads: one step is a weak attack. A model may withstand it and not others.

    Cost: ``4/3 + len(sizes) / 3`` gradients a batch, and ``(len(sizes) + 1) / 3`` more with accuracies.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: ``(inputs, labels)``, or mappings with one floating-point tensor besides the labels.
        sizes: Sizes of the attack, each >= 0, in the units of the inputs; the last one decides ``value``.
        bounds: Smallest and largest value that an input may take; None for no limit.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar``, such as ``sharpness.accuracy``.
        mode: "eval", "train", or "keep".
        progress: See ``ProgressOption``.

    Returns:
        The rise at each size.

    Raises:
        TypeError: If the inputs are no floating-point tensor.
        ValueError: If an argument is out of range, the loss at the weights is not finite, or it does not depend on the
            inputs.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, -4.0]])
        >>> def loss_fn(model, batch):
        ...     return model(batch[0]).mean()
        >>> batch = (torch.tensor([[1.0, 1.0]]), None)
        >>> sharpness.fgsm(model, loss_fn, [batch], sizes=[0.5]).value  # 0.5 * (3 + 4)
        3.5
    """
    if not sizes or any(not size >= 0 for size in sizes):
        raise ValueError(f"sizes must be numbers of at least 0, got {list(sizes)}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be the smallest and the largest value, in this order, got {bounds}")
    evaluations = (len(sizes) + 1) * FORWARD
    losses: list[list[float]] = [[] for _ in sizes]
    hits: list[list[float]] = [[] for _ in range(len(sizes) + 1)]
    before = []
    with measuring(
        model,
        loss_fn,
        batches,
        name="attack on the inputs",
        mode=mode,
        frozen=True,  # no weight moves
        cost_per_batch=GRADIENT + evaluations * (2 if accuracy_fn else 1),
        progress=progress,
    ) as measured:
        for number, batch in enumerate(measured.batches):
            inputs, replace = _inputs_of(batch)
            slope = _slope(measured, inputs, replace)
            before.append(measured.checked(measured.loss(batch), number))
            attacked = [batch]
            for level, size in enumerate(sizes):
                moved = inputs + size * slope
                attacked.append(replace(moved if bounds is None else moved.clamp(*bounds)))
                losses[level].append(float(measured.loss(attacked[-1])))
            if accuracy_fn is not None:
                for level, changed in enumerate(attacked):
                    hits[level].append(measured.evaluate(accuracy_fn, changed))
        fields = rises_at(losses, before, measured.sizes)
        accuracies = tuple(measured.mean(row) for row in hits) if accuracy_fn is not None else None
        cost = measured.progress.cost
    return Robustness(
        measure="fgsm",
        cost=cost,
        settings={"levels": "size of the attack on each input value", "bounds": bounds, **measured.settings},
        levels=tuple(float(size) for size in sizes),
        accuracies=accuracies,
        **fields,
    )


def _slope(measured: MeasuredModel, inputs: Tensor, replace: Callable[[Tensor], Any]) -> Tensor:
    """Return the sign of the loss's derivative in the inputs."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = measured.call(replace(leaf))
    (gradient,) = measured.differentiate([loss], [leaf])
    measured.progress.advance(GRADIENT)
    if gradient is None:
        raise ValueError(
            "the loss does not depend on the inputs, so no attack can be found; check that loss_fn and the model use "
            "batch's inputs, and neither detach nor round them"
        )
    return gradient.sign()


def _inputs_of(batch: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return a batch's inputs, and what makes the batch with other ones."""
    if isinstance(batch, Mapping):
        labels = label_key(batch)
        names = [name for name, part in batch.items() if name != labels and _is_continuous(part)]
        if len(names) == 1:
            return batch[names[0]], lambda changed: {**batch, names[0]: changed}
    elif isinstance(batch, tuple | list) and batch and _is_continuous(batch[0]):
        return batch[0], lambda changed: (changed, *batch[1:])
    raise TypeError(
        f"fgsm attacks inputs that are one floating-point tensor, which a batch of type {type(batch).__name__} does "
        "not have; give (inputs, labels), or a mapping with one such tensor besides its labels"
    )


def _is_continuous(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()
