"""The frontier: its grid, its choices, its costs, its advice, and the whole command."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import samopt
from benchmarks.harness import cost, frontier
from benchmarks.harness.cli import main
from benchmarks.harness.cost import Cost
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frontier import ARENAS, BASE, Outcome, Scene, advise, gain_of, is_chosen, overall, scenes
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import Experiment, Run
from benchmarks.harness.tuning import TUNING_SEED, Method, Place, compare, thin
from benchmarks.studies.frontier import METHODS

PLACE = Place("digits", "sgd", (0.01, 0.03, 0.1), label_noise=0.4)
SAM = METHODS["sam"]


def test_every_method_has_as_many_trials_over_the_same_relative_grid():
    for arena in ARENAS.values():
        assert [choice.settings["lr"] for choice in arena.place.candidates(BASE, 0.0)] == list(
            arena.place.learning_rates
        )
        for method in METHODS.values():
            if method.variant is not None and arena.place.base in method.bases:
                choices = arena.place.candidates(method, 0.002)
                values = [choice.settings[method.setting] for choice in choices]
                assert [value / values[1] for value in values] == pytest.approx([0.3, 1.0, 3.0])
                assert {choice.settings["lr"] for choice in choices} == {0.002}


def test_with_joint_choices_base_and_methods_have_equally_many_trials():
    rates = tuple(float(rate) for rate in np.logspace(-4, -2, 9))
    place = Place("digits", "adamw", rates, joint=True)
    base, choices = place.candidates(BASE, 0.0), place.candidates(SAM, 0.0)
    assert len(base) == len(choices) == 9
    assert sorted({choice.settings["lr"] for choice in choices}) == [rates[1], rates[4], rates[7]] == thin(rates, 3)
    assert choices[0].label == f"sam:lr={rates[1]:g}:rho=0.03"


@pytest.mark.parametrize(
    ("name", "arena"),
    [(name, arena) for name in METHODS for arena in ARENAS.values() if arena.place.base in METHODS[name].bases],
    ids=lambda value: value if isinstance(value, str) else value.place.task,
)
def test_every_method_builds_around_its_base_and_steps(name, arena):
    choice = arena.place.candidates(METHODS[name], 0.002)[0]
    model = TASKS[arena.place.task].build_model()
    optimizer = choice.build(model)
    aware = isinstance(optimizer, samopt.SharpnessAwareOptimizer)
    base = optimizer.base_optimizer if aware else optimizer
    assert isinstance(base, torch.optim.SGD if arena.place.base == "sgd" else torch.optim.AdamW)
    assert aware == (METHODS[name].variant is not None)
    if aware:
        assert base.param_groups[0]["lr"] == 0.002
    size = 28 if arena.place.task.startswith("fashion") else 8
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.rand(4, 1, size, size)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(*[closure] * (2 if "ascent_part" in choice.schedule else 1))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_first_pass_may_be_of_part_of_each_batch():
    task, choice = TASKS["digits"], PLACE.candidates(METHODS["asam-quarter"], 0.01)[0]
    experiment = Experiment(task, [], 0, 0.0, 1, 16, train_size=32)
    run = Run(experiment, choice, experiment.split())
    sizes = []
    run.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert len(list(run.steps())) == 2
    assert sizes == [4, 16, 4, 16]


def compared(folder, make_row, score, *, seeds=(0, 1), methods=(BASE, SAM), tune=True):
    """Run a comparison whose runs are made up, and return its log and the runs that were made."""
    log, made = open_log(folder), []

    def train(place, choice, seed, evaluate_on):
        made.append((choice.label, seed, evaluate_on))
        accuracy = score(choice.label) if evaluate_on == "validation" else 0.5
        return make_row(
            choice.label, seed, place.label_noise, accuracy=accuracy, evaluated_on=evaluate_on, settings=choice.settings
        )

    compare(log, [PLACE], methods, seeds, train, settings=lambda place, choice: choice.settings, tune=tune)
    return log, made


def test_settings_are_chosen_on_validation_data_alone(tmp_path, make_row):
    best = {"sgd:lr=0.01": 0.8, "sgd:lr=0.1": 0.9, "sam:rho=0.03": 0.7, "sam:rho=0.1": 0.7}
    log, made = compared(tmp_path, make_row, lambda label: best.get(label, float("nan")))
    tuning = [row for row in log.rows if row.evaluated_on == "validation"]
    assert len(tuning) == 6 and {row.seed for row in tuning} == {TUNING_SEED}
    chosen = ["sgd:lr=0.1", "sam:rho=0.03"]  # the first of equals; a run that diverged is never chosen
    assert [(label, seed) for label, seed, kind in made if kind == "test"] == [(n, s) for s in (0, 1) for n in chosen]
    assert all(row.settings["lr"] == 0.1 for row in log.rows if row.optimizer.startswith("sam"))


def test_no_run_is_repeated_and_methods_may_join(tmp_path, make_row):
    log, made = compared(tmp_path, make_row, len, tune=False)
    assert [label for label, *_ in made] == ["sgd:lr=0.03", "sam:rho=0.1"] * 2
    assert compared(tmp_path, make_row, len, tune=False)[1] == []
    lines = log.path.read_text(encoding="utf-8").splitlines(keepends=True)
    log.path.write_text("".join(lines[:3]), encoding="utf-8")
    assert compared(tmp_path, make_row, len, tune=False)[1] == [("sam:rho=0.1", 1, "test")]
    _, joined = compared(tmp_path, make_row, len, methods=(BASE, SAM, METHODS["gsam"]), tune=False)
    assert joined == [("gsam:rho=0.1", 0, "test"), ("gsam:rho=0.1", 1, "test")]


def test_costs_are_interleaved_and_relative_to_the_base(monkeypatch, tmp_path):
    order, pace = [], {"sgd:lr=0.01": 1.0, "sam:rho=0.1": 2.0, "gsam:rho=0.1": 1.5}

    def step(self, inputs, labels):
        order.append(self.choice.label)
        self.step_seconds.append(pace[self.choice.label] * ((len(order) - 1) // 9 + 1))  # the machine slows down
        return torch.zeros(())

    monkeypatch.setattr(Run, "_step", step)
    monkeypatch.setattr("torch.optim.lr_scheduler.CosineAnnealingLR.step", lambda self: None)
    choices = [PLACE.candidates(BASE, 0.0)[0], *(PLACE.candidates(METHODS[n], 0.01)[1] for n in ("sam", "gsam"))]
    costs = cost.measure("digits", choices, steps=3, repetitions=4)
    assert {each.method: each.ratio for each in costs} == pytest.approx({"base": 1, "sam": 2, "gsam": 1.5})
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == 5 * 3 and all(len(set(turn)) == 3 for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3  # every method comes first in turn


def outcome(method, cost, *accuracies):
    return Outcome(method, method, cost, dict(enumerate(accuracies)))


SCENE = Scene(
    "digits, 40% random labels",
    "digits",
    [
        outcome("base", 1.0, 0.80, 0.82, 0.81),
        outcome("momentum-ahead", 1.04, 0.79, 0.80, 0.80),
        outcome("asam-last-quarter", 1.25, 0.84, 0.86, 0.853),
        outcome("sam", 2.0, 0.83, 0.90, 0.75),
        outcome("asam", 2.2, 0.99, 0.99, 0.99),
    ],
)


def test_the_best_affordable_method_is_named_with_an_interval_widened_for_the_choice():
    chosen = [advise(SCENE, budget) for budget in (1.0, 1.25, 1.5, 2.0)]
    assert [best.method for best, *_ in chosen] == ["momentum-ahead", *["asam-last-quarter"] * 3]
    gains = np.array([0.04, 0.04, 0.043])
    for (_, won, picked_from), candidates in zip(chosen[1:], (2, 2, 3), strict=True):
        low, _ = stats.t.interval(1 - 0.05 / candidates, 2, gains.mean(), stats.sem(gains))
        assert picked_from == candidates
        assert won.mean - won.half_width(picked_from) == pytest.approx(low)
    assert frontier._advice(SCENE, 1.25)[0] == "asam-last-quarter"
    assert frontier._advice(SCENE, 1.0)[0] == "the base", "its interval holds 0"
    assert advise(replace(SCENE, outcomes=SCENE.outcomes[:1]), 2.0) == (None, None, 0)
    one = Scene("", "", [outcome("base", 1.0, 0.1), outcome("sam", 2.0, 0.9)])
    assert frontier._advice(one, 2.0)[0] == "the base", "one seed shows nothing"


def test_the_picture_names_what_no_cheaper_method_equals():
    names = [each.method for each in SCENE.outcomes if is_chosen(each, SCENE)]
    assert names == ["base", "asam-last-quarter", "asam"]


def test_gains_are_paired_and_the_mean_over_scenes_is_seed_by_seed():
    won = gain_of(Outcome("sam", "sam", 2.0, {1: 0.8, 2: 0.9}), Outcome("base", "base", 1.0, {0: 0.5, 1: 0.7}))
    assert (won.n, won.mean) == (1, pytest.approx(0.1))
    other = Scene("", "digits_vit", [outcome("base", 1.0, 0.5, 0.5, 0.5), outcome("sam", 1.8, 0.6, 0.4, 0.6)])
    mean = overall([SCENE, other])
    assert [each.method for each in mean.outcomes] == ["base", "sam"]
    assert mean.outcomes[1].cost == pytest.approx(1.9)
    assert mean.outcomes[1].accuracies == pytest.approx({0: 0.715, 1: 0.65, 2: 0.675})


def test_scenes_take_test_rows_and_rename_what_had_another_name(make_row):
    rows = [
        make_row("momentum-sam:rho=0.1", 1000, 0.4, accuracy=1.0, evaluated_on="validation"),
        *(make_row("momentum-sam:rho=0.1", seed, 0.4, accuracy=value) for seed, value in ((0, 0.90), (1, 0.94))),
        *(make_row("sgd:lr=0.03", seed, 0.4, accuracy=value) for seed, value in ((0, 0.80), (1, 0.838))),
    ]
    costs = [Cost("digits", name, ratio, ratio, ratio, 3.0, 20, 7, {}) for name, ratio in
             (("base", 1.0), ("momentum-sam", 1.2))]  # fmt: skip
    (scene,) = scenes(rows, costs)
    assert [(each.method, each.label, each.cost, dict(each.accuracies)) for each in scene.outcomes] == [
        ("base", "sgd:lr=0.03", 1.0, {0: 0.80, 1: 0.838}),
        ("momentum-uphill", "momentum-uphill:rho=0.1", 1.2, {0: 0.90, 1: 0.94}),
    ]


def test_the_quick_form_of_the_command(tmp_path, capsys):
    assert main(["frontier", "--quick", "--output", str(tmp_path)]) == 0
    assert [row.task for row in Log(tmp_path / "runs.jsonl").rows] == ["digits"] * 4 + ["digits_vit"] * 4
    costs = Log(tmp_path / "costs.jsonl", Cost).rows
    assert {each.method for each in costs} == {"base", "asam", "momentum-uphill-asam", "asam-every-2"}
    assert all(each.ratio == 1.0 for each in costs if each.method == "base")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| digits") == 2 * 4 and table.count("\n| mean over all (") == 4
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    small = ["frontier", "--tasks", "digits", "--methods", "sam", "--seeds", "0", "--label-noise", "0.4"]
    assert main([*small, "--epochs", "2", "--output", str(tmp_path)]) == 2
    assert "(epochs, training examples) = (1, None), and (2, None) is asked for" in capsys.readouterr().err


def test_real_rows_are_found_again(tmp_path, monkeypatch):
    arguments = ["frontier", "--tasks", "digits", "--methods", "wsam-coupled,base-twice,sam-every-2", "--seeds", "0"]
    arguments += ["--label-noise", "0", "--epochs", "1", "--train-size", "128", "--output", str(tmp_path)]
    monkeypatch.setattr(frontier, "measure", lambda task, choices, data, **how: [
        Cost(task, "base" if index == 0 else name, 1.0, 1.0, 1.0, 1.0, 1, 1, {})
        for index, name in enumerate(choice.label.partition(":")[0] for choice in choices)
    ])  # fmt: skip
    assert main(arguments) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    assert len(rows) == 4 * 3 + 4
    monkeypatch.setattr(frontier, "run_experiment", pytest.fail)
    assert main(arguments) == 0
    assert Log(tmp_path / "runs.jsonl").rows == rows


def test_a_folder_of_images_serves_the_tasks_that_need_one(fashion_folder, monkeypatch):
    monkeypatch.setattr(frontier, "measure", lambda task, choices, data, **how: [
        Cost(task, name, 1.0, 1.0, 1.0, 1.0, 1, 1, {}) for name in ("base", "sam")
    ])  # fmt: skip
    output = fashion_folder / "out"
    arguments = [
        "frontier",
        "--tasks",
        "digits,fashion_small",
        "--methods",
        "sam",
        "--seeds",
        "0",
        "--label-noise",
        "0",
    ]
    arguments += ["--epochs", "1", "--train-size", "64", "--data", str(fashion_folder), "--output", str(output)]
    assert main(arguments) == 0
    tested = [row for row in Log(output / "runs.jsonl").rows if row.evaluated_on == "test"]
    assert [(row.task, row.examples["train"]) for row in tested] == [
        ("digits", 64), ("digits", 64), ("fashion_small", 64), ("fashion_small", 64)
    ]  # fmt: skip


def test_other_methods_are_refused_by_name():
    with pytest.raises(BenchmarkError, match="cannot be made"):
        Place("digits", "sgd", (0.1,)).candidates(Method("x", "", "sam", (-1.0,)), 0.1)[0].build(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_longer_runs_ten_times_the_frontiers_epochs_in_its_quick_form(tmp_path):
    assert main(["longer", "--quick", "--output", str(tmp_path)]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    names = ["adamw", "base-twice", "looksam", "looksam-layers"]
    assert [row.optimizer.partition(":")[0] for row in rows] == names
    assert [row.settings["epochs"] for row in rows] == [1, 2, 1, 1]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    (cost,) = [
        line.split(" | ")[3] for line in table.splitlines() if line.startswith("| base-twice:lr=0.003 | the base")
    ]
    assert float(cost.split()[0]) == pytest.approx(2.0, rel=0.2)
