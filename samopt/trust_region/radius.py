"""The radius of TRAM: the distance between the model's outputs and those of a version of it that is trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from samopt._callers.user_warnings import warn_user
from samopt._replay.unwrap import original
from samopt.parts.radius import Radius, RadiusValue
from samopt.trust_region import TRUST_REGIONS, RadiusSource, StatefulTrustRegion, TrustRegion
from samopt.trust_region.comparison import Comparison
from samopt.trust_region.ranks import sum_over_ranks
from samopt.trust_region.watch import FirstPassWatch

__all__ = ["TrustRegionRadius"]


class TrustRegionRadius(Radius):
    """``r = min(scale * d, max_radius)``, with ``d`` measured on the first pass's forward calls.

    Source: Sherborne et al. 2024, "TRAM: Bridging Trust Regions and Sharpness Aware Minimization", equations 4 to 7.

    Args:
        trust_region: A name in ``samopt.trust_region.TRUST_REGIONS``, an object with ``measure(call)``, or a callable
            without arguments that returns the distance.
        comparison: How outputs are compared.
        max_radius: Largest radius, > 0; None is no bound.

    Raises:
        TypeError: If the trust region is neither.
        ValueError: If a name is unknown, or ``max_radius`` is not positive.

    Attributes:
        trust_region: What measures the distance.
        watch: Follows the forward calls of the first pass; None until ``follow``, or where there is nothing to follow.
    """

    option = "scale"

    def __init__(
        self, trust_region: str | TrustRegion | RadiusSource, comparison: Comparison, max_radius: float | None
    ) -> None:
        if max_radius is not None and not max_radius > 0:
            raise ValueError(f"max_radius must be > 0, got {max_radius}; use scale=0 to disable the ascent")
        self.trust_region = _resolved(trust_region)
        self.comparison = comparison
        self.max_radius = max_radius
        self.watch: FirstPassWatch | None = None
        self._model: nn.Module | None = None
        self._parameters: list[Tensor] = []
        self._distance: float | Tensor | None = None

    @property
    def measures_outputs(self) -> bool:
        """Whether the distance is measured on the model's forward calls, so that a model is needed."""
        return isinstance(self.trust_region, TrustRegion)

    def follow(
        self, models: Sequence[nn.Module], parameters: Callable[[], list[Tensor]], may_move: Callable[[], bool]
    ) -> FirstPassWatch | None:
        """Return what measures the distance on the calls of the first pass; None where outputs are not measured.

        Args:
            models: The module that the training loop calls comes first.
            parameters: Returns what the optimizer updates.
            may_move: Returns whether a distance is wanted.
        """
        if not isinstance(self.trust_region, TrustRegion) or not models:
            return None

        def wanted() -> tuple[torch.device, ...] | None:
            return tuple(dict.fromkeys(p.device for p in parameters() if not p.is_cpu)) if may_move() else None

        self.watch = FirstPassWatch(self.trust_region, self.comparison, wanted)
        self._model, self._parameters = models[0], parameters()
        return self.watch

    def bind(self, model: nn.Module) -> None:
        """Give a trust region with a memory its model, once.

        Args:
            model: The module that the training loop calls.
        """
        if isinstance(self.trust_region, StatefulTrustRegion):
            self.trust_region.bind(original(model))

    def prepare(self) -> None:
        """Forget the distance of the last step; it is measured again when a group asks for its radius."""
        self._distance = None

    def at(self, value: float | Tensor) -> RadiusValue:
        """Return ``value`` times the distance of this first pass, at most ``max_radius``.

        Args:
            value: The group's ``scale``.
        """
        if not isinstance(value, Tensor) and value == 0:
            return 0.0
        if self._distance is None:
            self._distance = self._measured_distance()
        return _bounded(value * self._distance, self.max_radius)

    def metrics(self) -> dict[str, Tensor]:
        """Return the distance."""
        if self._distance is None:
            return {}
        return {"distance": torch.as_tensor(self._distance)}

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Tell the trust region that the weights are about to change; they are unperturbed.

        Args:
            parameters: Every parameter.
        """
        if isinstance(self.trust_region, StatefulTrustRegion):
            with torch.no_grad():
                self.trust_region.advance()

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the trust region's memory, and its kind.

        Args:
            parameters: Every parameter.
        """
        if not isinstance(self.trust_region, StatefulTrustRegion):
            return {}
        return {"kind": type(self.trust_region).__name__, **self.trust_region.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Load the trust region's memory; warn and start from the current weights where it is of another kind.

        Args:
            state: What ``state_dict`` returned.
            parameters: Every parameter.
        """
        if not isinstance(self.trust_region, StatefulTrustRegion):
            return
        kind = type(self.trust_region).__name__
        saved = dict(state)
        found = saved.pop("kind", None)
        with torch.no_grad():
            if found == kind:
                self.trust_region.load_state_dict(saved)
                return
            self.trust_region.reset()
        warn_user(
            f"the state dict holds {'no trust region' if found is None else f'the trust region {found}'}, and this "
            f"optimizer's is {kind}: its reference starts from the current weights, so the next step is a plain one"
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"watch": None, "_model": None, "_parameters": [], "_distance": None}

    def _measured_distance(self) -> float | Tensor:
        if not self.measures_outputs:
            return cast(RadiusSource, self.trust_region)()
        watch = self.watch
        measured = None if watch is None else watch.total()
        if self._model is None or watch is None or measured is None:
            raise RuntimeError(
                f"TRAM saw no forward call of model={type(self._model).__name__} in this first pass, so there is no "
                "distance to take the radius from; pass as model= the module that the loop calls itself, and compile "
                "it with torch.compile(model), not model.compile()"
            )
        called = watch.caller or self._model  # accelerate, Lightning and Fabric put DDP around the model later
        total, weight = sum_over_ranks(torch.stack(measured), called, self._parameters)
        mean: Tensor = total / weight.clamp(min=1)
        return mean


def _resolved(trust_region: str | TrustRegion | RadiusSource) -> TrustRegion | RadiusSource:
    """Return the trust region that was named or given."""
    if isinstance(trust_region, str):
        if trust_region not in TRUST_REGIONS:
            raise ValueError(
                f"trust_region must be one of {list(TRUST_REGIONS)}, an object with measure(call), or a callable "
                f"without arguments; got {trust_region!r}"
            )
        made: TrustRegion = TRUST_REGIONS[trust_region]()
        return made
    if isinstance(trust_region, type) or not (isinstance(trust_region, TrustRegion) or callable(trust_region)):
        raise TypeError(
            f"trust_region must be a name, an object with measure(call), or a callable without arguments; got "
            f"{trust_region!r}"
        )
    return trust_region


def _bounded(radius: float | Tensor, largest: float | None) -> float | Tensor:
    """Return the radius, at most ``largest``; 0 where it is not finite, since no distance was measured then."""
    if isinstance(radius, Tensor):
        radius = radius if largest is None else radius.clamp(max=largest)
        return torch.where(torch.isfinite(radius), radius, 0.0)
    radius = radius if largest is None else min(radius, largest)
    return radius if math.isfinite(radius) else 0.0
