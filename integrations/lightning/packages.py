"""A callback for the trainers of ``pytorch_lightning`` and of ``lightning.pytorch``, two packages with one content."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback

__all__ = ["Callback"]


def _callback_classes() -> tuple[Any, ...]:
    try:
        classes = [importlib.import_module("pytorch_lightning").Callback]
    except ModuleNotFoundError as error:
        if error.name != "pytorch_lightning":
            raise
        raise ImportError(
            "samopt.integrations.lightning needs pytorch_lightning, which is not installed; install it with: "
            'pip install "samopt[lightning]"'
        ) from error
    if importlib.util.find_spec("lightning") is not None:
        classes.append(importlib.import_module("lightning.pytorch").Callback)
    return tuple(classes)


if not TYPE_CHECKING:
    Callback = type("Callback", _callback_classes(), {"__doc__": "A callback of every Lightning that is installed."})
