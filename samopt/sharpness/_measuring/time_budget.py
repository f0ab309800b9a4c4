"""A share of a run's time, and what may still be spent of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Budget", "OverBudget"]

_ROUGH = 0.02  # of the expected cost: a forecast from less may be far off, the first evaluation being the slowest
_SLACK = 4.0  # by how much a rough forecast must exceed what is left


class OverBudget(Exception):
    """A measurement would take, or has taken, more than is left; says how much."""


class Budget:
    """Time that may be spent on the side: a fraction of the time since the start, less what has been spent.

    Args:
        fraction: In (0, 1], or None for no limit.
        clock: Returns seconds.

    Raises:
        ValueError: If ``fraction`` is out of range.
    """

    def __init__(self, fraction: float | None, clock: Callable[[], float]) -> None:
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"max_fraction must be in (0, 1], got {fraction}; use None for no limit")
        self.fraction = fraction
        self.spent = 0.0
        self._clock = clock
        self._started: float | None = None
        self._expected: dict[str, float] = {}

    def start(self) -> None:
        """Let time begin to count, unless it has begun."""
        if self._started is None:
            self._started = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return 0.0 if self._started is None else self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds that may still be spent now."""
        return float("inf") if self.fraction is None else self.fraction * self.elapsed - self.spent

    @contextmanager
    def spend(
        self, name: str, *, limited: bool, charged: bool = True
    ) -> Generator[Callable[[float, float | None], None]]:
        """Account for the time inside this context.

        Args:
            name: Whose time it is.
            limited: Whether to stop what would take more than is left.
            charged: Whether the time counts as spent.

        Yields:
            A function ``progress(done, total)``, which extrapolates and raises as soon as the end will be too late.

        Raises:
            OverBudget: If it takes longer than what is left, or is expected to.
        """
        left = self.left if limited else float("inf")
        expected = self._expected.get(name, 0.0)
        if expected > left or left <= 0:
            raise OverBudget(self._explain(expected, left))
        begin = self._clock()

        def progress(done: float, total: float | None) -> None:
            used = self._clock() - begin
            forecast = used * total / done if total else used
            slack = _SLACK if total and done < _ROUGH * total else 1.0
            if forecast > slack * left or used > left:
                self._expected[name] = max(forecast, 2 * used)
                raise OverBudget(self._explain(forecast, left))

        try:
            yield progress
            self._expected[name] = self._clock() - begin
        finally:
            if charged:
                self.spent += self._clock() - begin

    def state_dict(self) -> dict[str, Any]:
        """Return the time elapsed, spent and expected."""
        return {"elapsed": self.elapsed, "spent": self.spent, "expected": dict(self._expected)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from saved times.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._started = self._clock() - state_dict["elapsed"]
        self.spent = state_dict["spent"]
        self._expected = dict(state_dict["expected"])

    def _explain(self, forecast: float, left: float) -> str:
        share = f"{self.fraction:.3g}" if self.fraction is not None else "1"
        return (
            f"takes about {forecast:.2g} s, but {max(left, 0.0):.2g} s are left of a share of {share} of the time "
            "since the start; raise max_fraction (None: no limit), or measure fewer examples or something cheaper"
        )
