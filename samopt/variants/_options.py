"""The options that every optimizer takes, for type checkers and for ``inspect.signature``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, TypeVar

from torch import nn

from samopt._step.selection import Only
from samopt.optimizer import DirectionName, SharpnessAwareOptimizer
from samopt.parts.combination import Combination
from samopt.parts.direction import Direction

__all__ = ["FIXED_BY_ADAPTIVE", "TAKEN_ELSEWHERE", "Options", "OptionsWithoutModel", "all_options_shown"]

TAKEN_ELSEWHERE = "use samopt.SharpnessAwareOptimizer, which takes it"
"""What to use instead of an option that only the general class has."""

FIXED_BY_ADAPTIVE = {"geometry": TAKEN_ELSEWHERE, "eta": TAKEN_ELSEWHERE}
"""The options that a class with ``adaptive`` sets itself."""

_C = TypeVar("_C", bound=type[SharpnessAwareOptimizer])


class OptionsWithoutModel(TypedDict, total=False):
    """Options of ``SharpnessAwareOptimizer`` that every optimizer passes on, with the same meaning and defaults."""

    only: Only | None
    reuse_trunk: bool
    direction: DirectionName | Direction
    combination: Combination | None
    norm: Literal["l2", "linf"]
    stochastic_rounding: bool
    seed: int
    sync_perturbation: bool
    backend: str
    measure_grad_norms: bool | None
    warn_on_stall: bool


class Options(OptionsWithoutModel, total=False):
    """The same, and the model."""

    model: nn.Module | Sequence[nn.Module] | None


def all_options_shown(kind: _C) -> _C:
    """Return a class whose signature lists every option it takes, in place of ``**options``.

    Args:
        kind: The class. Options that it sets itself are named in ``_fixed_options``.
    """
    own = list(inspect.signature(kind.__init__).parameters.values())[1:-1]
    shared = inspect.signature(SharpnessAwareOptimizer.__init__).parameters
    names = [
        name
        for name in ("model", *OptionsWithoutModel.__annotations__)
        if name not in getattr(kind, "_fixed_options", ())
    ]
    known = {parameter.name for parameter in own}
    listed: list[Any] = [*own, *(shared[name] for name in names if name not in known), shared["base_kwargs"]]
    kind.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]  # what inspect and help look for
    return kind
