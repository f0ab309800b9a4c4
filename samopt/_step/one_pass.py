"""The order of a step with one pass: the direction is known, so its gradient is taken at ``w + epsilon`` at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from samopt._callers.cached_weights import clear_cached_weights
from samopt._callers.user_warnings import warn_user
from samopt._perturb.gradients import StashedGradients, any_nonzero
from samopt._perturb.perturbation import Perturbation, gradient_norm
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.call_watch import watch
from samopt._replay.module_state import ModuleState, every_module
from samopt._replay.random_state import RngState
from samopt._step.ascent import Ascent
from samopt._step.decoupled_update import DecoupledUpdate
from samopt._step.exact_exit import ExactExit
from samopt._step.moved_shards import MovedShards
from samopt._step.outer_variables import OuterVariables, WindowVariables
from samopt._step.pass_handle import PassHandle
from samopt._step.retirement import enlist, replace_older
from samopt._step.shifted_parameters import OtherWeights, ShiftedParameters
from samopt._step.two_pass import differentiate
from samopt.distributed import is_fully_sharded, reshard, runs_on_several_ranks, unsynced
from samopt.parts.direction import CachedDirection, KnownDirection
from samopt.step_metrics import StepMetrics, as_scalar

__all__ = ["OnePass"]


class OnePass:
    """Where an optimizer is between two steps whose direction is known before the gradient.

    With a model, its parameters are replaced by tensors at ``w + epsilon`` while it runs in training (see
    ``ShiftedParameters``): no weight moves. Modules that ``fully_shard`` has sharded gather copies of their own, so
    there the shards are moved (see ``MovedShards``). Without a model, ``perturbed()`` and the closure form move them.

    Args:
        ascent: What moves, along what, how far.
        models: The modules whose calls to follow.
        sync_perturbation: Whether ranks share the gradient of a cached direction.
        measure_grad_norms: Whether to measure the gradient norm.

    Attributes:
        metrics: What the latest step measured.
    """

    def __init__(
        self, ascent: Ascent, models: Sequence[nn.Module], *, sync_perturbation: bool, measure_grad_norms: bool
    ) -> None:
        self._ascent = ascent
        self._direction = cast(KnownDirection, ascent.direction)
        self._models = models
        self._sync_perturbation = sync_perturbation
        self._measure_grad_norms = measure_grad_norms
        self._memory = ScratchPool()  # for w + epsilon beside the weights
        self._old_weights = ScratchPool()  # for weights that are moved themselves
        self._backup: WeightBackup | None = None  # of weights that are at w + epsilon now
        self._context: ExactExit[PassHandle] | None = None
        self._has_ascended = False
        self._is_aside = False  # whether a first pass is running, at w
        self._loss: Any = None
        self._moved = StepMetrics()
        self.metrics = StepMetrics()
        self._shards: MovedShards | None = None
        self._shifted: OtherWeights | None = None
        if is_fully_sharded(every_module(models)):
            self._shards = MovedShards(models, self._enter_forward, self._enter, self._leave, self._be_exact)
        elif models:
            self._shifted = self._make_shifted()
        self._stop_watching: Callable[[], None] | None = None
        self._is_retired = False
        self._has_warned = False
        if models:
            enlist(self, ascent.parameters())
            self._watch()
        else:
            replace_older(ascent.parameters())

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights themselves are at ``w + epsilon`` now."""
        return self._backup is not None

    @property
    def is_attached(self) -> bool:
        """Whether the models' calls are followed, or will be once the optimizer is used again."""
        return self._stop_watching is not None or self._is_retired

    @property
    def needs_first_pass(self) -> bool:
        """Whether a cached direction must be taken, in a pass of its own, before this step's ascent."""
        return self._ascent.needs_capture()

    @property
    def waits_for_step(self) -> bool:
        """False: micro-batches add up in one pass."""
        return False

    def detach(self) -> None:
        """Follow the models' calls no longer."""
        self._leave()
        self._is_retired = False
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if self._shards is not None:
            self._shards.detach()
        if self._shifted is not None:
            self._shifted.forget()

    @contextmanager
    def hold_exact(self) -> Generator[None]:
        """Have every forward in this context run at the exact weights."""
        self._be_exact()
        watcher = self._shifted or self._shards
        if watcher is None:
            yield
            return
        watcher.exact_depth += 1
        try:
            yield
        finally:
            watcher.exact_depth -= 1

    def ascend(self) -> None:
        """Move the weights to ``w + epsilon``; ``restore`` ends it."""
        if self.is_perturbed:
            raise RuntimeError("ascend() was called while the weights are perturbed; call restore() or step() first")
        context = self.perturbed(None)
        context.__enter__()
        self._context = context

    def restore(self) -> None:
        """Put the weights back; without a direction yet, they never moved."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)
        self._leave()

    def perturbed(self, first_loss: Any) -> ExactExit[PassHandle]:
        """Return the context in which the weights themselves are at ``w + epsilon``.

        Args:
            first_loss: Ignored: there is no first pass.
        """
        return ExactExit(self._steps())

    @contextmanager
    def first_pass(self, outside: OuterVariables | None = None) -> Generator[None]:
        """Take a cached direction in this context; nothing else is left of the pass.

        Args:
            outside: What the loss function finds outside itself, where that is known.

        Raises:
            RuntimeError: If the pass computed no gradients.
        """
        if not isinstance(self._direction, CachedDirection) or self._is_aside:
            yield
            return
        ascent = self._ascent
        parameters = ascent.parameters()
        gradients = StashedGradients(parameters, [parameter.grad for parameter in parameters])
        state = ModuleState(self._models)
        state.reach(() if outside is None else outside.modules)
        random = RngState.capture(ascent.accelerators(), generators=() if outside is None else outside.generators)
        state.save()
        self._is_aside = True
        try:
            gradients.clear()
            with self.hold_exact(), nullcontext() if self._sync_perturbation else unsynced(self._models):
                yield
            self._direction.capture(parameters if ascent.selection is None else ascent.perturbed_parameters())
        finally:
            self._is_aside = False
            gradients.put_back()
            state.restore()
            random.restore()
            clear_cached_weights()

    def backward(self, compute_loss: Callable[[], Any], *, last: bool) -> Any:
        """Run forward and backward at ``w + epsilon``.

        Args:
            compute_loss: Returns the loss of a micro-batch.
            last: Whether it is the last of the window.

        Returns:
            What ``compute_loss`` returned.
        """
        with torch.enable_grad():
            if self.needs_first_pass:
                self._take_direction(compute_loss, lambda: differentiate(compute_loss()))
            with self._moved_without_model(), nullcontext() if last else unsynced(self._models):
                result = compute_loss()
                differentiate(result)
        self._loss = result
        return result

    def run(
        self, closure: Callable[[], Any], results: list[Any], ascent_closure: Callable[[], Any] | None = None
    ) -> Any:
        """Run the one pass, after one for the direction where that is due.

        Args:
            closure: Computes a gradient and returns its loss.
            results: Gets what the closure returned.
            ascent_closure: Computes the gradient for the direction; None is ``closure``.

        Returns:
            What the closure returned.
        """
        with torch.enable_grad():
            if self.needs_first_pass:
                closure_of_direction = ascent_closure or closure
                self._take_direction(closure_of_direction, closure_of_direction)
            with self._moved_without_model():
                results.append(closure())
        self._loss = results[-1]
        self._measure()
        return results[-1]

    def _take_direction(self, function: Callable[[], Any], run: Callable[[], Any]) -> None:
        """Run the pass of a cached direction, of which nothing else is left.

        Args:
            function: What computes its loss.
            run: Calls it, and takes the gradient.
        """
        variables = WindowVariables()
        number = variables.begin(function)
        with self.first_pass(variables.at_start):
            run()
        variables.end(function)
        variables.set_to(number)

    def check_restored(self, what: str) -> None:
        """Have the weights exact.

        Args:
            what: What for.
        """
        self.restore()

    def check_gradient(self, stage: OptState | None) -> None:
        """Raise if there are gradients, but none was taken at ``w + epsilon``.

        Args:
            stage: How far the calling ``GradScaler`` got; it does not matter in one pass.

        Raises:
            RuntimeError: If the gradients are those of another point.
        """
        if not self._has_ascended and self._was_retired():
            return
        if not self._has_ascended and self._can_move() and any_nonzero(self._ascent.base.param_groups):
            if self._models:
                names = ", ".join(type(model).__name__ for model in self._models)
                seen = f"no training forward of {names}"
            else:
                seen = "model=None"
            raise RuntimeError(
                f"step() found gradients that were not taken at the perturbed weights ({seen} since the last step). "
                "Pass the module that your loop calls (the torch.compile'd or DDP one) as model=, in train() mode; or "
                "write 'with optimizer.perturbed(): criterion(model(x), y).backward()' before 'optimizer.step()'"
            )
        self._measure()

    def gradients_cleared(self) -> None:
        """Follow the models' calls again, if another optimizer over the same weights ended that: this one is in use."""
        self._was_retired()
        if self._shifted is not None:
            self._shifted.gradients_cleared()

    def note_unscaling(self) -> None:
        """Do nothing: gradients are scaled and unscaled once."""

    def take_decoupled_update(self) -> DecoupledUpdate | None:
        """Return None: there is no first gradient to decouple from the second."""
        return None

    def reset(self) -> None:
        """Be ready for the next step's ascent: the update changes weights and direction."""
        self._leave()
        if self._has_ascended:
            self._ascent.advance_rounding()
        self._has_ascended = False
        if self._shifted is not None:
            self._shifted.forget()
        self._loss = None

    def retire(self) -> None:
        """Stop following the models' calls, because another optimizer was made over the same weights."""
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
            self._is_retired = True

    def _was_retired(self) -> bool:
        """Follow the models' calls again if ``retire`` ended that, and return whether it did."""
        was_retired, self._is_retired = self._is_retired, False
        if was_retired:
            self._watch()
        return was_retired

    def _make_shifted(self) -> OtherWeights:
        """Return what gives the modules other weights while they run."""
        return ShiftedParameters(self._displaced, self._ascent.parameters)

    def _watch(self) -> None:
        if self._shifted is not None:
            self._stop_watching = self._shifted.follow(self._models)
        elif self._shards is not None:
            # Sharded modules gather copies for the whole of a model, so parts called on their own are not followed.
            self._stop_watching = watch(self._models, self._shards, only_these=True)

    def _steps(self) -> Generator[Any, Any, None]:
        """Move the weights, wait for the block, put them back: the generator behind ``perturbed``."""
        handle = PassHandle(True)
        watcher = self._shifted
        try:
            if watcher is not None:
                watcher.exact_depth += 1  # the weights themselves are moved, so no module replaces them
            try:
                self._enter()
                yield handle
            finally:
                try:
                    self._leave()
                finally:
                    self._leave()  # does nothing unless an interrupt hit the first one
        finally:
            if watcher is not None:
                watcher.exact_depth -= 1
        if handle.loss is not None:
            self._loss = handle.loss
        for _ in range(4):
            yield 0

    def _moved_without_model(self) -> AbstractContextManager[Any]:
        """Return the context that moves the weights where no model's calls are followed."""
        follows = self._stop_watching is not None
        return nullcontext() if follows else cast(Any, self.perturbed(None))

    def _displaced(self, beside: bool) -> dict[Tensor, Tensor]:
        """Return the values at ``w + epsilon`` by parameter; empty where nothing moves.

        Args:
            beside: Leave the memory of the last values to the graphs that hold it.
        """
        if beside:
            self._memory = ScratchPool()
        perturbation = self._perturbation()
        if perturbation is None:
            return {}
        values, applied = perturbation.displaced(self._memory, self._ascent.rounding_noise(), may_link=True)
        self._moved = StepMetrics(radius=perturbation.radius(), applied_radius=applied)
        return values

    def _enter(self) -> None:
        """Move the weights to ``w + epsilon``; does nothing where they are, or while there is no direction yet."""
        if self.is_perturbed or self._is_aside:
            return
        perturbation = self._perturbation()
        if perturbation is None:
            return
        self._backup = perturbation.backup(self._old_weights)
        try:
            applied = perturbation.move(self._ascent.rounding_noise(), self._backup)
        except BaseException:
            self._leave()
            raise
        if perturbation.is_sharded:
            for model in self._models:
                reshard(model)
            if self._shards is not None:
                self._shards.has_stale_copies = True
        self._moved = StepMetrics(radius=perturbation.radius(), applied_radius=applied)
        clear_cached_weights()

    def _enter_forward(self) -> None:
        """Do ``_enter`` where a training forward of sharded modules begins."""
        if not self.is_perturbed and torch._C._current_graph_task_id() != -1 and self._can_move():
            raise RuntimeError(
                "a training forward began inside a backward pass whose own forward ran at the exact weights, so loss "
                "and gradient would be of different weights. torch.utils.checkpoint(..., use_reentrant=True) around "
                "the whole module does this; use use_reentrant=False, or checkpoint parts of the module"
            )
        self._enter()

    def _leave(self) -> None:
        """Put every weight back, bit for bit; does nothing where they are exact."""
        if self._backup is None:
            return
        try:
            self._backup.restore()
        finally:
            self._backup.restore()  # does nothing unless an interrupt hit the first one
        self._backup = None
        clear_cached_weights()

    def _be_exact(self) -> None:
        """Put every weight back, and have a forward that is about to begin gather exact shards."""
        self._leave()
        if self._shards is not None and self._shards.has_stale_copies:
            self._shards.has_stale_copies = False
            for model in self._models:
                reshard(model)

    def _perturbation(self) -> Perturbation | None:
        """Return this step's perturbation; None where nothing moves.

        Raises:
            RuntimeError: If a cached direction has to be taken first.
        """
        if self.needs_first_pass:
            raise RuntimeError(
                f"this step's direction, {type(self._direction).__name__}, has not been taken; where "
                "optimizer.needs_first_pass is True, write 'with optimizer.first_pass(): criterion(model(x), "
                "y).backward()' before the step's own forward, or use optimizer.step(closure)"
            )
        targets = self._ascent.targets_along(self._direction)
        self._has_ascended = True
        if any([some.weights for some in targets]):
            perturbation = self._ascent.perturbation(targets)
            if not (perturbation.is_empty or perturbation.usable is False):
                return perturbation
        self._moved = StepMetrics(radius=torch.zeros(()), applied_radius=torch.zeros(()))
        return None

    def _can_move(self) -> bool:
        return any(some.weights for some in self._ascent.targets_along(self._direction))

    def _warn_of_exact_gradients(self) -> None:
        """Warn once where a parameter was used at the exact weights alone, past the modules that replace it."""
        # Of several ranks, another one may have used the parameter in its module.
        if self._shifted is None or self._has_warned or runs_on_several_ranks():
            return
        found = self._shifted.unreached()
        if not found:
            return
        self._has_warned = True
        names = {id(p): name for model in self._models for name, p in model.named_parameters()}
        first = names.get(id(found[0]), f"one of shape {tuple(found[0].shape)} outside model=")
        warn_user(
            f"gradients were taken at the exact weights, not at the perturbed ones, for {len(found)} parameters; the "
            f"first is {first}. They are used outside the modules of model= (add that module to the list), in a module "
            "called in eval() mode or scripted, or looked up in forward through parameters(), state_dict() or a list "
            "instead of the module's attribute. If that is not meant, leave out model= and use "
            "optimizer.backward(compute_loss), which then moves the weights themselves"
        )

    def _measure(self) -> None:
        """Note what the step measured."""
        self._warn_of_exact_gradients()
        norm = gradient_norm(self._ascent.perturbed_parameters()) if self._measure_grad_norms else None
        self.metrics = replace(self._moved, perturbed_loss=as_scalar(self._loss), perturbed_grad_norm=norm)
