"""The callback that shows how sharp a model is while it trains."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

import samopt.sharpness
from samopt import SharpnessAwareOptimizer, StepMetrics
from samopt.distributed import mean_over_ranks
from samopt.sharpness._measuring.step_means import StepMeans, log_keys
from samopt.sharpness.presets import DEFAULT, Measures, named_measures

from .._logging.history import draw_history
from .._logging.progress import with_bar
from .._logging.step_metrics import free_metrics
from .loss import training_loss
from .packages import Callback
from .refusals import refuse_sharded_measurement
from .sample import Sample

__all__ = ["SharpnessCallback"]

_SOURCES = ("training", "validation")


class SharpnessCallback(Callback):
    """Logs sharpness as ``sharpness/...`` through the trainer's loggers, with or without sharpness-aware training.

    Every so many optimizer steps, or at each validation, it runs measures of ``samopt.sharpness`` on one fixed
    sample. The model, its gradients
    and all random streams stay as they are, so a monitored run is the unmonitored one, bit for bit. What a samopt
    optimizer measures anyway (the one-step sharpness ``sharpness/sam``, the radius, gradient norms) is logged at every
    ``log_every_n_steps`` for nothing but its reading. In a run of several processes each measures on a sample of its
    own data, and all log the mean. Other callbacks can follow every value, as in
    ``EarlyStopping("sharpness/worst_case")``: between measurements they see the last one. At the end of training there
    is a picture of it all.

    Cost: the first measurement always happens, before a validation whose callbacks follow it, and at the end of a run
    that is shorter than ``every``. Later ones take at most ``max_fraction`` of the training time; a measure that would
    take more is left out, which a warning says, and has a larger budget the next time. Memory: the sample, and what the
    measures say.

    Args:
        measures: Names out of "worst_case" and "average_case" (adaptive sharpness), "worst_case_plain", "one_step"
            (SAM's own), "per_layer", "lambda_max", "trace", "quantization" and "weight_noise"; functions of
            ``samopt.sharpness``, with arguments bound by ``functools.partial``; or a dict from own names to functions,
            or from one of these names to other options.
        every: Optimizer steps between measurements, >= 1; None measures at each validation.
        examples: Size of the sample, >= 1: the first so many examples, in whole batches. Measuring begins once they
            have gone by, or all that there are. A resumed run takes a new sample.
        data: Of which data: "training" or "validation".
        batches: Batches to measure on instead, on any device.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None is the module's ``training_step``, in evaluation mode.
        average_metrics: Log what the optimizer measures averaged over the steps since the last log, not of one step.
        max_fraction: Largest share of the training time, in (0, 1]; None for no limit.
        path: File to append each record to, as a line of JSON, in the first process.
        plot: Where to save the picture; TensorBoard gets it, too. True is ``sharpness.png`` in the logger's folder, if
            matplotlib is installed; False is no picture.

    Raises:
        TypeError: If a measure is neither a name nor a function.
        ValueError: If an argument is out of range.

    Attributes:
        history: What was logged at each step at which something was measured, by step.
        monitor: Keeps every result of this process whole, and why a measure was left out; None until measuring begins.
    """

    def __init__(
        self,
        measures: Measures = DEFAULT,
        *,
        every: int | None = 500,
        examples: int = 256,
        data: str = "training",
        batches: list[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        average_metrics: bool = False,
        max_fraction: float | None = 0.05,
        path: str | Path | None = None,
        plot: str | Path | bool = True,
    ) -> None:
        for name, value in (("every", every), ("examples", examples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if data not in _SOURCES:
            raise ValueError(f'data must be "training" or "validation", got {data!r}; give other data as batches=')
        self.every = every
        self.history: dict[int, dict[str, float]] = {}
        self.monitor: samopt.sharpness.SharpnessMonitor | None = None
        self._measures = named_measures(measures, warm=True)
        self._examples = examples
        self._data = data
        self._batches = batches
        self._loss_fn = loss_fn
        self._path = path
        self._plot = plot
        self._sample = Sample(examples)
        self._latest: dict[str, float] = {}
        self._means = StepMeans() if average_metrics else None
        self._last_step = 0
        self._loaded: dict[str, Any] = {}
        self._make_monitor = functools.partial(
            samopt.sharpness.SharpnessMonitor, measures=self._measures, every=every, max_fraction=max_fraction
        )
        self._make_monitor(nn.Linear(1, 1), _no_loss, [torch.zeros(1)])  # checks the options now

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured before anything starts.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "fit" or another.

        Raises:
            TypeError: If the module's training step is no loss.
            ValueError: If the model is sharded over processes.
        """
        if stage != "fit":
            return
        refuse_sharded_measurement(trainer)
        iterates = "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
        if self._loss_fn is None and (iterates or not pl_module.automatic_optimization):
            reason = "takes its batches itself" if iterates else "runs the optimizer (automatic_optimization=False)"
            raise TypeError(
                f"SharpnessCallback takes training_step for the loss, but that of {type(pl_module).__name__} {reason}; "
                "give it loss_fn=, as in SharpnessCallback(loss_fn=samopt.sharpness.cross_entropy)"
            )
        self.monitor = None
        self._sample = Sample(self._examples)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, if there is something to measure on.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            ValueError: If there is no validation data to measure on.
        """
        self._last_step = trainer.global_step
        self.history = self._loaded.get("history", {})
        if self._batches is not None:
            self._begin(trainer, pl_module, trainer.strategy.batch_to_device(self._batches))
        elif self._data == "validation" and not trainer.enable_validation:
            raise ValueError(
                "SharpnessCallback was to measure on validation data, of which the trainer has none; give it some, or "
                'use SharpnessCallback(data="training")'
            )
        elif self._data == "validation" and self._sample.is_complete:  # from the sanity check
            self._begin(trainer, pl_module, self._sample.batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the batch into the sample, until that is complete.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch.
            batch_idx: Not used.
        """
        if self.monitor is None and self._data == "training":
            self._sample.add(batch)
            if trainer.is_last_batch:
                self._sample.end()
            if self._sample.is_complete:
                self._begin(trainer, pl_module, self._sample.batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new sample of the validation data.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._data == "validation":
            self._sample.begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the batch into the sample, until that is complete; of several data sets, the first counts.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch.
            batch_idx: Not used.
            dataloader_idx: Which data set.
        """
        if self.monitor is None and self._data == "validation" and dataloader_idx == 0:
            self._sample.add(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure, if that waited for validation data.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._data == "validation" and self.monitor is None and not trainer.sanity_checking:
            self._sample.end()
            self._begin(trainer, pl_module, self._sample.batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is time to, and log that and what the optimizer measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        row: int = trainer.fit_loop.epoch_loop._batches_that_stepped  # loggers count rows in these, as their own do
        step = row + 1
        if self._means is not None and (last := _last_step(trainer)) is not None:
            self._means.add(last)
        values = {} if self.monitor is None else self.monitor.step(step)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        is_due = self.every is not None and step % self.every == 0
        if is_due or (interval > 0 and step % interval == 0):
            self._log(trainer, pl_module, values, step)
        elif self._latest and _is_followed(trainer, self):
            pl_module.log_dict(self._latest, logger=False, on_step=True, on_epoch=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where ``every`` is None, or where another callback follows a measure and there is none so far.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        is_followed = _is_followed(trainer, self)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not (is_followed or self.every is None):
            return
        if self.monitor is None and self._data == "training":
            self._begin_with_what_there_is(trainer, pl_module)
        if self.monitor is not None and (self.every is None or not self.monitor.has_measured):
            step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._log(trainer, pl_module, self.monitor.measure(within_budget=True, step=step), step)
        elif self._latest and is_followed:
            pl_module.log_dict(self._latest, logger=False, on_step=False, on_epoch=True)

    def _begin_with_what_there_is(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample.end()
        if self._sample.batches:
            self._begin(trainer, pl_module, self._sample.batches)

    def _log(self, trainer: Trainer, pl_module: LightningModule | None, values: dict[str, float], step: int) -> None:
        """Log a measurement, and what the optimizer measured anyway."""
        record = self.monitor.history[-1] if self.monitor is not None and self.monitor.history else {}
        if record.get("step") == step:
            for name, reason in record.get("skipped", {}).items():
                rank_zero_warn(f"sharpness/{name} left out at step {step}: {reason}")
        free = _free_metrics(trainer) if self._means is None else log_keys(self._means.take())
        values = mean_over_ranks(free | values)
        measured = {name: value for name, value in values.items() if name not in free}
        if measured:
            self.history[step] = values
            self._latest = measured
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=step - 1)
        if values and pl_module is not None and not trainer.barebones:
            on_step = not trainer.validating
            pl_module.log_dict(self._latest | values, logger=False, on_step=on_step, on_epoch=not on_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if nothing has been measured so far, and draw the picture.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            ModuleNotFoundError: If a picture was asked for by its path, and matplotlib is not installed.
        """
        if self.monitor is None:
            self._begin_with_what_there_is(trainer, pl_module)
        if self.monitor is None:
            rank_zero_warn("SharpnessCallback measured nothing: no batch of its data has gone by")
        elif not self.monitor.has_measured:
            step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._log(trainer, None, self.monitor.finish(step), step)
        folder = trainer.log_dir or trainer.default_root_dir  # asks every process
        is_trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # a connector sets it
        if self._plot is False or not self.history or not trainer.is_global_zero or is_trial:
            return
        try:
            figure = draw_history(self.history, ["sam", *self._measures])
        except ModuleNotFoundError as error:
            if self._plot is not True:
                raise
            rank_zero_info(f"SharpnessCallback draws no picture: {error}")
            return
        path = Path(folder) / "sharpness.png" if self._plot is True else Path(self._plot)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_figure"):
                experiment.add_figure("sharpness", figure, global_step=trainer.global_step, close=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for the checkpoint."""
        if self.monitor is None:
            return self._loaded  # of a run resumed so lately that there is no sample yet
        return {"monitor": self.monitor.state_dict(), "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a history to go on with.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._loaded = state_dict

    def _begin(self, trainer: Trainer, module: LightningModule, batches: list[Any]) -> None:
        loss_fn = self._loss_fn or training_loss(trainer, module)
        path = self._path if trainer.is_global_zero else None
        monitor = self._make_monitor(module, loss_fn, batches, path=path)
        disable = not trainer.is_global_zero or trainer.progress_bar_callback is None
        monitor.measures = {
            name: with_bar(name, measure, disable=disable) for name, measure in monitor.measures.items()
        }
        if self._loaded:
            monitor.load_state_dict(self._loaded["monitor"])
            self._loaded = {}
        self.monitor = monitor


def _is_followed(trainer: Trainer, own: Callback) -> bool:
    """Return whether another callback monitors a measure, as EarlyStopping and ModelCheckpoint do."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    return any(str(getattr(other, "monitor", "")).startswith("sharpness/") for other in callbacks if other is not own)


def _last_step(trainer: Trainer) -> StepMetrics | None:
    """Return what the sharpness-aware optimizer measured in its last step."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    sources = [callback for callback in callbacks if getattr(callback, "runs_second_pass", False)]
    sources += [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SharpnessAwareOptimizer)]
    return sources[0].last_step if sources else None


def _free_metrics(trainer: Trainer) -> dict[str, float]:
    """Return what the sharpness-aware optimizer measured, the callback's or the module's own; nothing without one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    for callback in callbacks:
        if getattr(callback, "runs_second_pass", False):
            return free_metrics(callback.last_step)
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SharpnessAwareOptimizer):
            values = free_metrics(optimizer.last_step)
            if not optimizer.is_one_pass and getattr(trainer.precision_plugin, "scaler", None) is not None:
                # Manual optimization measures them before the GradScaler divides, and it has changed its scale since.
                values = {name: value for name, value in values.items() if not name.endswith("grad_norm")}
            return values
    return {}


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise NotImplementedError
