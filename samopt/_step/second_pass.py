"""One second pass: what it changes on entry, what it puts back on exit, what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from samopt._numerics.stochastic_rounding import Noise
from samopt._perturb.gradients import StashedGradients, dense_gradients
from samopt._perturb.perturbation import Perturbation, gradient_norm
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Targets
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.forward_calls import Replay, RngState
from samopt._step.decoupled_update import DecoupledUpdate
from samopt.distributed import abandon_pass, local_part, reshard, runs_on_several_ranks
from samopt.parts.combination import Combination
from samopt.parts.geometry import Geometry
from samopt.step_metrics import ZERO, Known, StepMetrics, as_scalar

__all__ = ["SecondPass"]


class SecondPass:
    """The time between ascent and restore; ``SharpnessAwareOptimizer.perturbed`` yields it.

    Making one measures and changes nothing. ``enter`` takes the gradients and moves the weights; ``leave`` undoes it.

    Args:
        taken: Every trainable parameter with its gradient of the first pass; emptied on entry where the gradients are
            used up, so that their memory can hold the weights.
        targets: What moves.
        metric: The metric ``T``.
        linf: True for the l-infinity ball.
        backend: Name of a kernel backend, or "auto".
        first_loss: What the first pass returned.
        measure_grad_norms: Whether to measure both gradient norms.
        may_move: Whether some rank may have targets; all of them know, and agree.
        keep_gradients: Whether the first gradients are needed after the pass; their memory is left alone then.

    Attributes:
        loss: Set it to the second pass's loss to have it in ``last_step``.
        perturbation: The ascent, and the way back.
        is_spoiled: Whether an interrupt left the gradients half combined.
    """

    def __init__(
        self,
        taken: StashedGradients,
        targets: Sequence[Targets],
        metric: Geometry,
        *,
        linf: bool,
        backend: str,
        first_loss: Any,
        measure_grad_norms: bool,
        may_move: bool = True,
        keep_gradients: bool = False,
        memory: ScratchPool | None = None,
    ) -> None:
        self._memory = ScratchPool() if memory is None else memory
        self.backup: WeightBackup | None = None
        self.loss: Any = None
        self.is_spoiled = False
        self.perturbation = Perturbation(targets, metric, linf=linf, backend=backend)
        norm = self.perturbation.gradient_norm() if measure_grad_norms else None
        self._is_alone = not runs_on_several_ranks()
        self.is_needed = self.perturbation.usable is not False or (may_move and not self._is_alone)
        """False where the host knows that nothing moves: the first gradients are all zero, or not all finite.

        True among several ranks, unless none of them moves: one that left out its second pass would leave the others
        waiting for it. Its weights stay where they are then, so that the pass repeats the first one's gradients for
        everybody.
        """
        self._taken = taken
        self._keep_gradients = keep_gradients
        self._moving = [weight for some in targets for weight in some.weights] if measure_grad_norms else []
        self._backend = backend
        self._measure_grad_norms = measure_grad_norms
        self._metrics = StepMetrics(
            loss=as_scalar(first_loss),
            grad_norm=norm,
            asked=Known(self.perturbation.radius()),
            applied=ZERO,
        )

    def enter(self, replay: Replay, start: RngState | None, noise: Noise | None) -> None:
        """Take the gradients and move the weights to ``w + epsilon``.

        Args:
            replay: Repeats the first pass's surroundings.
            start: Random state at the start of the first pass, where known.
            noise: Numbers for stochastic rounding, or None.
        """
        self._taken.clear()
        replay.begin(start)
        if self.is_needed:
            if not self._keep_gradients:
                self._taken.release()  # now their memory is the perturbation's alone, unless the user holds them
            self.backup = self.perturbation.backup(self._memory)
            applied = self.perturbation.move(noise, self.backup)
            self._metrics = replace(self._metrics, applied=Known(applied))
        if self.perturbation.is_sharded:
            reshard(replay.model)
        self.perturbation.release_directions()
        torch.clear_autocast_cache()  # autocast keeps low-precision copies of the weights, which are stale now

    def leave(self, replay: Replay, failed: bool = False) -> None:
        """Put weights, buffers and random streams back; may be called again if it was interrupted.

        Gradients of the first pass that were not used, because they were zero or not finite, are put back too, in place
        of the second pass's.

        Args:
            replay: As for ``enter``.
            failed: Whether an exception cut the pass short.
        """
        if self.backup is not None:
            self.backup.restore()
        if self.perturbation.is_sharded:
            if failed:
                abandon_pass(replay.model)
            reshard(replay.model)
        replay.end()
        torch.clear_autocast_cache()
        if not self.is_needed:
            self._taken.put_back()

    def combine(self, combination: Combination) -> DecoupledUpdate | None:
        """Make the base's gradients of both passes'; call it after ``leave``.

        Args:
            combination: The rule.

        Returns:
            What the update does besides the base's step; None for nothing.
        """
        beside = None
        both = [(p, g) for p, g in zip(*self._taken, strict=True) if g is not None and p.grad is not None]
        parameters = [parameter for parameter, _ in both]
        if self.is_needed and both:
            self.is_spoiled = True
            with torch.no_grad():
                first, second = [local_part(g, p) for p, g in both], dense_gradients(parameters)
                directions = combination.beside(first, second)
                combination.combine(parameters, first, second)
                if directions is not None:
                    beside = DecoupledUpdate(parameters, directions, second)
            self.is_spoiled = False
        self._taken = StashedGradients([], [])
        return beside

    def measure(self) -> StepMetrics:
        """Return what both passes measured; call it after ``leave``, with the second gradients in place."""
        measured = self._measure_grad_norms and self.is_needed
        norm = gradient_norm(self._moving, self._backend) if measured else None
        return replace(self._metrics, perturbed_loss=as_scalar(self.loss), perturbed_grad_norm=norm)

    def zero_or_nan(self) -> Tensor | None:
        """Return 0, or nan if the first gradients were not finite, on their device; None where that is seen to."""
        return self.perturbation.nonfinite_flag if self._is_alone and self.perturbation.usable is None else None
