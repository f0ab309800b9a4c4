"""Auto-PGD: a step-size-free search for the worst point of a ball (Croce & Hein 2020, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samopt._numerics.low_precision import is_low_precision, widen
from samopt._numerics.stochastic_rounding import Noise, RoundingNoise
from samopt.sharpness._measuring.batches import map_tensors
from samopt.sharpness._measuring.measured_model import MeasuredModel
from samopt.sharpness._measuring.optimizer_parts import MovableWeights
from samopt.sharpness._measuring.seeds import stream
from samopt.sharpness.nearby.ball import Ball

__all__ = ["AutoPGD", "checkpoints"]

_MOMENTUM = 0.75  # weight of the new step; the rest goes to the previous one
_ENOUGH = 0.75  # fraction of steps that must raise the loss for the step size to stay
_FIRST_CHECK = 0.22


def checkpoints(steps: int) -> set[int]:
    """Return the numbers of steps after which the step size is reconsidered.

    Args:
        steps: Number of steps.
    """
    before, at, found = 0.0, _FIRST_CHECK, set()
    while at < 1:
        found.add(math.ceil(at * steps))
        before, at = at, at + max(at - before - 0.03, 0.06)
    return found


class AutoPGD:
    """The search on one batch.

    The first step from the centre is SAM's own ascent. Later ones move by ``size`` along the steepest direction,
    project, and add a quarter of the previous step. The size starts at ``2 rho`` and is halved at a checkpoint where
    too few steps raised the loss. Unlike in the original the search goes on from where it is then, not from the best
    point, so that no copy of it is needed.

    Where the gradient is exactly 0, or no step up to a checkpoint has raised the loss, the next step leads to a random
    point of the ball: a model whose training loss is 0 in fp32 stands on a plateau.

    Memory: besides the saved weights of ``movable``, the gradient and one more copy (low-precision weights: fp32
    copies of the last two perturbations instead).

    Args:
        measured: What is measured.
        batch: The batch.
        ball: Where to search.
        movable: Moves the measured's weights; they are anywhere afterwards.
        key: Decides the random starts and the stochastic rounding.
    """

    def __init__(
        self, measured: MeasuredModel, batch: Any, ball: Ball, movable: MovableWeights, key: tuple[int, int]
    ) -> None:
        self._measured = measured
        self._batch = batch
        self._ball = ball
        self._movable = movable
        self._key = key
        self._noise = RoundingNoise(key[0])
        self._held: list[Tensor | None] = [None] * len(measured.weights)
        self._previous: list[Tensor] | None = None
        self._has_moved = False
        self._escapes = 0
        self._foreign: set[int] = set()
        map_tensors(batch, self._note)
        self.loss = torch.zeros(())
        """The loss at the centre."""
        self.met_nan = False
        """Whether the loss was NaN at a point of the ball, where a search ends."""

    def _note(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            self._foreign.add(tensor.untyped_storage().data_ptr())
        return tensor

    def run(self, steps: int, restarts: int) -> list[float]:
        """Return the largest rise of the loss found within each number of steps, over all restarts; never below 0.

        Args:
            steps: Steps a restart.
            restarts: The first starts at the centre, the others at random points of the ball.
        """
        self._movable.undo()
        self.loss, gradient = self._measured.gradient(self._batch)
        best = self._search(steps, self._first_from_centre, gradient)
        del gradient
        for restart in range(1, restarts):
            found = self._search(steps, self._first_from_random, self._random_start(restart))
            best = [max(pair) for pair in zip(best, found, strict=True)]
        return best

    def _search(
        self, steps: int, first: Callable[[list[Tensor | None]], float], gradient: list[Tensor | None]
    ) -> list[float]:
        best: list[float] = []
        highest, last_highest = 0.0, 0.0
        size = last_size = 2 * self._ball.rho
        since, raised, loss_before = 0, 0, 0.0
        checks = checkpoints(steps)
        is_lost = False
        for step in range(1, steps + 1):
            norm = 0.0 if is_lost else first(gradient) if step == 1 else self._step(gradient, size)
            is_lost = False
            if norm == 0 and steps > 1 and self._ball.rho > 0:
                self._escape()
            elif not 0 < norm < math.inf:
                break
            rise, gradient = self._evaluate(with_gradient=step < steps)
            if math.isnan(rise):
                self.met_nan = True
                break
            highest = max(highest, rise)
            raised += rise > loss_before
            loss_before, since = rise, since + 1
            if step in checks:
                stalled = raised < _ENOUGH * since or (size == last_size and highest == last_highest)
                last_size, last_highest = size, highest
                size = size / 2 if stalled else size
                since = raised = 0
                is_lost = highest == 0
            best.append(highest)
        return best + [highest] * (steps - len(best))

    def _evaluate(self, *, with_gradient: bool) -> tuple[float, list[Tensor | None]]:
        gradient: list[Tensor | None] = []
        if with_gradient:
            loss, gradient = self._measured.gradient(self._batch)
        else:
            loss = self._measured.loss_in_graph(self._batch)
        return float(loss - self.loss), gradient

    def _first_from_centre(self, gradient: list[Tensor | None]) -> float:
        self._previous, self._has_moved = None, True
        ascent = self._ball.first_step(self._measured.weights, gradient)
        norm = float(ascent.norm)
        if not 0 < norm < math.inf:
            return norm
        ascent.move(self._next_noise())
        if any(is_low_precision(weight) for weight in self._measured.weights):
            offsets = self._take(gradient)
            self._ball.uphill(offsets, self._movable.origin, self._ball.rho)
            self._hold(offsets)
        gradient.clear()  # other holders of the list hold no memory
        return norm

    def _first_from_random(self, gradient: list[Tensor | None]) -> float:
        self._previous, self._has_moved = None, False
        return self._step(gradient, 2 * self._ball.rho)

    def _random_start(self, restart: int) -> list[Tensor | None]:
        """Move to a random point of the ball, and return the gradient there."""
        self._move(self._random_point("restart", restart))
        return self._measured.gradient(self._batch)[1]

    def _escape(self) -> None:
        """Move to a random point of the ball, from where the search goes on as from a start."""
        self._escapes += 1
        self._move(self._random_point("escape", self._escapes))
        self._previous, self._has_moved = None, False

    def _random_point(self, purpose: str, number: int) -> list[Tensor]:
        offsets = []
        for index, centre in enumerate(self._movable.origin):
            generator = stream(centre.device, purpose, *self._key, number, index)
            if self._ball.linf and not centre.is_complex():
                offset = torch.randn(centre.shape, generator=generator, device=centre.device, dtype=widen(centre).dtype)
                offset = torch.erf(offset / math.sqrt(2))  # uniform in [-1, 1]
            else:
                offset = self._ball.draw(centre, generator)
            if (lengths := self._ball.lengths(centre)) is not None:
                offset.mul_(lengths)
            offsets.append(offset.mul_(self._ball.rho))
        self._ball.project(offsets, self._movable.origin)
        return offsets

    def _step(self, gradient: list[Tensor | None], size: float) -> float:
        """Move to the next point, and return the gradient's norm; where it is 0 or not finite, do not move."""
        ball, centre = self._ball, self._movable.origin
        offsets = self._take(gradient)
        norm = ball.uphill(offsets, centre, size)
        if not 0 < norm < math.inf:
            return norm
        for index, offset in enumerate(offsets):
            offset.add_(self._offset(index))
        ball.project(offsets, centre)
        trail: list[Tensor] = []
        for index, offset in enumerate(offsets):
            here = self._offset(index)
            if self._has_moved:  # the previous point of the first step was the centre
                offset.mul_(_MOMENTUM).add_(here, alpha=2 * (1 - _MOMENTUM))
            if self._previous is not None:
                offset.sub_(self._previous[index], alpha=1 - _MOMENTUM)
                self._previous[index] = here  # frees the older one before the next is made
            trail.append(here)
        self._previous, self._has_moved = trail, True
        ball.project(offsets, centre)
        self._move(offsets)
        return norm

    def _take(self, gradient: list[Tensor | None]) -> list[Tensor]:
        """Empty the list into dense tensors, in at least fp32, that share their memory with nothing."""
        taken = []
        seen = set(self._foreign)
        for index, centre in enumerate(self._movable.origin):
            g, gradient[index] = gradient[index], None
            if g is None:
                taken.append(torch.zeros_like(centre, dtype=widen(centre).dtype))
                continue
            g = widen(g.to_dense() if g.is_sparse else g)
            storage = g.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != g.numel() * g.element_size():
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(g.untyped_storage().data_ptr())
            taken.append(g)
        return taken

    def _offset(self, index: int) -> Tensor:
        held = self._held[index]
        return self._measured.weights[index].detach() - self._movable.origin[index] if held is None else held

    def _move(self, offsets: list[Tensor]) -> None:
        noise = self._next_noise()
        for index, offset in enumerate(offsets):
            self._movable.move(index, offset, noise)
        self._hold(offsets)

    def _next_noise(self) -> Noise:
        self._noise.advance()
        return self._noise.source()

    def _hold(self, offsets: list[Tensor]) -> None:
        """Keep what rounding would lose; where weights are precise, they hold the perturbation themselves."""
        for index, offset in enumerate(offsets):
            if is_low_precision(self._measured.weights[index]):
                self._held[index] = offset
