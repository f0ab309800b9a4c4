"""The optimizer's own state inside the base optimizer's checkpoint."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from samopt import SharpnessAwareOptimizer

__all__ = ["CheckpointEntry"]

_KEY = "samopt"


class CheckpointEntry:
    """Adds a "samopt" entry to the state dict that the base optimizer writes, and takes it back when one is loaded.

    ``Trainer`` saves and loads the base, long before and after the sharpness-aware optimizer around it exists; a base
    without one ignores the entry.

    Args:
        base: The optimizer whose state dicts carry the entry.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._owner: SharpnessAwareOptimizer | None = None
        self._loaded: Any = None
        self._handles = [
            base.register_state_dict_post_hook(self._add),
            base.register_load_state_dict_pre_hook(self._take),
        ]

    def belongs_to(self, optimizer: SharpnessAwareOptimizer) -> None:
        """Hand what was loaded to its owner, whose state is saved from now on.

        Args:
            optimizer: The optimizer around ``base``.
        """
        self._owner = optimizer
        if self._loaded is not None:
            optimizer.load_state_dict(self.base.state_dict() | {_KEY: self._loaded})
            self._loaded = None

    def remove(self) -> None:
        """Leave the base's state dicts alone."""
        for handle in self._handles:
            handle.remove()

    def _add(self, base: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._owner is not None:
            state_dict[_KEY] = self._owner._own_state()  # its state_dict() would ask the base, and so call this again

    def _take(self, base: Optimizer, state_dict: dict[str, Any]) -> None:
        if _KEY in state_dict:
            self._loaded = state_dict[_KEY]
