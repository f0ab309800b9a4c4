"""For which parameters a base optimizer keeps state: a direction or a geometry that is read from it must not guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["StateSeen"]


class StateSeen:
    """Remembers which parameters the base stepped, and which of these it kept state of.

    A base that stepped a parameter and never had state of it keeps none. If it had some and has none now, the state
    was reset, and the next step makes it again.
    """

    def __init__(self) -> None:
        self._stepped: set[Tensor] = set()
        self._found: set[Tensor] = set()

    def is_missing(self, parameter: Tensor) -> bool:
        """Return whether the base stepped a parameter and never kept state of it."""
        return parameter in self._stepped and parameter not in self._found

    def find(self, parameters: Sequence[Tensor], found: Sequence[object]) -> None:
        """Note of which parameters there is state: those with something other than None in ``found``."""
        if len(self._found) < len(self._stepped):
            self._found.update([p for p, state in zip(parameters, found, strict=True) if state is not None])

    def step(self, parameters: Sequence[Tensor]) -> None:
        """Note which parameters the base steps: those with a gradient."""
        if len(self._stepped) < len(parameters):
            self._stepped.update([parameter for parameter in parameters if parameter.grad is not None])

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to other parameters; it learns again which ones were stepped.
        return vars(StateSeen())
