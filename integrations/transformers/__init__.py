"""SAM and its relatives as arguments of a Hugging Face ``Trainer``, with sharpness in its logs."""

from __future__ import annotations

import importlib

try:
    for _name in ("transformers", "accelerate"):
        importlib.import_module(_name)
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise ImportError(
        f"samopt.integrations.transformers needs {error.name}, which is not installed; install it with: "
        'pip install "samopt[hf]"'
    ) from error

from .arguments import SAMArguments, SAMTrainingArguments
from .callback import SharpnessCallback
from .trainer import SAMTrainer, SAMTrainerMixin, make_sharpness_aware

__all__ = [
    "SAMArguments",
    "SAMTrainer",
    "SAMTrainerMixin",
    "SAMTrainingArguments",
    "SharpnessCallback",
    "make_sharpness_aware",
]
