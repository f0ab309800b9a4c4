"""Reads the values of command-line arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from benchmarks.choice import Choice, parse_choice
from benchmarks.errors import BenchmarkError
from benchmarks.registry import choose

__all__ = ["choices", "fractions", "names", "positive_int", "positive_number", "seeds"]

_T = TypeVar("_T")


def choices(text: str) -> list[Choice]:
    """Return the optimizers in a comma-separated list.

    Args:
        text: As in "sgd,sam:rho=0.1".

    Raises:
        BenchmarkError: If one is unknown or named twice.
    """
    return _distinct("an optimizer", text, parse_choice, lambda choice: choice.label, "sgd,sam")


def seeds(text: str) -> list[int]:
    """Return the seeds in a comma-separated list.

    Args:
        text: As in "0,1,2".

    Raises:
        BenchmarkError: If one is no whole number >= 0, or given twice.
    """
    return _distinct("a seed", text, lambda part: _integer("seed", part, 0), str, "0,1,2")


def fractions(text: str) -> list[float]:
    """Return the fractions in a comma-separated list.

    Args:
        text: As in "0,0.4".

    Raises:
        BenchmarkError: If one is outside [0, 1), or given twice.
    """
    return _distinct("a label noise", text, _fraction, str, "0,0.4")


def names(what: str, text: str, known: Mapping[str, Any], example: str) -> list[str]:
    """Return the names in a comma-separated list.

    Args:
        what: What they are names of, as in "a task".
        text: As in "digits,digits_vit".
        known: What there is, by name.
        example: A list to show to whom mistakes one.

    Raises:
        BenchmarkError: If one is unknown or given twice.
    """

    def checked(name: str) -> str:
        choose(what.partition(" ")[2], name, known)
        return name

    return _distinct(what, text, checked, str, example)


def positive_int(text: str) -> int:
    """Return a whole number >= 1.

    Args:
        text: The number.

    Raises:
        BenchmarkError: If it is none.
    """
    return _integer("a count", text, 1)


def positive_number(text: str) -> float:
    """Return a finite number > 0.

    Args:
        text: The number.

    Raises:
        BenchmarkError: If it is none.
    """
    value = _float(text)
    if value is None or not 0 < value < float("inf"):
        raise BenchmarkError(f"expected a number > 0, got {text!r}; write 0.05, for example")
    return value


def _fraction(text: str) -> float:
    value = _float(text)
    if value is None or not 0 <= value < 1:
        raise BenchmarkError(
            f"label noise must be a fraction of the training labels in [0, 1), got {text!r}; for 40% write 0.4"
        )
    return value


def _integer(what: str, text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise BenchmarkError(f"{what} must be a whole number >= {least}, got {text!r}; write {least + 1}, for example")
    return int(text)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _distinct(what: str, text: str, parse: Callable[[str], _T], name: Callable[[_T], str], example: str) -> list[_T]:
    values = [parse(part.strip()) for part in text.split(",") if part.strip()]
    names = [name(value) for value in values]
    if not values:
        raise BenchmarkError(f"expected {what}, got {text!r}; write a comma-separated list such as {example}")
    if len(set(names)) < len(names):
        raise BenchmarkError(f"{what} is given twice in {text!r}; name each once, as in {example}")
    return values
