"""One second pass: what it changes when it begins, what it puts back when it ends, what it measured."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from samopt._callers.cached_weights import clear_cached_weights
from samopt._callers.compiled import never_compiled
from samopt._perturb.gradients import StashedGradients, dense_gradients, in_flat_memory
from samopt._perturb.perturbation import gradient_norm
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Targets
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.random_state import RngState
from samopt._replay.replay import Replay
from samopt._step.ascent import Ascent
from samopt._step.decoupled_update import DecoupledUpdate
from samopt.distributed import abandon_pass, local_part, reshard, runs_on_several_ranks
from samopt.parts.combination import Combination
from samopt.step_metrics import StepMetrics, as_scalar

__all__ = ["SecondPass"]

_WEIGHTS = attrgetter("weights")


class SecondPass:
    """The time between ascent and restore; ``optimizer.perturbed()`` yields its ``PassHandle``.

    Making one measures and changes nothing. ``begin`` takes the gradients and moves the weights; ``restore_weights``
    and ``end`` undo it.

    Args:
        ascent: What moves, along what, how far.
        stashed: Every trainable parameter with its gradient of the first pass.
        targets: What moves.
        others: Parameters of other optimizers, with their gradients of the first pass.
        first_loss: What the first pass returned.
        measure_grad_norms: Whether to measure both gradient norms.

    Attributes:
        loss: The second pass's loss, for the metrics.
        is_needed: False where the host knows that nothing moves: the first gradients are all zero, or not all finite.
            True on several ranks unless no rank moves: a rank that left out its second pass would leave the others
            waiting. Its weights stay where they are then, so the pass repeats the first one's gradients.
        is_combining: Whether an interrupt left the gradients half combined.
    """

    def __init__(
        self,
        ascent: Ascent,
        stashed: StashedGradients,
        targets: list[Targets],
        others: StashedGradients,
        *,
        first_loss: Any,
        measure_grad_norms: bool,
    ) -> None:
        self.loss: Any = None
        self.is_combining = False
        self._ascent = ascent
        self._stashed = stashed
        self._others = others
        self._flat, self._flat_of_others = in_flat_memory(stashed.parameters), in_flat_memory(others.parameters)
        self._values_of_others: list[Tensor | None] = []
        self._per_sample = [p for p in stashed.parameters if getattr(p, "grad_sample", None) is not None]
        self._perturbation = ascent.perturbation(targets)
        self._measures_norms = measure_grad_norms and not self._perturbation.is_empty
        self._moving = list(chain.from_iterable(map(_WEIGHTS, targets)))
        self._is_alone = not runs_on_several_ranks()
        self.is_needed = self._perturbation.usable is not False or (ascent.may_move() and not self._is_alone)
        self._backup: WeightBackup | None = None
        self._loss = as_scalar(first_loss)
        self._norm = None
        if self._measures_norms:  # a direction made of the gradients has another norm than they
            made = ascent.makes_directions
            self._norm = gradient_norm(self._moving, ascent.backend) if made else self._perturbation.gradient_norm()
        self._radius = self._perturbation.radius()
        self._applied: Tensor | None = None

    @never_compiled
    def begin(self, replay: Replay, start: RngState | None, memory: ScratchPool) -> None:
        """Take the gradients and move the weights to ``w + epsilon``.

        Args:
            replay: Repeats the first pass's surroundings.
            start: Random state at the start of the first pass, where known.
            memory: Where the weights are saved.
        """
        perturbation = self._perturbation
        if self.is_needed:
            self._backup = perturbation.backup(memory)
        # Flat memory of gradients may be cleared as a whole in the second pass.
        if self._flat_of_others.parameters:
            self._values_of_others = self._flat_of_others.copies()
        if self._flat.parameters and self.is_needed and self._ascent.combines:
            self._stashed = StashedGradients(self._stashed.parameters, self._stashed.copies())
        self._stashed.clear()
        self._others.clear()
        for parameter in self._per_sample:  # filled by backward hooks, which would add the second pass's to the first's
            parameter.grad_sample = None  # type: ignore[attr-defined]  # an attribute of Opacus and its relatives
        replay.begin_second(start, self._moving if self._backup is not None else ())
        if self._backup is not None:
            if not self._ascent.combines:
                self._stashed.release()  # the gradients' memory is free for the second pass's
            self._applied = perturbation.move(self._ascent.rounding_noise(), self._backup)
        if perturbation.is_sharded:
            for model in replay.models:
                reshard(model)
        perturbation.release_directions()
        clear_cached_weights()

    @never_compiled
    def restore_weights(self) -> None:
        """Put every weight back, bit for bit; may be called again after an interrupt."""
        if self._backup is not None:
            self._backup.restore()

    def end(self, replay: Replay, *, failed: bool) -> None:
        """Put back state, random streams and the gradients of other optimizers; may be called again.

        Gradients of the first pass that were not used, because they were zero or not finite, are put back too.

        Args:
            replay: As for ``begin``.
            failed: Whether an exception cut the pass short; its gradients are dropped then.
        """
        if self._perturbation.is_sharded:
            for model in replay.models:
                if failed:
                    abandon_pass(model)
                reshard(model)
        if failed:
            self._ascent.base.zero_grad()
            self._flat.fill()
        replay.end_second()
        clear_cached_weights()
        self._others.put_back()
        if self._values_of_others:
            self._flat_of_others.write(self._values_of_others)
        if not self.is_needed and not failed:
            self._stashed.put_back()

    def fill_flat_memory(self) -> None:
        """Move the base's gradients to where those of the first pass were, if that is a part of larger memory."""
        if self.is_needed and self._flat.parameters:
            self._flat.fill()

    def combine(self, combination: Combination) -> DecoupledUpdate | None:
        """Make the base's gradients of both passes'; call it after ``end``.

        Args:
            combination: The rule.

        Returns:
            What the update does besides the base's step; None for nothing.
        """
        update = None
        both = [(p, g) for p, g in zip(*self._stashed, strict=True) if g is not None and p.grad is not None]
        parameters = [parameter for parameter, _ in both]
        if self.is_needed and both:
            self.is_combining = True
            with torch.no_grad():
                first, second = [local_part(g, p) for p, g in both], dense_gradients(parameters)
                directions = combination.decoupled_update(first, second)
                combination.combine(parameters, first, second)
                if directions is not None:
                    update = DecoupledUpdate(parameters, directions, second)
            self.is_combining = False
        return update

    def measure(self) -> StepMetrics:
        """Return what both passes measured; call it after ``end``, with the second gradients in place, not combined."""
        is_known = self._measures_norms and self.is_needed
        norm = gradient_norm(self._moving, self._ascent.backend) if is_known else None
        applied = self._radius.new_zeros(()) if self._applied is None else self._applied
        return StepMetrics(
            loss=self._loss,
            perturbed_loss=as_scalar(self.loss),
            grad_norm=self._norm,
            perturbed_grad_norm=norm,
            radius=self._radius,
            applied_radius=applied,
            distance=self._ascent.metrics().get("distance"),
        )

    def nonfinite_flag(self) -> Tensor | None:
        """Return 0, or nan if the first gradients were not finite, on their device; None where the host knows."""
        return self._perturbation.nonfinite_flag if self._is_alone and self._perturbation.usable is None else None
