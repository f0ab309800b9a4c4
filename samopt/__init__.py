"""Sharpness-aware training for PyTorch: SAM and ASAM around any torch optimizer."""

from samopt.metrics import StepMetrics
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.rho_scheduler import RhoScheduler
from samopt.second_pass import SecondPass
from samopt.variants import ASAM, SAM

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "SAM",
    "RhoScheduler",
    "SecondPass",
    "SharpnessAwareOptimizer",
    "StepMetrics",
]
