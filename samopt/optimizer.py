"""The two-step engine: gradient, ascent, second gradient, exact restore, base step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt import kernels
from samopt.amp import calling_scaler_stage, is_unscaling
from samopt.geometry import Metric
from samopt.gradients import any_nonzero, poison_unless
from samopt.metrics import StepMetrics, as_scalar
from samopt.perturbation import Region, Target
from samopt.replay import PassObserver, Replay, RngState
from samopt.rounding import RoundingNoise
from samopt.second_pass import SecondPass
from samopt.stall import StallDetector
from samopt.validation import build_base, check_model, check_nonnegative
from samopt.wrapper import OptimizerWrapper, with_step_hooks

__all__ = ["SharpnessAwareOptimizer"]

_TWO_WAYS = (
    "Write either 'loss.backward()', 'with optimizer.perturbed(): criterion(model(x), y).backward()', "
    "'optimizer.step()'; or 'optimizer.step(closure)' with a closure that clears the gradients, computes the loss, "
    "calls backward and returns the loss"
)


class SharpnessAwareOptimizer(OptimizerWrapper):
    """Any torch optimizer, fed the gradient at ``w + epsilon`` instead of the gradient at ``w``.

    The common engine of ``SAM``, ``ASAM`` and their relatives, which differ in the metric and the radius. One step is:
    gradient at ``w``; ascent to ``w + epsilon`` with ``epsilon = rho T^2 g / ||T g||``; gradient there; exact restore
    of ``w``; step of the base optimizer. The norm is global over every parameter with ``perturb=True``. Each parameter
    group carries ``rho``, ``eta`` and ``perturb``, which may be changed at any time (see ``RhoScheduler``).

    Cost: two forward-backward passes and, while perturbed, one copy of the weights. Nothing is kept between steps.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class or factory, called as
            ``base_optimizer(params, **base_kwargs)``.
        metric: The elementwise metric ``T``.
        rho: Radius of the ball, >= 0, in the metric's norm. 0 is the base optimizer alone.
        eta: Stabiliser of the metric, >= 0.
        norm: "l2", or "linf" for ``epsilon = rho T sign(g)``.
        model: The module that the passes run. When given, the second pass replays dropout masks, and buffers such as
            normalisation statistics are left as by the first pass. Give the outermost module that your loop calls
            (the ``torch.compile``d or DDP one).
        stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically, so that perturbations below half an
            ulp survive in expectation.
        seed: Seed of that rounding; no global random stream is used.
        backend: Kernel backend, a name in ``samopt.kernels.BACKENDS`` or "auto".
        measure_grad_norms: Measure both gradient norms for ``last_step`` (one read of the gradients each where the
            metric does not give them for free).
        warn_on_stall: Warn once when the loss stays at its starting level while the perturbation is on.
        **base_kwargs: Arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None,
        *,
        metric: Metric,
        rho: float,
        eta: float,
        norm: str = "l2",
        model: nn.Module | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str = "auto",
        measure_grad_norms: bool = True,
        warn_on_stall: bool = True,
        **base_kwargs: Any,
    ) -> None:
        if norm not in ("l2", "linf"):
            raise ValueError(f'norm must be "l2" or "linf", got {norm!r}')
        if backend != "auto" and backend not in kernels.BACKENDS:
            raise ValueError(f'backend must be "auto" or one of {sorted(kernels.BACKENDS)}, got {backend!r}')
        check_nonnegative("rho", rho)
        check_nonnegative("eta", eta)
        base = build_base(params, base_optimizer, base_kwargs, type(self).__name__)
        check_model(model, base, type(self).__name__)
        super().__init__(base, {"rho": rho, "eta": eta, "perturb": True})
        self.metric = metric
        self.norm = norm
        self.backend = backend
        self.measure_grad_norms = measure_grad_norms
        self._rounding = RoundingNoise(seed) if stochastic_rounding else None
        self._stall = StallDetector() if warn_on_stall else None
        self._set_up_passes(model)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        if is_unscaling():
            self._unscaled = True
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.param_groups = value

    @property
    def last_step(self) -> StepMetrics:
        """Measurements of the latest pair of passes; every field None before the first."""
        return self._last_step

    @property
    def is_perturbed(self) -> bool:
        """Whether the second pass is running: for code that must not act twice in a step."""
        return self._current is not None

    @with_step_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights.

        With a closure, both passes happen inside: it is called at ``w``, then at ``w + epsilon``. Without one, both
        have happened already (see ``perturbed``), and this is the base optimizer's step.

        Args:
            closure: Clears the gradients, computes the loss of the whole batch, calls backward and returns the loss:
                a tensor, or a dict or tuple that holds it. Do not call backward before.

        Returns:
            What the closure returned in the first pass; None without a closure.

        Raises:
            RuntimeError: If there was no perturbed pass since the last step, the weights are still perturbed, or a
                ``GradScaler`` would let wrongly scaled gradients through.
            TypeError: If ``closure`` cannot be called.
        """
        self._require_unperturbed("step()")
        stage = calling_scaler_stage()
        if closure is None:
            self._require_second_gradient(stage)
            self._ready = False
            self._replay.forget()
            self._before_update()
            self.base_optimizer.step()
            return None
        if not callable(closure):
            raise TypeError(f"step() takes a closure or nothing, got {type(closure).__name__}. {_TWO_WAYS}")
        if stage is not None:
            raise RuntimeError(
                "GradScaler.step was given a closure, whose gradients it would neither unscale nor check; run the "
                "passes yourself: scaler.scale(loss).backward(), then 'with optimizer.perturbed(): "
                "scaler.scale(criterion(model(x), y)).backward()', then scaler.step(optimizer)"
            )
        return self._step_with(closure)

    @contextmanager
    def perturbed(self, loss: Any = None) -> Generator[SecondPass]:
        """Run the second pass inside this context: at ``w + epsilon`` within, exactly at ``w`` after.

        Entering takes the gradients at ``w`` (``.grad`` is None inside, so clearing it is optional), moves the weights
        and, with ``model=``, starts the replay of dropout masks. Leaving restores every weight bit for bit, also after
        an exception or interrupt, in which case the partial second gradients are dropped. Non-finite gradients at ``w``
        move nothing and are put back on leaving, so that the base optimizer or a ``GradScaler`` meets them.

        Args:
            loss: The first pass's loss, for ``last_step``.

        Yields:
            A handle whose ``loss`` may be set to the second pass's loss, for ``last_step``.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        with self._second_pass(loss) as second:
            yield second
        self._watch_for_stall()

    def ascend(self) -> None:
        """Move the weights to ``w + epsilon`` and take the gradients; ``perturbed`` does this and guards the way back.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        self._begin(None)

    def restore(self) -> None:
        """Put the weights back, bit for bit, keeping the second pass's gradients for ``step``.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        if self._current is None:
            raise RuntimeError(
                "restore() was called, but the weights are not perturbed; call ascend() first, or use "
                "'with optimizer.perturbed():', which does both"
            )
        try:
            self._put_back(failed=False)
        finally:
            self._put_back(failed=False)  # does nothing unless an interrupt hit the first one

    def first_step(self, zero_grad: bool = False) -> None:
        """Do ``ascend()``, under the name that existing SAM training code uses.

        Args:
            zero_grad: Accepted for that code; the gradients are taken in either case.
        """
        self.ascend()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Do ``restore()`` and ``step()``, under the name that existing SAM training code uses.

        Args:
            zero_grad: Also clear the gradients afterwards.
        """
        self.restore()
        self.step()
        if zero_grad:
            self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients through the base optimizer; a second gradient waiting for ``step`` is gone then.

        Args:
            set_to_none: As for ``torch.optim.Optimizer.zero_grad``.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._replay.gradients_cleared()
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling")
        return super().__getstate__() | {
            "metric": self.metric,
            "norm": self.norm,
            "backend": self.backend,
            "measure_grad_norms": self.measure_grad_norms,
            "_rounding": self._rounding,
            "_stall": self._stall,
            "model": self._replay.model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("model")
        super().__setstate__(state)
        self._set_up_passes(model)

    def _set_up_passes(self, model: nn.Module | None) -> None:
        self._replay = Replay(model, self._devices(), self._observers(model))
        self._current: SecondPass | None = None
        self._ready = False  # whether the gradients are a second pass's
        self._unscaled = False  # whether a GradScaler divided them since that pass began
        self._last_step = StepMetrics()

    def _observers(self, model: nn.Module | None) -> Iterable[PassObserver]:
        """Return what else wants to know when passes begin and end."""
        return ()

    def _before_update(self) -> None:
        """Act on the weights as the base optimizer is about to find them; the gradients are the final ones."""

    def _measure(self, second: SecondPass) -> StepMetrics:
        """Return what the step measured, once both passes are over."""
        return second.measure()

    def _own_state(self) -> dict[str, Any]:
        return {} if self._rounding is None else {"rounding": self._rounding.position}

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        if self._rounding is not None:
            self._rounding.position = (own or {}).get("rounding", 0)
        self._ready = False

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        """Give the base optimizer a closure that delivers the perturbed gradient at ``w``, as often as it asks."""
        self._validated_groups()
        first_losses: list[Any] = []

        def oracle() -> Any:
            loss = self._run_passes(closure, first_losses)
            self._before_update()
            return loss

        self.base_optimizer.step(oracle)
        self._ready = False
        self._watch_for_stall()
        return first_losses[0] if first_losses else None

    def _run_passes(self, closure: Callable[[], Any], first_losses: list[Any]) -> Any:
        """Leave the perturbed gradient in place, and return the loss that goes with it."""
        self._replay.forget()
        start = self._replay.capture()
        with torch.enable_grad():
            first_losses.append(closure())
        if not self._may_move():
            self._replay.forget()
            self._last_step = StepMetrics(loss=as_scalar(first_losses[-1]), radius=torch.zeros(()))
            return first_losses[-1]
        with self._second_pass(first_losses[-1], start) as second:
            if not second.is_needed:
                return first_losses[-1]
            with torch.enable_grad():
                second.loss = closure()
        return second.loss

    @contextmanager
    def _second_pass(self, first_loss: Any, start: RngState | None = None) -> Generator[SecondPass]:
        self._require_unperturbed("perturbed()")
        failed = True
        try:
            try:
                yield self._begin(first_loss, start)
                failed = False
            finally:
                self._put_back(failed)
        finally:
            self._put_back(failed)  # does nothing unless an interrupt hit the first one

    def _begin(self, first_loss: Any, start: RngState | None = None) -> SecondPass:
        """Move the weights; whatever was done when this is interrupted, ``_put_back`` undoes."""
        self._require_unperturbed("ascend()")
        gradients, targets = self._take_stock(self._validated_groups())
        second = SecondPass(
            gradients,
            targets,
            self.metric,
            linf=self.norm == "linf",
            backend=self.backend,
            first_loss=first_loss,
            measure_grad_norms=self.measure_grad_norms,
        )
        self._replay.use_devices(self._devices())
        self._ready = False
        self._unscaled = False
        self._current = second
        second.enter(self._replay, start, None if self._rounding is None else self._rounding.next())
        return second

    def _put_back(self, failed: bool) -> None:
        """Undo ``_begin`` and set up what ``step`` needs; a no-op with nothing to undo, so that it can be retried."""
        second = self._current
        if second is None:
            return
        if failed:
            self.base_optimizer.zero_grad()
        second.leave(self._replay)
        if not failed:
            finite = second.first_gradients_finite()
            if finite is not None:
                poison_unless(finite, self.param_groups)
            self._last_step = self._measure(second)
            self._ready = True
        self._current = None

    def _watch_for_stall(self) -> None:
        if self._stall is not None:
            self._stall.observe(self._last_step)

    def _take_stock(self, groups: list[dict[str, Any]]) -> tuple[list[tuple[Tensor, Tensor | None]], list[Target]]:
        """Return every trainable parameter with its gradient, and those that move; nothing where no gradient is."""
        taken: list[tuple[Tensor, Tensor | None]] = []
        targets = []
        moving = self._may_move()
        for group in groups:
            sign = -1 if group.get("maximize", False) else 1
            region = Region(self._radius(group), self.option(group, "eta"), sign)
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                taken.append((parameter, parameter.grad))
                if parameter.grad is not None and moving and self.option(group, "perturb"):
                    targets.append(Target(parameter, parameter.grad.detach(), region))
        return taken if any(gradient is not None for _, gradient in taken) else [], targets

    def _radius(self, group: dict[str, Any]) -> float | Tensor:
        """Return the radius of a group's ball: a number, or a 0-dim tensor that is never read on the host."""
        radius: float | Tensor = self.option(group, "rho")
        return radius

    def _may_move(self) -> bool:
        """Whether any group moves, as far as the host can tell."""
        return any(
            self.option(group, "perturb") and (isinstance(radius := self._radius(group), Tensor) or radius > 0)
            for group in self.param_groups
        )

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for group in self.param_groups for p in group["params"]))

    def _validated_groups(self) -> list[dict[str, Any]]:
        for index, group in enumerate(self.param_groups):
            self._check_group(group, index)
        return self.param_groups

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        where = f" in param group {index}"
        rho, eta = self.option(group, "rho"), self.option(group, "eta")
        if not isinstance(rho, Tensor):
            check_nonnegative(self.option_key("rho"), rho, where)
        check_nonnegative(self.option_key("eta"), eta, where)

    def _require_unperturbed(self, what: str) -> None:
        if self._current is not None:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; leave 'with optimizer.perturbed():' first, or "
                "call restore() after ascend()"
            )

    def _require_second_gradient(self, stage: OptState | None) -> None:
        """Raise unless the gradients are a second pass's, or there is nothing that an ascent would change."""
        if self._ready:
            if stage is OptState.UNSCALED and not self._unscaled:
                raise RuntimeError(
                    "the gradients of the second pass are still multiplied by the GradScaler's scale: "
                    "scaler.unscale_(optimizer) was called before the second pass; call it after the 'with "
                    "optimizer.perturbed():' block (the ascent needs no unscaling), or leave it to scaler.step"
                )
            return
        if self._may_move() and any_nonzero(self.param_groups):
            raise RuntimeError(f"step() found gradients but no perturbed pass since the last step. {_TWO_WAYS}")
