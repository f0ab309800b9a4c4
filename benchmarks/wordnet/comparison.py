"""The comparison: settings chosen on validation definitions, then every optimizer from every seed on both tests."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.rows import Row
from benchmarks.run_log import TUNING_SEED, RunLog, best_setting
from benchmarks.wordnet.encoder import Encoded, Encoder
from benchmarks.wordnet.finetune import FineTune
from benchmarks.wordnet.lexicon import Synset
from benchmarks.wordnet.methods import ADAMW, METHODS, Method
from benchmarks.wordnet.split import make_split

__all__ = ["Comparison", "Plan", "label_of"]

_TIMED_STEPS = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        methods: Names in ``METHODS``.
        seeds: Of the final runs; the runs that choose settings have one of their own.
        train_size: Training definitions.
        test_size: Definitions to choose on, and examples in each test.
        steps: Steps of each run.
        batch_size: Examples a step.
        tune: Whether to choose settings; without, the middle value of each is taken.
    """

    methods: Sequence[str]
    seeds: Sequence[int]
    train_size: int
    test_size: int
    steps: int
    batch_size: int
    tune: bool

    def settings(self, lr: float, method: Method, value: float) -> dict[str, float]:
        """Return what a row says about its settings.

        Args:
            lr: Learning rate.
            method: The optimizer.
            value: Its setting.
        """
        own = {"lr": value} if method is ADAMW else {"lr": lr, method.setting: value}
        return own | {"steps": self.steps, "batch_size": self.batch_size}


class Comparison:
    """Runs a plan, a row a run; runs that the file has already are not repeated.

    Args:
        plan: What to run.
        synsets: The lexicon.
        encoder: The pretrained encoder.
        path: File of rows, to continue and to append to.
        report: Called with a line of text as each run ends.
    """

    def __init__(
        self, plan: Plan, synsets: Sequence[Synset], encoder: Encoder, path: Path, report: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._synsets = synsets
        self._encoder = encoder
        self._log = RunLog(path)
        self._report = report
        split = make_split(synsets, 0, train_size=plan.train_size, test_size=plan.test_size)
        self._validation, self._definitions, self._usages = (
            encoder.encode(part) for part in (split.validation, split.definitions, split.usages)
        )
        self._training: dict[int, Encoded] = {}

    @property
    def rows(self) -> list[Row]:
        """Every row of the file."""
        return self._log.rows

    def run(self) -> None:
        """Choose settings, measure the cost of a step, and run every optimizer from every seed.

        Raises:
            BenchmarkError: If the file holds runs of another plan.
        """
        self._check_rows()
        lr = self._choose(ADAMW, 0.0)
        chosen = {name: lr if name == ADAMW.name else self._choose(METHODS[name], lr) for name in self._plan.methods}
        seconds: dict[str, float] = {}
        for seed in self._plan.seeds:
            for name, value in chosen.items():
                if self._find("test", METHODS[name], lr, value, seed) is None:
                    seconds = seconds or self._time_steps(lr, chosen)
                    self._run(METHODS[name], lr, value, seed, "test", seconds[name])

    def _choose(self, method: Method, lr: float) -> float:
        """Return the setting with the best validation accuracy, the smallest of equals."""

        def validated(value: float) -> Row:
            row = self._find("validation", method, lr, value, TUNING_SEED)
            return row or self._run(method, lr, value, TUNING_SEED, "validation", None)

        return best_setting(method.values, validated if self._plan.tune else None)

    def _run(self, method: Method, lr: float, value: float, seed: int, evaluate_on: str, seconds: float | None) -> Row:
        train = self._train(seed)
        run = self._fine_tune(method, lr, value, train, seed)
        while not run.is_finished:
            run.step()
        tests = {"accuracy": self._validation}
        if evaluate_on == "test":
            tests = {"accuracy": self._definitions, "shifted_accuracy": self._usages}
        metrics = {name: run.accuracy(examples) for name, examples in tests.items()}
        last = run.curves["train_loss"][-max(1, self._plan.steps // 10) :]
        row = Row(
            task="wordnet",
            optimizer=label_of(method, value),
            base=ADAMW.name,
            seed=seed,
            label_noise=0.0,
            evaluated_on=evaluate_on,
            settings=self._plan.settings(lr, method, value),
            examples={"train": len(train.labels), "test": len(self._definitions.labels)},
            metrics=metrics
            | {"train_loss": statistics.fmean(last)}
            | {"seconds_per_step": statistics.median(run.step_seconds) if seconds is None else seconds},
            curves=dict(run.curves),
            warnings=run.warnings,
            environment=environment.describe(_CPU),
            timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        self._log.add(row)
        shown = ", ".join(f"{name.replace('_', ' ')} {100 * metrics[name]:.1f}%" for name in tests)
        self._report(f"{evaluate_on}, seed {seed}: {row.optimizer}: {shown} ({sum(run.step_seconds):.0f} s)")
        return row

    def _time_steps(self, lr: float, chosen: dict[str, float]) -> dict[str, float]:
        """Return the median duration of a step of each optimizer, their steps taken in turns."""
        train = self._train(TUNING_SEED)
        runs = {name: self._fine_tune(METHODS[name], lr, value, train, TUNING_SEED) for name, value in chosen.items()}
        for _ in range(min(_TIMED_STEPS, self._plan.steps)):
            for run in runs.values():
                run.step()
        return {name: statistics.median(run.step_seconds[1:] or run.step_seconds) for name, run in runs.items()}

    def _fine_tune(self, method: Method, lr: float, value: float, train: Encoded, seed: int) -> FineTune:
        plan = self._plan
        return FineTune(self._encoder, method, lr, value, train, seed, steps=plan.steps, batch_size=plan.batch_size)

    def _train(self, seed: int) -> Encoded:
        if seed not in self._training:
            plan = self._plan
            split = make_split(self._synsets, seed, train_size=plan.train_size, test_size=plan.test_size)
            self._training = {seed: self._encoder.encode(split.train)}
        return self._training[seed]

    def _find(self, evaluated_on: str, method: Method, lr: float, value: float, seed: int) -> Row | None:
        return self._log.find(
            evaluated_on=evaluated_on,
            optimizer=label_of(method, value),
            seed=seed,
            settings=self._plan.settings(lr, method, value),
        )

    def _check_rows(self) -> None:
        plan = self._plan
        wanted = (plan.steps, plan.batch_size, plan.train_size, plan.test_size)
        self._log.check(
            "(steps, batch size, training examples, test examples)",
            lambda row: (
                row.settings["steps"],
                row.settings["batch_size"],
                row.examples["train"],
                row.examples["test"],
            ),
            lambda row: wanted,
        )


def label_of(method: Method, value: float) -> str:
    """Return what a row calls an optimizer with its setting, as in "sam:rho=0.05".

    Args:
        method: The optimizer.
        value: Its setting.
    """
    return f"{method.name}:{method.setting}={value:g}"
