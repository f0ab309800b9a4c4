"""The two-step engine: gradient, ascent, second gradient, exact restore, base step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt._callers.grad_scaler import calling_scaler_stage, is_unscaling
from samopt._callers.lightning import is_trainer_closure, refuse_without_callback
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._replay.forward_calls import PassObserver
from samopt._step.arguments import build_base, check_model
from samopt._step.ascent import AscentRule, check_options
from samopt._step.base_wrapper import with_step_hooks
from samopt._step.decoupled_update import follow_steps
from samopt._step.one_pass import OnePass
from samopt._step.passes import Passes, PassHandle
from samopt._step.second_pass import SecondPass
from samopt._step.two_pass import TWO_WAYS, TwoPass
from samopt.distributed import refuse_unsupported
from samopt.parts.combination import Combination, check_combination
from samopt.parts.direction import Direction, GradientDirection, named_direction
from samopt.parts.geometry import Geometry
from samopt.stall_warning import StallDetector
from samopt.step_metrics import StepMetrics

__all__ = ["SharpnessAwareOptimizer"]


class SharpnessAwareOptimizer(AscentRule):
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
        direction: "gradient": this batch's, which takes a pass of its own. "momentum": known before the batch, so that
            a step is one pass and the training loop stays as it is (``loss.backward(); optimizer.step()``); needs
            ``model``, or the closure form. "momentum-ahead": the other way along it. Or an object from
            ``samopt.parts.direction``.
        combination: What the base gets of both gradients, an object from ``samopt.parts``; None is the second.
        model: The module that the passes run. When given, the second pass replays dropout masks, and buffers such as
            normalisation statistics are left as by the first pass. Give the outermost module that your loop calls
            (the ``torch.compile``d or DDP one).
        stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically, so that perturbations below half an
            ulp survive in expectation.
        seed: Seed of that rounding; no global random stream is used.
        sync_perturbation: Under ``DistributedDataParallel``: perturb along the gradient averaged over all ranks, which
            makes two exchanges of gradients a step. By default each rank perturbs along its own (m-sharpness, the
            papers' setting), and only the second pass's are exchanged; that takes ``model``, and in explicit form
            ``first_pass()``. Sharded parameters have one perturbation in either case.
        backend: Kernel backend, a name in ``samopt.kernels.BACKENDS`` or "auto".
        measure_grad_norms: Measure the gradient norms for ``last_step`` (one read of the gradients each where the
            metric does not give them for free). None is True for two passes; False for one, whose cost would show.
        warn_on_stall: Warn once when the loss stays at its starting level while the perturbation is on.
        **base_kwargs: Arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, or ``model`` has none of the parameters.
        RuntimeError: If the backend that was named cannot run on this machine.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None,
        *,
        metric: Geometry,
        rho: float,
        eta: float,
        norm: str = "l2",
        direction: str | Direction | GradientDirection = "gradient",
        combination: Combination | None = None,
        model: nn.Module | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        sync_perturbation: bool = False,
        backend: str = "auto",
        measure_grad_norms: bool | None = None,
        warn_on_stall: bool = True,
        **base_kwargs: Any,
    ) -> None:
        check_options(rho=rho, eta=eta, norm=norm, backend=backend)
        uphill = named_direction(direction)
        check_combination(combination, one_pass=isinstance(uphill, Direction))
        base = build_base(params, base_optimizer, base_kwargs, type(self).__name__)
        check_model(model, base, type(self).__name__)
        refuse_unsupported(model, base, one_pass=isinstance(uphill, Direction))
        super().__init__(
            base,
            metric=metric,
            rho=rho,
            eta=eta,
            norm=norm,
            direction=uphill,
            combination=combination,
            rounding=RoundingNoise(seed) if stochastic_rounding else None,
            backend=backend,
        )
        # What is kept from gradients, or made of them for the base, must be the same on every rank.
        self.sync_perturbation = sync_perturbation or combination is not None or isinstance(uphill, GradientDirection)
        self.measure_grad_norms = not self.is_one_pass if measure_grad_norms is None else measure_grad_norms
        self._stall = StallDetector() if warn_on_stall else None
        self._set_up_passes(model)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_without_callback(cls)

    @property
    def last_step(self) -> StepMetrics:
        """Measurements of the latest pair of passes; every field None before the first."""
        return self._passes.metrics

    @property
    def model(self) -> nn.Module | None:
        """The module that the passes run, if one was given."""
        return self._passes.model

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at ``w + epsilon`` now: in two-pass form, whether the second pass is running."""
        return self._passes.is_perturbed

    @property
    def needs_first_pass(self) -> bool:
        """Whether a gradient at ``w`` has to be taken for this step's ascent."""
        return self._passes.needs_first_pass

    @with_step_hooks
    def step(self, closure: Callable[[], Any] | None = None, ascent_closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights.

        With a closure, both passes happen inside: it is called at ``w``, then at ``w + epsilon``. Without one, both
        have happened already (see ``perturbed``), and this is the base optimizer's step.

        Args:
            closure: Clears the gradients, computes the loss of the whole batch, calls backward and returns the loss:
                a tensor, or a dict or tuple that holds it. Do not call backward before.
            ascent_closure: The same for the gradient that is ascended along, on part of the batch, say; for
                ``direction=ReusedGradient()``.

        Returns:
            What the closure returned when it was first called; None without a closure.

        Raises:
            RuntimeError: If there was no perturbed pass since the last step, the weights are still perturbed, or a
                ``GradScaler`` would let wrongly scaled gradients through.
            TypeError: If ``closure`` cannot be called.
        """
        self._passes.settle("step()")
        stage = calling_scaler_stage()
        if closure is None:
            self._passes.require_gradient(stage)
            self._release()
            self.base_optimizer.step()
            return None
        if not callable(closure):
            raise TypeError(f"step() takes a closure or nothing, got {type(closure).__name__}. {TWO_WAYS}")
        if stage is not None:
            raise RuntimeError(
                "GradScaler.step was given a closure, whose gradients it would neither unscale nor check; run the "
                "passes yourself: scaler.scale(loss).backward(), then 'with optimizer.perturbed(): "
                "scaler.scale(criterion(model(x), y)).backward()', then scaler.step(optimizer)"
            )
        if not self.is_one_pass and is_trainer_closure(closure):
            return self._step_after(closure)
        return self._step_with(closure, ascent_closure)

    @contextmanager
    def perturbed(self, loss: Any = None) -> Generator[PassHandle]:
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
        with self._passes.at_perturbed(loss) as second:
            yield second
        self._watch_for_stall()

    def first_pass(self) -> AbstractContextManager[None]:
        """Run the first pass, forward and backward, inside this context: its gradients stay on their rank.

        With ``direction=ReusedGradient()`` they become the direction, and nothing else is left of the pass. Otherwise
        it is ``DistributedDataParallel.no_sync()`` where ``model`` is, or holds, a DDP module and each rank perturbs
        along its own gradient; anywhere else nothing changes, so a loop may have it on one device too. Without it, the
        gradients are averaged as ever, and so is the perturbation. ``step(closure)`` does this by itself.

        Returns:
            The context.
        """
        return self._passes.first_pass()

    def ascend(self) -> None:
        """Move the weights to ``w + epsilon`` and take the gradients; ``perturbed`` does this and guards the way back.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        self._passes.ascend()

    def restore(self) -> None:
        """Put the weights back, bit for bit, keeping the second pass's gradients for ``step``.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        self._passes.restore()

    def hand_over(self) -> None:
        """Do all of ``step()`` but the base optimizer's step, for a loop that steps the base itself.

        Call it after the second pass, just before the base's step; ``base_optimizer.register_step_pre_hook`` is a way.

        Raises:
            RuntimeError: If there was no perturbed pass since the last step.
        """
        self._passes.require_gradient(None)
        self._release()

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
        self._passes.gradients_cleared()

    def measured(self, second: SecondPass) -> StepMetrics:
        """Return what the step measured, once both passes are over.

        Args:
            second: The pass.
        """
        return second.measure()

    def __getstate__(self) -> dict[str, Any]:
        self._passes.settle("copying or pickling")
        return super().__getstate__() | {
            "sync_perturbation": self.sync_perturbation,
            "measure_grad_norms": self.measure_grad_norms,
            "_stall": self._stall,
            "model": self._passes.model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("model")
        super().__setstate__(state)
        self._set_up_passes(model)

    def _before_groups_are_read(self) -> None:
        if is_unscaling():
            self._passes.note_unscaling()

    def _set_up_passes(self, model: nn.Module | None) -> None:
        self._passes: Passes
        if isinstance(self.direction, Direction):
            self._passes = OnePass(self, model, self.direction)
        else:
            self._passes = TwoPass(self, model, self._observers(model))
        if self.combination is not None:
            follow_steps(self.base_optimizer, self._after_base_step)

    def _observers(self, model: nn.Module | None) -> Iterable[PassObserver]:
        """Return what else wants to know when passes begin and end."""
        return ()

    def _before_update(self) -> None:
        """Act on the weights as the base optimizer is about to find them; the gradients are the final ones."""
        self.advance_parts()

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        super()._load_own_state(own)
        if self._stall is not None and self.state:
            self._stall.dismiss()  # a run that goes on is past its start
        self._passes.reset()
        self._passes.take_beside()

    def _step_with(self, closure: Callable[[], Any], ascent_closure: Callable[[], Any] | None) -> Any:
        """Give the base optimizer a closure that delivers the perturbed gradient at ``w``, as often as it asks."""
        self.validate_groups()
        first_losses: list[Any] = []

        def oracle() -> Any:
            loss = self._passes.run(closure, first_losses, ascent_closure)
            self._before_update()
            return loss

        base, passes = self.base_optimizer, self._passes
        base.step(oracle)
        passes.reset()
        self._watch_for_stall()
        return first_losses[0] if first_losses else None

    def _step_after(self, closure: Callable[[], Any]) -> Any:
        """Step the base with a closure of Lightning's Trainer, which is called once and makes no second pass itself."""
        results: list[Any] = []

        def prepare() -> Any:
            results.append(closure())
            self.hand_over()
            return results[-1]

        self.base_optimizer.step(prepare)
        return results[0] if results else None

    def _release(self) -> None:
        self._passes.reset()
        self._opt_called = True  # what learning rate schedules made for this optimizer look for
        self._before_update()

    def _after_base_step(self) -> None:
        """Do the part of the update that is not the base's."""
        beside = self._passes.take_beside()
        if beside is not None:
            beside.apply(self.base_optimizer.param_groups)

    def _watch_for_stall(self) -> None:
        if self._stall is not None:
            self._stall.observe(self._passes.metrics)
