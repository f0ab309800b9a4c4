"""What a running ``torch.amp.GradScaler`` has done to an optimizer's gradients."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp.grad_scaler import GradScaler, OptState

__all__ = ["calling_scaler_stage"]

_FRAMES = 12  # between GradScaler.step and ours: its helper, a scheduler's wrapper, step hooks


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
