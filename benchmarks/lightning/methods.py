"""What is compared: an optimizer of the module's own, alone or with the callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: What a person types.
        base: Name of the registered optimizer that the module returns.
        variant: What ``SharpnessAwareTraining`` is given; None is no callback.
        options: Its options; a whole number or a fraction each.
    """

    name: str
    base: str
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    method.name: method
    for method in (
        Method("sgd", "sgd"),
        Method("sgd+sam", "sgd", "sam", {"rho": 0.05}),
        Method("sgd+asam", "sgd", "asam", {"rho": 0.5}),
        Method("adamw", "adamw"),
        Method("adamw+sam", "adamw", "sam", {"rho": 0.05}),
        Method("adamw+asam", "adamw", "asam", {"rho": 0.5}),
    )
}
"""By name. The radii are the papers' usual ones, and nothing here is chosen on this task."""
