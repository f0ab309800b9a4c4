"""What makes an ascent: which parameters of which group move, along what, how far, and with what rounding."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt import kernels
from samopt._numerics.stochastic_rounding import Noise, RoundingNoise
from samopt._perturb.gradients import StashedGradients
from samopt._perturb.targets import Radius, Region, Targets
from samopt._step.arguments import check_nonnegative
from samopt._step.base_wrapper import OptimizerWrapper
from samopt.kernels.memory import IS_CPU
from samopt.parts.combination import Combination
from samopt.parts.direction import Direction, GradientDirection, Momentum, StatefulDirection
from samopt.parts.geometry import Geometry

__all__ = ["AscentRule", "check_options"]


class AscentRule(OptimizerWrapper):
    """The choices behind ``epsilon = r T^2 d / ||T d||_2``, over the parameter groups of a base optimizer.

    It moves nothing: the passes ask it for targets.

    Args:
        base_optimizer: The optimizer to wrap.
        metric: The elementwise metric ``T``.
        rho: Radius that a group has where it says nothing else.
        eta: Likewise, the stabiliser of the metric.
        norm: "l2" or "linf".
        direction: Where uphill is; None is this batch's gradient.
        combination: What the base gets of both gradients; None is the second.
        rounding: Source of numbers for stochastic rounding, or None.
        backend: Kernel backend.

    Attributes:
        is_one_pass: Whether the direction is known before a step's gradient, so that its one pass is at
            ``w + epsilon``.

    Raises:
        ValueError: If the direction does not suit the base.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        metric: Geometry,
        rho: float,
        eta: float,
        norm: str,
        direction: Direction | GradientDirection | None,
        combination: Combination | None,
        rounding: RoundingNoise | None,
        backend: str,
    ) -> None:
        if isinstance(direction, Momentum):
            direction.check(base_optimizer)
        if combination is not None:
            combination.check(base_optimizer)
        super().__init__(base_optimizer, {"rho": rho, "eta": eta, "perturb": True})
        self.metric = metric
        self.norm = norm
        self.direction = direction
        self.combination = combination
        self.backend = backend
        self._rounding = rounding
        self._sort_parts()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "metric": self.metric,
            "norm": self.norm,
            "direction": self.direction,
            "combination": self.combination,
            "backend": self.backend,
            "_rounding": self._rounding,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sort_parts()

    def take_stock(self) -> tuple[StashedGradients, list[Targets]]:
        """Return every trainable parameter with its gradient, and those that move; nothing where no gradient is.

        Raises:
            ValueError: If a group's option is out of range.
        """
        self.validate_groups()
        taken = StashedGradients([], [])
        targets = []
        moving = self.may_move()
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.requires_grad]
            gradients = [parameter.grad for parameter in weights]
            taken.parameters.extend(weights)
            taken.gradients.extend(gradients)
            if moving and self.option(group, "perturb"):
                sign = -1 if group.get("maximize", False) else 1
                region = Region(self.radius(group), self.option(group, "eta"), sign)
                weights, present = _having(weights, gradients)
                targets.append(Targets(region, weights, present))
        if self._turning is not None:
            with torch.no_grad():
                targets = self._turned(targets, self._turning)
        if all([gradient is None for gradient in taken.gradients]):
            return StashedGradients([], []), targets
        return taken, targets

    def radius(self, group: dict[str, Any]) -> Radius:
        """Return the radius of a group's ball.

        Args:
            group: One of ``param_groups``.
        """
        radius: float | Tensor = self.option(group, "rho")
        return radius

    def may_move(self) -> bool:
        """Return whether any group moves in this step, as far as the host can tell."""
        return self.is_on() and (self.combination is None or self.combination.is_due())

    def is_on(self) -> bool:
        """Return whether any group has a positive ``rho``, so that this is more than the base optimizer."""
        for group in self.param_groups:
            rho = self.option(group, "rho")
            if (isinstance(rho, Tensor) or rho > 0) and self.option(group, "perturb"):
                return True
        return False

    def targets_along(self, direction: Direction) -> list[Targets]:
        """Return every parameter that moves along ``direction``; those without a direction yet do not.

        Args:
            direction: Where uphill is.

        Raises:
            ValueError: If a group's option is out of range, or the base has no such direction.
        """
        self.validate_groups()
        if not self.may_move():
            return []
        targets = []
        sign = getattr(direction, "sign", 1)
        for group in self.param_groups:
            if not self.option(group, "perturb"):
                continue
            weights = [parameter for parameter in group["params"] if parameter.requires_grad]
            weights, directions = _having(weights, direction.of(weights, group, self.base_optimizer))
            targets.append(Targets(Region(self.radius(group), self.option(group, "eta"), sign), weights, directions))
        return targets

    def rounding_noise(self) -> Noise | None:
        """Return the numbers that the present ascent rounds with; None rounds to nearest."""
        return None if self._rounding is None else self._rounding.source()

    def advance_rounding(self) -> None:
        """Go on to the numbers of the next ascent."""
        if self._rounding is not None:
            self._rounding.advance()

    def parameters(self) -> list[Tensor]:
        """Return every parameter, in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def accelerators(self) -> list[torch.device]:
        """Return the devices of the parameters, but for the CPU."""
        parameters = self.parameters()
        if all(map(IS_CPU, parameters)):
            return []
        return list(dict.fromkeys([parameter.device for parameter in parameters if not parameter.is_cpu]))

    def validate_groups(self) -> None:
        """Raise if an option of a group is out of range.

        Raises:
            TypeError: If one is not a number.
            ValueError: If one is negative or not finite.
        """
        for index, group in enumerate(self.param_groups):
            self._check_group(group, index)

    def advance_parts(self) -> None:
        """Tell the parts with a memory that the base is about to be stepped."""
        for part in self._stateful.values():
            part.advance()

    def _own_state(self) -> dict[str, Any]:
        own: dict[str, Any] = {} if self._rounding is None else {"rounding": self._rounding.position}
        parameters = self.parameters()
        for name, part in self._stateful.items():
            if state := part.state_dict(parameters):
                own[name] = state
        return own

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        own = own or {}
        if self._rounding is not None:
            self._rounding.position = own.get("rounding", 0)
        parameters = self.parameters()
        for name, part in self._stateful.items():
            part.load_state_dict(own.get(name, {}), parameters)

    def _sort_parts(self) -> None:
        direction = self.direction
        self.is_one_pass = isinstance(direction, Direction)
        self._turning = direction if isinstance(direction, GradientDirection) else None
        self._stateful: dict[str, StatefulDirection | Combination] = {}
        if isinstance(direction, StatefulDirection):
            self._stateful["direction"] = direction
        if self.combination is not None:
            self._stateful["combination"] = self.combination

    def _turned(self, targets: list[Targets], turning: GradientDirection) -> list[Targets]:
        """Return the targets with directions made of their gradients."""
        weights = [weight for some in targets for weight in some.weights]
        if not weights:
            return targets
        turned = iter(turning.turn(weights, [gradient for some in targets for gradient in some.directions]))
        return [some._replace(directions=list(islice(turned, len(some.weights)))) for some in targets]

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        where = f" in param group {index}"
        rho, eta = self.option(group, "rho"), self.option(group, "eta")
        if not isinstance(rho, Tensor):
            check_nonnegative(self.option_key("rho"), rho, where)
        check_nonnegative(self.option_key("eta"), eta, where)


def _having(weights: list[Tensor], directions: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights that have a direction, and theirs."""
    present = [direction for direction in directions if direction is not None]
    if len(present) < len(weights):
        weights = [weight for weight, towards in zip(weights, directions, strict=True) if towards is not None]
    return weights, present


def check_options(*, rho: Any, eta: Any, norm: str, backend: str) -> None:
    """Raise if an option of a constructor is out of range.

    Args:
        rho: Radius.
        eta: Stabiliser of the metric.
        norm: Kind of ball.
        backend: Kernel backend.

    Raises:
        TypeError: If ``rho`` or ``eta`` is not a number.
        ValueError: If it is out of range, or a name is unknown.
        RuntimeError: If the backend cannot run on this machine.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f'norm must be "l2" or "linf", got {norm!r}')
    kernels.check(backend)
    check_nonnegative("rho", rho)
    check_nonnegative("eta", eta)
