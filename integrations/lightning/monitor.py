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
from samopt import SharpnessAwareOptimizer
from samopt.distributed import mean_over_ranks
from samopt.sharpness.presets import Measures, named_measures

from .._logging.history import draw_history
from .._logging.progress import with_bar
from .._logging.step_metrics import free_metrics
from .loss import training_loss
from .packages import Callback
from .refusals import refuse_sharded_measurement
from .sample import Sample

__all__ = ["SharpnessMonitor"]

_SOURCES = ("training", "validation")


class SharpnessMonitor(Callback):
    """Logs sharpness as ``sharpness/...`` through the trainer's loggers, with or without sharpness-aware training.

    Every so many optimizer steps it runs measures of ``samopt.sharpness`` on one fixed sample. The model, its gradients
    and all random streams stay as they are, so a monitored run is the unmonitored one, bit for bit. What a samopt
    optimizer measures anyway (the one-step sharpness ``sharpness/sam``, the radius, gradient norms) is logged at every
    ``log_every_n_steps`` for nothing but its reading. In a run of several processes each measures on a sample of its
    own data, and all log the mean. Other callbacks can follow every value, as in
    ``EarlyStopping("sharpness/worst_case")``. At the end of training there is a picture of it all.

    Cost: at most ``max_fraction`` of the training time; a measure that would take more is left out, which a warning
    says, and has a larger budget the next time. Memory: the sample, and what the measures say.

    Args:
        measures: Names out of "worst_case" and "average_case" (adaptive sharpness), "per_layer" and "lambda_max";
            functions of ``samopt.sharpness``, with arguments bound by ``functools.partial``; or a dict from names to
            functions, or to options of a measure that has the name.
        every_n_steps: Optimizer steps between measurements, >= 1.
        examples: Size of the sample, >= 1: the first so many examples, in whole batches. Measuring begins once they
            have gone by, or all that there are. A resumed run takes a new sample.
        data: Of which data: "training" or "validation".
        batches: Batches to measure on instead, on any device.
        loss_fn: ``loss_fn(model, batch) -> scalar``; None is the module's ``training_step``, in evaluation mode.
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
        measures: Measures = ("worst_case", "average_case"),
        *,
        every_n_steps: int = 500,
        examples: int = 256,
        data: str = "training",
        batches: list[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        max_fraction: float | None = 0.05,
        path: str | Path | None = None,
        plot: str | Path | bool = True,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("examples", examples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if data not in _SOURCES:
            raise ValueError(f'data must be "training" or "validation", got {data!r}; give other data as batches=')
        self.every_n_steps = every_n_steps
        self.history: dict[int, dict[str, float]] = {}
        self.monitor: samopt.sharpness.SharpnessMonitor | None = None
        self._measures = named_measures(measures)
        self._examples = examples
        self._data = data
        self._batches = batches
        self._loss_fn = loss_fn
        self._path = path
        self._plot = plot
        self._sample = Sample(examples)
        self._last_step = 0
        self._loaded: dict[str, Any] = {}
        self._make_monitor = functools.partial(
            samopt.sharpness.SharpnessMonitor, measures=self._measures, every=every_n_steps, max_fraction=max_fraction
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
                f"SharpnessMonitor takes training_step for the loss, but that of {type(pl_module).__name__} {reason}; "
                "give it loss_fn=, as in SharpnessMonitor(loss_fn=samopt.sharpness.cross_entropy)"
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
                "SharpnessMonitor was to measure on validation data, of which the trainer has none; give it some, or "
                'use SharpnessMonitor(data="training")'
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
        """Begin a sample of the validation data anew.

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
        values = {} if self.monitor is None else self.monitor.step(step)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        is_logged = every > 0 and step % every == 0
        if step % self.every_n_steps and not is_logged:
            return
        record = self.monitor.history[-1] if self.monitor is not None and self.monitor.history else {}
        if record.get("step") == step:
            for name, reason in record.get("skipped", {}).items():
                rank_zero_warn(f"sharpness/{name} left out at step {step}: {reason}")
        free = _free_metrics(trainer)
        values = mean_over_ranks(free | values)
        if values.keys() - free.keys():
            self.history[step] = values
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=row)
        if values and not trainer.barebones:
            pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            ModuleNotFoundError: If a picture was asked for by its path, and matplotlib is not installed.
        """
        folder = trainer.log_dir or trainer.default_root_dir  # asks every process
        is_trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # a connector sets it
        if self._plot is False or not self.history or not trainer.is_global_zero or is_trial:
            return
        try:
            figure = draw_history(self.history, ["sam", *self._measures])
        except ModuleNotFoundError as error:
            if self._plot is not True:
                raise
            rank_zero_info(f"SharpnessMonitor draws no picture: {error}")
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
