"""What a running ``torch.amp.GradScaler`` has done to an optimizer's gradients."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp.grad_scaler import GradScaler, OptState

__all__ = ["calling_scaler_stage", "is_unscaling"]

_FRAMES = 12  # between GradScaler.step and ours: its helper, a scheduler's wrapper, step hooks
_UNSCALE_FRAMES = 4  # between GradScaler.unscale_ and ours: its helper, an optimizer around this one


def calling_scaler_stage() -> OptState | None:
    """Return how far the ``GradScaler`` whose ``step`` is calling us got, or None where none is.

    The scaler does not tell the optimizer that it is the caller, so the call stack is asked.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        if frame.f_code is GradScaler._maybe_opt_step.__code__:
            stage: OptState = frame.f_locals["optimizer_state"]["stage"]
            return stage
        frame = frame.f_back
    return None


def is_unscaling() -> bool:
    """Return whether a ``GradScaler.unscale_`` is reading the parameter groups, to divide their gradients.

    It leaves no trace on the gradients, not even in their version counters, so the call stack is asked again.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_UNSCALE_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == "unscale_" and isinstance(frame.f_locals.get("self"), GradScaler):
            return True
        frame = frame.f_back
    return False
