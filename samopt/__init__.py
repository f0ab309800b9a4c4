"""Sharpness-aware training for PyTorch: SAM, ASAM, TRAM and their relatives around any torch optimizer."""

from samopt._step.second_pass import SecondPass
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.rho_scheduler import RhoScheduler
from samopt.step_metrics import StepMetrics
from samopt.variants import available, create
from samopt.variants.lesam import GSAM, LESAM, WSAM, FriendlySAM, LookSAM, MomentumSAM
from samopt.variants.sam import ASAM, SAM, FisherSAM
from samopt.variants.tram import TRAM

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "GSAM",
    "LESAM",
    "SAM",
    "TRAM",
    "WSAM",
    "FisherSAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "RhoScheduler",
    "SecondPass",
    "SharpnessAwareOptimizer",
    "StepMetrics",
    "available",
    "create",
]
