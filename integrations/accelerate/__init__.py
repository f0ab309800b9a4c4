"""The second pass in a training loop of your own around ``accelerate``."""

from .backward import SharpnessAwareBackward

__all__ = ["SharpnessAwareBackward"]
