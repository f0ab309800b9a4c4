"""Sharpness-aware training for PyTorch: SAM, ASAM, Fisher SAM and TRAM around any torch optimizer."""

from samopt.metrics import StepMetrics
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.rho_scheduler import RhoScheduler
from samopt.second_pass import SecondPass
from samopt.tram import TRAM
from samopt.variants import ASAM, SAM, FisherSAM

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "SAM",
    "TRAM",
    "FisherSAM",
    "RhoScheduler",
    "SecondPass",
    "SharpnessAwareOptimizer",
    "StepMetrics",
]
