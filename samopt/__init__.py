"""Sharpness-aware training for PyTorch: SAM, ASAM, TRAM and their relatives around any torch optimizer."""

import importlib
from typing import TYPE_CHECKING, Any

from samopt._step.pass_handle import PassHandle
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.rho_scheduler import RhoScheduler
from samopt.step_metrics import StepMetrics
from samopt.variants import available, create
from samopt.variants.asam import ASAM
from samopt.variants.fisher_sam import FisherSAM
from samopt.variants.flat_lora import FlatLoRA
from samopt.variants.friendly_sam import FriendlySAM
from samopt.variants.functional_sam import FunctionalSAM
from samopt.variants.gsam import GSAM
from samopt.variants.lesam import LESAM
from samopt.variants.looksam import LookSAM
from samopt.variants.momentum_sam import MomentumSAM
from samopt.variants.preconditioned_sam import PreconditionedSAM
from samopt.variants.sam import SAM
from samopt.variants.tram import TRAM
from samopt.variants.wsam import WSAM

if TYPE_CHECKING:
    from samopt import sharpness as sharpness
    from samopt.sharpness.radius.find_rho import find_rho

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "GSAM",
    "LESAM",
    "SAM",
    "TRAM",
    "WSAM",
    "FisherSAM",
    "FlatLoRA",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "MomentumSAM",
    "PassHandle",
    "PreconditionedSAM",
    "RhoScheduler",
    "SharpnessAwareOptimizer",
    "StepMetrics",
    "available",
    "create",
    "find_rho",
]

_LAZY = ("find_rho", "sharpness")  # imported at the first use, so that `import samopt` stays quick


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    measures = importlib.import_module(f"{__name__}.sharpness")
    return measures if name == "sharpness" else getattr(measures, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
