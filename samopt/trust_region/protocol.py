"""What may answer the question of TRAM: how far is far enough at this step?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from samopt.trust_region.call import ForwardCall

__all__ = ["RadiusSource", "StatefulTrustRegion", "TrustRegion"]

RadiusSource: TypeAlias = Callable[[], float | Tensor]
"""The shortest trust region: called once at each ascent; returns the distance ``d >= 0``, a number or 0-dim tensor."""


@runtime_checkable
class TrustRegion(Protocol):
    """A distance that is measured on the model's own forward calls.

    ``measure`` is asked after every forward call of the first pass, and ``TRAM`` averages what it returns, weighted by
    the number of examples in each call. It must leave the model as it is: ``call.rerun`` and ``call.distance_to`` do.

    Example:
        >>> class HalvedWeights:
        ...     def measure(self, call):
        ...         halved = {name: weight / 2 for name, weight in call.module.named_parameters()}
        ...         return call.distance_to(call.rerun(halved))
        >>> isinstance(HalvedWeights(), TrustRegion)
        True
    """

    def measure(self, call: ForwardCall) -> float | Tensor:
        """Return the distance ``d >= 0`` of one call, averaged over its examples: a number or a 0-dim tensor."""


@runtime_checkable
class StatefulTrustRegion(TrustRegion, Protocol):
    """A trust region that remembers something between steps."""

    def bind(self, model: nn.Module) -> None:
        """Meet the model, once, when the optimizer is made; ``model`` is free of DDP and ``torch.compile``."""

    def advance(self) -> None:
        """Note that the base optimizer is about to move the weights; they are at ``theta_t``, unperturbed."""

    def reset(self) -> None:
        """Start from the model's current weights, because a checkpoint without a trust region was loaded."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
