"""Sharpness-aware training for PyTorch: SAM, ASAM, TRAM and their relatives around any torch optimizer."""

from samopt.metrics import StepMetrics
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.presets import GSAM, LESAM, WSAM, FriendlySAM, LookSAM, MomentumSAM
from samopt.rho_scheduler import RhoScheduler
from samopt.second_pass import SecondPass
from samopt.tram import TRAM
from samopt.variants import ASAM, SAM, FisherSAM

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
]
