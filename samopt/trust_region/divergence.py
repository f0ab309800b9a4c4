"""How far apart two outputs are, without a full-size copy of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "Divergence", "between", "check_divergence", "kl", "l2", "mmd", "reverse_kl", "symmetric_kl"]

_CHUNK = 2**21  # entries in flight: 8 MiB in fp32 for each temporary


class Divergence(Protocol):
    """Anyone's own measure of how far two outputs are apart; it must be 0 where they are equal."""

    def __call__(self, reference: Tensor, current: Tensor) -> Tensor:
        """Compare two outputs.

        Args:
            reference: ``(examples, ..., classes)``, as the model returns it.
            current: Of the same shape.

        Returns:
            One value per position, shaped like the arguments without the last dimension; or a 0-dim mean.
        """


def kl(reference: Tensor, current: Tensor) -> Tensor:
    """Return ``KL(reference || current) = sum p_ref (log p_ref - log p_cur)`` of each row, in nats.

    Summed as ``sum p_ref (D + exp(-D) - 1)`` with ``D = log p_ref - log p_cur``: the same, because probabilities sum to
    1. Every term is >= 0 and quadratic in ``D``, so nearly equal outputs keep their digits; the plain sum would be
    rounding noise there. Source: Sherborne et al. 2024, equations 4 and 5 (forward KL, their section C.5).

    Args:
        reference: Logits ``(n, classes)`` in fp32 or fp64.
        current: Of the same shape.
    """
    log_p, log_q = reference.log_softmax(-1), current.log_softmax(-1)
    p, difference = log_p.exp(), log_p - log_q
    small = difference.clamp(-1, 1)
    near = p * (small + torch.expm1(-small))
    far = torch.where(log_p > -torch.inf, p * difference, 0.0) + (log_q.exp() - p)
    return torch.where(difference.abs() < 1, near, far).sum(-1).clamp(min=0)


def reverse_kl(reference: Tensor, current: Tensor) -> Tensor:
    """Return ``KL(current || reference)`` of each row, in nats.

    Args:
        reference: Logits ``(n, classes)`` in fp32 or fp64.
        current: Of the same shape.
    """
    return kl(current, reference)


def symmetric_kl(reference: Tensor, current: Tensor) -> Tensor:
    """Return ``KL(reference || current) + KL(current || reference)`` of each row, in nats.

    Args:
        reference: Logits ``(n, classes)`` in fp32 or fp64.
        current: Of the same shape.
    """
    return kl(reference, current) + kl(current, reference)


def l2(reference: Tensor, current: Tensor) -> Tensor:
    """Return ``||reference - current||_2`` of each row, in units of the output.

    Args:
        reference: Outputs ``(n, dimensions)`` in fp32 or fp64.
        current: Of the same shape.
    """
    norm: Tensor = torch.linalg.vector_norm(reference - current, dim=-1)
    return norm


def mmd(reference: Tensor, current: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the squared maximum mean discrepancy between two sets of rows: 0-dim, in [0, 2].

    The biased estimate ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` (Gretton et al. 2012, equation 5) with the
    inverse multiquadric kernel ``k(x, y) = (1 + ||x - y||^2 / dimensions)^(-1/2)``.

    Args:
        reference: Outputs ``(n, dimensions)`` in fp32 or fp64.
        current: Of the same shape.
        weights: ``(n,)``, how much each row counts, with sum 1; None is ``1 / n``.
    """
    shares = reference.new_full((len(reference),), 1 / max(1, len(reference))) if weights is None else weights

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        kernel = (distance.square() / x.shape[-1] + 1).rsqrt()
        return torch.outer(shares, shares).mul_(kernel).sum()

    discrepancy = (
        mean_kernel(reference, reference) + mean_kernel(current, current) - 2 * mean_kernel(reference, current)
    )
    return discrepancy.clamp(min=0)


_ROWWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "l2": l2,
}
DIVERGENCES = (*_ROWWISE, "mmd")
"""The names that ``TRAM`` knows."""


def check_divergence(divergence: str | Divergence) -> None:
    """Raise unless ``divergence`` is a known name or a callable.

    Args:
        divergence: What the user gave.

    Raises:
        ValueError: If it is neither.
    """
    if not (divergence in DIVERGENCES if isinstance(divergence, str) else callable(divergence)):
        raise ValueError(
            f"divergence must be one of {list(DIVERGENCES)}, or a callable on (reference, current) logits; got "
            f"{divergence!r}"
        )


def between(divergence: str | Divergence, reference: Tensor, current: Tensor, mask: Tensor | None) -> Tensor:
    """Compare two outputs in chunks, in fp32 (fp64 outputs in fp64).

    Args:
        divergence: A name in ``DIVERGENCES`` or a callable, which gets the whole outputs as they are.
        reference: ``(examples, ..., classes)``.
        current: Of the same shape.
        mask: ``(examples, ...)``, which positions count; only ``mmd`` needs it here.

    Returns:
        One value per position, shaped ``(examples, ...)``; or a 0-dim mean.

    Raises:
        ValueError: If distributions are asked for and there is one class, or a callable returns another shape.
    """
    if not isinstance(divergence, str):
        return _checked(divergence(reference, current), reference)
    if divergence == "mmd":
        return _example_mmd(reference, current, mask)
    classes = reference.shape[-1]
    if classes == 1 and divergence != "l2":
        raise ValueError(
            f'divergence="{divergence}" compares distributions over classes, but the model returns one number per '
            f'position (shape {tuple(reference.shape)}); use divergence="l2" for a regression, or for the single logit '
            "of a binary classifier logits=lambda output: torch.stack([torch.zeros_like(output), output], -1)"
        )
    measure = _ROWWISE[divergence]
    # In place: small results kept between large temporaries would leave the allocator holes that fit none of the next.
    measured = reference.new_empty(reference.shape[:-1].numel(), dtype=_wide(reference))
    parts = torch.split(measured, _rows_in_chunk(reference))
    for part, ours, theirs in zip(parts, _chunks(reference), _chunks(current), strict=True):
        part.copy_(measure(_widen(ours), _widen(theirs)))
    return measured.view(reference.shape[:-1])


def _checked(values: Tensor, reference: Tensor) -> Tensor:
    if values.dim() and values.shape != reference.shape[:-1]:
        raise ValueError(
            f"the divergence returned shape {tuple(values.shape)} for outputs of shape {tuple(reference.shape)}; "
            f"return one value per position, shape {tuple(reference.shape[:-1])}, or a 0-dim mean"
        )
    return values


def _example_mmd(reference: Tensor, current: Tensor, mask: Tensor | None) -> Tensor:
    """Return the discrepancy between the two sets of examples, each its mean output over the positions that count."""
    if mask is None:
        mask = torch.ones(reference.shape[:-1], dtype=torch.bool, device=reference.device)
    counts = mask.reshape(len(mask), -1).sum(1)
    has_any = (counts > 0).to(_wide(reference))
    return mmd(_means(reference, mask), _means(current, mask), has_any / has_any.sum().clamp(min=1))


def _means(outputs: Tensor, mask: Tensor) -> Tensor:
    """Return the mean output of each example: ``(examples, classes)``, widened chunk by chunk."""
    means = outputs.new_zeros(len(outputs), outputs.shape[-1], dtype=_wide(outputs))
    for mean, output, counted in zip(means, outputs, mask, strict=True):
        weights = counted.reshape(-1).to(device=outputs.device, dtype=means.dtype)
        for part, chunk in zip(torch.split(weights, _rows_in_chunk(outputs)), _chunks(output), strict=True):
            mean.add_(part @ _widen(chunk))
        mean.div_(weights.sum().clamp(min=1))
    return means


def _chunks(outputs: Tensor) -> tuple[Tensor, ...]:
    return torch.split(outputs.reshape(-1, outputs.shape[-1]), _rows_in_chunk(outputs))


def _rows_in_chunk(outputs: Tensor) -> int:
    return max(1, _CHUNK // max(1, outputs.shape[-1]))


def _widen(values: Tensor) -> Tensor:
    return values.to(_wide(values))


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
