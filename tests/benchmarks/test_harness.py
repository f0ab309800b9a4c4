"""The harness: what is held equal between optimizers, what is measured, what is kept."""

import gzip
import json
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

import samopt
from benchmarks.harness import environment, tasks
from benchmarks.harness.data import Pool, make_split, randomise_labels
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import parse_choice, parse_choices
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.statistics import base_runs, estimate, gain, panels
from benchmarks.harness.tasks import TASKS, read_idx
from benchmarks.harness.training import Experiment, Run, build_model, epoch_order, one_step_sharpness, run_experiment
from tests.benchmarks.conftest import idx_bytes
from tests.helpers.pages import REPOSITORY


@pytest.fixture(scope="module")
def digits():
    return TASKS["digits"].load(None)


def split_of(digits, seed=0, **options):
    return make_split(digits, seed, classes=10, **options)


def make_run(split, optimizer="sgd", seed=0, epochs=1, batch_size=64):
    return Run(Experiment(TASKS["digits"], [], seed, 0.0, epochs, batch_size), parse_choice(optimizer), split)


# The data

IMAGES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
@pytest.mark.parametrize("array", [IMAGES, np.array([7, 255, 0]), np.zeros((0, 28, 28))], ids=["3d", "1d", "empty"])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, array, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(array)))
    assert read_idx(path).dtype == np.uint8
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(IMAGES, magic=b"\x01\x02\x08\x03"), "not an IDX file: it starts with the bytes 01 02 08 03"),
        (idx_bytes(IMAGES, magic=b"\x00\x00\x07\x03"), "not an IDX file"),
        (b"", "not an IDX file: it starts with the bytes (none)"),
        (idx_bytes(IMAGES)[:-1], "truncated: expected 40 bytes for sizes [2, 3, 4], found 39"),
        (idx_bytes(IMAGES)[:6], "truncated"),
        (idx_bytes(IMAGES) + b"\0", "too long"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:-9], "cannot be read"),
    ],
    ids=["magic", "type", "empty", "a byte short", "header cut", "a byte long", "gzip cut"],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=re.escape(message)) as error:
        read_idx(path)
    assert str(path) in str(error.value) and "get the file again" in str(error.value)


def test_fashion_mnist_is_read_from_a_folder(fashion_folder):
    pool = TASKS["fashion_mnist"].load(fashion_folder)
    assert (pool.inputs.shape, pool.test_inputs.shape) == ((200, 1, 28, 28), (50, 1, 28, 28))
    assert (pool.inputs.min(), pool.inputs.max()) == (0.0, 1.0)
    assert pool.labels.tolist() == [i % 10 for i in range(200)]
    assert TASKS["fashion_mnist"].build_model()(pool.inputs[:2]).shape == (2, 10)


def test_fashion_mnist_says_what_is_missing_and_how_to_get_it(fashion_folder, monkeypatch):
    def message(data):
        tasks.load_fashion.cache_clear()
        with pytest.raises(BenchmarkError, match="apt-get install dataset-fashion-mnist") as error:
            TASKS["fashion_mnist"].load(data)
        return str(error.value)

    (fashion_folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(19)))
    assert "found shapes [50, 28, 28] and [19]" in message(fashion_folder)
    (fashion_folder / "t10k-labels-idx1-ubyte").unlink()
    assert "misses t10k-labels-idx1-ubyte (or with .gz)" in message(fashion_folder)
    assert "found no such folder" in message(fashion_folder / "none")
    assert "a file, not a folder" in message(fashion_folder / "train-labels-idx1-ubyte")
    (fashion_folder / "empty").mkdir()
    assert "found an empty folder" in message(fashion_folder / "empty")
    monkeypatch.setattr(tasks, "DEBIAN_FOLDER", fashion_folder / "nowhere")
    assert "nowhere; found no such folder" in message(None)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.999])
def test_exactly_that_fraction_of_labels_is_drawn_uniformly(fraction):
    labels = torch.full((5000,), 3)
    noisy, count = randomise_labels(labels, fraction, 10, seed=1)
    assert count == round(fraction * 5000)
    assert torch.equal(labels, torch.full((5000,), 3)), "the argument is not changed"
    changed = int((noisy != labels).sum())
    assert changed <= count
    assert abs(changed - 0.9 * count) <= 4 * math.sqrt(0.09 * max(count, 1))  # a tenth is right by chance
    assert torch.equal(noisy, randomise_labels(labels, fraction, 10, seed=1)[0])
    more = randomise_labels(labels, 0.9999, 10, seed=1)[0]
    assert torch.equal(noisy[noisy != labels], more[noisy != labels]), "more noise keeps what less noise changed"


def test_noise_touches_training_labels_only(digits):
    clean, noisy = split_of(digits), split_of(digits, label_noise=0.4)
    assert torch.equal(clean.labels, clean.clean_labels)
    assert (clean.randomised, noisy.randomised) == (0, round(0.4 * 1437))
    assert not torch.equal(noisy.labels, noisy.clean_labels)
    for name in ("inputs", "clean_labels", "test_inputs", "test_labels"):
        assert torch.equal(getattr(clean, name), getattr(noisy, name)), name


def test_the_split_is_stratified_disjoint_and_decided_by_the_seed():
    labels = torch.arange(10).repeat_interleave(50)
    pool = Pool(torch.arange(500.0), labels)
    test, again, other = split_of(pool), split_of(pool), split_of(pool, seed=1)
    assert test.test_labels.bincount().tolist() == [10] * 10
    assert sorted([*test.inputs.tolist(), *test.test_inputs.tolist()]) == pool.inputs.tolist()
    assert torch.equal(test.inputs, again.inputs) and not torch.equal(test.inputs, other.inputs)
    assert torch.equal(labels[test.inputs.long()], test.labels)
    validation = split_of(pool, evaluate_on="validation", train_size=100)
    assert validation.labels.bincount().tolist() == [10] * 10
    assert not set(validation.test_inputs.tolist()) & set(test.test_inputs.tolist()), "settings never see the test set"
    assert not set(validation.test_inputs.tolist()) & set(validation.inputs.tolist())


def test_a_data_sets_own_test_set_is_kept():
    pool = Pool(torch.arange(500.0), torch.arange(10).repeat(50), torch.tensor([-1.0, -2.0]), torch.tensor([4, 5]))
    split = split_of(pool, train_size=500)
    assert (split.test_inputs.tolist(), len(split.labels)) == ([-1.0, -2.0], 500)
    with pytest.raises(BenchmarkError, match=r"--train-size must be between 10 .* and 500 .* got 501"):
        split_of(pool, train_size=501)


# Optimizers by name


def test_every_name_of_the_package_is_an_optimizer_around_both_bases():
    for name in samopt.available():
        bases = [("", torch.optim.SGD), ("sgd+", torch.optim.SGD), ("adamw+", torch.optim.AdamW)]
        for prefix, kind in bases[2:] if name == "preconditioned-sam" else bases:  # SGD has no second moment
            choice = parse_choice(f"{prefix}{name}:lr=0.0125")
            optimizer = choice.build(TASKS["digits"].build_model())
            assert isinstance(optimizer, samopt.SharpnessAwareOptimizer)
            assert isinstance(optimizer.base_optimizer, kind)
            assert optimizer.param_groups[0]["lr"] == choice.settings["lr"] == 0.0125


def test_settings_reach_the_optimizer_and_defaults_are_kept():
    choice = parse_choice("adamw+asam:rho=0.3:weight_decay=0.1:rho_warmup=0.5")
    group = choice.build(torch.nn.Linear(3, 2)).param_groups[0]
    assert (group["rho"], group["weight_decay"], group["lr"]) == (0.3, 0.1, 1e-3)
    assert choice.settings == {"lr": 1e-3, "weight_decay": 0.1, "rho": 0.3, "eta": 0.01, "rho_warmup": 0.5}
    assert parse_choice("sam").settings["rho"] == 0.05
    assert parse_choice("sam:only=norm").settings["only"] == "norm"
    with pytest.raises(BenchmarkError, match="no valid regular expression"):
        parse_choice("sam:only=(")
    assert parse_choice("sgd").settings == {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}


def test_a_class_of_the_users_own_is_compared(tmp_path, monkeypatch):
    (tmp_path / "users_variant.py").write_text("import samopt\nclass MySAM(samopt.SAM): pass\n")
    monkeypatch.chdir(tmp_path)
    choice = parse_choice("users_variant:MySAM:rho=0.25")
    optimizer = choice.build(torch.nn.Linear(3, 2))
    assert (type(optimizer).__name__, optimizer.param_groups[0]["rho"]) == ("MySAM", 0.25)
    assert (choice.base, choice.label) == ("sgd", "users_variant:MySAM:rho=0.25")
    with pytest.raises(BenchmarkError, match="users_variant:Other cannot be imported"):
        parse_choice("users_variant:Other")


# Training and measuring


def by_hand(split, epochs, optimizer_of):
    """The weights after a plain loop, and the losses of each epoch."""
    model = build_model(TASKS["digits"].build_model, seed=0)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (1437 // 64))
    losses = []
    for epoch in range(epochs):
        model.train()
        order, of_epoch = epoch_order(1437, seed=0, epoch=epoch), []
        for step in range(1437 // 64):
            batch = order[64 * step : 64 * step + 64]

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(split.inputs[batch]), split.labels[batch])
                loss.backward()
                return loss

            of_epoch.append(optimizer.step(closure).item())
            scheduler.step()
        losses.append(of_epoch)
    return model.eval(), losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("name", ["sgd", "sam"])
def test_epochs_equal_a_loop_by_hand_bit_for_bit(digits, name):
    split = split_of(digits, label_noise=0.4)
    run = make_run(split, name, epochs=2)
    for _ in range(2):
        run.train_epoch()
    model, losses = by_hand(
        split, 2, sgd if name == "sgd" else lambda model: samopt.SAM(sgd(model), rho=0.05, model=model)
    )
    for ours, theirs in zip(run.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert run.curves["train_loss"] == [sum(epoch) / len(epoch) for epoch in losses]
    with torch.no_grad():
        right = model(split.test_inputs).argmax(1) == split.test_labels
    assert run.curves["accuracy"][-1] == float(right.double().mean())
    assert len(run.step_seconds) == 2 * (1437 // 64)


def test_an_optimizer_with_backward_is_stepped_in_the_documented_form():
    """The loop of samopt 1.0: clear the gradients, ``backward`` the function of the loss, step."""
    weight, calls = torch.nn.Parameter(torch.tensor([2.0])), []

    class New(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append("zero_grad")
            super().zero_grad(set_to_none)

        def backward(self, compute_loss):
            calls.append("backward")
            loss = compute_loss()
            loss.backward()
            return loss

        def step(self, closure=None):
            calls.append("step")
            assert closure is None
            return super().step()

    loss = take_step(New([weight], lr=0.5), lambda: weight.square().sum())
    assert calls == ["zero_grad", "backward", "step"]
    assert (loss.item(), loss.requires_grad, weight.item()) == (4.0, False, 0.0)


def test_a_published_row_comes_out_again(digits):
    """The first row of the published frontier, trained again, has the same accuracy and losses."""
    text = (REPOSITORY / "docs" / "results" / "frontier" / "runs.jsonl").read_text(encoding="utf-8")
    published = json.loads(text.partition("\n")[0])
    experiment = Experiment(
        TASKS["digits"], [parse_choice(published["optimizer"])], published["seed"], 0.0, 20, 64,
        evaluate_on="validation", curves=False,
    )  # fmt: skip
    ((row, _),) = run_experiment(experiment)
    assert row.metrics["accuracy"] == pytest.approx(published["metrics"]["accuracy"], abs=0.01)
    assert row.curves["train_loss"] == pytest.approx(published["curves"]["train_loss"], rel=0.05)
    assert row.settings == published["settings"]


def test_runs_repeat_and_depend_on_no_other_run_nor_on_the_global_random_state():
    def measured(*optimizers):
        experiment = Experiment(TASKS["digits"], parse_choices(list(optimizers)), 0, 0.4, 2, 64, train_size=256)
        rows = [row for row, _ in run_experiment(experiment)]
        return {row.optimizer: (row.curves, row.metrics["accuracy"]) for row in rows}

    before = torch.get_rng_state()
    together = measured("sgd", "sam", "asam", "adamw", "adamw+sam")
    assert torch.equal(torch.get_rng_state(), before), "the caller's random stream is left alone"
    torch.manual_seed(99)
    assert measured("sam") == {"sam": together["sam"]}
    assert measured("adamw+sam", "sgd") == {name: together[name] for name in ("adamw+sam", "sgd")}
    assert len({str(curves) for curves, _ in together.values()}) == 5, "the optimizers differ"


def test_every_optimizer_starts_from_the_same_weights(digits):
    split = split_of(digits, train_size=256)
    models = [make_run(split, name).model.state_dict().values() for name in ("sgd", "asam", "adamw")]
    for weights in zip(*models, strict=True):
        assert all(torch.equal(weights[0], other) for other in weights)
    other_seed = make_run(split, seed=1).model.state_dict().values()
    assert not all(torch.equal(a, b) for a, b in zip(models[0], other_seed, strict=True))


def test_rho_warms_up_and_the_learning_rate_falls(digits):
    run = make_run(split_of(digits, train_size=256), "sam:rho=0.4:rho_warmup=0.5", epochs=2)
    group = run.optimizer.param_groups[0]
    radii = [group["rho"]]
    for _ in range(2):
        run.train_epoch()
        radii.append(group["rho"])
    assert radii == [0.0, 0.4, 0.4]
    assert abs(group["lr"]) < 1e-12


@pytest.mark.parametrize(
    ("schedule", "steps", "perturbed"),
    [
        ("", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (":rho_from=0.5", 8, [4, 5, 6, 7]),
        (":rho_from=0.75", 8, [6, 7]),
        (":rho_every=2", 6, [0, 2, 4]),
        (":rho_every=4", 9, [0, 4, 8]),
    ],
)
def test_schedules_perturb_in_these_steps_only(digits, schedule, steps, perturbed):
    run = make_run(split_of(digits, train_size=steps * 16), f"asam{schedule}", batch_size=16)
    forwards = []
    run.model.register_forward_hook(lambda *_: forwards.append(len(run.step_seconds)))
    assert len(list(run.steps())) == steps
    assert [step for step in range(steps) if forwards.count(step) == 2] == perturbed
    assert len(forwards) == steps + len(perturbed)


def test_warnings_during_training_are_kept_once(digits, monkeypatch):
    run = make_run(split_of(digits, train_size=256), epochs=2)
    monkeypatch.setattr(Run, "steps", lambda self: [warnings.warn("stuck", stacklevel=1) or torch.tensor(1.0)])
    run.train_epoch()
    run.train_epoch()
    assert run.warnings == ["stuck"]


def test_sharpness_is_the_rise_after_one_ascent_step_and_leaves_the_model_alone(digits):
    split = split_of(digits)
    run = make_run(split)
    run.train_epoch()
    run.model.train()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    batches = [(split.inputs[i : i + 64], split.labels[i : i + 64]) for i in (0, 64)]
    measured = one_step_sharpness(run.model, batches, rho=0.05)
    assert run.model.training
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())

    model = TASKS["digits"].build_model().double()
    model.load_state_dict(before)
    model.double().eval()
    rises = []
    for inputs, labels in batches:

        def loss_at(parameters, inputs=inputs, labels=labels):
            state = parameters | dict(model.named_buffers())
            return functional.cross_entropy(torch.func.functional_call(model, state, inputs.double()), labels)

        weights = {name: value.detach() for name, value in model.named_parameters()}
        gradient, loss = torch.func.grad_and_value(loss_at)(weights)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
        rises.append(loss_at({name: w + 0.05 * gradient[name] / norm for name, w in weights.items()}) - loss)
    assert measured == pytest.approx(float(sum(rises) / 2), rel=1e-3)
    torch.nn.init.constant_(run.model[-1].weight, math.inf)
    assert math.isnan(one_step_sharpness(run.model, batches, rho=0.05)), "a diverged model has no sharpness"


# Rows and statistics


def test_rows_survive_the_file_and_half_a_line_is_dropped(tmp_path, make_row):
    log = open_log(tmp_path)
    rows = [make_row(seed=0, warnings=["ü"]), make_row(seed=1, accuracy=1 / 3)]
    for row in rows:
        log.add(row)
    assert Log(log.path).rows == rows
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"task": "dig')  # the process was killed
    again = open_log(tmp_path)
    assert again.rows == rows
    again.add(make_row(seed=2))
    assert [row.seed for row in Log(log.path).rows] == [0, 1, 2]
    assert open_log(tmp_path, restart=True).rows == []


def test_a_diverged_run_is_strict_json_and_comes_back_as_nan(tmp_path, make_row):
    diverged = make_row()
    diverged.metrics["train_loss"] = diverged.curves["train_loss"][1] = math.inf
    log = open_log(tmp_path)
    log.add(diverged)
    parsed = json.loads(log.path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert parsed["metrics"]["train_loss"] is None
    (read,) = Log(log.path).rows
    assert math.isnan(read.metrics["train_loss"]) and math.isnan(read.curves["train_loss"][1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no runs"),
        ("not json\n", "line 1 of .* is no row"),
        ("\n[1]\n", "line 2 of .* expected an object"),
        ('{"schema": 2}\n', "expected schema 1"),
        ('{"schema": 1, "task": "digits"}\n', "missing or unknown: base, curves"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, content, message):
    path = tmp_path / "runs.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BenchmarkError, match=message):
        Log(path, must_exist=True)


def test_mean_spread_and_interval_agree_with_numpy_and_scipy():
    values = [0.1, 0.25, 0.7, 0.15]
    got = estimate(values)
    assert (got.mean, got.sd, got.n) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)), 4)
    for picked_from in (1, 3):
        low, high = stats.t.interval(1 - 0.05 / picked_from, 3, np.mean(values), stats.sem(values))
        assert got.mean + got.half_width(picked_from) == pytest.approx(high)
        assert got.interval("+.3f", 1, picked_from) == f"{np.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"
    assert math.isnan(estimate([0.5]).sd) and math.isnan(estimate([0.5]).half_width())
    assert math.isnan(estimate([0.5, math.nan]).mean)


def test_gains_are_paired_by_seed_with_the_base_of_the_same_settings(make_row):
    seconds = ((0, 0.5, 0.1), (1, 0.7, 0.2), (2, 0.6, 0.4))
    rows = [
        *(make_row("sgd", seed, accuracy=accuracy, seconds=time) for seed, accuracy, time in seconds),
        *(make_row("sam", seed, accuracy=a, seconds=s) for seed, a, s in ((2, 0.9, 0.8), (0, 0.6, 0.3))),
        make_row("adamw+sam", 0, base="adamw"),
        make_row("sam:lr=0.2", 0, settings=make_row().settings | {"lr": 0.2}),
    ]
    (panel,) = panels(rows)
    won = gain(panel.runs["sam"], base_runs("sam", panel))
    assert (won.n, won.mean, won.sd) == (2, pytest.approx(0.2), pytest.approx(np.std([0.3, 0.1], ddof=1)))
    cost = gain(panel.runs["sam"], base_runs("sam", panel), "seconds_per_step", lambda value, base: value / base)
    assert cost.mean == pytest.approx(2.5)
    assert base_runs("adamw+sam", panel) == base_runs("sam:lr=0.2", panel) == []
    assert gain(panel.runs["adamw+sam"], []) is None


def test_rows_that_must_not_be_averaged_or_compared_are_refused(make_row):
    other = make_row().settings | {"lr": 0.2}
    with pytest.raises(BenchmarkError, match="the runs of sgd on digits with label noise 0 cannot be averaged: .* lr;"):
        panels([make_row(seed=0), make_row(seed=1, settings=other)])
    with pytest.raises(BenchmarkError, match=r"cannot be compared: sgd \(seed 0\) and sam \(seed 0\) differ in train;"):
        panels([make_row(), make_row("sam", examples=make_row().examples | {"train": 99})])
    with pytest.raises(BenchmarkError, match="differ in epochs;"):
        panels([make_row(), make_row("sam", settings=other | {"epochs": 3})])
    with pytest.raises(BenchmarkError, match="seed 3 is there 2 times among the runs of sgd"):
        panels([make_row(seed=3), make_row(seed=3)])


def test_the_commit_is_that_of_this_code_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code = tmp_path / "benchmarks" / "__main__.py"
    code.parent.mkdir()
    code.write_text("", encoding="utf-8")
    assert environment.commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "other").write_text("", encoding="utf-8")
    git("add", "other")
    git("commit", "-m", "another project")
    assert environment.commit(tmp_path) == "unknown", "installed into an environment inside another checkout"
    git("add", ".")
    git("commit", "-m", "this one")
    assert re.fullmatch("[0-9a-f]{12}", environment.commit(tmp_path))
    code.write_text("changed", encoding="utf-8")
    assert re.fullmatch(r"[0-9a-f]{12}\+changes", environment.commit(tmp_path))


@pytest.mark.parametrize("package", ["docstring_parser", "jsonargparse", "matplotlib", "rich"])  # what cli.py imports
def test_a_missing_package_names_the_extra(package):
    code = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv = ['benchmarks', 'train']; "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert f'{package} is not installed; install them with: python -m pip install "samopt[bench]"' in done.stderr
    assert "Traceback" not in done.stderr
