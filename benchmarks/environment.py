"""What a row says about where it was measured: versions, device, commit; never the machine's name."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import samopt
from benchmarks.errors import BenchmarkError

__all__ = ["commit", "describe", "select_device"]

_FOLDER = Path(__file__).parent
_REPRODUCED = ("samopt", "benchmarks")


def describe(device: torch.device) -> dict[str, str | int]:
    """Return commit, versions, device and number of threads.

    Args:
        device: Where the runs train.
    """
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


def commit(folder: Path = _FOLDER) -> str:
    """Return the commit that the benchmarks' code is at, "+changes" appended where files differ from it.

    "unknown" where that code is not part of a git checkout: installed from a wheel, say, into an environment that
    happens to lie inside another project's checkout.

    Args:
        folder: A folder of this code.
    """
    if _git(folder, "ls-files", "--error-unmatch", "errors.py") is None:
        return "unknown"
    revision = _git(folder, "rev-parse", "--short=12", "HEAD")
    changes = _git(folder.parent, "status", "--porcelain", "--", *_REPRODUCED)
    return "unknown" if revision is None else revision + ("+changes" if changes else "")


def select_device(name: str) -> torch.device:
    """Return the device called ``name``, after trying it.

    Args:
        name: As torch names it: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        BenchmarkError: If it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0]
        raise BenchmarkError(f"--device {name!r} cannot be used: {reason}; leave it out to train on the CPU") from error
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
