"""Where a row was measured: versions, device, commit; never the machine's name."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import samopt
from benchmarks.harness.errors import BenchmarkError

CPU = torch.device("cpu")
_REPOSITORY = Path(__file__).parents[2]
_MEASURED = ("samopt", "integrations", "benchmarks")


def describe(device: torch.device = CPU) -> dict[str, str | int]:
    """Return commit, versions, device and number of threads."""
    return {
        "commit": commit(),
        "samopt": samopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit(repository: Path = _REPOSITORY) -> str:
    """Return the checkout's commit, "+changes" appended where the measured code differs from it.

    Where this code is not tracked, as in a copy without history, returns what BENCHMARKS_COMMIT says, or "unknown".
    """
    if _git(repository, "ls-files", "--error-unmatch", "benchmarks/__main__.py") is None:
        return os.environ.get("BENCHMARKS_COMMIT", "unknown")
    revision = _git(repository, "rev-parse", "--short=12", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--", *_MEASURED)
    return "unknown" if revision is None else revision + ("+changes" if changes else "")


def select_device(name: str) -> torch.device:
    """Return the device called ``name`` after trying it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0]
        raise BenchmarkError(f"--device {name!r} cannot be used: {reason}; leave it out to use the CPU") from error
    return device


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
