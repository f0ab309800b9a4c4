"""Sharpness-aware training of any LightningModule, by a callback."""

from __future__ import annotations

from .training import SharpnessAwareTraining, is_second_pass

__all__ = ["SharpnessAwareTraining", "is_second_pass"]
