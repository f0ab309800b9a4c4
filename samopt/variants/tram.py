"""TRAM: a radius that is the distance between the model and a version of it that is trusted (Sherborne et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._step.arguments import refuse_fixed
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.direction import KnownDirection, named_direction
from samopt.parts.geometry import Adaptive, Euclidean, Fisher, Geometry, Preconditioned
from samopt.trust_region import Divergence, ForwardCall, RadiusSource, TrustRegion
from samopt.trust_region.comparison import Comparison
from samopt.trust_region.divergence import check_divergence
from samopt.trust_region.radius import TrustRegionRadius
from samopt.variants._options import TAKEN_ELSEWHERE, OptionsWithoutModel, all_options_shown

__all__ = ["TRAM"]

_GEOMETRIES: dict[str, tuple[type[Geometry], float]] = {
    "adaptive": (Adaptive, 0.01),
    "euclidean": (Euclidean, 0.0),
    "fisher": (Fisher, 0.1),
    "preconditioned": (Preconditioned, 0.0),
}


@all_options_shown
class TRAM(SharpnessAwareOptimizer):
    """Trust-region-aware minimisation: fine-tuning with a radius as large as the model's outputs have moved.

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
        scale: Factor from distance to radius, >= 0. Each parameter group holds it as ``scale``; ``RhoScheduler``
            drives it, and groups may differ.
        max_radius: Largest radius, > 0; None is no bound.
        geometry: "adaptive" (ASAM's), "euclidean" (SAM's), "fisher" (TRAM-Fisher), "preconditioned" (of the
            base's second moment); or an object from ``samopt.parts``.
        eta: Stabiliser of the geometry, >= 0; None is 0.01 for "adaptive" and 0.1 for "fisher".
        class_dim: Dimension of the logits that holds the classes: 1 for segmentation models.
        logits: Takes the compared tensor from what the model returns; None looks for ``.logits``, entries named so, or
            the first floating-point tensor.
        mask: Returns from a ``ForwardCall`` which positions count, as a boolean tensor shaped like the logits without
            the class dimension; None leaves out padding (attention mask 0) and the label -100.
        **options: ``only``, ``direction``, ``combination``, ``norm``, ``stochastic_rounding``, ``seed``,
            ``sync_perturbation``, ``backend``, ``measure_grad_norms``, ``warn_on_stall`` as for
            ``SharpnessAwareOptimizer``; with parameters, also the arguments of ``base_optimizer``.

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

    _fixed_options = ("reuse_trunk",)

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        *,
        model: nn.Module | None = ...,
        trust_region: str | TrustRegion | RadiusSource = ...,
        divergence: str | Divergence = ...,
        scale: float = ...,
        max_radius: float | None = ...,
        geometry: str | Geometry = ...,
        eta: float | None = ...,
        class_dim: int = ...,
        logits: Callable[[Any], Tensor] | None = ...,
        mask: Callable[[ForwardCall], Tensor] | None = ...,
        **options: Unpack[OptionsWithoutModel],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        *,
        model: nn.Module | None = ...,
        trust_region: str | TrustRegion | RadiusSource = ...,
        divergence: str | Divergence = ...,
        scale: float = ...,
        max_radius: float | None = ...,
        geometry: str | Geometry = ...,
        eta: float | None = ...,
        class_dim: int = ...,
        logits: Callable[[Any], Tensor] | None = ...,
        mask: Callable[[ForwardCall], Tensor] | None = ...,
        **options: Any,
    ) -> None: ...

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
        geometry: str | Geometry = "adaptive",
        eta: float | None = None,
        class_dim: int = -1,
        logits: Callable[[Any], Tensor] | None = None,
        mask: Callable[[ForwardCall], Tensor] | None = None,
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            rho="its radius is scale times the trust-region distance: use scale=, or samopt.ASAM for a constant radius",
            radius=TAKEN_ELSEWHERE,
            reuse_trunk="its reference is another run of the whole model; use samopt.SAM, which takes it",
        )
        check_divergence(divergence)
        radius = TrustRegionRadius(trust_region, Comparison(divergence, class_dim, logits, mask), max_radius)
        if radius.measures_outputs:
            self._check_outputs(radius, model, options.get("direction", "gradient"))
        chosen, usual_eta = _chosen(geometry)
        super().__init__(
            params,
            base_optimizer,
            geometry=chosen,
            rho=scale,
            eta=usual_eta if eta is None else eta,
            radius=radius,
            model=model,
            **options,
        )
        if model is not None:
            radius.bind(model)

    @property
    def trust_region(self) -> TrustRegion | RadiusSource:
        """What measures the distance."""
        return self._trust_region_radius.trust_region

    @property
    def max_radius(self) -> float | None:
        """Largest radius; None is no bound."""
        return self._trust_region_radius.max_radius

    @property
    def _trust_region_radius(self) -> TrustRegionRadius:
        assert isinstance(self.radius, TrustRegionRadius)
        return self.radius

    @staticmethod
    def _check_outputs(radius: TrustRegionRadius, model: Any, direction: Any) -> None:
        """Raise if the outputs of a first pass cannot be measured."""
        kind = type(radius.trust_region).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"TRAM measures {kind} on the model's forward calls, but model= is {type(model).__name__}; pass the "
                "module that the training loop calls, as in samopt.TRAM(base_optimizer, model=model)"
            )
        if isinstance(named_direction(direction), KnownDirection):
            raise ValueError(
                f"TRAM measures {kind} in the first pass, which direction={direction!r} does without; leave direction= "
                "out, or give trust_region= a callable without arguments"
            )


def _chosen(geometry: str | Geometry) -> tuple[Geometry, float]:
    """Return a geometry, and the stabiliser that it usually has."""
    if not isinstance(geometry, str):
        return geometry, 0.01
    if geometry not in _GEOMETRIES:
        raise ValueError(
            f"geometry must be one of {list(_GEOMETRIES)}, or an object from samopt.parts; got {geometry!r}"
        )
    kind, eta = _GEOMETRIES[geometry]
    return kind(), eta
