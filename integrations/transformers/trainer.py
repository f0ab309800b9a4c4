"""Trainers whose training step runs both passes, and whose loop then steps the optimizer as ever."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from samopt import SharpnessAwareOptimizer
from samopt._callers.user_warnings import warn_user

from .._second_pass.batch_copies import independent_copy
from .arguments import SAMArguments
from .callback import SharpnessCallback
from .refusals import refuse_unsupported
from .run import Run

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["SAMTrainer", "SAMTrainerMixin", "make_sharpness_aware"]

_T = TypeVar("_T")


class SAMTrainerMixin(_Base):
    """Makes any ``Trainer`` subclass sharpness-aware: ``class MyTrainer(SAMTrainerMixin, Seq2SeqTrainer): pass``.

    Put it first. Its arguments are ``SAMTrainingArguments``, or others with the fields of ``SAMArguments``. The loop,
    and all that it logs, counts, saves and schedules, stays the Trainer's; the second pass runs inside the training
    step of a window's last micro-batch. Attributes of the Trainer, of its ``state`` and of objects that it holds are
    put back after it, and it logs nothing, so a ``compute_loss`` that keeps statistics counts each batch once. Code
    that counts elsewhere can ask ``is_second_pass``.

    Cost: two forward-backward passes a step, one transient copy of the weights, and a copy of a window's inputs.

    Args:
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        TypeError: If the arguments have no sharpness-aware fields.
        ValueError: If the Trainer, its optimizer or its parallelism cannot run a second pass.
    """

    _attached_arguments: SAMArguments | None = None  # where the Trainer's own arguments have no such fields
    _run: Run | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a ``training_step`` that comes before this class's part of both passes, as one that comes after is."""
        super().__init_subclass__(**kwargs)
        found = cls.training_step
        if not getattr(found, "_runs_both_passes", False):
            cls.training_step = _in_both_passes(found)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self, self.sam_arguments)
        if not self.sam_arguments.sam_is_given:
            warn_user(
                f"{type(self).__name__} trains without SAM, since its arguments do not choose an optimizer; write "
                'SAMTrainingArguments(..., sam="sam"), or sam="none" if that is meant'
            )
        _bind_callbacks(self)

    @property
    def sam_arguments(self) -> SAMArguments:
        """The sharpness-aware fields in force.

        Raises:
            TypeError: If the Trainer's arguments have none.
        """
        if self._attached_arguments is not None:
            return self._attached_arguments
        if not isinstance(self.args, SAMArguments):
            kind = type(self.args).__name__
            raise TypeError(
                f"{type(self).__name__} needs arguments with the fields of SAMArguments, got {kind}; use "
                f"SAMTrainingArguments, or declare '@dataclass class MyArguments(SAMArguments, {kind}): pass'"
            )
        return self.args

    @property
    def sam_optimizer(self) -> SharpnessAwareOptimizer | None:
        """The optimizer around the Trainer's, for ``last_step`` and ``param_groups``; None before its first step."""
        return None if self._run is None else self._run.optimizer

    @property
    def is_second_pass(self) -> bool:
        """Whether the second pass is running: for code in ``compute_loss`` that must not count a batch twice."""
        optimizer = self.sam_optimizer
        return optimizer is not None and not optimizer.is_one_pass and optimizer.is_perturbed

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the Trainer's optimizer as ever, and remember it as the base.

        Args:
            model: As for ``Trainer.create_optimizer``.

        Returns:
            The base.
        """
        # Many subclasses override it as create_optimizer(self), which is how the Trainer calls it.
        optimizer: Optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        self._run = None if self.sam_arguments.sam == "none" else Run(self.sam_arguments, optimizer, self._run)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch and, if it is the last of a window, the window's second pass.

        Args:
            model: The wrapped model.
            inputs: The micro-batch.
            num_items_in_batch: As for ``Trainer.training_step``.

        Returns:
            The first pass's loss.
        """
        return self._run_both_passes(super().training_step, model, inputs, num_items_in_batch)

    training_step._runs_both_passes = True  # type: ignore[attr-defined]

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback as ever, and give a ``SharpnessCallback`` the way to log.

        Args:
            callback: As for ``Trainer.add_callback``.
        """
        super().add_callback(callback)
        _bind_callbacks(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer logs; beside a training loss, also what the latest step measured.

        Args:
            logs: As for ``Trainer.log``.
            start_time: As for ``Trainer.log``.
        """
        if self.is_second_pass:  # a compute_loss that logs has done so in the first
            return
        if "loss" in logs and self._run is not None:
            logs.update(self._run.metrics())
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SharpnessCallback):
                    logs.update(callback.take_averages())
        super().log(logs, start_time)

    def _run_both_passes(
        self, step: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any
    ) -> Tensor:
        """Call a training step in both passes; inside one, call it once, since it is a part of that."""
        if self.sam_arguments.sam == "none":
            return step(model, inputs, *rest, **named)
        if self._run is None:  # a subclass created the optimizer in its own way
            assert self.optimizer is not None
            self._run = Run(self.sam_arguments, self.optimizer)
        if self._run.is_in_step:
            return step(model, inputs, *rest, **named)
        copied, parts = independent_copy(inputs), self.current_gradient_accumulation_steps

        def again() -> Tensor:
            self.current_gradient_accumulation_steps = parts
            return step(model, copied, *rest, **named)

        return self._run.step(self, model, lambda: step(model, inputs, *rest, **named), again)


class SAMTrainer(SAMTrainerMixin, Trainer):
    """``transformers.Trainer`` with SAM and its relatives as arguments.

    Args:
        *args: As for ``Trainer``; ``args`` are ``SAMTrainingArguments``.
        **kwargs: As for ``Trainer``.

    Raises:
        TypeError: If the arguments have no sharpness-aware fields.
        ValueError: If the optimizer or the parallelism cannot run a second pass.
    """


def make_sharpness_aware(trainer: _T, **options: Any) -> _T:
    """Make an existing Trainer instance of any class sharpness-aware.

    Args:
        trainer: A Trainer that is not sharpness-aware yet, before ``train()``. Its class is replaced by a subclass. An
            object of another kind that holds one Trainer in an attribute (setfit's) has that one made sharpness-aware.
        **options: The fields of ``SAMArguments``: ``sam="asam", sam_rho=0.5``. May be left out if the Trainer's
            arguments have them.

    Returns:
        The same instance.

    Raises:
        TypeError: If there is no Trainer, or not one alone; or there are no options, neither here nor in its arguments.
        ValueError: If an option is out of range, the Trainer is sharpness-aware already, or it cannot run a second
            pass.
    """
    if not isinstance(trainer, Trainer):
        make_sharpness_aware(_trainer_inside(trainer), **options)
        return trainer
    kind = type(trainer)
    if isinstance(trainer, SAMTrainerMixin):
        raise ValueError(f"{kind.__name__} is sharpness-aware already; set the fields of its arguments instead")
    if options:
        arguments = SAMArguments(**options)
    elif isinstance(trainer.args, SAMArguments):
        arguments = trainer.args
    else:
        raise TypeError(
            f"make_sharpness_aware needs options, since {type(trainer.args).__name__} has none of them; as in "
            'make_sharpness_aware(trainer, sam="sam", sam_rho=0.05)'
        )
    refuse_unsupported(trainer, arguments)
    trainer.__class__ = type(f"SharpnessAware{kind.__name__}", (SAMTrainerMixin, kind), {})
    vars(trainer)["_attached_arguments"] = arguments
    _bind_callbacks(trainer)
    return trainer


def _in_both_passes(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a ``training_step`` that calls another one in both passes."""

    @functools.wraps(step)
    def training_step(self: SAMTrainerMixin, *args: Any, **named: Any) -> Tensor:
        return self._run_both_passes(functools.partial(step, self), *args, **named)

    training_step._runs_both_passes = True  # type: ignore[attr-defined]
    return training_step


def _trainer_inside(wrapper: Any) -> Trainer:
    """Return the one Trainer that an object of another kind holds."""
    found = f"the class {wrapper.__name__}" if isinstance(wrapper, type) else type(wrapper).__name__
    attributes = {} if isinstance(wrapper, type) else getattr(wrapper, "__dict__", {})
    inside = {name: value for name, value in attributes.items() if isinstance(value, Trainer)}
    if len(inside) == 1:
        return next(iter(inside.values()))
    if inside:
        raise TypeError(
            f"{found} holds several Trainers, in {', '.join(inside)}; give the one that is meant, as in "
            f"make_sharpness_aware(trainer.{next(iter(inside))}, ...)"
        )
    reason = "" if isinstance(wrapper, type) else ", which holds none"
    raise TypeError(
        f"make_sharpness_aware needs a transformers Trainer, got {found}{reason}; give an instance of Trainer, or the "
        "attribute that holds one"
    )


def _bind_callbacks(trainer: Trainer) -> None:
    """Give each ``SharpnessCallback`` of a Trainer the way to log, which callbacks do not have."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SharpnessCallback):
            callback.bind(trainer)
