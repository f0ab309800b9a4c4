"""What a person asks for with ``--optimizers``: a registered optimizer, perhaps with some settings changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError
from benchmarks.registry import OPTIMIZERS, OptimizerCase, choose

__all__ = ["Choice", "parse_choice"]


@dataclass(frozen=True)
class Choice:
    """An optimizer with the settings to use.

    Attributes:
        label: What the person typed, as in "sam:rho=0.2"; its name in tables and plots.
        case: The registered optimizer.
        settings: All of its settings.
    """

    label: str
    case: OptimizerCase
    settings: Mapping[str, float]


def parse_choice(text: str) -> Choice:
    """Return the choice that ``NAME`` or ``NAME:SETTING=NUMBER:...`` describes.

    Args:
        text: What a person typed.

    Raises:
        BenchmarkError: If the name or a setting is unknown, or a value is no number.
    """
    name, *changes = text.split(":")
    case = OPTIMIZERS[name]
    settings = dict(case.defaults)
    for change in changes:
        key, _, value = change.partition("=")
        choose(f"setting of {name}", key, settings)
        try:
            settings[key] = float(value)
        except ValueError:
            settings[key] = math.nan
        if not math.isfinite(settings[key]):
            raise BenchmarkError(f"setting {key} of {name} must be a number, got {value!r}; write {name}:{key}=0.1")
    return Choice(text, case, settings)
