"""Sharpness during training, at a bounded share of its time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from samopt.sharpness._measuring.batches import fresh, read_batches
from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.results import plain, to_json
from samopt.sharpness._measuring.step_means import StepMeans, log_keys
from samopt.sharpness._measuring.time_budget import Budget, OverBudget
from samopt.sharpness.presets import DEFAULT, Measures, named_measures

__all__ = ["SharpnessMonitor"]


class SharpnessMonitor:
    """Measures a model every so many steps, keeps a history, and says what to log.

    Belongs to no framework: call ``step()`` after each optimizer step, and ``finish()`` at the end. At every
    ``every``-th call it runs the measures on the same batches and returns numbers to log; the model, its gradients and
    all random streams stay as they are, so a monitored run is the unmonitored one, bit for bit.

    The first measurement always happens, at the end of a run that is shorter than ``every``. Later ones take no more
    than ``max_fraction`` of the time since the first ``step()``, the first one not counted: a measure that would is
    left out, and the record says so and which options change it. What is left of the budget accumulates, so that an
    expensive measure runs less often rather than never.

    In a loop::

        monitor = SharpnessMonitor(model, sharpness.cross_entropy, batches, every=200, optimizer=optimizer)
        for batch in loader:
            ...
            optimizer.step(closure)
            logger.log(monitor.step())
        logger.log(monitor.finish())

    In a callback: make one where the model is on its device (first training batch), call ``values =
    monitor.step(global_step)`` once an optimizer step, log ``values`` if it is not empty, and save and load
    ``state_dict()`` with the checkpoint. It never communicates: in distributed training make it in one process, or in
    each on batches of its own, and log ``samopt.distributed.mean_over_ranks(monitor.step())``.

    Args:
        model: The model in training; compiled and data-parallel wrappers are looked into.
        loss_fn: ``loss_fn(model, batch) -> scalar``; or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: What to measure on, the same ones every time; copied once, here. A few hundred examples do.
        every: Steps between measurements, >= 1; None measures at the end and where ``measure()`` is called.
        measures: Names out of "worst_case" and "average_case" (adaptive sharpness), "worst_case_plain", "one_step"
            (SAM's own), "per_layer", "lambda_max", "trace", "quantization" and "weight_noise"; functions of
            ``samopt.sharpness``, with arguments bound by ``functools.partial``; or a dict from own names to functions,
            or from one of these names to other options.
        optimizer: A samopt optimizer, whose ``last_step`` joins each record; it costs nothing but reading it.
        average_metrics: Log the optimizer's measurements averaged over the steps since the last record.
        path: File to append each record to, as a line of JSON; numbers that are not finite are null there.
        max_fraction: Largest share of the time that measuring may take, in (0, 1]; None for no limit.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Attributes:
        history: One dict a record: ``step``; ``seconds`` since the first step; ``measures``, each measure's
            ``to_dict()``; ``skipped``, why a measure was left out; ``metrics``, the optimizer's.

    Example:
        >>> import torch, samopt
        >>> from functools import partial
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(4, 3)
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> monitor = sharpness.SharpnessMonitor(
        ...     model,
        ...     sharpness.cross_entropy,
        ...     [batch],
        ...     every=2,
        ...     measures={"sharpness": partial(sharpness.worst_case, rho=0.1, steps=5)},
        ...     max_fraction=None,
        ... )
        >>> [sorted(monitor.step()) for _ in range(2)]
        [[], ['sharpness/sharpness']]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        *,
        every: int | None = 500,
        measures: Measures = DEFAULT,
        optimizer: Any = None,
        average_metrics: bool = False,
        path: str | Path | None = None,
        max_fraction: float | None = 0.05,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}; None measures at the end")
        if optimizer is not None and not hasattr(optimizer, "last_step"):
            raise TypeError(
                f"optimizer must be a samopt optimizer, which has last_step, got {type(optimizer).__name__}; leave it "
                "out for any other"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.batches = [fresh(batch) for batch in read_batches(batches)]  # a loop may write into its own
        self.every = every
        self.measures = named_measures(measures, warm=True)
        self.optimizer = optimizer
        self.path = None if path is None else Path(path)
        self.history: list[dict[str, Any]] = []
        self._budget = Budget(max_fraction, time.perf_counter)
        self._steps = 0
        self._has_stepped = False
        self._worked: set[str] = set()
        self._means = StepMeans() if average_metrics else None

    def step(self, step: int | None = None) -> dict[str, float]:
        """Note that the optimizer has stepped, and measure where it is time to.

        Args:
            step: Number of optimizer steps so far, for the record and for when to measure; None counts the calls.

        Returns:
            What to log, if this call measured anything: ``"sharpness/NAME"`` for each measure, for each layer of a
            measure by layer ``"sharpness/NAME/LAYER"``, and ``"sharpness/METRIC"`` for each measurement of the
            optimizer, whose own sharpness is ``"sharpness/sam"``. Otherwise an empty dict.
        """
        self._budget.start()
        before, self._steps = self._steps, self._steps + 1 if step is None else step
        if not self._has_stepped:
            before = self._steps - 1
        self._has_stepped = True
        if self._means is not None and self.optimizer is not None:
            self._means.add(self.optimizer.last_step)
        # A step may be named twice (at each micro-batch), or left out (by several optimizers that count together).
        if self.every is None or self._steps // self.every <= before // self.every:
            return {}
        return self.measure(within_budget=True)

    def finish(self, step: int | None = None) -> dict[str, float]:
        """Measure if nothing has been measured so far, since the run was shorter than ``every``.

        Args:
            step: As for ``step``.

        Returns:
            As ``step``.

        Raises:
            RuntimeError: If a measure fails on its first run.
            ValueError: Likewise.
        """
        if self.has_measured:
            return {}
        values = self.measure(step=step)
        if not self.has_measured:
            warnings.warn("this run measured no sharpness: every measure was left out", stacklevel=2)
        return values

    @property
    def has_measured(self) -> bool:
        """Whether a measure has run, in this run or in the one that it continues."""
        return any(record["measures"] for record in self.history)

    def measure(self, *, within_budget: bool = False, step: int | None = None) -> dict[str, float]:
        """Measure now.

        Args:
            within_budget: Leave out what would take more than its share of the time, but for its first run.
            step: Number of optimizer steps so far, for the record; None for what ``step`` knows.

        Returns:
            As ``step``.

        Raises:
            RuntimeError: If a measure fails on its first run.
            ValueError: Likewise.
        """
        self._budget.start()
        self._steps = self._steps if step is None else step
        record: dict[str, Any] = {"step": self._steps, "seconds": self._budget.elapsed, "measures": {}}
        skipped: dict[str, str] = {}
        for name, measure in self.measures.items():
            is_free = within_budget and name not in self._worked
            limited = within_budget and not is_free
            try:
                with self._budget.spend(name, limited=limited, charged=not is_free) as progress:
                    result = measure(self.model, self.loss_fn, self.batches, progress=progress)
            except OverBudget as reason:
                skipped[name] = str(reason)
            except (RuntimeError, ValueError) as error:
                if name not in self._worked:
                    raise
                skipped[name] = f"{type(error).__name__}: {error}"
                warnings.warn(f"sharpness measure {name!r} failed at step {self._steps}: {error}", stacklevel=3)
            else:
                self._worked.add(name)
                record["measures"][name] = plain(result)
        if skipped:
            record["skipped"] = skipped
        if self.optimizer is not None:
            record["metrics"] = (self._means and self._means.take()) or self.optimizer.last_step.to_dict()
        self._append(record)
        return self.to_log(record)

    @staticmethod
    def to_log(record: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers of a record under flat names.

        Args:
            record: An entry of ``history``.
        """
        values = {f"sharpness/{name}": float(result["value"]) for name, result in record["measures"].items()}
        for name, result in record["measures"].items():
            layers = result.get("layers") if result["measure"] == "per_layer" else None
            values |= {f"sharpness/{name}/{layer}": float(one["value"]) for layer, one in (layers or {}).items()}
        return log_keys(record.get("metrics", {})) | values

    def state_dict(self) -> dict[str, Any]:
        """Return the history, the number of steps and the time used so far."""
        return {"steps": self._steps, "history": list(self.history), "budget": self._budget.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a history; records are not written to ``path`` again.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._steps = state_dict["steps"]
        self._has_stepped = True
        self.history = list(state_dict["history"])
        self._budget.load_state_dict(state_dict["budget"])
        self._worked = {name for record in self.history for name in record["measures"]}

    def _append(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")
