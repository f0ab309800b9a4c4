"""Tests in a process of their own, for what has to be chosen before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_apart"]

_ROOT = Path(__file__).parents[2]


def run_apart(*arguments: str, **environment: str) -> None:
    """Assert that all tests of a run of pytest pass and none is skipped.

    Args:
        *arguments: What to run, as pytest takes it.
        **environment: Variables to set.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=_ROOT, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
