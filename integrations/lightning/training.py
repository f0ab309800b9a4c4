"""The callback that makes training sharpness-aware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

import samopt
from samopt import SharpnessAwareOptimizer, StepMetrics
from samopt._step.late_phase import share_of

from .._second_pass.variant_options import try_options
from .late_phase import LatePhase
from .packages import Callback
from .refusals import (
    refuse_missing_optimizer,
    refuse_scaled_geometry,
    refuse_unsupported_optimizer,
    refuse_unsupported_run,
)
from .run import Run

__all__ = ["SharpnessAwareTraining", "is_second_pass"]

_TAKE_OUTPUTS = ("tram", "functional-sam")
"""The optimizers that follow the forward calls of the module that makes the outputs."""


class SharpnessAwareTraining(Callback):
    """Trains any LightningModule with SAM or a relative of it; the module and its optimizer stay as they are.

    ``Trainer(callbacks=[SharpnessAwareTraining("asam", rho=0.5)])`` is the one changed line. When the gradients of an
    accumulation window are complete, the window's training steps are run again at ``w + epsilon``, and the gradients
    found there are what Lightning clips and what the module's own optimizer steps. The second pass is not logged,
    counted or profiled, and leaves buffers, metrics, plain attributes of the module and random streams as the first
    pass left them. Code in ``training_step`` that keeps count elsewhere can ask ``is_second_pass(self.trainer)``.

    The module must use automatic optimization, and may return its optimizer with ``rho``, ``eta`` or ``perturb`` in
    parameter groups. The module's ``on_after_backward``, which may mask gradients, is called in both passes; that of
    callbacks, and ``on_before_backward``, in the first only: what they change is lost. ``on_before_optimizer_step``
    finds the final gradients, except in callbacks that come before this one.

    Cost: two forward-backward passes a step, one transient copy of the weights, and a copy of a window's batches.

    Args:
        variant: A name in ``samopt.available()``; or a callable that makes a samopt optimizer of an optimizer and the
            options. None is "sam", or the samopt optimizer that ``configure_optimizers`` returned.
        rho: Radius of the perturbation, >= 0; None for the optimizer's own default. TRAM has ``scale`` instead.
        eta: Stabiliser of the geometry, >= 0; None for the optimizer's own default. SAM has none.
        norm: "l2", or "linf" for the l-infinity ball.
        only: Which parameters move: "norm", "bias" or "head"; a regular expression that is found in their names, as the
            module's ``named_parameters()`` gives them; or a function ``(name, parameter) -> bool``. None is all.
        sync_perturbation: With several processes: perturb along the averaged gradient, as one process with the whole
            batch would, for one more exchange of gradients. By default each perturbs along its own.
        stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically.
        seed: Seed of that rounding.
        watch: For TRAM and functional SAM: name of the submodule whose outputs they take. None is the one that has all
            parameters, or else the module itself, if ``training_step`` calls it as ``self(...)``.
        late: Perturb in the last share of the run only: "last 25 %", or 0.25. It counts the trainer's optimizer steps,
            or its ``max_time`` where that ends the run first. The steps before cost one pass. None is the whole run.
        **options: Further options of the optimizer, such as TRAM's ``trust_region`` and ``scale``.

    Raises:
        TypeError: If the optimizer does not know an option.
        ValueError: If the variant is unknown, or an option is out of range.

    Attributes:
        optimizer: The sharpness-aware optimizer around the module's; None before a fit.
    """

    runs_second_pass = True  # what an optimizer that needs one looks for among the trainer's callbacks

    def __init__(
        self,
        variant: str | Callable[..., SharpnessAwareOptimizer] | None = None,
        *,
        rho: float | None = None,
        eta: float | None = None,
        norm: str | None = None,
        only: str | Callable[[str, Tensor], bool] | None = None,
        sync_perturbation: bool = False,
        stochastic_rounding: bool | None = None,
        seed: int | None = None,
        watch: str | None = None,
        late: float | str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(variant, str) and variant not in samopt.available():
            raise ValueError(f"variant must be one of {', '.join(samopt.available())}, got {variant!r}")
        self.optimizer: SharpnessAwareOptimizer | None = None
        named = {"rho": rho, "eta": eta, "norm": norm, "only": only}
        named |= {"stochastic_rounding": stochastic_rounding, "seed": seed}
        self._variant = variant
        self._options = {name: value for name, value in named.items() if value is not None} | options
        self._sync_perturbation = sync_perturbation
        self._watch = watch
        self._late = None if late is None else share_of("late", late)
        self._phase: LatePhase | None = None
        self._run: Run | None = None
        self._loaded: dict[str, Any] = {}
        self._group_options: list[dict[str, Any]] = []
        self._added: list[set[str]] = []
        self._check_options()

    @property
    def is_second_pass(self) -> bool:
        """Whether the second pass is running."""
        return self._run is not None and self._run.is_second_pass

    @property
    def last_step(self) -> StepMetrics:
        """Measurements of the latest step, with gradient norms that no ``GradScaler`` has multiplied."""
        return StepMetrics() if self._run is None else self._run.last_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything starts.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "fit" or another.

        Raises:
            TypeError: If the module cannot be trained with a second pass.
            ValueError: If the trainer's strategy has no place for one.
        """
        if stage == "fit":
            refuse_unsupported_run(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizer around the module's, before a checkpoint is restored.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            ValueError: If the optimizer cannot be driven.
        """
        refuse_missing_optimizer(trainer, pl_module)
        given = trainer.optimizers[0]
        refuse_unsupported_optimizer(given)
        if isinstance(given, SharpnessAwareOptimizer):
            self._refuse_second_choice(given)
            self.optimizer = given
            trainer.strategy.optimizers = [given.base_optimizer]
        else:
            present = [set(group) for group in given.param_groups]
            self.optimizer = self._build(given, pl_module, self._watched(trainer, pl_module))
            self._added = [group.keys() - keys for group, keys in zip(given.param_groups, present, strict=True)]
        optimizer = self.optimizer
        refuse_unsupported_optimizer(optimizer)
        refuse_scaled_geometry(trainer, optimizer)
        keys = [optimizer.option_key(name) for name in (optimizer.radius.option, "eta", "perturb")]
        self._group_options = [{key: group[key] for key in keys} for group in optimizer.param_groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part in the trainer's steps from here on. Options are those of this run, not of a checkpoint.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            ValueError: If ``late`` is a share of a run of unknown length.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        if self._loaded:
            optimizer.load_state_dict(optimizer.base_optimizer.state_dict() | {"samopt": self._loaded})
            self._loaded = {}
        for group, options in zip(optimizer.param_groups, self._group_options, strict=False):
            group.update(options)
        self._phase = None if self._late is None else LatePhase(trainer, self._late)
        self._run = Run(trainer, pl_module, optimizer, sync_perturbation=self._sync_perturbation)
        self._run.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave out the perturbation before the last share of the run.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch.
            batch_idx: Its number in the epoch.
        """
        if self._phase is not None and self.optimizer is not None:
            self.optimizer.is_paused = not self._phase.has_begun()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note that an accumulation window begins.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The trainer's optimizer.
        """
        if self._run is not None:
            self._run.gradients_cleared()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note that the latest training step belongs to the window.

        Args:
            trainer: The trainer.
            pl_module: The module.
            loss: Its loss.
        """
        if self._run is not None:
            self._run.backward_begins()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that its gradients are there.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._run is not None:
            self._run.backward_ended()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Run the second pass.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The trainer's optimizer.
        """
        if self._run is not None:
            self._run.replace_gradients(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trainer and the optimizer's groups as they were.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer and the optimizer's groups as they were.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What ended the run.
        """
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's counters, for the checkpoint that holds its base's state."""
        if self.optimizer is None:
            return {}
        own: dict[str, Any] = self.optimizer.state_dict()["samopt"]
        return {"optimizer": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the counters for the optimizer, which is yet to be made.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._loaded = state_dict["optimizer"]

    def _check_options(self) -> None:
        """Raise now what the optimizer would raise at the start of a fit, as far as plain values can be tried out."""
        if not callable(self._variant):
            try_options(self._variant or "sam", self._options)

    def _build(self, base: Optimizer, module: nn.Module, watched: nn.Module) -> SharpnessAwareOptimizer:
        variant = self._variant or "sam"
        if not isinstance(variant, str):
            return variant(base, **self._options)
        if variant in _TAKE_OUTPUTS:
            return samopt.create(variant, base, model=watched, **self._options)
        return samopt.create(variant, base, model=module, **self._options)

    def _watched(self, trainer: Trainer, module: LightningModule) -> nn.Module:
        if self._watch is not None:
            return module.get_submodule(self._watch)
        every = set(module.parameters())
        candidates = [child for child in module.children() if every <= set(child.parameters())]
        if candidates:
            return candidates[0]
        if self._variant in _TAKE_OUTPUTS and trainer.strategy.model is not module:
            raise ValueError(
                f'"{self._variant}" takes the outputs of one module, but under {type(trainer.strategy).__name__} a '
                f"call of {type(module).__name__} is its training step, and no child of it has all parameters; name "
                f'the submodule that makes the outputs, as in SharpnessAwareTraining("{self._variant}", watch="net")'
            )
        return module

    def _refuse_second_choice(self, given: SharpnessAwareOptimizer) -> None:
        if self._variant is not None or self._options:
            chosen = {"variant": self._variant} | self._options
            raise ValueError(
                f"configure_optimizers returned {type(given).__name__}, which SharpnessAwareTraining would drive, but "
                f"it was given options for one of its own: {chosen}; leave them out, or return "
                f"{type(given.base_optimizer).__name__} alone"
            )

    def _leave(self) -> None:
        if self._run is not None:
            self._run.remove()
        if self.optimizer is not None:
            self.optimizer.is_paused = False
            for group, keys in zip(self.optimizer.param_groups, self._added, strict=False):
                for key in keys:
                    group.pop(key, None)
        self._added = []


def is_second_pass(trainer: Trainer) -> bool:
    """Return whether the second pass of a step is running: for code in ``training_step`` that must not count twice.

    Args:
        trainer: The trainer, ``self.trainer`` in a module.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    return any(getattr(callback, "is_second_pass", False) for callback in callbacks)
