"""The lifecycle that every part of an optimizer shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from samopt._replay.call_watch import PassFollower

__all__ = ["Part"]


class Part:
    """One choice in ``epsilon = r T^2 d / ||T d||``: a direction, a geometry, a radius or a combination.

    An optimizer is four parts. A new method is a new part, or a new combination of parts. The optimizer calls every
    part in the same order: ``check``, ``check_models`` and ``follow`` when it is made; ``advance`` just before each
    step of the base optimizer; ``state_dict`` and ``load_state_dict`` for checkpoints; ``metrics`` after each step. The
    defaults do nothing.
    """

    def check(self, base: Optimizer) -> None:
        """Raise ``ValueError`` if the part cannot work with a base optimizer.

        Args:
            base: The base optimizer, before anything about it is changed.
        """

    def check_models(self, models: Sequence[nn.Module], base: Optimizer) -> None:
        """Raise ``TypeError`` or ``ValueError`` if the part cannot work with what was given as ``model``.

        Args:
            models: The modules; empty where none was given.
            base: The base optimizer, before anything about it is changed.
        """

    def follow(
        self, models: Sequence[nn.Module], parameters: Callable[[], list[Tensor]], may_move: Callable[[], bool]
    ) -> PassFollower | None:
        """Return what is to be told of the forward calls of both passes, for a part that needs them; None by default.

        It is called for optimizers of two passes, when they are made, copied or loaded from a pickle.

        Args:
            models: What was given as ``model``; the calls of the first are followed.
            parameters: Returns every parameter, in the order of the groups.
            may_move: Returns whether this step has a second pass, as far as the host can tell.
        """
        return None

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Note that the base optimizer is about to step with the gradients that the parameters hold now.

        Args:
            parameters: Every parameter, in the order of the groups.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Return what the part measured in the latest step, as 0-dim tensors by name."""
        return {}

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return what a checkpoint must hold; an empty dict for a part without state.

        Args:
            parameters: Every parameter, in the order of the groups. Tensors are saved by this order.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Continue from what ``state_dict`` returned; start from the beginning where that is empty.

        Args:
            state: The saved state.
            parameters: As for ``state_dict``.
        """
