"""Whether forward calls belong to a training step, or to a measurement between two steps."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = ["is_observed", "is_unobserved", "outside_transforms", "unobserved"]

_depth = 0


def is_observed() -> bool:
    """Return whether a forward call that runs now may belong to a training step.

    Calls inside a transform of ``torch.func`` (vmap, grad) do not: they run on the tensors that they were given.
    """
    return _depth == 0 and torch._C._functorch.peek_interpreter_stack() is None


def is_unobserved() -> bool:
    """Return whether a forward call that runs now is inside ``unobserved``, or is recorded as a graph.

    What ``torch.jit.trace`` and ``make_fx`` record is to be the model itself, also where it is in train mode.
    """
    return _depth > 0 or torch._C._is_tracing() or _is_recorded_by_fx()


def _is_recorded_by_fx() -> bool:
    get_mode = getattr(sys.modules.get("torch.fx.experimental.proxy_tensor"), "get_proxy_mode", None)
    return get_mode is not None and get_mode() is not None


def outside_transforms() -> AbstractContextManager[object]:
    """Return a context that runs code outside every transform of ``torch.func``."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


@contextmanager
def unobserved() -> Generator[None]:
    """Let forward calls inside this context belong to no pass of any optimizer."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
