"""Which perturbations count as equally long: the elementwise geometry ``T``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Adamax, Optimizer, RMSprop

from samopt._numerics.low_precision import widen
from samopt.distributed import local_part
from samopt.parts.base_state import StateSeen
from samopt.parts.checks import check_nonnegative
from samopt.parts.part import Part

__all__ = ["Adaptive", "Euclidean", "Fisher", "Geometry", "Preconditioned"]


class Geometry(Part):
    """An elementwise, positive, diagonal geometry ``T`` on weight space.

    Every ascent is ``r T^2 d / ||T d||_2`` (l2) or ``r T sign(d)`` (l-infinity), so a geometry answers one question:
    what is ``T`` for this tensor?

    Attributes:
        name: A short identifier. Kernels with a fused form of the geometry look it up by this name.
    """

    name = "custom"

    def applies_to(self, weight: Tensor) -> bool:
        """Return whether ``weight`` uses this geometry, True unless overridden; where it does not, ``T = 1``.

        Args:
            weight: A parameter, or this rank's part of one.
        """
        return True

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``T``: real, of the shape of ``weight``, in its dtype (its real dtype where complex).

        Args:
            weight: The weight, in at least fp32.
            direction: Its direction, likewise.
            eta: The group's stabiliser.
        """
        raise NotImplementedError

    def known_scales(
        self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer
    ) -> Sequence[Callable[[], Tensor] | None] | None:
        """Return what makes ``T`` of each parameter, for a geometry that is known from the base optimizer's state.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.

        Returns:
            For each parameter a function that returns ``T`` for this rank's part of it, in at least fp32; None for a
            parameter that does not move. Or None instead of the sequence, as here: ``T`` is what ``scale`` says.
        """
        return None


class Euclidean(Geometry):
    """``T = 1``: the ball of SAM (Foret et al. 2021, equation 2)."""

    name = "euclidean"

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ones.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        return torch.ones_like(weight.abs())


class Adaptive(Geometry):
    """``T = |w| + eta``: the scale-invariant ball of ASAM (Kwon et al. 2021, algorithm 1).

    Tensors of at most one dimension (biases, the scales of norm layers) keep ``T = 1``, as in the paper's experiments.
    """

    name = "adaptive"

    def applies_to(self, weight: Tensor) -> bool:
        """Return whether ``weight`` has more than one dimension.

        Args:
            weight: A parameter.
        """
        return weight.dim() > 1

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``|w| + eta``.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        return weight.abs().add_(eta)


class Fisher(Geometry):
    """``T = (1 + eta d^2)^(-1/2)``: the diagonal empirical Fisher ball of Fisher SAM (Kim et al. 2022, equation 9)."""

    name = "fisher"

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Return ``1 / sqrt(1 + eta |d|^2)``.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.
        """
        length = direction.abs().mul_(eta**0.5)
        return torch.hypot(length, torch.ones_like(length)).reciprocal_()  # the square of 1e30 would overflow


class Preconditioned(Geometry):
    """``T^2 = 1 / (sqrt(v_hat) + eps)``: the ball of the base optimizer's own second moment.

    ``T^2 g`` is the step that Adam would take along this gradient in place of its first moment. ``v_hat`` is the
    bias-corrected ``exp_avg_sq`` of Adam and its relatives (with ``amsgrad`` the maximum that they divide by), the
    ``square_avg`` of RMSprop (less the squared mean where it is centered) or the ``sum`` of Adagrad, as the latest step
    left it. An entry without a second moment does not move. Before the base's first step that is every entry, so this
    step is a plain one. Later it is those that never had a gradient, such as embeddings of tokens that did not occur.

    ``T`` does not depend on the present gradient, so a ``GradScaler`` does not change it. It is computed in at least
    fp32, one parameter at a time. The group's ``eta`` is not used.

    Cost: two reads of the second moment a step; no memory is kept.

    Args:
        damping: Added to ``sqrt(v_hat)``, >= 0, in units of the gradient. None is the base group's ``eps``. An entry
            whose gradients were tiny until now has a large ``T``; a larger ``damping`` bounds it.

    Raises:
        ValueError: If ``damping`` is negative. When an optimizer is made with it, if the base keeps no second moment,
            or a factored one (Adafactor). At a step, if the base keeps none of a parameter's shape.
    """

    name = "preconditioned"

    def __init__(self, damping: float | None = None) -> None:
        if damping is not None:
            check_nonnegative("damping", damping)
        self.damping = damping
        self._seen = StateSeen()

    def check(self, base: Optimizer) -> None:
        """Raise if the base is known to keep no second moment of each parameter.

        Args:
            base: The base optimizer.

        Raises:
            ValueError: If it is neither RMSprop nor Adagrad, and has groups without Adam's ``betas`` and ``eps``.
        """
        if isinstance(base, RMSprop | Adagrad):
            return
        if isinstance(base, Adamax):
            raise ValueError(_missing(base, "keeps a largest gradient instead"))
        for index, group in enumerate(base.param_groups):
            if not (_is_pair(group.get("betas")) and isinstance(group.get("eps"), float | int | Tensor)):
                found = "keeps a factored one" if "adafactor" in type(base).__name__.lower() else "keeps none"
                options = ", ".join(key for key in group if key != "params")
                raise ValueError(_missing(base, f"{found} (param group {index} has {options})"))

    def scale(self, weight: Tensor, direction: Tensor, eta: float) -> Tensor:
        """Raise: ``T`` is known from the base optimizer alone.

        Args:
            weight: The weight.
            direction: Its direction.
            eta: The stabiliser.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "the preconditioned geometry is made of a base optimizer's state, and there is none here; give it to an "
            "optimizer, as in samopt.PreconditionedSAM(base)"
        )

    def known_scales(
        self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer
    ) -> list[Callable[[], Tensor] | None]:
        """Return what makes ``T`` of each parameter; None before the base's first step for it.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.

        Raises:
            ValueError: If the base has stepped a parameter and keeps no second moment of its shape.
        """
        damping = group["eps"] if self.damping is None else self.damping
        scales: list[Callable[[], Tensor] | None] = []
        for parameter in parameters:
            state = base.state.get(parameter)
            if state:
                scales.append(partial(_scale, parameter, *_second_moment(parameter, state, group, base), damping))
            elif self._seen.is_missing(parameter):
                raise ValueError(_missing(base, "has stepped a parameter on this rank and keeps no state of it"))
            else:
                scales.append(None)
        self._seen.find(parameters, scales)
        return scales

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Note which parameters the base steps.

        Args:
            parameters: Every parameter.
        """
        self._seen.step(parameters)

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Learn again which parameters the base steps.

        Args:
            state: Nothing: the second moments are in the base's state.
            parameters: Every parameter.
        """
        self._seen = StateSeen()


def _second_moment(
    parameter: Tensor, state: Mapping[str, Any], group: dict[str, Any], base: Optimizer
) -> tuple[Tensor, Tensor | None, float | Tensor]:
    """Return the second moment, what is subtracted from it, and what it is divided by to correct its bias."""
    mean: Tensor | None = None
    correction: float | Tensor = 1.0
    if isinstance(base, RMSprop | Adagrad):
        key = "square_avg" if isinstance(base, RMSprop) else "sum"
        mean = state["grad_avg"] if group.get("centered") else None
    else:
        key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        count = state.get("step", group.get("step"))
        if count is None:
            raise ValueError(_missing(base, f"keeps no 'step' to correct it by, but {sorted(map(str, state))}"))
        # On the host; on the device where the base is capturable or fused, and not read there.
        steps = count if isinstance(count, Tensor) and not count.is_cpu else float(count)
        correction = 1 - group["betas"][1] ** steps
    second = state.get(key)
    if not isinstance(second, Tensor):
        raise ValueError(_missing(base, f"has no {key!r} in a state of {sorted(map(str, state))}"))
    if second.shape != parameter.shape or not second.is_floating_point():
        raise ValueError(
            _missing(base, f"keeps {second.dtype} of shape {tuple(second.shape)} for {tuple(parameter.shape)}")
        )
    return second, mean, correction


def _scale(
    parameter: Tensor,
    second_moment: Tensor,
    mean: Tensor | None,
    correction: float | Tensor,
    damping: float | Tensor,
) -> Tensor:
    """Return ``T`` of this rank's part of a parameter; 0 where there is no second moment."""
    second = widen(local_part(second_moment, parameter))
    if mean is not None:
        second = (second - widen(local_part(mean, parameter)).square()).clamp_min_(0)
    t = (second / correction).sqrt_().add_(damping).rsqrt_()
    return torch.where(second > 0, t, torch.zeros_like(t))


def _is_pair(betas: object) -> bool:
    """Return whether a group's decay rates are Adam's: two of them."""
    return isinstance(betas, tuple | list) and len(betas) == 2


def _missing(base: Optimizer, found: str) -> str:
    return (
        "the preconditioned geometry needs the second moment that Adam, AdamW and their relatives, RMSprop or Adagrad "
        f"keep of every parameter, but {type(base).__name__} {found}; use such a base, or samopt.ASAM, whose geometry "
        "is made of the weights"
    )
