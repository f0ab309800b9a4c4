"""Step (a): versions, the device, and what else is installed."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.harness.environment import describe
from benchmarks.harness.gpu.checks import find_sanitizer
from benchmarks.harness.gpu.step import Options
from samopt.kernels.triton.availability import missing

_PACKAGES = ("triton", "numpy", "pytest", "timm", "transformers", "lightning", "accelerate", "scipy", "sklearn", "rich")


def run(options: Options) -> None:
    """Write one row."""
    found = {name: importlib.util.find_spec(name) is not None for name in _PACKAGES}
    row: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "installed": [name for name, there in found.items() if there],
        "absent": [name for name, there in found.items() if not there],
        "sanitizer": find_sanitizer(),
        "triton_lacks": missing(),
        "integrations": importlib.util.find_spec("samopt.integrations") is not None,
    }
    if found["triton"]:
        import triton

        row["triton"] = triton.__version__
    if options.device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["memory_gib"] = round(properties.total_memory / 2**30, 1)
        row["driver"] = _driver()
    options.write(**describe(torch.device(options.device)), **row)


def _driver() -> str | None:
    """Return the driver's version, and what else nvidia-smi says that matters for times."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    return done.stdout.strip() or None
