"""Everything that the measures take from the optimizers' private folders, in one place."""

from __future__ import annotations

from samopt._perturb.perturbation import Perturbation
from samopt._perturb.perturbation import Placement as MovableWeights
from samopt._perturb.targets import Region, Targets
from samopt._replay.forward_calls import RngState, SavedBuffers
from samopt._replay.unobserved import unobserved
from samopt.kernels.reference import vector_norm
from samopt.parts.geometry import Adaptive, Euclidean
from samopt.parts.geometry import Metric as Geometry

__all__ = [
    "Adaptive",
    "Euclidean",
    "Geometry",
    "MovableWeights",
    "Perturbation",
    "Region",
    "RngState",
    "SavedBuffers",
    "Targets",
    "unobserved",
    "vector_norm",
]
