"""The public class: one step is gradient, ascent, second gradient, exact restore, base step."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt._callers.compiled import never_compiled
from samopt._callers.grad_scaler import calling_scaler_stage, is_unscaling
from samopt._callers.lightning import is_trainer_closure, refuse_without_callback
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._step.arguments import (
    as_group,
    build_base,
    check_combination,
    check_models,
    check_option,
    check_options,
    check_reuse,
)
from samopt._step.ascent import Ascent
from samopt._step.base_wrapper import GroupOptions, OptimizerWrapper, with_step_hooks
from samopt._step.decoupled_update import follow_steps
from samopt._step.one_pass import OnePass
from samopt._step.pass_handle import PassHandle
from samopt._step.retirement import replace_older
from samopt._step.selection import Only, Selection
from samopt._step.two_pass import THREE_WAYS, TwoPass
from samopt.distributed import calling_data_parallel_module, refuse_unsupported, runs_on_several_ranks
from samopt.parts.checks import check_nonnegative
from samopt.parts.combination import Combination
from samopt.parts.direction import Direction, Gradient, named_direction
from samopt.parts.geometry import Geometry
from samopt.parts.radius import ConstantRadius, Radius
from samopt.stall_warning import StallDetector
from samopt.step_metrics import StepMetrics

__all__ = ["DirectionName", "SharpnessAwareOptimizer"]

DirectionName: TypeAlias = Literal["gradient", "momentum", "momentum-uphill"]


class SharpnessAwareOptimizer(OptimizerWrapper):
    """Any torch optimizer, given the gradient at ``w + epsilon`` instead of the gradient at ``w``.

    The common engine of ``SAM``, ``ASAM`` and their relatives. An optimizer is four parts: a direction ``d``, a
    geometry ``T`` and a radius ``r``, in ``epsilon = r T^2 d / ||T d||``, and a combination that says which gradient
    the base gets. The norm is global over every parameter with ``perturb=True``. Each parameter group carries ``rho``,
    ``eta`` and ``perturb``, which may be changed at any time (see ``RhoScheduler``).

    Cost: two forward-backward passes (one for a known direction), and one copy of the weights, kept between steps.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class or factory, called as
            ``base_optimizer(params, **base_kwargs)``.
        geometry: The elementwise geometry ``T``.
        rho: Radius of the ball, >= 0, in the geometry's norm. 0 is the base optimizer alone. With another ``radius``:
            the number that this radius is made from.
        eta: Stabiliser of the geometry, >= 0.
        radius: How the radius is made from each group's number; None is that number itself.
        model: The module that the passes run, or a list of modules (a loss module with state, say). When given, the
            second pass repeats the random numbers of the first, and leaves buffers, parameters of other owners and
            attributes of modules as the first pass left them. Give the outermost module that your loop calls (the
            ``torch.compile``d or DDP one). ``backward`` and a closure also find modules in their function's variables.
        only: Which parameters move; None is all of them. "norm": those of normalisation layers. "bias": the biases.
            "head": those of the last layer. Any other text: those in whose name, as in ``model.named_parameters()``,
            this regular expression is found (``re.search``). Or a function ``(name, parameter) -> bool``. The others
            are trained as ever, and are neither moved, saved nor counted in the norm. Groups with ``perturb=False`` do
            not move either way. It needs ``model``, or a base made from ``model.named_parameters()``.
        reuse_trunk: Run the trunk once in ``backward``, where ``only`` chooses the module that makes the model's output
            (``only="head"``): the second pass begins there, on the input that it had in the first, and one backward
            goes through the whole. The result is that of two full passes, bit for bit. For a loss that calls the model
            once, on one process and uncompiled; ``backward`` refuses everything else with the reason.
        direction: "gradient": this batch's, which takes a pass of its own. "momentum": ahead along the base's momentum,
            which is known before the batch, so that a step is one pass and the training loop stays as it is
            (``loss.backward(); optimizer.step()``); needs ``model`` there. "momentum-uphill": the other way along it.
            Or an object from ``samopt.parts``.
        combination: What the base gets of both gradients, an object from ``samopt.parts``; None is the second.
        norm: "l2", or "linf" for ``epsilon = r T sign(d)``.
        stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically, so that perturbations below half an
            ulp survive in expectation.
        seed: Seed of that rounding; no global random stream is used.
        sync_perturbation: Under ``DistributedDataParallel``: perturb along the gradient averaged over all ranks, which
            makes two exchanges of gradients a step. By default each rank perturbs along its own (m-sharpness, the
            papers' setting), and only the second pass's are exchanged; that takes ``model``, and in explicit form
            ``first_pass()``. Sharded parameters have one perturbation in either case.
        backend: Kernel backend, a name in ``samopt.kernels.BACKENDS`` or "auto".
        measure_grad_norms: Measure the gradient norms for ``last_step`` (one read of the gradients each where the
            geometry does not give them for free). None is True for two passes, and False for one.
        warn_on_stall: Warn once when the loss stays at its starting level while the perturbation is on.
        **base_kwargs: Arguments of ``base_optimizer``.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, ``model`` has none of the parameters, or ``only`` chooses nothing that
            can move.
        RuntimeError: If the backend that was named cannot run on this machine.

    Example:
        >>> import torch, samopt
        >>> from samopt.parts import Euclidean
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> base = torch.optim.SGD([w], lr=0.1)
        >>> optimizer = samopt.SharpnessAwareOptimizer(base, geometry=Euclidean(), rho=0.5)
        >>> optimizer.backward(lambda: 0.5 * (w * w).sum()).item()
        12.5
        >>> w.grad  # the gradient at w + 0.5 * w / 5
        tensor([3.3000, 4.4000])
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        *,
        geometry: Geometry,
        rho: float,
        eta: float = 0.01,
        radius: Radius | None = None,
        model: nn.Module | Sequence[nn.Module] | None = None,
        only: Only | None = None,
        reuse_trunk: bool = False,
        direction: DirectionName | Direction = "gradient",
        combination: Combination | None = None,
        norm: Literal["l2", "linf"] = "l2",
        stochastic_rounding: bool = True,
        seed: int = 0,
        sync_perturbation: bool = False,
        backend: str = "auto",
        measure_grad_norms: bool | None = None,
        warn_on_stall: bool = True,
        **base_kwargs: Any,
    ) -> None:
        name = type(self).__name__
        radius = ConstantRadius() if radius is None else radius
        check_nonnegative(radius.option, rho)
        check_nonnegative("eta", eta)
        check_options(norm=norm, backend=backend)
        if not isinstance(geometry, Geometry):
            raise TypeError(f"geometry must be an object from samopt.parts, such as Adaptive(); got {geometry!r}")
        chosen = named_direction(direction)
        check_combination(combination, chosen)
        base = build_base(params, base_optimizer, base_kwargs, name)
        models = check_models(model, base, name)
        self._check_models(models, base)
        refuse_unsupported(models, base, state_reader=_state_reader(chosen, geometry))
        for part in (chosen, geometry, radius, combination):
            if part is not None:
                part.check(base)
                part.check_models(models, base)
        options = GroupOptions(base, {radius.option: rho, "eta": eta, "perturb": True}, check_option)
        selection = None if only is None else Selection(only, models, options)
        if selection is not None:
            selection.check()
        if reuse_trunk:
            check_reuse(has_choice=only is not None, models=models, direction=chosen, combination=combination)
        options.take_over()
        super().__init__(options)
        self._ascent = Ascent(
            options,
            selection=selection,
            direction=chosen,
            geometry=geometry,
            radius=radius,
            combination=combination,
            linf=norm == "linf",
            rounding=RoundingNoise(seed) if stochastic_rounding else None,
            backend=backend,
        )
        # What is kept from gradients, or made of them for the base, must be the same on every rank.
        self.sync_perturbation = sync_perturbation or self._ascent.combines or type(chosen) is not Gradient
        self.measure_grad_norms = not self.is_one_pass if measure_grad_norms is None else measure_grad_norms
        self.reuse_trunk = reuse_trunk
        self._stall = StallDetector() if warn_on_stall else None
        self._model = model
        self._set_up_passes(models)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_without_callback(cls)

    @property
    def direction(self) -> Direction:
        """The direction ``d``."""
        return self._ascent.direction

    @property
    def geometry(self) -> Geometry:
        """The geometry ``T``."""
        return self._ascent.geometry

    @property
    def radius(self) -> Radius:
        """How the radius is made from each group's number."""
        return self._ascent.radius

    @property
    def combination(self) -> Combination | None:
        """What the base gets of both gradients; None for the second."""
        return self._ascent.combination

    @property
    def norm(self) -> str:
        """The kind of ball, "l2" or "linf"."""
        return "linf" if self._ascent.linf else "l2"

    @property
    def backend(self) -> str:
        """Name of the kernel backend, or "auto"."""
        return self._ascent.backend

    @property
    def is_one_pass(self) -> bool:
        """Whether the direction is known before a step's gradient, so that a step is one pass."""
        return self._ascent.is_one_pass

    @property
    def rho(self) -> Any:
        """The radius of all groups: one number where they agree, else a list with one for each group.

        Setting it sets every group's. For ``TRAM`` and ``LESAM`` it is the number that the radius is made from, which
        their groups hold as ``scale`` and ``budget``.
        """
        values = [self.option(group, self.radius.option) for group in self.base_optimizer.param_groups]
        return values[0] if all(value == values[0] for value in values[1:]) else values

    @rho.setter
    def rho(self, value: float) -> None:
        key = self.option_key(self.radius.option)
        check_nonnegative(key, value)
        for group in self.base_optimizer.param_groups:
            self.set_option(group, self.radius.option, value)

    @property
    def last_step(self) -> StepMetrics:
        """Measurements of the latest step; every field None before the first."""
        return self._passes.metrics

    @property
    def model(self) -> nn.Module | Sequence[nn.Module] | None:
        """What was given as ``model``."""
        return self._model

    @property
    def only(self) -> Only | None:
        """What was given as ``only``."""
        return None if self._ascent.selection is None else self._ascent.selection.only

    @property
    def perturbed_parameters(self) -> list[Tensor]:
        """The parameters that move where their radius is not 0, in the order of the groups.

        These are the trainable ones that ``only`` chooses, in groups without ``perturb=False``.
        ``sum(p.numel() for p in optimizer.perturbed_parameters)`` is how many numbers a step moves, and how many its
        copy of the weights holds.
        """
        return self._ascent.perturbed_parameters()

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights themselves are at ``w + epsilon`` now: whether a second pass is running.

        Always False for one pass with ``model``, except on sharded modules: there no weight moves.
        """
        return self._passes.is_perturbed

    @property
    def needs_first_pass(self) -> bool:
        """Whether a gradient at ``w`` must be taken for this step's ascent."""
        return self._passes.needs_first_pass

    @property
    def two_passes(self) -> TwoPass | None:
        """The steps of two passes, for a framework's loop that runs them itself; None for one pass."""
        return self._passes if isinstance(self._passes, TwoPass) else None

    @property
    def perturbs_this_step(self) -> bool:
        """Whether anything moves in this step, as far as the host can tell: not for ``rho=0``, say."""
        return self._ascent.may_move()

    @property
    def is_paused(self) -> bool:
        """Whether every step is the base's alone, in one pass, whatever ``rho`` is; False unless set.

        Set it between steps. The trainers leave out the perturbation for a part of a run by it. Checkpoints do not hold
        it.
        """
        return self._ascent.is_paused

    @is_paused.setter
    def is_paused(self, value: bool) -> None:
        self._ascent.is_paused = bool(value)

    @property
    def waits_for_step(self) -> bool:
        """Whether the gradients of a second pass wait for ``step()``."""
        return self._passes.waits_for_step

    @never_compiled
    def backward(self, compute_loss: Callable[[], Any], *, last: bool = True) -> Any:
        """Compute the loss and leave the gradient for the base in place: one or two passes, as the optimizer needs.

        The second pass starts from the random numbers of the first. With accumulation, call it once for each
        micro-batch with ``last=(i + 1) % k == 0``: at the last one, the second pass runs over every micro-batch since
        ``zero_grad()``. Then clip, unscale and call ``step()`` as ever. Without a perturbation (``rho=0``, a step of a
        schedule without one) it is one forward and backward.

        Args:
            compute_loss: Runs the forward pass and returns the loss, a tuple that begins with it, or a dict or output
                object that holds it; ``scaler.scale(loss)`` under a ``GradScaler``. It does not call backward. It is
                called again for the second pass; variables that it reads from outside may change in between. Names
                outside that it binds (a hidden state, a counter) are in the end as the first call left them.
            last: Whether this is the last micro-batch before ``step()``.

        Returns:
            What ``compute_loss`` returned: at ``w`` for two passes, at ``w + epsilon`` for one.

        Raises:
            RuntimeError: If the gradients of another second pass wait for ``step()``, gradients were there before the
                first micro-batch of the window, the loss has no graph, or DDP would not exchange its gradients.
            TypeError: If there is no loss in what ``compute_loss`` returned.
        """
        if not callable(compute_loss):
            raise TypeError(
                f"backward() takes a function that computes the loss, got {type(compute_loss).__name__}; write "
                "optimizer.backward(lambda: criterion(model(x), y))"
            )
        if calling_data_parallel_module() is not None and runs_on_several_ranks():
            raise RuntimeError(
                "backward() was called inside the forward of DistributedDataParallel, which would not exchange these "
                "gradients. Under Lightning, manual optimization runs training_step there: write "
                "self.manual_backward(loss), then 'with optimizer.perturbed(loss): self.manual_backward(...)' and "
                "optimizer.step()"
            )
        return self._passes.backward(compute_loss, last=last)

    @with_step_hooks
    @never_compiled
    def step(self, closure: Callable[[], Any] | None = None, ascent_closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights.

        With a closure, both passes happen inside: it is called at ``w``, then at ``w + epsilon``. Without one, both
        have happened already (see ``backward`` and ``perturbed``), and this is the base optimizer's step.

        Args:
            closure: Clears the gradients, computes the loss of the whole batch, calls backward and returns the loss:
                a tensor, or a dict or tuple that holds it. Do not call backward before.
            ascent_closure: The same for the gradient that is ascended along, on part of the batch, say; for
                ``direction=ReusedGradient()``.

        Returns:
            What the closure returned when it was first called; None without a closure.

        Raises:
            RuntimeError: If there was no perturbed pass since the last step, the weights are still perturbed, the
                closure does not clear the gradients, or a ``GradScaler`` would let wrongly scaled gradients through.
            TypeError: If ``closure`` cannot be called, or the base's ``step`` takes none.
        """
        self._passes.check_restored("step()")
        stage = calling_scaler_stage()
        if closure is None:
            self._passes.check_gradient(stage)
            self._prepare()
            self._step_base()
            return None
        if not callable(closure):
            raise TypeError(f"step() takes a closure or nothing, got {type(closure).__name__}. {THREE_WAYS}")
        if stage is not None:
            raise RuntimeError(
                "GradScaler.step was given a closure, whose gradients it would neither unscale nor check; run the "
                "passes yourself: optimizer.backward(lambda: scaler.scale(criterion(model(x), y))), then "
                "scaler.step(optimizer)"
            )
        if not self.is_one_pass and is_trainer_closure(closure):
            return self._step_after(closure)
        return self._step_with(closure, ascent_closure)

    def perturbed(self, loss: Any = None) -> AbstractContextManager[PassHandle]:
        """Run the second pass inside this context: at ``w + epsilon`` within, exactly at ``w`` after.

        Entering takes the gradients at ``w`` (``.grad`` is None inside, so clearing it is optional), moves the weights
        and, with ``model=``, starts the replay of random numbers. Leaving restores every weight bit for bit, also after
        an exception or interrupt, in which case the second gradients are dropped. Non-finite gradients at ``w`` move
        nothing and are put back on leaving, so that the base optimizer or a ``GradScaler`` meets them.

        Numbers that a loss function draws outside every forward are not repeated here; ``backward`` repeats them.

        Args:
            loss: The first pass's loss, for ``last_step``.

        Returns:
            A context that yields a ``PassHandle``. Its ``loss`` may be set to the second pass's loss, for
            ``last_step``; ``is_needed`` is False where the pass would repeat the first one.

        Raises:
            RuntimeError: When it is entered, if the weights are perturbed already, there are no gradients at ``w``, or
                the gradients of another second pass wait for ``step()``.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "perturbed() cannot be compiled; compile the model, or the function that computes the loss, instead of "
                "the whole training step"
            )
        return cast("AbstractContextManager[PassHandle]", self._passes.perturbed(loss))

    def first_pass(self) -> AbstractContextManager[None]:
        """Run the first pass, forward and backward, inside this context: its gradients stay on their rank.

        With ``direction=ReusedGradient()`` they become the direction, and nothing else is left of the pass. Otherwise
        it is ``DistributedDataParallel.no_sync()`` where ``model`` is, or holds, a DDP module and each rank perturbs
        along its own gradient; anywhere else nothing changes, so a loop may have it on one device too. Without it, the
        gradients are averaged as usual, and so is the perturbation. ``backward`` and ``step(closure)`` do it by
        themselves.

        Returns:
            The context.
        """
        return self._passes.first_pass()

    def exact(self) -> AbstractContextManager[None]:
        """Have every forward in this context run at the exact weights ``w``, for one-pass directions.

        For a forward that is no training of this model's weights: the generator's step through a watched discriminator,
        a critic, per-sample statistics. Two-pass directions run there in any case, outside ``perturbed()``.

        Returns:
            The context.

        Raises:
            RuntimeError: If a second pass is running.

        Example:
            >>> import torch, samopt
            >>> critic = torch.nn.Linear(2, 1)
            >>> base = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
            >>> optimizer = samopt.MomentumSAM(base, model=critic)
            >>> with optimizer.exact():
            ...     score = critic(torch.ones(1, 2))
        """
        return self._passes.hold_exact()

    def detach(self) -> None:
        """Follow the model's calls no longer: remove everything that this optimizer put on it.

        Saving, copying and exporting a model need no ``detach``. ``torch.jit.script`` does; so does a next stage of
        training with another optimizer, while this one is still referenced. One-pass steps need ``perturbed()`` or a
        closure from then on; the second pass of two no longer repeats dropout masks.
        """
        self._passes.detach()

    def ascend(self) -> None:
        """Move the weights to ``w + epsilon`` and take the gradients; ``perturbed`` does this and guards the way back.

        Raises:
            RuntimeError: If the weights are perturbed already, or there are no gradients.
        """
        self._passes.ascend()

    def restore(self) -> None:
        """Put the weights back, bit for bit, keeping the second pass's gradients for ``step``.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        self._passes.restore()

    def prepare_base_step(self) -> None:
        """Do all of ``step()`` but the base optimizer's step, for a loop that steps the base itself.

        Call it after the second pass, just before the base's step; ``base_optimizer.register_step_pre_hook`` is a way.

        Raises:
            RuntimeError: If there was no perturbed pass since the last step.
        """
        self._passes.check_gradient(None)
        self._prepare()

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; it may have its own ``rho``, ``eta`` or ``perturb``.

        Args:
            param_group: As for ``torch.optim.Optimizer.add_param_group``. With ``only``, its parameters have names in
                ``model``, or are given as pairs of name and parameter.

        Raises:
            ValueError: If one of its options is out of range, or ``only`` is given and a parameter has no name; nothing
                is added then.
        """
        if "_ascent" in self.__dict__ and self._ascent.selection is not None:
            self._ascent.selection.check(as_group(param_group))
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients through the base optimizer; a second gradient waiting for ``step`` is gone then.

        Args:
            set_to_none: As for ``torch.optim.Optimizer.zero_grad``.
        """
        super().zero_grad(set_to_none=set_to_none)
        self._passes.gradients_cleared()

    def __repr__(self) -> str:
        if self.only is None:
            return super().__repr__()
        moving = sum(parameter.numel() for parameter in self.perturbed_parameters)
        every = sum(parameter.numel() for parameter in self._ascent.parameters())
        name = type(self).__name__
        return f"{name} (only={self.only!r}: {moving:,} of {every:,} parameters) around {self.base_optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        self._passes.check_restored("copying or pickling")
        return super().__getstate__() | {
            "_ascent": self._ascent,
            "sync_perturbation": self.sync_perturbation,
            "measure_grad_norms": self.measure_grad_norms,
            "reuse_trunk": self.reuse_trunk,
            "_stall": self._stall,
            "_model": self._model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up_passes(check_models(self._model, self.base_optimizer, type(self).__name__))

    def _before_groups_are_read(self) -> None:
        if is_unscaling():
            self._passes.note_unscaling()

    def _own_state(self) -> dict[str, Any]:
        return self._ascent.state_dict()

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        self._ascent.load_state_dict(own)
        if self._stall is not None and self.state:  # accelerate loads a fresh optimizer's state into itself
            self._stall.dismiss()
        self._passes.reset()

    def _set_up_passes(self, models: list[nn.Module]) -> None:
        """Make the passes, and have them end their work on the model with this optimizer."""
        ascent = self._ascent
        self._passes: OnePass | TwoPass
        if ascent.is_one_pass:
            self._passes = OnePass(
                ascent,
                models,
                sync_perturbation=self.sync_perturbation,
                measure_grad_norms=self.measure_grad_norms,
            )
        else:
            replace_older(ascent.parameters())
            self._passes = TwoPass(
                ascent,
                models,
                sync_perturbation=self.sync_perturbation,
                measure_grad_norms=self.measure_grad_norms,
                followers=ascent.followers(models),
                reuse_trunk=self.reuse_trunk,
            )
        weakref.finalize(self, self._passes.detach)
        if ascent.combines:
            follow_steps(self.base_optimizer, self._after_base_step)

    def _check_models(self, models: list[nn.Module], base: Optimizer) -> None:
        """Raise if this kind of optimizer cannot work on some models; nothing has been changed yet."""

    def _step_with(self, closure: Callable[[], Any], ascent_closure: Callable[[], Any] | None) -> Any:
        """Give the base optimizer a closure that delivers the perturbed gradient at ``w``, as often as it asks."""
        self._options.check(self.base_optimizer.param_groups)
        results: list[Any] = []

        self._step_base(functools.partial(self._run_passes, closure, results, ascent_closure))
        self._passes.reset()
        if not self.is_one_pass:
            self._watch_for_stall()
        return results[0] if results else None

    @never_compiled  # the base's step, which calls it, may be compiled
    def _run_passes(
        self, closure: Callable[[], Any], results: list[Any], ascent_closure: Callable[[], Any] | None
    ) -> Any:
        """Run the passes of one evaluation of the base, and return its loss."""
        loss = self._passes.run(closure, results, ascent_closure)
        self._ascent.advance()
        return loss

    def _step_after(self, closure: Callable[[], Any]) -> Any:
        """Step the base with a closure of Lightning's Trainer, which is called once and makes no second pass itself."""
        results: list[Any] = []

        def prepare() -> Any:
            results.append(closure())
            self.prepare_base_step()
            return results[-1]

        self.base_optimizer.step(prepare)
        return results[0] if results else None

    def _step_base(self, oracle: Callable[[], Any] | None = None) -> None:
        """Step the base, and explain what it cannot do."""
        try:
            if oracle is None:
                self.base_optimizer.step()
            elif accepts_closure(self.base_optimizer):
                self.base_optimizer.step(oracle)
            else:
                oracle()
                self.base_optimizer.step()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            base = type(self.base_optimizer).__name__
            raise RuntimeError(
                f"{base} differentiates the gradients once more inside its step, which needs the weights at w + "
                "epsilon; they are back at w by then. Second-order bases that do so (AdaHessian, SophiaH) cannot be "
                "wrapped; use a first-order base"
            ) from error

    def _prepare(self) -> None:
        """Note that the base is about to be stepped with the present gradients."""
        if self._passes.waits_for_step:
            self._watch_for_stall()
        self._passes.reset()
        self._opt_called = True  # what learning rate schedules made for this optimizer look for
        self._ascent.advance()

    def _after_base_step(self) -> None:
        """Do the part of the update that is not the base's."""
        update = self._passes.take_decoupled_update()
        if update is not None:
            update.apply(self.base_optimizer.param_groups)

    def _watch_for_stall(self) -> None:
        if self._stall is not None:
            self._stall.observe(self._passes.metrics)


def _state_reader(direction: Direction, geometry: Geometry) -> str | None:
    """Return the part that is made of the base's state, as messages name it; None where neither is."""
    if not isinstance(direction, Gradient):
        return 'direction="momentum"'
    known = type(geometry).known_scales is not Geometry.known_scales
    return f"the {geometry.name} geometry" if known else None


def accepts_closure(base: Optimizer) -> bool:
    """Return whether an optimizer's ``step`` takes a closure, as torch's contract says.

    Args:
        base: The optimizer.
    """
    code = getattr(inspect.unwrap(type(base).step), "__code__", None)  # inside of torch's profiling and of no_grad
    return code is None or code.co_argcount > 1 or bool(code.co_flags & 0x0C)
