"""What an ascent is made of: which parameters move, along what, how far, and with what rounding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, compress, filterfalse, islice, repeat
from operator import attrgetter, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samopt._numerics.stochastic_rounding import Noise, RoundingNoise
from samopt._perturb.gradients import StashedGradients
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.targets import Region, Targets
from samopt._replay.call_watch import PassFollower
from samopt._step.base_wrapper import GroupOptions
from samopt._step.selection import Selection
from samopt.parts.combination import Combination
from samopt.parts.direction import CachedDirection, Direction, Gradient, KnownDirection
from samopt.parts.geometry import Geometry
from samopt.parts.part import Part
from samopt.parts.radius import Radius

__all__ = ["Ascent"]

# Every step asks each parameter: a map over these takes a third of the time of a loop in Python.
_PARAMS, _GRADIENT, _IS_TRAINABLE = itemgetter("params"), attrgetter("grad"), attrgetter("requires_grad")


class Ascent:
    """The four parts behind ``epsilon = r T^2 d / ||T d||_2``, over the parameter groups of a base optimizer.

    It moves nothing: it says what is to move, and makes the ``Perturbation`` that does.

    Args:
        options: The base's parameter groups, with the options "eta", "perturb" and the radius's own.
        selection: Which parameters may move; None for all.
        direction: Along what.
        geometry: The elementwise geometry ``T``.
        radius: How far.
        combination: What the base gets of both gradients; None is the second.
        linf: True for the l-infinity ball.
        rounding: Source of numbers for stochastic rounding, or None.
        backend: Name of a kernel backend, or "auto".

    Attributes:
        is_paused: Whether nothing moves, whatever the radii are.
        makes_directions: Whether the direction is made of all of a step's gradients at once, instead of being them.
    """

    def __init__(
        self,
        options: GroupOptions,
        *,
        selection: Selection | None,
        direction: Direction,
        geometry: Geometry,
        radius: Radius,
        combination: Combination | None,
        linf: bool,
        rounding: RoundingNoise | None,
        backend: str,
    ) -> None:
        self.options = options
        self.base: Optimizer = options.base
        self.selection = selection
        self.direction = direction
        self.geometry = geometry
        self.radius = radius
        self.combination = combination
        self.linf = linf
        self.rounding = rounding
        self.backend = backend
        self.is_paused = False
        self.makes_directions = isinstance(direction, Gradient) and type(direction) is not Gradient
        # By the names that they have in checkpoints. Most parts do nothing in a step, and are not asked.
        self.parts: dict[str, Part] = {"direction": direction, "geometry": geometry, "radius": radius}
        if combination is not None:
            self.parts["combination"] = combination
        self._advancing = [part for part in self.parts.values() if type(part).advance is not Part.advance]
        self._measuring = [part for part in self.parts.values() if type(part).metrics is not Part.metrics]

    @property
    def is_one_pass(self) -> bool:
        """Whether the direction is known before a step's gradient, so that its one pass is at ``w + epsilon``."""
        return isinstance(self.direction, KnownDirection)

    @property
    def combines(self) -> bool:
        """Whether the base's gradient is made of those of both passes."""
        return self.combination is not None and self.combination.uses_first_gradients

    def is_on(self) -> bool:
        """Return whether any group has a positive radius, so that this is more than the base optimizer."""
        if self.is_paused:
            return False
        for group, (number, _, perturb) in zip(self.base.param_groups, self.options.rows(), strict=True):
            if perturb and (isinstance(number, Tensor) or number > 0):
                if self.selection is None or any(map(self.selection.is_chosen, group["params"])):
                    return True
        return False

    def may_move(self) -> bool:
        """Return whether any group moves in this step, as far as the host can tell."""
        return self.is_on() and (self.combination is None or self.combination.is_due())

    def share_gradients(self) -> None:
        """Have ranks share the direction's gradients: nothing to do for parameters, whose backward exchanges them."""

    def needs_capture(self) -> bool:
        """Return whether a cached direction must be taken, in a pass of its own, before this step's ascent."""
        return isinstance(self.direction, CachedDirection) and self.direction.is_due() and self.may_move()

    def targets_from_gradients(self, frozen_since: Collection[int] = ()) -> tuple[StashedGradients, list[Targets]]:
        """Return every trainable parameter with its gradient, and those that move along a direction made of theirs.

        Args:
            frozen_since: Ids of parameters that were trainable in the first pass, and are not any more.

        Raises:
            ValueError: If a group's option is out of range.
        """
        rows = self.options.checked_rows()
        stashed = StashedGradients([], [])
        targets, groups = [], []
        moving = self.may_move()
        if moving:
            self.radius.prepare()
        for group, (number, eta, perturb) in zip(self.base.param_groups, rows, strict=True):
            weights = list(filter(_IS_TRAINABLE, group["params"]))
            if frozen_since:
                weights = [p for p in group["params"] if p.requires_grad or id(p) in frozen_since]
            gradients = list(map(_GRADIENT, weights))
            stashed.parameters.extend(weights)
            stashed.gradients.extend(gradients)
            if moving and perturb:
                sign = -1 if group.get("maximize", False) else 1
                if self.selection is not None:
                    weights = self.chosen(weights)
                    gradients = list(map(_GRADIENT, weights))
                region = Region(self.radius.at(number), eta, sign)
                targets.append(Targets(region, *_having(weights, gradients)))
                groups.append(group)
        if moving and isinstance(self.direction, Gradient) and self.makes_directions:
            with torch.no_grad():
                targets = self._redirected(targets, self.direction)
        return stashed, self._with_known_scales(targets, groups)

    def targets_along(self, direction: KnownDirection) -> list[Targets]:
        """Return every parameter that moves along a known direction; those without a direction yet do not.

        Args:
            direction: The direction.

        Raises:
            ValueError: If a group's option is out of range, or the base has no such direction.
        """
        rows = self.options.checked_rows()
        if not self.may_move():
            return []
        self.radius.prepare()
        targets, groups = [], []
        for group, (number, eta, perturb) in zip(self.base.param_groups, rows, strict=True):
            if perturb:
                weights = self.chosen(list(filter(_IS_TRAINABLE, group["params"])))
                found = _having(weights, direction.directions(weights, group, self.base))
                targets.append(Targets(Region(self.radius.at(number), eta, direction.sign), *found))
                groups.append(group)
        return self._with_known_scales(targets, groups)

    def perturbation(self, targets: list[Targets]) -> Perturbation:
        """Return the perturbation of targets, with its norms measured and nothing written.

        Args:
            targets: What moves.
        """
        return Perturbation(targets, self.geometry, linf=self.linf, backend=self.backend)

    def rounding_noise(self) -> Noise | None:
        """Return the numbers that the present ascent rounds with; None rounds to nearest."""
        return None if self.rounding is None else self.rounding.source()

    def advance_rounding(self) -> None:
        """Go on to the numbers of the next ascent."""
        if self.rounding is not None:
            self.rounding.advance()

    def followers(self, models: Sequence[nn.Module]) -> list[PassFollower]:
        """Return what the parts have told of the forward calls of both passes.

        Args:
            models: What was given as ``model``.
        """
        found = [part.follow(models, self.parameters, self.may_move) for part in self.parts.values()]
        return [follower for follower in found if follower is not None]

    def parameters(self) -> list[Tensor]:
        """Return every parameter, in the order of the groups."""
        return list(chain.from_iterable(map(_PARAMS, self.base.param_groups)))

    def chosen(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return those of some parameters that ``only`` chooses; all of them without it.

        Args:
            parameters: Parameters of the base.
        """
        return parameters if self.selection is None else list(filter(self.selection.is_chosen, parameters))

    def perturbed_parameters(self) -> list[Tensor]:
        """Return the parameters that move where the radius is not 0, in the order of the groups."""
        moving = [group for group, row in zip(self.base.param_groups, self.options.rows(), strict=True) if row[2]]
        return self.chosen(list(filter(_IS_TRAINABLE, chain.from_iterable(map(_PARAMS, moving)))))

    def frozen_with_gradients(self) -> list[Tensor]:
        """Return the parameters that have a gradient, and are not trainable now."""
        return [p for p in filterfalse(_IS_TRAINABLE, self.parameters()) if p.grad is not None]

    def accelerators(self) -> list[torch.device]:
        """Return the devices of the parameters, except the CPU."""
        devices = dict.fromkeys([p.device for group in self.base.param_groups for p in group["params"] if not p.is_cpu])
        return list(devices)

    def advance(self) -> None:
        """Tell every part that the base is about to be stepped."""
        if self._advancing:
            parameters = self.parameters()
            for part in self._advancing:
                part.advance(parameters)

    def metrics(self) -> dict[str, Tensor]:
        """Return what the parts measured in this step."""
        found: dict[str, Tensor] = {}
        for part in self._measuring:
            found |= part.metrics()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts and of the rounding."""
        own: dict[str, Any] = {"version": 1}
        if self.rounding is not None:
            own["rounding"] = self.rounding.position
        parameters = self.parameters()
        for name, part in self.parts.items():
            if state := part.state_dict(parameters):
                own[name] = state
        return own

    def load_state_dict(self, own: dict[str, Any] | None) -> None:
        """Load what ``state_dict`` returned; a load that fails changes no part.

        Args:
            own: The state; None where there is none, so that everything starts from the beginning.
        """
        own = own or {}
        parameters = self.parameters()
        before = [(part, dict(vars(part))) for part in self.parts.values()]
        try:
            for name, part in self.parts.items():
                part.load_state_dict(own.get(name, {}), parameters)
            if self.rounding is not None:
                self.rounding.position = int(own.get("rounding", 0))
        except BaseException:
            for part, attributes in before:
                vars(part).clear()
                vars(part).update(attributes)
            raise

    def _redirected(self, targets: list[Targets], direction: Gradient) -> list[Targets]:
        """Return the targets with the directions that are made of their gradients."""
        weights = [weight for some in targets for weight in some.weights]
        if not weights:
            return targets
        gradients = [gradient for some in targets for gradient in some.directions]
        made = iter(direction.from_gradients(weights, gradients))
        return [some._replace(directions=list(islice(made, len(some.weights)))) for some in targets]

    def _with_known_scales(self, targets: list[Targets], groups: list[dict[str, Any]]) -> list[Targets]:
        """Return the targets with the ``T`` that the geometry knows from the base's state, without those that lack it.

        Args:
            targets: What moves, by group.
            groups: The parameter group of each.
        """
        found = []
        for some, group in zip(targets, groups, strict=True):
            scales = self.geometry.known_scales(some.weights, group, self.base)
            if scales is not None:
                moving = [t is not None for t in scales]
                weights, directions = list(compress(some.weights, moving)), list(compress(some.directions, moving))
                some = Targets(some.region, weights, directions, [t for t in scales if t is not None])
            found.append(some)
        return found


def _having(weights: list[Tensor], directions: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights that have a direction, and their directions."""
    known = list(map(is_not, directions, repeat(None)))
    return list(compress(weights, known)), list(compress(directions, known))  # type: ignore[arg-type]  # none is None
