"""Everything that the measures take from the optimizers' private folders, in one place."""

from __future__ import annotations

from samopt._callers.cached_weights import clear_cached_weights
from samopt._numerics.vector_norm import vector_norm
from samopt._perturb.movable_weights import MovableWeights
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.targets import Region, Targets
from samopt._replay.random_state import RngState
from samopt._replay.unobserved import unobserved
from samopt._step.trunk_reuse import graph_nodes, leaves_of
from samopt.parts.geometry import Adaptive, Euclidean, Geometry
from samopt.sharpness._measuring.saved_state import SavedState

__all__ = [
    "Adaptive",
    "Euclidean",
    "Geometry",
    "MovableWeights",
    "Perturbation",
    "Region",
    "RngState",
    "SavedState",
    "Targets",
    "clear_cached_weights",
    "graph_nodes",
    "leaves_of",
    "unobserved",
    "vector_norm",
]
