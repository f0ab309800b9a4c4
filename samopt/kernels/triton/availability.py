"""Whether Triton can run on a device, found out without importing it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch

__all__ = ["interprets", "missing", "unavailable"]

_CAPABILITY = (8, 0)
_VERSION = (3, 5)
# A loop's bound is an array of one element in the interpreter, which NumPy 2.4 no longer turns into an int by itself.
_INTERPRETER_FOR_NUMPY_2_4 = (3, 7)


def missing() -> str | None:
    """Return what this machine lacks for any kernel to run, or None; it may ask the driver, so not in every step."""
    if (lack := _unfit_version()) is not None:
        return lack
    if interprets():
        return None
    return _unbuildable() if torch.cuda.is_available() else "torch finds no CUDA or ROCm device"


def unavailable(device: torch.device) -> str | None:
    """Return why no kernel can run on ``device``, or None where they can.

    Args:
        device: Where the tensors are.
    """
    if (lack := _unfit_version()) is not None:
        return lack
    if device.type == "cuda":
        old = f"{device} has a compute capability below {_dotted(_CAPABILITY)}"
        return _unbuildable() if _is_recent(device) else old
    if device.type == "cpu" and interprets():
        return None
    return f"a parameter is on {device}, not on a CUDA or ROCm device"


def interprets() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU: they are made for it as they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _unfit_version() -> str | None:
    """Return why the triton that is installed, or its lack, does not do; None where it does."""
    version = _version()
    if version is None:
        return "triton is not installed (pip install triton)"
    if version < _VERSION:
        return f"the triton installed is version {_dotted(version)}, older than {_dotted(_VERSION)}"
    return _unfit_numpy(version) if interprets() else None


@functools.cache
def _unfit_numpy(version: tuple[int, ...]) -> str | None:
    """Return why the interpreter of this version of Triton cannot run with the NumPy that is installed, or None."""
    try:
        numpy = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return "triton's interpreter needs NumPy, which is not installed (pip install numpy)"
    if version < _INTERPRETER_FOR_NUMPY_2_4 and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        return (
            f"the interpreter of triton {_dotted(version)} cannot run with NumPy {numpy} "
            f'(pip install "numpy<2.4", or "triton>={_dotted(_INTERPRETER_FOR_NUMPY_2_4)}")'
        )
    return None


@functools.cache
def _unbuildable() -> str | None:
    """Return why Triton cannot build the C module that it launches kernels through, or None where it can.

    It looks where Triton does. Images without a compiler are common, and a launch would raise there.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler, which it needs to launch kernels (install gcc, or name one in CC)"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(headers) / "Python.h").exists():
        return f"triton finds no Python.h in {headers}, which it needs to launch kernels (install python3-dev)"
    return None


@functools.cache
def _version() -> tuple[int, ...] | None:
    """Return the version as the package's source says it; the name it was installed under depends on the vendor."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    said = re.search(
        r"""^__version__ = ["'](\d+)\.(\d+)""", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE
    )
    return None if said is None else tuple(map(int, said.groups()))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
