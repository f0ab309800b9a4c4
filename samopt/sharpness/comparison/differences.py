"""How far two results of one measure lie apart, and whether that is more than their error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from samopt.sharpness._measuring.results import Result, mean_and_error

__all__ = ["Difference", "difference"]

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom: half of a 95% interval, in standard errors.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
_MANY = 1.96
_RELATIVE = 0.05  # what counts as a difference where no error is known


@dataclass(frozen=True)
class Difference:
    """One model's value less another's.

    Attributes:
        value: The difference.
        standard_error: Its standard error over the same batches, or None where it is not known.
        is_clear: Whether its 95% interval leaves out 0; without an error, whether it is above 5% of the larger value.
    """

    value: float
    standard_error: float | None
    is_clear: bool


def difference(first: Result, second: Result, sizes: Sequence[int]) -> Difference:
    """Return the second result less the first, paired batch by batch where both know their batches.

    Args:
        first: A result.
        second: One of the same measure, on the same batches.
        sizes: Examples of each batch.
    """
    value = second.value - first.value
    error, count = _error(first, second, sizes)
    if not math.isfinite(value):
        return Difference(value, None, not math.isnan(value))
    if error is None:
        return Difference(value, None, abs(value) > _RELATIVE * max(abs(first.value), abs(second.value)))
    degrees = count - 1
    quantile = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else _MANY
    return Difference(value, error, abs(value) > quantile * error)


def _error(first: Result, second: Result, sizes: Sequence[int]) -> tuple[float | None, int]:
    """Return the standard error of the difference, and from how many pairs it is."""
    pairs = _paired(first, second, "per_batch")
    if len(pairs) < 2:
        return None, 0
    error = mean_and_error(pairs, sizes if len(sizes) == len(pairs) else None)[1] or 0.0
    count = len(pairs)
    probes = _paired(first, second, "samples")
    if len(probes) > 1:  # a trace has noise of its own, which more batches do not lower
        error = math.hypot(error, mean_and_error(probes)[1] or 0.0)
    return error, count


def _paired(first: Result, second: Result, field: str) -> list[float]:
    one, other = (getattr(result, field, None) or () for result in (first, second))
    return [b - a for a, b in zip(one, other, strict=True)] if len(one) == len(other) else []
