"""The order of a step with two passes: gradient, ascent, second gradient, restore, base step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from samopt._callers.compiled import never_compiled
from samopt._callers.user_warnings import warn_user
from samopt._perturb.gradients import GradientMarks, StashedGradients, any_nonzero, dense_gradients, propagate_nonfinite
from samopt._perturb.scratch_pool import ScratchPool
from samopt._replay.call_watch import PassFollower
from samopt._replay.outputs import describe
from samopt._replay.random_state import RngState
from samopt._replay.replay import Replay
from samopt._step.ascent import Ascent
from samopt._step.clearing_check import ClearingCheck
from samopt._step.decoupled_update import DecoupledUpdate
from samopt._step.exact_exit import ExactExit
from samopt._step.outer_variables import OuterVariables, WindowVariables
from samopt._step.pass_handle import PassHandle
from samopt._step.second_pass import SecondPass
from samopt._step.trunk_reuse import TrunkReuse, leaves_of
from samopt._step.window import MicroBatch, Start
from samopt.distributed import has_graph_to_learn, runs_on_several_ranks, unsynced
from samopt.step_metrics import StepMetrics, as_scalar, loss_in

__all__ = ["THREE_WAYS", "TwoPass", "differentiate"]

THREE_WAYS = (
    "Write 'loss = optimizer.backward(lambda: criterion(model(x), y))' and 'optimizer.step()'; or 'loss.backward()', "
    "'with optimizer.perturbed(): criterion(model(x), y).backward()' and 'optimizer.step()'; or "
    "'optimizer.step(closure)' with a closure that clears the gradients, computes the loss, calls backward and returns "
    "the loss"
)

_IN_TRAINERS = (
    "In a Hugging Face Trainer, use SAMTrainer or make_sharpness_aware, with the inner optimizer; in a loop around "
    "accelerate, SharpnessAwareBackward (both in samopt.integrations)"
)

_FROZEN = (
    "{} parameters had gradients but requires_grad=False when the second pass began, so they were not perturbed, and "
    "the loss trains them in each pass: it thaws them at its start and freezes them at its end. Freeze them after "
    "optimizer.step() instead, or use optimizer.step(closure), which finds them"
)


class TwoPass:
    """Where an optimizer is between first gradient, second gradient and update.

    It is one object, shared by anything that copies the optimizer's attributes (as Lightning's wrapper does).

    Args:
        ascent: What moves, along what, how far.
        models: The modules that the passes run.
        sync_perturbation: Whether ranks perturb along the averaged gradient.
        measure_grad_norms: Whether to measure both gradient norms.
        followers: Told of the calls of the first model, and when passes begin and end.
        reuse_trunk: Whether the second pass begins at the module that moves.

    Attributes:
        metrics: What the latest step measured.
        window: The micro-batches since ``zero_grad()`` that wait for the window's last.
    """

    def __init__(
        self,
        ascent: Ascent,
        models: Sequence[nn.Module],
        *,
        sync_perturbation: bool,
        measure_grad_norms: bool,
        followers: Iterable[PassFollower],
        reuse_trunk: bool = False,
    ) -> None:
        self._ascent = ascent
        self._models = models
        self._sync_perturbation = sync_perturbation
        self._measure_grad_norms = measure_grad_norms
        if sync_perturbation:
            ascent.share_gradients()
        self._replay = Replay(models, ascent.accelerators, ascent.may_move, followers)
        self._reuse = TrunkReuse(models, ascent) if reuse_trunk else None
        self._is_reusing = False
        self._memory = ScratchPool()
        self._current: SecondPass | None = None
        self._context: ExactExit[PassHandle] | None = None
        self.window: list[MicroBatch] = []
        self._variables = WindowVariables()
        self._stays_on_rank = False  # whether the first gradients of the window do
        self._leaves: list[Tensor] = []  # with gradients, of this window's losses
        self._at_end: list[tuple[int, int] | None] = []  # of the gradients, after the latest micro-batch
        self._is_ready = False  # whether the gradients are a second pass's
        self._is_unscaled = False  # whether a GradScaler divided them since that pass began
        # One parameter and its gradient of the second pass, by which they are known again.
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._decoupled: DecoupledUpdate | None = None
        self._frozen_marks: GradientMarks | None = None
        self._frozen_since: Collection[int] = ()  # ids of parameters that only the first pass trained
        self._has_warned_of_missing = False
        self._has_warned_of_written = False
        self.metrics = StepMetrics()
        self._is_measured = False  # whether these are of the present step

    @property
    def is_perturbed(self) -> bool:
        """Whether the second pass is running."""
        return self._current is not None

    @property
    def needs_first_pass(self) -> bool:
        """True: the direction is made from this step's gradient."""
        return True

    @property
    def waits_for_step(self) -> bool:
        """Whether a second pass's gradients are still there, waiting for the base's step."""
        waiting = self._waiting
        return self._is_ready and waiting is not None and waiting[0].grad is waiting[1]

    def detach(self) -> None:
        """Follow the models' calls no longer."""
        self._replay.detach()

    def note_unscaling(self) -> None:
        """Note that a ``GradScaler`` divides the present gradients."""
        self._is_unscaled = True

    def gradients_cleared(self) -> None:
        """Note that the gradients are gone; a second pass's that waited for the update too."""
        self._replay.gradients_cleared()
        if self._current is None:
            self.window = []
        self._is_ready = self._is_measured = False
        self._waiting = None
        self._decoupled = None

    def check_gradient(self, stage: OptState | None) -> None:
        """Raise unless the gradients are a second pass's, or there is nothing that an ascent would change.

        Args:
            stage: How far the calling ``GradScaler`` got, or None.

        Raises:
            RuntimeError: If the gradients must not be applied.
        """
        # A second pass's gradients that the model itself has cleared belong to no step that has no second pass.
        if self._is_ready and not self.waits_for_step and not self._ascent.may_move():
            self._is_ready, self._decoupled, self._is_measured = False, None, False
        if self._is_ready:
            if stage is OptState.UNSCALED and not self._is_unscaled:
                raise RuntimeError(
                    "the gradients of the second pass are still multiplied by the GradScaler's scale: "
                    "scaler.unscale_(optimizer) was called before the second pass; call it after the 'with "
                    "optimizer.perturbed():' block (the ascent needs no unscaling), or leave it to scaler.step"
                )
        elif self.window:
            raise RuntimeError(
                f"step() was called after {len(self.window)} call(s) of backward(..., last=False); give the last "
                "micro-batch of a window last=True, so that the second pass runs before the step"
            )
        elif self._ascent.may_move():
            if any_nonzero(self._ascent.base.param_groups):
                raise RuntimeError(
                    f"step() found gradients but no perturbed pass since the last step. {THREE_WAYS}. {_IN_TRAINERS}"
                )
        else:
            self._complete()
        if not self._is_measured:  # a plain loop's step: nothing of an earlier one belongs to it
            self.metrics = StepMetrics(radius=torch.zeros(()))

    def reset(self) -> None:
        """Forget gradients and records, ready for the next first pass."""
        self._is_ready = self._is_measured = False
        self._waiting = None
        self.window = []
        self._replay.forget()

    def share_perturbation(self) -> None:
        """Have ranks perturb along the averaged gradient, where a loop exchanges the first gradients itself."""
        self._sync_perturbation = True
        self._ascent.share_gradients()

    def keeps_on_rank(self, models: Sequence[nn.Module]) -> bool:
        """Return whether the first pass's gradients serve this rank's perturbation alone, and so need no exchange.

        They do not where the models have trainable parameters that this optimizer lacks: another one steps with their
        gradients. Where the models lack some of this optimizer's, the gradients of those are exchanged in any case, and
        half of a perturbation would be the rank's own.

        Args:
            models: The modules whose DDP would leave out the exchange.
        """
        if self._sync_perturbation or not self._ascent.may_move():
            return False
        if not runs_on_several_ranks():
            return True
        trained = {p for p in self._ascent.parameters() if p.requires_grad}
        of_models = {p for model in models for p in model.parameters() if p.requires_grad}
        return trained == of_models and not has_graph_to_learn(models)

    def take_decoupled_update(self) -> DecoupledUpdate | None:
        """Return what the update does besides the base's step, once: a base's ``step`` may call its parent's."""
        update, self._decoupled = self._decoupled, None
        return update

    def first_pass(self) -> AbstractContextManager[None]:
        """Keep the gradients on their rank in the context, if they decide no more than this rank's perturbation."""
        return self._exchange(is_needed=not self.keeps_on_rank(self._models))

    def backward(self, compute_loss: Callable[[], Any], *, last: bool) -> Any:
        """Run forward and backward at ``w``, and after the last micro-batch of a window the second pass of all.

        Args:
            compute_loss: Returns the loss of a micro-batch.
            last: Whether it is the last of the window.

        Returns:
            What ``compute_loss`` returned at ``w``.
        """
        self.check_restored("backward()")
        self.check_window()
        if not self.window:
            self._refuse_waiting("backward()")
            self.refuse_leftovers()
        if self._reuse is not None and self._ascent.may_move():
            return self._backward_through_one_trunk(self._reuse, compute_loss, is_whole=last and not self.window)
        # A static graph is learnt in the window's first backward, and the rest of the window goes the same way.
        self._stays_on_rank = (self._stays_on_rank or not self.window) and self.keeps_on_rank(self._models)
        if not self.window:
            self._variables, self._leaves = WindowVariables(), []
        variables = self._variables
        number = variables.begin(compute_loss)
        start = self.begin_micro_batch(is_first=not self.window, outside=variables.at_start)
        with torch.enable_grad(), self._exchange(is_needed=last and not self._stays_on_rank):
            result = compute_loss()
            loss = differentiate(result)
            self._note_leaves(loss)
        self._end_first(variables, compute_loss)

        def again() -> Tensor:
            variables.set_to(number)
            return differentiate(compute_loss())

        self.window.append(MicroBatch(again, loss.detach(), start))
        if last:
            window, self.window = self.window, []
            try:
                self.run_again(window, lambda is_last: self._exchange(is_needed=is_last))
            finally:
                self._put_back(variables)
                self._variables = WindowVariables()
        else:
            self.end_micro_batch()
        return result

    def _backward_through_one_trunk(self, reuse: TrunkReuse, compute_loss: Callable[[], Any], *, is_whole: bool) -> Any:
        """Do what ``backward`` does, with one forward and one backward of the trunk.

        Args:
            reuse: Runs the forwards.
            compute_loss: Returns the loss.
            is_whole: Whether this is the only micro-batch of its window.

        Returns:
            What ``compute_loss`` returned at ``w``.
        """
        if not is_whole:
            raise RuntimeError(
                "reuse_trunk=True takes one micro-batch a step, since each more would keep its own graph; leave "
                "reuse_trunk out to accumulate with backward(..., last=False)"
            )
        variables = WindowVariables()
        number = variables.begin(compute_loss)
        start = self.begin_micro_batch(is_first=True, outside=variables.at_start)
        moving = self._ascent.perturbed_parameters()
        before = StashedGradients.of(moving)
        self._is_reusing = True
        try:
            with torch.enable_grad():
                result = reuse.first(compute_loss)
                loss = _differentiable(result)
                reuse.check(loss, self._replay.state.rebound())
                self._replay.state.leave_as_written(reuse.trunk_buffers)
                loss.backward(inputs=moving, retain_graph=True)  # type: ignore[no-untyped-call]
            self._end_first(variables, compute_loss)
            with cast(Any, self.perturbed(loss.detach(), start.random)) as handle:
                if handle.is_needed:
                    variables.set_to(number)
                    with torch.enable_grad():
                        handle.loss = differentiate(reuse.again(compute_loss)).detach()
                        reuse.check_second()
            if not handle.is_needed:  # the trunk has no gradients yet; those of one plain pass are the step's
                before.put_back()
                loss.backward()  # type: ignore[no-untyped-call]
                self._waiting = self._first_gradient()
        finally:
            self._put_back(variables)
            self._is_reusing = False
            reuse.forget()
        return result

    def include(self, models: Sequence[nn.Module] = (), objects: Iterable[tuple[object, Collection[str]]] = ()) -> None:
        """Set what else the second pass must leave alone, in place of what was set before.

        Args:
            models: Further modules: their state, and the gradients of their parameters that this optimizer lacks.
            objects: Objects whose attributes are kept, each with the names of attributes to leave alone.
        """
        self._replay.state.include(models, objects)

    def begin_micro_batch(self, *, is_first: bool, outside: OuterVariables | None = None) -> Start:
        """Note that a micro-batch of the first pass begins.

        Args:
            is_first: Whether it is the first of its window.
            outside: What the loss function finds outside itself, where that is known.

        Returns:
            What the second pass needs to repeat it.
        """
        generators = [] if outside is None else outside.generators
        if is_first:
            random = self._replay.begin_first(generators, [] if outside is None else outside.modules)
        else:
            random = self._replay.capture(generators)
        return Start(random, self._replay.state.changes_between())

    def end_micro_batch(self) -> None:
        """Note that a micro-batch is over that is not the last of its window."""
        self._replay.state.end_micro_batch()
        self._at_end = self._gradient_marks()

    def check_window(self) -> None:
        """Forget a window whose gradients were cleared, by ``model.zero_grad()`` say; called before each micro-batch.

        Raises:
            RuntimeError: If the gradients were changed since the micro-batch before.
        """
        if not self.window or self._at_end == self._gradient_marks():
            return
        if any_nonzero(self._ascent.base.param_groups):
            raise RuntimeError(
                "the gradients were changed between two micro-batches of a window: the second pass computes them "
                "again, and would lose that. Clip or mask them before step(), after the last micro-batch; add every "
                "term of the loss in the function that computes it, without a backward of its own"
            )
        self.gradients_cleared()

    def refuse_leftovers(self) -> None:
        """Raise if a window begins with gradients: they would turn the perturbation, and never reach the base.

        Raises:
            RuntimeError: If it does.
        """
        if self._ascent.may_move() and any_nonzero(self._ascent.base.param_groups):
            raise RuntimeError(
                "backward() found gradients that no call of backward() in this window made: the last step's, if the "
                "loop does not clear them, or those of another loss. They would change the perturbation without "
                "reaching the update. Call optimizer.zero_grad() before the first backward() of a step, and add up all "
                "losses inside compute_loss"
            )

    def _gradient_marks(self) -> list[tuple[int, int] | None]:
        """Return what changes when a gradient is written into, or replaced."""
        gradients = [parameter.grad for parameter in self._ascent.parameters()]
        return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]

    def run_again(
        self,
        window: Sequence[MicroBatch],
        exchange: Callable[[bool], AbstractContextManager[None]],
        surroundings: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Replace the gradients of a window by those at ``w + epsilon``.

        Args:
            window: What the present gradients were accumulated from.
            exchange: Given whether a micro-batch is the last, returns the context that says whether ranks exchange its
                gradients.
            surroundings: Makes a context for all of the second pass.

        Returns:
            Whether there was a second pass.
        """
        total = _sum([micro_batch.loss for micro_batch in window])
        if not self._ascent.may_move():
            self._replay.forget()
            self.metrics, self._is_measured = StepMetrics(loss=total, radius=torch.zeros(())), True
            if self._complete():  # now, so that clipping before the step meets what the base gets
                self._is_ready, self._is_unscaled = True, False
                self._waiting = self._first_gradient()
            return False
        with cast(Any, self.perturbed(total, window[0].start.random, may_lack_gradients=True)) as handle:
            if not handle.is_needed:
                return False
            losses = []
            with surroundings(), torch.enable_grad():
                for micro_batch in window:
                    micro_batch.start.repeat()
                    with exchange(micro_batch is window[-1]):
                        losses.append(micro_batch.again().detach())
            handle.loss = _sum(losses)
        return True

    def run(
        self, closure: Callable[[], Any], results: list[Any], ascent_closure: Callable[[], Any] | None = None
    ) -> Any:
        """Run both passes by calling a closure.

        Args:
            closure: Computes a gradient and returns its loss.
            results: Gets what the closure returned in the first pass.
            ascent_closure: Must be None.

        Returns:
            What the closure returned in the pass whose gradient is left in place.

        Raises:
            TypeError: If there is an ``ascent_closure``.
        """
        if ascent_closure is not None:
            raise TypeError(
                "step() was given an ascent_closure, but the direction is the gradient that closure computes; use "
                "direction=samopt.parts.ReusedGradient() to take it from another"
            )
        variables = WindowVariables()
        number = variables.begin(closure)
        start = self._replay.begin_first(variables.at_start.generators, variables.at_start.modules)
        check = ClearingCheck(self._ascent.parameters())
        old = GradientMarks(self._ascent.frozen_with_gradients())
        with torch.enable_grad(), self.first_pass(), self._replay.told_first_pass():
            results.append(closure())
        self._end_first(variables, closure)
        check.verify()
        # A closure may thaw parameters at its start and freeze them at its end; it has cleared the gradients.
        self._frozen_since = {id(p) for p in self._ascent.frozen_with_gradients() if not old.is_known(p)}
        self._leaves = []
        self._note_leaves(loss_in(results[-1]))
        if not self._ascent.may_move():
            self._replay.forget()
            self.metrics = StepMetrics(loss=as_scalar(results[-1]), radius=torch.zeros(()))
            self._complete()
            return results[-1]
        try:
            with cast(Any, self.perturbed(results[-1], start, may_lack_gradients=True)) as handle:
                if not handle.is_needed:
                    return results[-1]
                variables.set_to(number)
                with torch.enable_grad():
                    handle.loss = closure()
        finally:
            self._put_back(variables)
        return handle.loss

    def perturbed(
        self, first_loss: Any, start: RngState | None = None, *, may_lack_gradients: bool = False
    ) -> ExactExit[PassHandle]:
        """Return the context in which the weights are at ``w + epsilon``.

        Args:
            first_loss: What the first pass returned, for the metrics.
            start: Random state at the start of the first pass, where known.
            may_lack_gradients: Whether a first pass without any gradient is a plain step instead of an error.
        """
        return ExactExit(self._steps(first_loss, start, may_lack_gradients))

    def ascend(self) -> None:
        """Take the gradients and move the weights; ``restore`` ends it."""
        self.check_restored("ascend()")
        context = self.perturbed(None)
        context.__enter__()
        self._context = context

    def restore(self) -> None:
        """Put the weights back and keep the second pass's gradients.

        Raises:
            RuntimeError: If ``ascend`` was not called.
        """
        context, self._context = self._context, None
        if context is None:
            raise RuntimeError(
                "restore() was called, but the weights are not perturbed; call ascend() first, or use "
                "'with optimizer.perturbed():', which does both"
            )
        context.__exit__(None, None, None)

    def check_restored(self, what: str) -> None:
        """Raise if the second pass is running.

        Args:
            what: What was called, for the message.

        Raises:
            RuntimeError: If the second pass is running.
        """
        if self._current is not None:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; leave 'with optimizer.perturbed():' first, or "
                "call restore() after ascend()"
            )

    def hold_exact(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing: outside the second pass, every forward runs at the exact weights."""
        self.check_restored("exact()")
        return nullcontext()

    def _steps(self, first_loss: Any, start: RngState | None, may_lack_gradients: bool) -> Generator[Any, Any, None]:
        """Move the weights, wait for the block, restore: the generator behind ``perturbed``."""
        self.check_restored("perturbed()")
        if self._reuse is not None and not self._is_reusing:
            raise RuntimeError(
                "reuse_trunk=True works in 'loss = optimizer.backward(compute_loss)' alone, where samopt runs both "
                "passes; this loop, or the trainer that it belongs to, runs them itself. Call backward(), or leave "
                "reuse_trunk out"
            )
        self._refuse_waiting("perturbed()")
        second = self._second_pass(first_loss, may_lack_gradients)
        handle = PassHandle(second.is_needed)
        try:
            try:
                self._current = second
                second.begin(self._replay, start, self._memory)
                yield handle
            except GeneratorExit:  # the optimizer was dropped before restore(), and is collected at any time
                self._replay.leave_streams()
                raise
            finally:
                second.restore_weights()
            error = yield 0  # the type of the exception that ended the block, or None
            yield 0  # the exception
            yield 0  # its traceback
            second.loss = handle.loss
            self._finish(second, failed=error is not None)
        finally:  # this does nothing unless an interrupt cut short what is above
            if self._current is second:
                second.restore_weights()
                self._finish(second, failed=True)
        yield 0

    @never_compiled
    def _second_pass(self, first_loss: Any, may_lack_gradients: bool) -> SecondPass:
        """Return a second pass along the present gradients, with nothing changed yet."""
        ascent = self._ascent
        frozen_since, self._frozen_since = self._frozen_since, ()
        stashed, targets = ascent.targets_from_gradients(frozen_since)
        frozen = [p for p in ascent.frozen_with_gradients() if id(p) not in frozen_since]
        has_gradients = not all(map(operator.is_, stashed.gradients, repeat(None)))
        if not (may_lack_gradients or has_gradients or runs_on_several_ranks()):
            if ascent.may_move():
                if frozen and any_nonzero([{"params": frozen}]):
                    raise RuntimeError(_FROZEN.format(len(frozen)))
                raise RuntimeError(
                    "perturbed() found no gradients at w, so there is no direction to perturb along. Either the first "
                    "backward is missing: call criterion(model(x), y).backward() before 'with optimizer.perturbed():'. "
                    'Or the one-pass loop was meant: make the optimizer with direction="momentum". Or a second pass of '
                    "another optimizer is running, which has set aside the gradients of every module in its model=: "
                    "enter both with model= set to the modules that each one trains"
                )
        if has_gradients and (targets or ascent.may_move()):
            self._replay.check_first_pass()
        if not may_lack_gradients:  # where samopt runs both passes, it has looked already
            self._leaves = []
            self._note_leaves(loss_in(first_loss))
        second = SecondPass(
            ascent,
            stashed,
            targets,
            self._gradients_of_others(),
            first_loss=first_loss,
            measure_grad_norms=self._measure_grad_norms,
        )
        self._frozen_marks = GradientMarks(frozen) if frozen else None
        ascent.advance_rounding()
        self._is_ready = False
        self._is_unscaled = False
        self._decoupled = None
        return second

    @never_compiled
    def _finish(self, second: SecondPass, *, failed: bool) -> None:
        """Put back what is left, combine the gradients and measure; whatever happens, the next step can begin."""
        failed = failed or second.is_combining
        try:
            if not failed and second.is_needed:
                self._replay.check_second_pass()
                if self._frozen_marks is not None:
                    self._refuse_thawed(self._frozen_marks)
            second.end(self._replay, failed=failed)
            if not failed:
                self._deliver(second)
        except BaseException:
            second.end(self._replay, failed=True)  # again: an interrupt may have cut the first one short
            raise
        finally:
            self._current = None

    def _refuse_thawed(self, marks: GradientMarks) -> None:
        """Raise if the second pass trained a parameter that was frozen before it: it was not moved.

        Args:
            marks: Of the gradients that frozen parameters had when the pass began.

        Raises:
            RuntimeError: If it did.
        """
        changed = marks.changed()
        if changed:
            raise RuntimeError(_FROZEN.format(len(changed)))

    def _deliver(self, second: SecondPass) -> None:
        """Leave the base's gradients in place."""
        ascent = self._ascent
        flag = second.nonfinite_flag()
        metrics = None
        if ascent.combination is not None:
            if ascent.combines and ascent.may_move():
                metrics = second.measure()
                self._decoupled = second.combine(ascent.combination)
            else:
                self._complete()
        if flag is not None:
            propagate_nonfinite(flag, ascent.base.param_groups)
        self.metrics, self._is_measured = second.measure() if metrics is None else metrics, True
        second.fill_flat_memory()
        self._waiting = self._first_gradient()
        self._warn_of_missing_gradients(second)
        self._is_ready = True

    def _first_gradient(self) -> tuple[Tensor, Tensor] | None:
        """Return the first parameter that has a gradient, and the gradient."""
        for group in self._ascent.base.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    return parameter, parameter.grad
        return None

    def _complete(self) -> bool:
        """Make the base's gradients of those at ``w``, where the combination chose to leave out the second pass.

        Returns:
            Whether the combination was asked to.
        """
        ascent = self._ascent
        if ascent.combination is None or not ascent.combines or not ascent.is_on():
            return False
        parameters = [parameter for parameter in ascent.parameters() if parameter.grad is not None]
        if parameters:
            with torch.no_grad():
                ascent.combination.complete(parameters, dense_gradients(parameters))
        return bool(parameters)

    def _refuse_waiting(self, what: str) -> None:
        """Raise if a second gradient waits for the step: a new first pass would add to it."""
        if self.waits_for_step:
            raise RuntimeError(
                f"{what} was called while the gradients of a second pass wait for step(); its gradients would be added "
                "to them. Call optimizer.step() or optimizer.zero_grad() first. To accumulate over micro-batches, call "
                "optimizer.backward(compute_loss, last=...) for each; or take all first backward passes, then all "
                "second ones inside one 'with optimizer.perturbed():'"
            )

    def _warn_of_missing_gradients(self, second: SecondPass) -> None:
        """Warn once where a second pass that was to give the gradient gave none, so that the update does nothing."""
        if self._waiting is not None or not second.is_needed:
            return
        if self._has_warned_of_missing or runs_on_several_ranks():
            return
        self._has_warned_of_missing = True
        warn_user(
            "the second pass computed no gradients, so this step changes no weight. Call backward inside it: 'with "
            "optimizer.perturbed(): criterion(model(x), y).backward()', and clear no gradients after that before step()"
        )

    def _end_first(self, variables: WindowVariables, function: Callable[[], Any]) -> None:
        """Look at a function after its first call; what it wrote into memory of gradients is not put back."""
        variables.end(function)
        if variables.written:
            parameters = (*self._ascent.parameters(), *self._replay.state.parameters_with_gradients())
            variables.leave_alone([p.grad for p in parameters if p.grad is not None])

    def _put_back(self, variables: WindowVariables) -> None:
        """Put back the variables of a loss function, and warn once where it wrote into a tensor outside itself."""
        variables.put_back()
        if self._has_warned_of_written or not variables.written:
            return
        self._has_warned_of_written = True
        tensor, name = variables.written[0]
        warn_user(
            f"the loss function wrote in place into {'an attribute' if name is None else repr(name)}, a {tensor.dtype} "
            f"tensor of shape {tuple(tensor.shape)} outside the models. It is as the first pass left it, but the "
            "second pass began with that, too. If the function reads what was there before, as x.sub_(mean) does, "
            "write x = x - mean instead; fill a queue after step()"
        )

    def _gradients_of_others(self) -> StashedGradients:
        """Return what else has gradients, with these: parameters that another optimizer trains, and other leaves."""
        owned = set(map(id, self._ascent.parameters()))
        found = {id(each): each for each in (*self._replay.state.parameters_with_gradients(), *self._leaves)}
        others = [tensor for key, tensor in found.items() if key not in owned]
        return StashedGradients(others, [tensor.grad for tensor in others])

    def _note_leaves(self, loss: Tensor | None) -> None:
        """Note the leaves of a loss, such as an input's perturbation: the second pass would add to their gradients.

        Args:
            loss: The loss of the first pass, differentiated.
        """
        if loss is not None:
            self._leaves += [leaf for leaf in leaves_of([loss]) if leaf.grad is not None]

    def _exchange(self, *, is_needed: bool) -> AbstractContextManager[None]:
        """Return the context in which ranks do or do not exchange gradients."""
        return nullcontext() if is_needed else unsynced(self._models)


def differentiate(result: Any) -> Tensor:
    """Call backward on the loss in what a user's function returned, and return it.

    Args:
        result: A loss, or a mapping, tuple or object that holds one.

    Returns:
        The loss, 0-dim.

    Raises:
        TypeError: If there is no loss in what was returned.
        RuntimeError: If it has no graph.
    """
    loss = _differentiable(result)
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    return loss


def _differentiable(result: Any) -> Tensor:
    """Return the loss in what a user's function returned, if it can be differentiated."""
    loss = loss_in(result)
    if loss is None:
        found = type(result).__name__
        if isinstance(result, tuple | list) and result:
            found += f" that begins with {describe(result[0])}; put the loss first"
        raise TypeError(
            f"backward() needs a function that returns the loss, or a dict, tuple or output object that holds it; got "
            f"{found}. Do not call backward inside: as in optimizer.backward(lambda: criterion(model(x), y))"
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss given to backward() has no graph: it was detached, or computed without gradients; return the "
            "loss as criterion(model(x), y) gives it"
        )
    return loss


def _sum(losses: Sequence[Tensor]) -> Tensor:
    """Return the loss of a window."""
    return torch.stack(list(losses)).sum() if len(losses) > 1 else losses[0]
