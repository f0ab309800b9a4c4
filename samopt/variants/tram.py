"""TRAM: a radius that is the distance between the model and a version of it that is trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt._callers.user_warnings import warn_user
from samopt._perturb.gradients import StashedGradients
from samopt._perturb.targets import Targets
from samopt._replay.forward_calls import PassObserver
from samopt._step.second_pass import SecondPass
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.direction import Direction, named_direction
from samopt.parts.geometry import Adaptive, Euclidean, Fisher, Geometry
from samopt.step_metrics import StepMetrics
from samopt.trust_region import (
    TRUST_REGIONS,
    Divergence,
    ForwardCall,
    RadiusSource,
    StatefulTrustRegion,
    TrustRegion,
)
from samopt.trust_region.comparison import Comparison
from samopt.trust_region.divergence import check_divergence
from samopt.trust_region.ranks import sum_over_ranks
from samopt.trust_region.unwrap import original
from samopt.trust_region.watch import FirstPassWatch

__all__ = ["TRAM"]

_METRICS: dict[str, tuple[type[Geometry], float]] = {
    "adaptive": (Adaptive, 0.01),
    "euclidean": (Euclidean, 0.0),
    "fisher": (Fisher, 0.1),
}


class TRAM(SharpnessAwareOptimizer):
    """Trust-region-aware minimisation: fine-tuning that climbs only as far as the model's outputs have moved.

    The base optimizer gets the gradient at ``w + r T^2 g / ||T g||_2`` with the radius ``r = scale * d``, where ``d``
    compares what the model's forward returned in the first pass with what a trusted version of it returns on the same
    inputs. Source: Sherborne et al. 2024, "TRAM: Bridging Trust Regions and Sharpness Aware Minimization", equations 4
    to 7 and algorithm 1.

    Cost: SAM's two forward-backward passes and one forward pass without a graph; memory as the trust region says. ``d``
    and ``r`` stay on the device. ``scale=0`` is the base alone, at its cost.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        model: The outermost module that the training loop calls; needed by every trust region that measures outputs.
        trust_region: "previous", "ema", "pretrained" or "input_noise"; an object from ``samopt.trust_region``; or your
            own: with ``measure(call)``, or a callable without arguments that returns the distance.
        divergence: "kl" (reference || current), "reverse_kl", "symmetric_kl", "l2" or "mmd"; or a callable
            ``(reference, current) -> Tensor`` on logits.
        scale: Factor from distance to radius, >= 0. It is each parameter group's ``rho``, so ``RhoScheduler`` drives
            it, and groups may differ.
        max_radius: Largest radius, > 0; None is no bound.
        metric: "adaptive" (ASAM's), "euclidean" (SAM's), "fisher" (TRAM-Fisher); or an object with the metric
            protocol.
        eta: Stabiliser of the metric, >= 0; None is 0.01 for "adaptive" and 0.1 for "fisher".
        class_dim: Dimension of the logits that holds the classes: 1 for segmentation models.
        logits: Takes the compared tensor from what the model returns; None looks for ``.logits``, entries named so, or
            the first floating-point tensor.
        mask: Returns from a ``ForwardCall`` which positions count, as a boolean tensor shaped like the logits without
            the class dimension; None leaves out padding (attention mask 0) and the label -100.
        **options: ``norm``, ``stochastic_rounding``, ``seed``, ``sync_perturbation``, ``backend``,
            ``measure_grad_norms``, ``warn_on_stall`` (see ``SharpnessAwareOptimizer``), and the arguments of
            ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form, ``rho`` is given, or ``model`` is missing.
        ValueError: If an option is out of range or unknown.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, scale=10.0)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.long)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> distances = [(optimizer.step(closure), float(optimizer.last_step.distance))[1] for _ in range(2)]
        >>> distances[0], distances[1] > 0
        (0.0, True)
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        *,
        model: nn.Module | None = None,
        trust_region: str | TrustRegion | RadiusSource = "previous",
        divergence: str | Divergence = "kl",
        scale: float = 1.0,
        max_radius: float | None = None,
        metric: str | Geometry = "adaptive",
        eta: float | None = None,
        class_dim: int = -1,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Callable[[ForwardCall], Tensor] | None = None,
        **options: Any,
    ) -> None:
        if "rho" in options:
            raise TypeError(
                f"TRAM's radius is scale times the trust-region distance, so it takes no rho, got {options['rho']!r}; "
                "use scale=, or samopt.ASAM for a constant radius"
            )
        check_divergence(divergence)
        if max_radius is not None and not max_radius > 0:
            raise ValueError(f"max_radius must be > 0, got {max_radius}; use scale=0 to disable the ascent")
        self.trust_region = _region(trust_region)
        if isinstance(self.trust_region, TrustRegion) and not isinstance(model, nn.Module):
            raise TypeError(
                f"TRAM measures {type(self.trust_region).__name__} on the model's forward calls, but model= is "
                f"{type(model).__name__}; pass the module that the training loop calls, as in "
                "samopt.TRAM(base_optimizer, model=model)"
            )
        direction = named_direction(options.get("direction", "gradient"))
        if isinstance(self.trust_region, TrustRegion) and isinstance(direction, Direction):
            raise ValueError(
                f"TRAM measures {type(self.trust_region).__name__} in the first pass, which "
                f"direction={options['direction']!r} does without; leave direction= out, or give trust_region= a "
                "callable without arguments"
            )
        self.max_radius = max_radius
        self._comparison = Comparison(divergence, class_dim, logits, mask)
        self._distance: float | Tensor | None = None
        chosen, usual_eta = _metric(metric)
        super().__init__(
            params,
            base_optimizer,
            metric=chosen,
            rho=scale,
            eta=usual_eta if eta is None else eta,
            model=model,
            **options,
        )
        if isinstance(self.trust_region, StatefulTrustRegion) and model is not None:
            self.trust_region.bind(original(model))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "trust_region": self.trust_region,
            "max_radius": self.max_radius,
            "_comparison": self._comparison,
            "_distance": None,
        }

    def _observers(self, model: nn.Module | None) -> Iterable[PassObserver]:
        self._watch: FirstPassWatch | None = None
        if isinstance(self.trust_region, TrustRegion) and model is not None:
            self._watch = FirstPassWatch(self.trust_region, self._comparison)
            self._watch.attach(model, self, self._accelerators_if_moving)
        return () if self._watch is None else (self._watch,)

    def _accelerators_if_moving(self) -> tuple[torch.device, ...] | None:
        return tuple(self.accelerators()) if self.may_move() else None

    def take_stock(self) -> tuple[StashedGradients, list[Targets]]:
        """Return what ``SharpnessAwareOptimizer.take_stock`` does, with a newly measured distance in the radii."""
        self._distance = None
        return super().take_stock()

    def radius(self, group: dict[str, Any]) -> float | Tensor:
        """Return ``scale`` times the distance of this first pass, at most ``max_radius``.

        Args:
            group: One of ``param_groups``.
        """
        scale = self.option(group, "rho")
        if not isinstance(scale, Tensor) and scale == 0:
            return 0.0
        if self._distance is None:
            self._distance = self._measured_distance()
        return _bounded(scale * self._distance, self.max_radius)

    def _measured_distance(self) -> float | Tensor:
        if self._watch is None:
            source = cast(RadiusSource, self.trust_region)
            return source()
        model = self._passes.model
        if model is None or (measured := self._watch.total()) is None:
            raise RuntimeError(
                f"TRAM saw no forward call of model={type(model).__name__} in this first pass, so there is no distance "
                "to take the radius from; pass as model= the module that the loop calls itself, and compile it with "
                "torch.compile(model), not model.compile()"
            )
        total, weight = sum_over_ranks(torch.stack(measured), model, self.parameters())
        mean: Tensor = total / weight.clamp(min=1)
        return mean

    def measured(self, second: SecondPass) -> StepMetrics:
        """Return what the step measured, the trust-region distance included.

        Args:
            second: The pass.
        """
        distance = self._distance if isinstance(self._distance, Tensor | None) else torch.tensor(float(self._distance))
        return replace(super().measured(second), distance=distance)

    def _before_update(self) -> None:
        super()._before_update()
        if isinstance(self.trust_region, StatefulTrustRegion):
            with torch.no_grad():
                self.trust_region.advance()

    def _own_state(self) -> dict[str, Any]:
        own = super()._own_state()
        if isinstance(self.trust_region, StatefulTrustRegion):
            own["trust_region"] = {"kind": type(self.trust_region).__name__, **self.trust_region.state_dict()}
        return own

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        super()._load_own_state(own)
        if not isinstance(self.trust_region, StatefulTrustRegion):
            return
        kind = type(self.trust_region).__name__
        saved = dict((own or {}).get("trust_region", {}))
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


def _region(trust_region: str | TrustRegion | RadiusSource) -> TrustRegion | RadiusSource:
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


def _metric(metric: str | Geometry) -> tuple[Geometry, float]:
    if not isinstance(metric, str):
        return metric, 0.01
    if metric not in _METRICS:
        raise ValueError(
            f"metric must be one of {list(_METRICS)}, or an object with applies_to and scale; got {metric!r}"
        )
    kind, eta = _METRICS[metric]
    return kind(), eta


def _bounded(radius: float | Tensor, largest: float | None) -> float | Tensor:
    """Return the radius, at most ``largest``; 0 where it is not finite, since no distance was measured then."""
    if isinstance(radius, Tensor):
        radius = radius if largest is None else radius.clamp(max=largest)
        return torch.where(torch.isfinite(radius), radius, 0.0)
    radius = radius if largest is None else min(radius, largest)
    return radius if math.isfinite(radius) else 0.0
