"""The last share of a run, in which alone an optimizer perturbs."""

from __future__ import annotations

import math
import re
from fractions import Fraction

__all__ = ["first_late_step", "share_of"]

_PERCENT = re.compile(r"last\s+(\d+(?:\.\d+)?)\s*%")
_FRACTION = re.compile(r"\d*\.?\d+")


def share_of(name: str, value: object) -> Fraction:
    """Return the share of a run that a user wrote.

    Args:
        name: The option, for the message.
        value: "last 25 %" or "last 25%"; or 0.25, also as text.

    Raises:
        ValueError: If it is neither, or not above 0 and at most the whole run.
    """
    share = None
    if isinstance(value, str):
        if match := _PERCENT.fullmatch(value.strip()):
            share = Fraction(match[1]) / 100
        elif _FRACTION.fullmatch(value.strip()):
            share = Fraction(value.strip())
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        share = Fraction(repr(value))  # 0.1 is a tenth here, and not the nearest binary fraction
    if share is None or not 0 < share <= 1:
        raise ValueError(
            f'{name} must be a share of the run, above 0 and up to 1 (100 %), written as "last 25 %" or 0.25; got '
            f"{value!r}"
        )
    return share


def first_late_step(share: Fraction, total: int) -> int:
    """Return the first step of the last share of a run; a broken number of steps is rounded up.

    Args:
        share: In (0, 1].
        total: Steps of the run.
    """
    return total - math.ceil(share * total)
