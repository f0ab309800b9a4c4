"""Sharpness in a Trainer's logs, measured on a fixed sample while it trains."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]  # accelerate ships no types
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samopt import StepMetrics
from samopt._replay.module_state import ModuleState
from samopt._replay.random_state import RngState
from samopt.sharpness import SharpnessMonitor
from samopt.sharpness._measuring.batches import map_tensors
from samopt.sharpness._measuring.step_means import StepMeans, log_keys
from samopt.sharpness.presets import DEFAULT, Measures, named_measures

from .._logging.progress import with_bar
from .._logging.step_metrics import free_metrics
from .._second_pass.batch_copies import independent_copy
from .own_state import own_state

__all__ = ["SharpnessCallback"]

_logger = logging.getLogger(__name__)
_T = TypeVar("_T", bound=Trainer)


class SharpnessCallback(TrainerCallback):
    """Logs sharpness as ``sharpness/...``: to the log history, TensorBoard and whatever ``report_to`` names.

    In a sharpness-aware Trainer it is one of the ``callbacks``; any other gets it by ``SharpnessCallback().attach(
    trainer)``, since only a Trainer can log. Every so many steps, or at each evaluation, it runs measures of
    ``samopt.sharpness`` on the same sample of the evaluation data. The model, its gradients and all random streams stay
    as they are, and so does what a Trainer's own ``compute_loss`` collects or logs. In a run of several processes the
    first one measures. What the optimizer measured anyway is logged beside the training loss. The last values are among
    the metrics of an evaluation, as ``eval_sharpness/...``, for ``metric_for_best_model``. A ``log`` of a subclass is
    passed by, since it may empty the averages that it adds to a row: the values go through ``Trainer.log``.

    Cost: the first measurement always happens, at the end of a run that is shorter than ``every``. Later ones take at
    most ``max_fraction`` of the training time; a measure that would take more is left out, which a warning says, and
    has a larger budget the next time.

    Args:
        measures: Names out of "worst_case" and "average_case" (adaptive sharpness), "worst_case_plain", "one_step"
            (SAM's own), "per_layer", "lambda_max", "trace", "quantization" and "weight_noise"; functions of
            ``samopt.sharpness``, with arguments bound by ``functools.partial``; or a dict from own names to functions,
            or from one of these names to other options.
        every: Optimizer steps between measurements, >= 1; None measures at each evaluation.
        examples: Size of the sample, drawn from the evaluation data, >= 1.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None is the Trainer's own ``compute_loss``.
        average_metrics: Log what the optimizer measures averaged over the steps since the last log, not of one step;
            without the norms of gradients where a ``GradScaler`` scales them.
        max_fraction: Largest share of the training time, in (0, 1]; None for no limit.
        seed: Of the sample.
        path: File to append each record to, as a line of JSON.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        measures: Measures = DEFAULT,
        *,
        every: int | None = 500,
        examples: int = 256,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        average_metrics: bool = False,
        max_fraction: float | None = 0.05,
        seed: int = 0,
        path: str | Path | None = None,
    ) -> None:
        for name, value in (("every", every), ("examples", examples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._latest: dict[str, float] = {}
        self._means = StepMeans() if average_metrics else None
        self.every = every
        self.examples = examples
        self.monitor: SharpnessMonitor | None = None
        """Keeps the history of what was measured, and of what was left out and why; None before training."""
        self._loss_fn = loss_fn
        self._seed = seed
        self._trainer: Trainer | None = None
        self._last_evaluation: int | None = None
        self._make_monitor = functools.partial(
            SharpnessMonitor,
            measures=named_measures(measures, warm=True),
            every=every,
            path=path,
            max_fraction=max_fraction,
        )

    def attach(self, trainer: _T) -> _T:
        """Add the callback to a Trainer.

        Args:
            trainer: Any Trainer.

        Returns:
            The Trainer.
        """
        self.bind(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return trainer

    def bind(self, trainer: Trainer) -> None:
        """Log through this Trainer; a sharpness-aware one calls this itself.

        Args:
            trainer: The Trainer that has this callback.
        """
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the sample.

        Args:
            args: The run's arguments.
            state: The run's state.
            control: Not used.
            **kwargs: Not used.

        Raises:
            RuntimeError: If the callback belongs to no Trainer, or its model is sharded.
            ValueError: If there is no evaluation data.
        """
        trainer = self._bound()
        self._latest, self._last_evaluation = {}, None  # of an earlier run
        if self._means is not None:
            self._means.take()
        if not state.is_world_process_zero:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RuntimeError(
                f"SharpnessCallback measures in one process, but the model of this {type(trainer).__name__} is sharded "
                "over several; leave the callback out, or train with distributed data parallel"
            )
        batches = map_tensors(self._sample(trainer), lambda tensor: tensor.to(args.device))
        assert trainer.model is not None
        monitor = self._make_monitor(trainer.model, self._loss_fn or _loss_of(trainer), batches)
        monitor.measures = {
            name: with_bar(name, measure, disable=args.disable_tqdm) for name, measure in monitor.measures.items()
        }
        self.monitor = monitor

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where ``every`` says so.

        Args:
            args: Not used.
            state: The run's state.
            control: Not used.
            **kwargs: Not used.
        """
        if self._means is not None:
            measured = getattr(_innermost(kwargs.get("optimizer")), "last_step", None)
            if not isinstance(measured, StepMetrics):  # a sharpness-aware Trainer steps the base
                measured = getattr(getattr(self._bound(), "sam_optimizer", None), "last_step", None)
            if isinstance(measured, StepMetrics):
                self._means.add(measured)
        if self.monitor is not None:
            self._log(self.monitor.step(state.global_step), state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where ``every`` is None, and add the last values to the evaluation's metrics.

        Where ``metric_for_best_model`` is one of them and none has been measured yet, this measures, too.

        Args:
            args: The run's arguments.
            state: The run's state.
            control: Not used.
            **kwargs: Not used.
        """
        trainer = self._bound()
        if not trainer.is_in_train:
            return
        is_first = self._last_evaluation != state.global_step  # several data sets are evaluated one after the other
        self._last_evaluation = state.global_step
        is_awaited = _is_followed(args) and not self._latest
        if self.monitor is not None and is_first and (self.every is None or is_awaited):
            self._log(self.monitor.measure(within_budget=True, step=state.global_step), state)
        latest = self._latest
        if trainer.accelerator.num_processes > 1:  # each of them looks for the best model
            (latest,) = broadcast_object_list([latest])
        metrics = kwargs.get("metrics")
        if isinstance(metrics, dict):
            metrics.update({f"eval_{name}": value for name, value in latest.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure if nothing has been measured so far.

        Args:
            args: Not used.
            state: The run's state.
            control: Not used.
            **kwargs: Not used.
        """
        if self.monitor is not None:
            self._log(self.monitor.finish(state.global_step), state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Follow a training loss by what the optimizer measured, unless the Trainer has logged that itself.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            logs: What is logged.
            **kwargs: The optimizer, among others.
        """
        step = getattr(_innermost(kwargs.get("optimizer")), "last_step", None)
        if logs is not None and "loss" in logs and isinstance(step, StepMetrics):
            values = free_metrics(step) | self.take_averages()
            if values and not values.keys() <= logs.keys():
                Trainer.log(self._bound(), values)

    def take_averages(self) -> dict[str, float]:
        """Return the optimizer's measurements averaged since the last call, for logs; nothing unless asked for."""
        if self._means is None:
            return {}
        values = log_keys(self._means.take())
        if self._bound().accelerator.scaler is not None:  # it has scaled the gradients by changing factors
            values = {name: value for name, value in values.items() if not name.endswith("grad_norm")}
        return values

    def _bound(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError(
                "SharpnessCallback is among the callbacks of a Trainer that is not sharpness-aware, and has no way to "
                "log there; write SharpnessCallback().attach(trainer) instead"
            )
        return self._trainer

    def _log(self, values: dict[str, float], state: TrainerState) -> None:
        record = self.monitor.history[-1] if self.monitor is not None and self.monitor.history else {}
        if values and record:
            trainer = self._bound()
            pending = trainer.control.should_log  # logging clears it, and the training loss may be waiting for it
            self._latest = {
                name: values[name] for name in values if name.removeprefix("sharpness/") in record["measures"]
            }
            Trainer.log(trainer, values)  # a subclass's would add the averages it has collected, and clear them
            trainer.control.should_log = pending
        if record.get("step") == state.global_step:
            for name, reason in record.get("skipped", {}).items():
                _logger.warning("sharpness/%s left out at step %d: %s", name, state.global_step, reason)

    def _sample(self, trainer: Trainer) -> list[Any]:
        data = trainer.eval_dataset
        if isinstance(data, dict):
            data = next(iter(data.values()), None)
        if data is None:
            raise ValueError(
                "SharpnessCallback measures on evaluation data, but the Trainer has no eval_dataset; give it one"
            )
        # The loader removes columns that the model does not take; drawing from its data set leaves its order alone.
        loader = trainer.get_eval_dataloader(data)
        before = RngState.capture([trainer.args.device])
        try:
            rows = _drawn(loader.dataset, self.examples, self._seed)
        finally:
            before.restore()
        size = trainer.args.per_device_eval_batch_size
        return [loader.collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]


def _is_followed(args: TrainingArguments) -> bool:
    """Return whether the best model is chosen by a measure."""
    return str(args.metric_for_best_model or "").removeprefix("eval_").startswith("sharpness/")


def _drawn(data: Any, count: int, seed: int) -> list[Any]:
    """Return up to ``count`` rows: any of a data set with a length, the first of a stream."""
    if not hasattr(data, "__len__"):
        return list(itertools.islice(iter(data), count))
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return [data[index] for index in chosen.tolist()]


def _loss_of(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with _unnoticed(trainer), trainer.compute_loss_context_manager():
            value = trainer.compute_loss(model, independent_copy(batch))
        return value if isinstance(value, Tensor) else value[0]

    return loss


@contextmanager
def _unnoticed(trainer: Trainer) -> Generator[None]:
    """Let a loss that is computed in this context add nothing to what the Trainer collects and logs."""
    modules, objects = own_state(trainer)
    state = ModuleState(modules)
    state.include(objects=objects)
    attributes = vars(trainer)
    own_log = {"log": attributes["log"]} if "log" in attributes else {}
    state.begin()
    state.save()
    try:
        attributes["log"] = _ignore
        yield
    finally:
        state.restore()
        attributes.pop("log", None)
        attributes.update(own_log)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for a Trainer's ``log``."""


def _innermost(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
