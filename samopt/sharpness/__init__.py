"""Sharpness measures of torch models; each leaves the model exactly as it was."""

from samopt.sharpness.average_case import AverageCase, average_case
from samopt.sharpness.logits import normalize_logits
from samopt.sharpness.losses import accuracy, cross_entropy, hf_loss
from samopt.sharpness.monitor import SharpnessMonitor
from samopt.sharpness.per_layer import PerLayer, per_layer
from samopt.sharpness.results import Result
from samopt.sharpness.worst_case import WorstCase, worst_case

__all__ = [
    "AverageCase",
    "PerLayer",
    "Result",
    "SharpnessMonitor",
    "WorstCase",
    "accuracy",
    "average_case",
    "cross_entropy",
    "hf_loss",
    "normalize_logits",
    "per_layer",
    "worst_case",
]
