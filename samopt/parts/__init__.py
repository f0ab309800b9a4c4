"""What can be chosen? Direction, geometry, radius and combination: the four parts of every optimizer."""

from samopt.parts.combination import Combination, ReusedComponent, SurrogateGap, WeightedSharpness
from samopt.parts.direction import (
    CachedDirection,
    Direction,
    Friendly,
    Gradient,
    KnownDirection,
    Momentum,
    ReusedGradient,
)
from samopt.parts.functional import FunctionalGradient
from samopt.parts.geometry import Adaptive, Euclidean, Fisher, Geometry, Preconditioned
from samopt.parts.part import Part
from samopt.parts.radius import ConstantRadius, LossBudget, Radius

__all__ = [
    "Adaptive",
    "CachedDirection",
    "Combination",
    "ConstantRadius",
    "Direction",
    "Euclidean",
    "Fisher",
    "Friendly",
    "FunctionalGradient",
    "Geometry",
    "Gradient",
    "KnownDirection",
    "LossBudget",
    "Momentum",
    "Part",
    "Preconditioned",
    "Radius",
    "ReusedComponent",
    "ReusedGradient",
    "SurrogateGap",
    "WeightedSharpness",
]
