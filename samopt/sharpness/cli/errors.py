"""What is shown as one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["CommandError", "explained", "first_line", "one_line", "quoted"]

_LONGEST = 600
_LONGEST_PATH = 120


class CommandError(Exception):
    """Bad input: what is wrong, what was found, how to put it right; shown without a traceback, exit code 2."""


def one_line(text: str) -> str:
    """Return a message on one line, cut where it is very long.

    Args:
        text: The message.
    """
    words = " ".join(str(text).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none.

    Args:
        error: The error.
    """
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def quoted(path: object) -> str:
    """Return a path in quotes, cut where it is very long.

    Args:
        path: The path.
    """
    text = str(path)
    return repr(text if len(text) <= _LONGEST_PATH else f"{text[:_LONGEST_PATH]}...")


@contextmanager
def explained(what: str) -> Generator[None]:
    """Show errors that this package raises itself as messages; those of other code keep their traceback.

    Args:
        what: What is being done.

    Raises:
        CommandError: Instead of an error of this package.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) or _is_ours(error):
            raise CommandError(f"{what}: {error}") from error
        raise


def _is_ours(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("samopt.")
