"""A progress bar for measures that take long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

from samopt.sharpness import Result

__all__ = ["with_bar"]

_DELAY = 2.0  # seconds before a bar appears
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def with_bar(name: str, measure: Callable[..., Result], *, disable: bool | None) -> Callable[..., Result]:
    """Return a measure with a progress bar, for as long as it takes.

    Args:
        name: Its name, after ``sharpness/``.
        measure: The measure.
        disable: Whether to show no bar; None shows one on a terminal only.
    """

    def run(*args: Any, progress: Callable[[float, float | None], None]) -> Result:
        with tqdm(
            desc=f"sharpness/{name}", total=1.0, delay=_DELAY, leave=False, disable=disable, bar_format=_BAR
        ) as bar:

            def advance(done: float, total: float | None) -> None:
                bar.update(min(1.0, done / total) - bar.n if total else 0)
                progress(done, total)

            return measure(*args, progress=advance)

    return run
