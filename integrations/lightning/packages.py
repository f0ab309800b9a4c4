"""A callback for the trainers of ``pytorch_lightning`` and of ``lightning.pytorch``, two packages with one content."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

import pytorch_lightning

__all__ = ["Callback"]

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    _classes = [pytorch_lightning.Callback]
    if importlib.util.find_spec("lightning") is not None:
        _classes.append(importlib.import_module("lightning.pytorch").Callback)
    Callback = type("Callback", tuple(_classes), {"__doc__": "A callback of every Lightning that is installed."})
