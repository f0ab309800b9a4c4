"""The frontier: its grid, its choices, its costs, its advice, and the whole command."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import samopt
from benchmarks.cli import main
from benchmarks.data import make_split
from benchmarks.errors import BenchmarkError
from benchmarks.frontier import comparison
from benchmarks.frontier.advice import Outcome, Place, advise, gain, half_width, overall, places
from benchmarks.frontier.arenas import ARENAS
from benchmarks.frontier.comparison import Comparison, Plan
from benchmarks.frontier.cost import Cost, measure, read_costs, write_costs
from benchmarks.frontier.methods import BASE, METHODS
from benchmarks.frontier.report import markdown
from benchmarks.registry import TASKS
from benchmarks.rows import Row, read_rows
from benchmarks.summary import Estimate
from benchmarks.training import Run
from tests.helpers.pages import REPOSITORY

DIGITS = replace(ARENAS["digits"], epochs=1, train_size=128)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_method_has_as_many_trials_over_the_same_relative_grid() -> None:
    for arena in ARENAS.values():
        for method in METHODS.values():
            values = method.values_in(arena)
            if method is not BASE:
                assert [value / values[1] for value in values] == pytest.approx([0.3, 1.0, 3.0])
        assert BASE.values_in(arena) == arena.learning_rates
        assert len(arena.learning_rates) == 3 and arena.learning_rates == tuple(sorted(arena.learning_rates))


@pytest.mark.parametrize(
    ("name", "arena"),
    [(name, arena) for name in METHODS for arena in ARENAS.values() if arena.base in METHODS[name].bases],
    ids=lambda value: getattr(value, "task", value),
)
def test_every_method_builds_around_its_base_and_steps(name: str, arena) -> None:
    method = METHODS[name]
    choice = method.choice(arena, 0.002, 0.02)
    model = TASKS[arena.task].build_model()
    optimizer = choice.case.build(model, choice.settings)
    base = optimizer.base_optimizer if isinstance(optimizer, samopt.SharpnessAwareOptimizer) else optimizer
    assert isinstance(base, torch.optim.SGD if arena.base == "sgd" else torch.optim.AdamW)
    assert base.param_groups[0]["lr"] == 0.002
    assert isinstance(optimizer, samopt.SharpnessAwareOptimizer) == (method is not BASE)
    if method is not BASE:
        assert optimizer.param_groups[0]["rho"] == 0.02
    size = (28, 28) if arena.task.startswith("fashion") else (8, 8)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.rand(4, 1, *size)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(*[closure] * (2 if "ascent_part" in choice.settings else 1))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "steps", "perturbed"),
    [
        ("asam", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("asam-last-half", 8, [4, 5, 6, 7]),
        ("asam-last-quarter", 8, [6, 7]),
        ("asam-every-2", 6, [0, 2, 4]),
        ("asam-every-4", 9, [0, 4, 8]),
    ],
)
def test_schedules_perturb_in_these_steps_only(name: str, steps: int, perturbed: list[int]) -> None:
    task = TASKS["digits"]
    split = make_split(task.load(None), 0, classes=10, train_size=steps * 16)
    choice = METHODS[name].choice(DIGITS, 0.01, 0.1)
    run = Run(
        task.build_model, choice, split, 0, epochs=1, batch_size=16, sharpness_rho=0.05, device=torch.device("cpu")
    )
    forwards: list[int] = []
    run.model.register_forward_hook(lambda *_: forwards.append(len(run.step_seconds)))
    assert len(list(run.steps())) == steps
    assert [step for step in range(steps) if forwards.count(step) == 2] == perturbed
    assert len(forwards) == steps + len(perturbed)


def test_the_first_pass_may_be_of_part_of_each_batch() -> None:
    task = TASKS["digits"]
    split = make_split(task.load(None), 0, classes=10, train_size=32)
    choice = METHODS["asam-quarter"].choice(DIGITS, 0.01, 0.1)
    run = Run(
        task.build_model, choice, split, 0, epochs=1, batch_size=16, sharpness_rho=0.05, device=torch.device("cpu")
    )
    sizes: list[int] = []
    run.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert len(list(run.steps())) == 2
    assert sizes == [4, 16, 4, 16]


def plan_of(**changes) -> Plan:
    plan = Plan(arenas=[DIGITS], methods=["base", "sam"], seeds=[0, 1], label_noise=[0.4], tune=True)
    return replace(plan, **changes)


def run_plan(path: Path, plan: Plan) -> list[str]:
    lines: list[str] = []
    Comparison(plan, path, lines.append).run()
    return lines


def test_settings_are_chosen_on_validation_data_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = comparison.run_experiment
    best = {"sgd:lr=0.01": 0.8, "sgd:lr=0.1": 0.9, "sam:rho=0.03": 0.7, "sam:rho=0.1": 0.7}

    def pretend(experiment):
        for row in trained(experiment):
            accuracy = best.get(row.optimizer, 0.1) if row.evaluated_on == "validation" else 0.0
            yield replace(row, metrics=row.metrics | {"accuracy": accuracy})

    monkeypatch.setattr(comparison, "run_experiment", pretend)
    plan = plan_of()
    assert len(run_plan(tmp_path / "runs.jsonl", plan)) == plan.count() == 10
    rows = read_rows(tmp_path / "runs.jsonl")
    tuning = [row for row in rows if row.evaluated_on == "validation"]
    assert len(tuning) == 6 and {row.seed for row in tuning} == {1000}
    assert [(row.optimizer, row.seed) for row in rows if row.evaluated_on == "test"] == [
        ("sgd:lr=0.1", 0), ("sam:rho=0.03", 0), ("sgd:lr=0.1", 1), ("sam:rho=0.03", 1)
    ]  # fmt: skip
    assert all(row.settings["lr"] == 0.1 for row in rows if row.optimizer.startswith("sam"))


def test_no_run_is_repeated_and_methods_may_join(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    whole = run_plan(path, plan_of(tune=False))
    assert len(whole) == 4 and whole[-1].startswith("[4/4] digits, 40% random labels, test, seed 1: sam:rho=0.1: ")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:3]), encoding="utf-8")
    assert len(run_plan(path, plan_of(tune=False))) == 1
    again, first = read_rows(path)[3], json.loads(lines[3])
    assert (again.metrics["accuracy"], again.curves) == (first["metrics"]["accuracy"], first["curves"])
    assert run_plan(path, plan_of(tune=False)) == []
    joined = run_plan(path, plan_of(tune=False, methods=["base", "sam", "momentum-sam"]))
    assert [line.split(": ")[1] for line in joined] == ["momentum-sam:rho=0.1"] * 2
    with pytest.raises(BenchmarkError, match=r"\(epochs, training examples\) = \(1, 128\), and \(2, 128\) is asked"):
        run_plan(path, plan_of(arenas=[replace(DIGITS, epochs=2)]))


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trained, calls = comparison.run_experiment, []

    def interrupted(experiment):
        calls.append(experiment)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return trained(experiment)

    monkeypatch.setattr(comparison, "run_experiment", interrupted)
    arguments = ["frontier", "--tasks", "digits", "--methods", "momentum-sam", "--seeds", "0", "--label-noise", "0"]
    arguments += ["--epochs", "1", "--train-size", "128", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert len(read_rows(tmp_path / "runs.jsonl")) == 4
    assert "the same command goes on after the last finished run" in capsys.readouterr().out
    assert main(arguments) == 0
    assert len(read_rows(tmp_path / "runs.jsonl")) == 8 and len(calls) == 5 + 4


def test_costs_are_interleaved_and_relative_to_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []
    pace = {"sgd:lr=0.01": 1.0, "sam:rho=0.1": 2.0, "momentum-sam:rho=0.1": 1.5}

    def step(self, inputs, labels):
        order.append(self.choice.label)
        self.step_seconds.append(pace[self.choice.label] * ((len(order) - 1) // 9 + 1))  # the machine slows down
        return torch.zeros(())

    monkeypatch.setattr(Run, "_step", step)
    monkeypatch.setattr("torch.optim.lr_scheduler.CosineAnnealingLR.step", lambda self: None)
    choices = [METHODS[name].choice(DIGITS, 0.01, value) for name, value in
               (("base", 0.01), ("sam", 0.1), ("momentum-sam", 0.1))]  # fmt: skip
    costs = measure("digits", choices, steps=3, repetitions=4)
    assert {cost.method: cost.ratio for cost in costs} == pytest.approx({"base": 1, "sam": 2, "momentum-sam": 1.5})
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == 5 * 3 and all(len(set(turn)) == 3 for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3  # every method comes first in turn
    write_costs(tmp_path / "costs.jsonl", costs)
    assert read_costs(tmp_path / "costs.jsonl") == costs


def outcome(method: str, cost: float, *accuracies: float) -> Outcome:
    return Outcome(method, method, cost, dict(enumerate(accuracies)))


PLACE = Place(
    "digits",
    0.4,
    [
        outcome("base", 1.0, 0.80, 0.82, 0.81),
        outcome("momentum-sam", 1.04, 0.79, 0.80, 0.80),
        outcome("asam-last-quarter", 1.25, 0.84, 0.86, 0.853),
        outcome("sam", 2.0, 0.83, 0.90, 0.75),
        outcome("asam", 2.2, 0.99, 0.99, 0.99),
    ],
)


def test_the_best_affordable_method_is_named_only_where_it_surely_beats_the_base() -> None:
    cheap, quarter, half, double = (advise(PLACE, budget) for budget in (1.0, 1.25, 1.5, 2.0))
    assert cheap.best.method == "momentum-sam" and not cheap.is_better
    assert quarter.best.method == half.best.method == double.best.method == "asam-last-quarter"
    assert quarter.is_better
    gains = np.array([0.04, 0.04, 0.043])
    assert quarter.gain.mean == pytest.approx(gains.mean())
    for advice, candidates in ((quarter, 2), (double, 3)):
        interval = stats.t.interval(1 - 0.05 / candidates, 2, gains.mean(), stats.sem(gains))
        assert advice.gain.mean - advice.margin == pytest.approx(interval[0])
    assert advise(Place("digits", 0.4, PLACE.outcomes[:1]), 2.0).best is None


def test_one_seed_proves_nothing() -> None:
    one = Place("digits", 0.4, [outcome("base", 1.0, 0.1), outcome("sam", 2.0, 0.9)])
    assert math.isnan(half_width(Estimate(0.8, math.nan, 1)))
    assert not advise(one, 2.0).is_better


def test_the_gain_is_paired_by_seed() -> None:
    base = Outcome("base", "base", 1.0, {0: 0.5, 1: 0.7})
    won = gain(Outcome("sam", "sam", 2.0, {1: 0.8, 2: 0.9}), base)
    assert (won.n, won.mean) == (1, pytest.approx(0.1))


def test_the_mean_over_places_is_seed_by_seed_over_methods_that_all_have() -> None:
    other = Place("digits_vit", 0.0, [outcome("base", 1.0, 0.5, 0.5, 0.5), outcome("sam", 1.8, 0.6, 0.4, 0.6)])
    mean = overall([PLACE, other])
    assert [outcome.method for outcome in mean.outcomes] == ["base", "sam"]
    assert mean.outcomes[1].cost == pytest.approx(1.9)
    assert mean.outcomes[1].accuracies == pytest.approx({0: 0.715, 1: 0.65, 2: 0.675})


def test_places_take_test_rows_of_known_cost_and_tables_show_them() -> None:
    def row(label: str, seed: int, accuracy: float, evaluated_on: str = "test") -> Row:
        return Row(
            "digits", label, "sgd", seed, 0.4, evaluated_on, {}, {}, {"accuracy": accuracy}, {}, [],
            dict.fromkeys(("device", "threads", "dtype", "torch", "python", "samopt", "commit"), "0"), "now",
        )  # fmt: skip

    def cost(method: str, ratio: float) -> Cost:
        return Cost("digits", method, ratio, ratio - 0.01, ratio + 0.01, 3.0, 20, 11, {})

    rows = [
        row("sam:rho=0.1", 1000, 1.0, "validation"),
        *(row("sam:rho=0.1", seed, value) for seed, value in ((0, 0.90), (1, 0.94))),
        *(row("sgd:lr=0.03", seed, value) for seed, value in ((0, 0.80), (1, 0.838))),
        row("asam:rho=0.3", 0, 1.0),
    ]
    costs = [cost("base", 1.0), cost("sam", 1.97)]
    (place,) = places(rows, costs)
    assert [(o.label, o.cost, dict(o.accuracies)) for o in place.outcomes] == [
        ("sgd:lr=0.03", 1.0, {0: 0.80, 1: 0.838}),
        ("sam:rho=0.1", 1.97, {0: 0.90, 1: 0.94}),
    ]
    text = markdown([place], rows, costs)
    assert "| digits, 40% random labels (81.9 ± 2.7) | 1x | the base | nothing else is this cheap |  |" in text
    margin = float(stats.t.isf(0.025, 1)) * statistics.stdev((0.1, 0.102)) / math.sqrt(2)
    interval = f"+10.1 [{100 * (0.101 - margin):+.1f}, {100 * (0.101 + margin):+.1f}]"
    assert f"| 2x | sam:rho=0.1 | {interval} | 1.97x |" in text
    assert f"| sam:rho=0.1 | SAM, two passes | 2 | 1.97 (1.96 to 1.98) | 92.0 ± 2.8 | {interval} |" in text


def test_the_quick_form_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "frontier", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "runs.jsonl")
    assert [row.task for row in rows] == ["digits"] * 4 + ["digits_vit"] * 4
    costs = read_costs(tmp_path / "costs.jsonl")
    assert {cost.method for cost in costs} == {"base", "asam", "momentum-asam", "asam-every-2"}
    assert all(cost.ratio == 1.0 for cost in costs if cost.method == "base")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| digits") == 2 * 4 and table.count("\n| mean over all (") == 4
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "base,samm"), "unknown method 'samm'; did you mean 'sam'?"),
        (("--tasks", "digits,digits"), "a task is given twice in 'digits,digits'"),
    ],
)
def test_mistakes_are_explained(arguments, message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["frontier", *arguments]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
