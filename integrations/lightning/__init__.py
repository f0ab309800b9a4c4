"""Sharpness-aware training of any LightningModule by one callback, its sharpness in the logs by another."""

from __future__ import annotations

import importlib

try:
    importlib.import_module("pytorch_lightning")
except ModuleNotFoundError as error:
    if error.name != "pytorch_lightning":
        raise
    raise ImportError(
        "samopt.integrations.lightning needs pytorch_lightning, which is not installed; install it with: "
        'pip install "samopt[lightning]"'
    ) from error

from .monitor import SharpnessCallback
from .training import SharpnessAwareTraining, is_second_pass

__all__ = ["SharpnessAwareTraining", "SharpnessCallback", "is_second_pass"]
