"""Write tables and figures of earlier runs again, from their rows."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.harness.cli import studies
from benchmarks.harness.errors import BenchmarkError, choose


def study(folder: Path, study: str = "train", output: Path | None = None) -> None:
    """Write a folder's tables and figures.

    Args:
        folder: The output folder of an earlier run.
        study: The study that wrote it.
        output: Where to write; by default the same folder.
    """
    choose("study", study, studies())
    module = importlib.import_module(f"benchmarks.studies.{study.replace('-', '_')}")
    if not hasattr(module, "render"):
        raise BenchmarkError(f"study {study!r} writes no tables from rows; give another --study")
    module.render(folder, output)
