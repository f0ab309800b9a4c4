"""Sharpness measures of torch models; each leaves the model exactly as it was."""

from samopt.sharpness._measuring.logits import normalize_logits
from samopt.sharpness._measuring.losses import accuracy, cross_entropy, hf_loss
from samopt.sharpness._measuring.results import Result
from samopt.sharpness.activations import ActiveUnits, active_units
from samopt.sharpness.curvature.eigenvalues import Eigenvalues, gauss_newton_eigenvalues, hessian_eigenvalues
from samopt.sharpness.curvature.preconditioned import preconditioned_eigenvalues
from samopt.sharpness.curvature.spectral_density import SpectralDensity, spectral_density
from samopt.sharpness.curvature.trace import Trace, hessian_trace
from samopt.sharpness.labels import LabelSharpness, label_sharpness
from samopt.sharpness.monitor import SharpnessMonitor
from samopt.sharpness.nearby.average_case import AverageCase, average_case
from samopt.sharpness.nearby.per_layer import PerLayer, per_layer
from samopt.sharpness.nearby.worst_case import WorstCase, worst_case
from samopt.sharpness.paths.interpolation import Interpolation, interpolate
from samopt.sharpness.paths.landscape import Landscape, landscape

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
