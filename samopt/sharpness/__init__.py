"""Sharpness measures of torch models; each leaves the model exactly as it was."""

from samopt.sharpness.activations import ActiveUnits, active_units
from samopt.sharpness.average_case import AverageCase, average_case
from samopt.sharpness.eigenvalues import Eigenvalues, gauss_newton_eigenvalues, hessian_eigenvalues
from samopt.sharpness.interpolation import Interpolation, interpolate
from samopt.sharpness.labels import LabelSharpness, label_sharpness
from samopt.sharpness.landscape import Landscape, landscape
from samopt.sharpness.logits import normalize_logits
from samopt.sharpness.losses import accuracy, cross_entropy, hf_loss
from samopt.sharpness.monitor import SharpnessMonitor
from samopt.sharpness.per_layer import PerLayer, per_layer
from samopt.sharpness.preconditioned import preconditioned_eigenvalues
from samopt.sharpness.results import Result
from samopt.sharpness.spectrum import SpectralDensity, spectral_density
from samopt.sharpness.trace import Trace, hessian_trace
from samopt.sharpness.worst_case import WorstCase, worst_case

__all__ = [
    "ActiveUnits",
    "AverageCase",
    "Eigenvalues",
    "Interpolation",
    "LabelSharpness",
    "Landscape",
    "PerLayer",
    "Result",
    "SharpnessMonitor",
    "SpectralDensity",
    "Trace",
    "WorstCase",
    "accuracy",
    "active_units",
    "average_case",
    "cross_entropy",
    "gauss_newton_eigenvalues",
    "hessian_eigenvalues",
    "hessian_trace",
    "hf_loss",
    "interpolate",
    "label_sharpness",
    "landscape",
    "normalize_logits",
    "per_layer",
    "preconditioned_eigenvalues",
    "spectral_density",
    "worst_case",
]
