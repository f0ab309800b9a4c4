"""Files that are whole or as they were: written beside their place, and renamed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from samopt.sharpness._measuring.style import DPI
from samopt.sharpness.cli.errors import CommandError, first_line, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["file_name", "make_folder", "write", "write_figure"]

_LONGEST_NAME = 100


def make_folder(folder: Path) -> None:
    """Make an output folder, before anything is measured.

    Args:
        folder: The folder.

    Raises:
        CommandError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise CommandError(f"--output {quoted(folder)} cannot be made: {error.strerror or error}") from error
    if not is_writable:
        raise CommandError(f"--output {quoted(folder)} cannot be written to")


def write(path: Path, content: bytes) -> None:
    """Write a file whole: a full disk or an interrupt leaves what was there.

    Args:
        path: The file.
        content: All of it.

    Raises:
        CommandError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"{quoted(path)} cannot be written: {error.strerror or first_line(error)}") from error


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG.

    Args:
        path: The file.
        figure: The figure.

    Raises:
        CommandError: If it cannot be written.
    """
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI)
    write(path, memory.getvalue())


def file_name(label: str) -> str:
    """Return a label as a file's name, without its suffix.

    Args:
        label: The label.
    """
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in label)[
        :_LONGEST_NAME
    ]
