"""The passes of a direction that needs no first one: ascent at a training forward, exact weights after its backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from samopt._perturb.gradients import StashedGradients, any_nonzero
from samopt._perturb.perturbation import Perturbation, gradient_norm
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.forward_calls import RngState, SavedBuffers
from samopt._replay.unobserved import is_observed
from samopt._step.decoupled_update import DecoupledUpdate
from samopt.distributed import reshard, unsynced
from samopt.parts.direction import Direction, TakenDirection
from samopt.step_metrics import ZERO, Known, StepMetrics, as_scalar

if TYPE_CHECKING:
    from samopt.optimizer import SharpnessAwareOptimizer

__all__ = ["OnePass"]

_STILL = StepMetrics(asked=ZERO, applied=ZERO)
_Reference: TypeAlias = Callable[[], Callable[[], None] | None]


class OnePass:
    """Moves the weights to ``w + epsilon`` for exactly as long as a gradient is being taken.

    With a model, hooks do it: a forward that trains (``model.training`` and gradients enabled) moves the weights, the
    end of its backward pass moves them back. Between two steps the direction does not change, so moving them again (for
    the next micro-batch, or for a second backward through the same graph) reproduces every bit. Any other forward, and
    reading or loading a state dict, finds the exact weights. Without a model, the closure form or the user says when.

    Args:
        optimizer: The optimizer whose groups, metric and radius are used.
        model: The module whose forward calls to follow, or None.
        direction: Where uphill is.
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, model: nn.Module | None, direction: Direction) -> None:
        self._optimizer: SharpnessAwareOptimizer = weakref.proxy(optimizer)
        self._direction = direction
        self._taken = direction if isinstance(direction, TakenDirection) else None
        self._perturbation: Perturbation | None = None
        self._has_ascended = False
        self._is_aside = False  # whether a first pass is running, at w
        self._has_stale_copies = False  # gathered from shards that have been put back since
        self._memory = ScratchPool()
        self._backup: WeightBackup | None = None
        self._moved = StepMetrics()
        self.metrics = StepMetrics()
        self.model = model
        self.loss: Any = None
        if model is not None:
            follower = _Follower(
                *(weakref.WeakMethod(m) for m in (self.enter_forward, self.enter, self.leave, self.be_exact))
            )
            for handle in follower.attach(model):
                weakref.finalize(self, handle.remove)

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at ``w + epsilon`` now."""
        return self._perturbation is not None

    @property
    def needs_first_pass(self) -> bool:
        """Whether the direction has to be taken anew, in a pass of its own, before this step's ascent."""
        return self._taken is not None and self._taken.is_due() and self._optimizer.may_move()

    def enter(self) -> None:
        """Move the weights to ``w + epsilon``; does nothing where they are, or while there is no direction yet.

        Raises:
            RuntimeError: If the direction has to be taken first.
        """
        if self._perturbation is not None or self._is_aside:
            return
        optimizer = self._optimizer
        if self.needs_first_pass:
            raise RuntimeError(
                f"this step's direction, {type(self._direction).__name__}, has not been taken; where "
                "optimizer.needs_first_pass is True, write 'with optimizer.first_pass(): criterion(model(x), "
                "y).backward()' before the step's own forward, or use optimizer.step(closure)"
            )
        targets = optimizer.targets_along(self._direction)
        self._has_ascended = True
        if not targets:
            self._moved = _STILL
            return
        perturbation = Perturbation(targets, optimizer.metric, linf=optimizer.norm == "linf", backend=optimizer.backend)
        if perturbation.is_empty or perturbation.usable is False:
            self._moved = StepMetrics(asked=Known(perturbation.radius()), applied=ZERO)
            return
        self._perturbation = perturbation
        self._has_stale_copies = perturbation.is_sharded
        try:
            self._backup = perturbation.backup(self._memory)
            applied = perturbation.move(optimizer.rounding_noise(), self._backup)
        except BaseException:
            self.leave()
            raise
        if perturbation.is_sharded:
            reshard(self.model)
        self._moved = StepMetrics(asked=Known(perturbation.radius()), applied=Known(applied))
        perturbation.release_directions()
        torch.clear_autocast_cache()  # autocast keeps low-precision copies of the weights, which are stale now

    def enter_forward(self) -> None:
        """Do ``enter`` where a training forward begins.

        Raises:
            RuntimeError: If it belongs to a backward pass that began at the exact weights.
        """
        if self._perturbation is None and _in_backward() and self._can_move():
            raise RuntimeError(
                f"a training forward of {type(self.model).__name__} began inside a backward pass, at whose own forward "
                "the weights were exact, so loss and gradient would be of different weights. "
                "torch.utils.checkpoint(..., use_reentrant=True) around the whole module does this; use "
                "use_reentrant=False, or checkpoint parts of the module"
            )
        self.enter()

    def leave(self) -> None:
        """Put every weight back, bit for bit; does nothing where they are exact."""
        if self._perturbation is None:
            return
        try:
            if self._backup is not None:
                self._backup.restore()
        finally:
            if self._backup is not None:
                self._backup.restore()  # does nothing unless an interrupt hit the first one
        self._perturbation = None
        torch.clear_autocast_cache()

    def be_exact(self) -> None:
        """Put every weight back, and have a forward that is about to begin gather exact shards."""
        self.leave()
        if self._has_stale_copies:
            reshard(self.model)
            self._has_stale_copies = False

    def ascend(self, first_loss: Any = None) -> None:
        """Move the weights to ``w + epsilon`` and keep the gradients: they may hold earlier micro-batches.

        Args:
            first_loss: Ignored: there is no first pass.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        if self._perturbation is not None:
            raise RuntimeError("ascend() was called while the weights are perturbed; call restore() or step() first")
        self.enter()

    def restore(self) -> None:
        """Put the weights back; without a direction yet, they never moved."""
        self.leave()

    @contextmanager
    def at_perturbed(self, first_loss: Any = None) -> Generator[OnePass]:
        """Be at ``w + epsilon`` inside this context.

        Args:
            first_loss: Ignored: there is no first pass.

        Yields:
            A handle whose ``loss`` may be set, for ``last_step``.
        """
        try:
            try:
                self.enter()
                yield self
            finally:
                self.leave()
        finally:
            self.leave()  # does nothing unless an interrupt hit the first one

    @contextmanager
    def first_pass(self) -> Generator[None]:
        """Take the direction in this context, if it is one to be taken; nothing else is left of the pass.

        Raises:
            RuntimeError: If the pass computed no gradients.
        """
        if self._taken is None or self._is_aside:
            yield
            return
        self.be_exact()
        optimizer = self._optimizer
        parameters = optimizer.parameters()
        aside = _Aside(parameters, self.model, optimizer.accelerators())
        self._is_aside = True
        try:
            aside.begin()
            with nullcontext() if optimizer.sync_perturbation else unsynced(self.model):
                yield
            self._taken.take(parameters)
        finally:
            self._is_aside = False
            aside.end()

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
                with self.first_pass():
                    (ascent_closure or closure)()
            with self.at_perturbed():
                results.append(closure())
        self.loss = results[-1]
        self._measure()
        return results[-1]

    def settle(self, what: str) -> None:
        """Have the weights exact.

        Args:
            what: What for.
        """
        self.leave()

    def require_gradient(self, stage: OptState | None) -> None:
        """Raise if there are gradients, but none was taken at ``w + epsilon``.

        Args:
            stage: How far the calling ``GradScaler`` got; it does not matter in one pass.

        Raises:
            RuntimeError: If the gradients are those of another point.
        """
        optimizer = self._optimizer
        if not self._has_ascended and self._can_move() and any_nonzero(optimizer.param_groups):
            seen = "model=None" if self.model is None else f"no training forward of {type(self.model).__name__}"
            raise RuntimeError(
                f"step() found gradients that were not taken at the perturbed weights ({seen} since the last step). "
                "Pass the module that your loop calls (the torch.compile'd or DDP one) as model=, in train() mode; or "
                "write 'with optimizer.perturbed(): criterion(model(x), y).backward()' before 'optimizer.step()'"
            )
        self._measure()

    def gradients_cleared(self) -> None:
        """Do nothing: weights move with the forward passes, whatever becomes of the gradients."""

    def note_unscaling(self) -> None:
        """Do nothing: gradients are scaled and unscaled once."""

    def take_beside(self) -> DecoupledUpdate | None:
        """Return None: there is no first gradient to decouple from the second."""
        return None

    def reset(self) -> None:
        """Be ready for the next step's ascent, whose direction the update changes."""
        self.leave()
        if self._has_ascended:
            self._optimizer.advance_rounding()
        self._has_ascended = False
        self.loss = None

    def _can_move(self) -> bool:
        return any(some.weights for some in self._optimizer.targets_along(self._direction))

    def _measure(self) -> None:
        optimizer = self._optimizer
        gradients = (
            [p for group in optimizer.param_groups if optimizer.option(group, "perturb") for p in group["params"]]
            if optimizer.measure_grad_norms
            else []
        )
        self.metrics = self._moved
        if self.loss is not None or gradients:
            self.metrics = replace(
                self._moved,
                perturbed_loss=as_scalar(self.loss),
                perturbed_grad_norm=gradient_norm(gradients) if gradients else None,
            )


class _Aside:
    """What a pass at ``w`` changes besides the weights, kept to be put back: gradients, buffers, random streams."""

    def __init__(self, parameters: list[Tensor], model: nn.Module | None, devices: list[torch.device]) -> None:
        self._taken = StashedGradients.of(parameters)
        self._buffers = SavedBuffers(model)
        self._random = RngState.capture(devices)

    def begin(self) -> None:
        self._taken.clear()

    def end(self) -> None:
        self._taken.put_back()
        self._buffers.restore()
        self._random.restore()
        torch.clear_autocast_cache()


class _Follower:
    """The hooks; copies of a hooked model get inert ones."""

    def __init__(
        self,
        enter_forward: _Reference | None = None,
        enter: _Reference | None = None,
        leave: _Reference | None = None,
        be_exact: _Reference | None = None,
    ) -> None:
        self._enter_forward = enter_forward
        self._enter = enter
        self._leave = leave
        self._be_exact = be_exact

    def attach(self, model: nn.Module) -> list[Any]:
        """Register every hook and return the handles."""
        # torch 2.4 has the last of these under a private name only.
        before_loading: Any = getattr(model, "register_load_state_dict_pre_hook", None)
        before_loading = before_loading or model._register_load_state_dict_pre_hook
        return [
            # Before FSDP's own, which gather the weights.
            model.register_forward_pre_hook(self.before_forward, prepend=True),
            model.register_forward_hook(self.after_forward, prepend=True, always_call=True),
            model.register_state_dict_pre_hook(self.exact),  # type: ignore[no-untyped-call]  # torch has no types here
            before_loading(self.exact),
        ]

    def before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._trains(module):
            self._call(self._enter_forward)
        else:
            self._call(self._be_exact)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._trains(module):
            return
        tensors = [tensor for tensor in _tensors_in(output) if tensor.requires_grad]
        for tensor in tensors:
            tensor.register_hook(self.before_backward)  # type: ignore[no-untyped-call]  # torch has no types here
        if not tensors and not _in_backward():  # where a checkpoint stops the forward once it has what it needs
            self._call(self._leave)  # the forward raised, or nothing can be differentiated

    def before_backward(self, gradient: Tensor) -> None:
        self._call(self._enter)
        if torch.is_grad_enabled():
            return  # create_graph=True: a backward through this one will read the weights again, so they stay
        # The engine has no public way to say "when this backward is over"; DDP and FSDP use the same call.
        torch.autograd.Variable._execution_engine.queue_callback(self.after_backward)

    def after_backward(self) -> None:
        self._call(self._leave)

    def exact(self, *args: Any) -> None:
        self._call(self._be_exact)

    def __reduce__(self) -> tuple[type[_Follower], tuple[()]]:
        return _Follower, ()

    @staticmethod
    def _trains(module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled() and is_observed()

    @staticmethod
    def _call(reference: _Reference | None) -> None:
        method = reference() if reference is not None else None
        if method is not None:
            method()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)
    elif hasattr(output, "__dict__"):
        for value in vars(output).values():
            yield from _tensors_in(value)
