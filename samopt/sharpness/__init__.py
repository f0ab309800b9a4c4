"""Sharpness measures of torch models; each leaves the model exactly as it was."""

from samopt.sharpness._measuring.logits import normalize_logits
from samopt.sharpness._measuring.losses import accuracy, cross_entropy, hf_loss
from samopt.sharpness._measuring.results import Result
from samopt.sharpness.activations import ActiveUnits, active_units
from samopt.sharpness.comparison.compare import Comparison, compare
from samopt.sharpness.curvature.eigenvalues import Eigenvalues, WarmStart, gauss_newton_eigenvalues, hessian_eigenvalues
from samopt.sharpness.curvature.preconditioned import preconditioned_eigenvalues
from samopt.sharpness.curvature.spectral_density import SpectralDensity, spectral_density
from samopt.sharpness.curvature.trace import Trace, hessian_trace
from samopt.sharpness.dimension import IntrinsicDimension, intrinsic_dimension
from samopt.sharpness.labels import LabelSharpness, label_sharpness
from samopt.sharpness.monitor import SharpnessMonitor
from samopt.sharpness.nearby.average_case import AverageCase, average_case
from samopt.sharpness.nearby.per_layer import PerLayer, per_layer
from samopt.sharpness.nearby.worst_case import WorstCase, worst_case
from samopt.sharpness.paths.interpolation import Interpolation, interpolate
from samopt.sharpness.paths.landscape import Landscape, landscape
from samopt.sharpness.radius.find_rho import RhoSearch, find_rho
from samopt.sharpness.robustness.adversarial import fgsm
from samopt.sharpness.robustness.forgetting import Forgetting, forgetting
from samopt.sharpness.robustness.quantization import quantization
from samopt.sharpness.robustness.result import Robustness
from samopt.sharpness.robustness.weight_noise import weight_noise

__all__ = [
    "ActiveUnits",
    "AverageCase",
    "Comparison",
    "Eigenvalues",
    "Forgetting",
    "Interpolation",
    "IntrinsicDimension",
    "LabelSharpness",
    "Landscape",
    "PerLayer",
    "Result",
    "RhoSearch",
    "Robustness",
    "SharpnessMonitor",
    "SpectralDensity",
    "Trace",
    "WarmStart",
    "WorstCase",
    "accuracy",
    "active_units",
    "average_case",
    "compare",
    "cross_entropy",
    "fgsm",
    "find_rho",
    "forgetting",
    "gauss_newton_eigenvalues",
    "hessian_eigenvalues",
    "hessian_trace",
    "hf_loss",
    "interpolate",
    "intrinsic_dimension",
    "label_sharpness",
    "landscape",
    "normalize_logits",
    "per_layer",
    "preconditioned_eigenvalues",
    "quantization",
    "spectral_density",
    "weight_noise",
    "worst_case",
]
