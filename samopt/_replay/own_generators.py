"""Random generators that a model holds itself, beside the global streams."""

from __future__ import annotations

import random
from typing import Any

import torch

__all__ = ["GENERATORS", "position_of", "set_position"]

GENERATORS = (torch.Generator, random.Random)
"""Kinds of generators; NumPy's, which may not be installed, are told by their module."""


def position_of(generator: Any) -> Any:
    """Return where a generator is in its stream; None for an object that is no generator.

    Args:
        generator: Of torch, of Python, or of NumPy.
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state() if hasattr(generator, "get_state") else None


def set_position(generator: Any, position: Any) -> None:
    """Set where a generator is in its stream.

    Args:
        generator: Of torch, of Python, or of NumPy.
        position: What ``position_of`` returned.
    """
    if isinstance(generator, random.Random):
        generator.setstate(position)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = position
    else:
        generator.set_state(position)
