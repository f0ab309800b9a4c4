"""The benchmarks: what is held equal between optimizers, what is measured, and what a person is told."""

import gzip
import json
import math
import os
import re
import struct
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional

from benchmarks import environment
from benchmarks.choice import parse_choice
from benchmarks.cli import main
from benchmarks.data import Pool, make_split, randomise_labels
from benchmarks.errors import BenchmarkError
from benchmarks.experiment import Experiment, run_experiment
from benchmarks.idx import read_idx
from benchmarks.registry import COMMANDS, OPTIMIZERS, TASKS
from benchmarks.rows import Row, append_row, read_rows
from benchmarks.sharpness import one_step_sharpness
from benchmarks.summary import estimate, panels, summarise
from benchmarks.table import markdown, terminal_table
from benchmarks.tasks import fashion_mnist
from benchmarks.training import Run, build_model, epoch_order
from tests.helpers.pages import REPOSITORY

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return TASKS["digits"].load(None)


def split_of(digits, seed=0, **options):
    return make_split(digits, seed, classes=10, **options)


def make_run(split, optimizer="sgd", seed=0, epochs=1):
    build = TASKS["digits"].build_model
    choice = parse_choice(optimizer)
    return Run(build, choice, split, seed, epochs=epochs, batch_size=64, sharpness_rho=0.05, device=CPU)


def experiment(optimizers, seeds=(0,), label_noise=(0.0,), epochs=1):
    return Experiment(
        task=TASKS["digits"],
        choices=[parse_choice(name) for name in optimizers],
        seeds=seeds,
        label_noise=label_noise,
        epochs=epochs,
        batch_size=64,
        train_size=256,
        data=None,
        evaluate_on="test",
        sharpness_rho=0.05,
        device=CPU,
    )


def row(optimizer="sgd", seed=0, label_noise=0.0, base="sgd", accuracy=0.5, seconds=0.25, **changes):
    values = {"accuracy": accuracy, "train_loss": 0.5, "sharpness": 0.125}
    return replace(
        Row(
            task="digits",
            optimizer=optimizer,
            base=base,
            seed=seed,
            label_noise=label_noise,
            evaluated_on="test",
            settings={"lr": 0.1, "epochs": 2, "batch_size": 64, "sharpness_rho": 0.05},
            examples={"train": 100, "randomised": round(100 * label_noise), "test": 50},
            metrics=values | {"seconds_per_step": seconds},
            curves={name: [value / 2, value] for name, value in values.items()},
            warnings=[],
            environment={"commit": "abc", "device": "a CPU", "threads": 1, "dtype": "float32"}
            | dict.fromkeys(("torch", "python", "samopt", "numpy"), "1.0"),
            timestamp="2026-01-01T00:00:00+00:00",
        ),
        **changes,
    )


# The data


def idx_bytes(array, magic=None):
    header = struct.pack(">HBB", 0, 0x08, array.ndim) if magic is None else magic
    return header + b"".join(struct.pack(">I", size) for size in array.shape) + array.astype(np.uint8).tobytes()


IMAGES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
@pytest.mark.parametrize("array", [IMAGES, np.array([7, 255, 0]), np.zeros((0, 28, 28))], ids=["3d", "1d", "empty"])
def test_idx_files_are_read_whatever_their_name(tmp_path, array, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(array)))
    read = read_idx(path)
    assert read.dtype == np.uint8
    assert np.array_equal(read, array)


def test_idx_integers_of_several_bytes_are_big_endian(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 0x0C, 1]) + struct.pack(">Iii", 2, 1, -2))
    assert read_idx(path).tolist() == [1, -2]


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
        (gzip.compress(idx_bytes(IMAGES), mtime=0)[:12] + b"\xff" * 30, "cannot be read"),
    ],
    ids=["magic", "type", "empty", "a byte short", "header cut", "a byte long", "gzip cut", "gzip damaged"],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=re.escape(message)) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "get the file again" in str(error.value)


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


def test_more_noise_randomises_the_same_labels_and_more():
    labels = torch.full((5000,), 3)
    little, much = (randomise_labels(labels, fraction, 10, seed=1)[0] for fraction in (0.2, 0.4))
    changed = little != labels
    assert torch.equal(little[changed], much[changed])
    assert not torch.equal(randomise_labels(labels, 0.4, 10, seed=2)[0], much)


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
    assert torch.equal(test.inputs, again.inputs)
    assert not torch.equal(test.inputs, other.inputs)
    assert torch.equal(labels[test.inputs.long()], test.labels)

    validation = split_of(pool, evaluate_on="validation", train_size=100)
    assert validation.labels.bincount().tolist() == [10] * 10
    assert not set(validation.test_inputs.tolist()) & set(test.test_inputs.tolist()), "settings never see the test set"
    assert not set(validation.test_inputs.tolist()) & set(validation.inputs.tolist())


def test_a_data_sets_own_test_set_is_kept():
    pool = Pool(torch.arange(500.0), torch.arange(10).repeat(50), torch.tensor([-1.0, -2.0]), torch.tensor([4, 5]))
    split = split_of(pool, train_size=500)
    assert split.test_inputs.tolist() == [-1.0, -2.0]
    assert len(split.labels) == 500
    with pytest.raises(BenchmarkError, match=r"--train-size must be between 10 .* and 500 .* got 501"):
        split_of(pool, train_size=501)


@pytest.fixture
def fashion_folder(tmp_path):
    """Fashion-MNIST in small: 60 training and 20 test images."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(count) % 10)))
    return tmp_path


def test_fashion_mnist_is_read_from_a_folder(fashion_folder):
    pool = TASKS["fashion_mnist"].load(str(fashion_folder))
    assert pool.inputs.shape == (60, 1, 28, 28)
    assert pool.test_inputs.shape == (20, 1, 28, 28)
    assert (pool.inputs.min(), pool.inputs.max()) == (0.0, 1.0)
    assert pool.labels.tolist() == [i % 10 for i in range(60)]
    assert TASKS["fashion_mnist"].build_model()(pool.inputs[:2]).shape == (2, 10)


def test_fashion_mnist_says_what_is_missing_and_how_to_get_it(fashion_folder, tmp_path, monkeypatch):
    def message(data):
        with pytest.raises(BenchmarkError) as error:
            TASKS["fashion_mnist"].load(data)
        assert "apt-get install dataset-fashion-mnist" in str(error.value)
        assert "--data hub" in str(error.value)
        return str(error.value)

    (fashion_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    text = message(str(fashion_folder))
    assert "of which t10k-labels-idx1-ubyte (or with .gz) is missing" in text
    assert "found t10k-images-idx3-ubyte, train-images-idx3-ubyte, train-labels-idx1-ubyte.gz" in text
    (fashion_folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(19)))
    assert "found shapes [20, 28, 28] and [19]" in message(str(fashion_folder))
    assert "found no such folder" in message(str(tmp_path / "none"))
    assert "a file, not a folder" in message(__file__)
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in message(str(tmp_path / "empty"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    assert "nowhere; found no such folder" in message(None)


def test_fashion_mnist_loads_through_the_hub_where_there_is_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BenchmarkError, match="pip install datasets"):
        TASKS["fashion_mnist"].load("hub")

    part = {"image": [np.full((28, 28), 255), np.zeros((28, 28))], "label": [9, 1]}
    hub = types.SimpleNamespace(
        load_dataset=lambda name: {"train": part, "test": part} if name == "fashion_mnist" else {}
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    pool = TASKS["fashion_mnist"].load("hub")
    assert pool.inputs.shape == (2, 1, 28, 28)
    assert pool.inputs[0].min() == 1.0
    assert pool.test_labels.tolist() == [9, 1]

    hub.load_dataset = lambda name: 1 / 0
    with pytest.raises(BenchmarkError, match=r"could not load fashion_mnist: ZeroDivisionError.*check the network"):
        TASKS["fashion_mnist"].load("hub")


# Training and measuring


def test_an_epoch_of_sgd_equals_a_stock_loop_bit_for_bit(digits):
    split = split_of(digits, label_noise=0.4)
    run = make_run(split, epochs=2)
    for _ in range(2):
        run.train_epoch()

    model = build_model(TASKS["digits"].build_model, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    steps = 2 * (1437 // 64)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for epoch in range(2):
        model.train()
        order = epoch_order(1437, seed=0, epoch=epoch)
        losses.append([])
        for step in range(1437 // 64):
            batch = order[64 * step : 64 * step + 64]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(split.inputs[batch]), split.labels[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses[-1].append(loss.item())
    model.eval()

    assert all(
        torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert run.curves.train_loss == [sum(epoch) / len(epoch) for epoch in losses]
    assert run.curves.accuracy[-1] == sklearn_accuracy(model, split)
    assert len(run.step_seconds) == steps


def sklearn_accuracy(model, split):
    from sklearn.metrics import accuracy_score

    with torch.no_grad():
        return accuracy_score(split.test_labels, model(split.test_inputs).argmax(1))


def test_runs_repeat_and_depend_on_no_other_run_nor_on_the_global_random_state():
    def measured(*optimizers):
        rows = {row.optimizer: row for row in run_experiment(experiment(optimizers, label_noise=(0.4,), epochs=2))}
        return {name: (row.curves, row.metrics["accuracy"]) for name, row in rows.items()}

    before = torch.get_rng_state()
    together = measured("sgd", "sam", "asam", "adamw", "adamw+sam")
    assert torch.equal(torch.get_rng_state(), before), "the caller's random stream is left alone"
    torch.manual_seed(99)
    assert measured("sam") == {"sam": together["sam"]}
    assert measured("adamw+sam", "sgd") == {name: together[name] for name in ("adamw+sam", "sgd")}
    assert len({str(curves) for curves, _ in together.values()}) == 5, "the optimizers differ"


def test_every_optimizer_starts_from_the_same_weights(digits):
    split = split_of(digits, train_size=256)
    models = [make_run(split, case.name).model.state_dict().values() for case in OPTIMIZERS]
    for weights in zip(*models, strict=True):
        assert all(torch.equal(weights[0], other) for other in weights)
    other_seed = make_run(split, seed=1).model.state_dict().values()
    assert not all(torch.equal(a, b) for a, b in zip(models[0], other_seed, strict=True))


@pytest.mark.parametrize("case", list(OPTIMIZERS), ids=lambda case: case.name)
def test_registered_optimizers_use_their_settings(case):
    assert case.base in OPTIMIZERS.names()
    model = TASKS["digits"].build_model()
    settings = dict(case.defaults) | {"lr": 0.0125} | ({"rho": 0.3} if "rho" in case.defaults else {})
    group = case.build(model, settings).param_groups[0]
    for name in settings.keys() - {"rho_warmup"}:
        assert group[name] == settings[name], name


def test_rho_warms_up_and_the_learning_rate_falls(digits):
    run = make_run(split_of(digits, train_size=256), "sam:rho=0.4:rho_warmup=0.5", epochs=2)
    groups = run._optimizer.param_groups
    assert groups[0]["rho"] == 0.0
    run.train_epoch()
    assert groups[0]["rho"] == 0.4
    run.train_epoch()
    assert groups[0]["rho"] == 0.4
    assert abs(groups[0]["lr"]) < 1e-12


def test_warnings_during_training_are_kept_once(digits, monkeypatch):
    import warnings

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
            buffers = dict(model.named_buffers())
            return functional.cross_entropy(
                torch.func.functional_call(model, parameters | buffers, inputs.double()), labels
            )

        weights = {name: value.detach() for name, value in model.named_parameters()}
        gradient, loss = torch.func.grad_and_value(loss_at)(weights)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
        rises.append(loss_at({name: w + 0.05 * gradient[name] / norm for name, w in weights.items()}) - loss)
    assert measured == pytest.approx(float(sum(rises) / 2), rel=1e-3)


def test_a_diverged_model_has_no_sharpness(digits):
    split = split_of(digits)
    run = make_run(split)
    torch.nn.init.constant_(run.model[-1].weight, math.inf)
    assert math.isnan(one_step_sharpness(run.model, [(split.inputs[:64], split.labels[:64])], rho=0.05))


# Rows, means, tables


def test_mean_and_spread_agree_with_numpy():
    values = [0.1, 0.25, 0.7, 0.15]
    got = estimate(values)
    assert got.mean == pytest.approx(np.mean(values))
    assert got.sd == pytest.approx(np.std(values, ddof=1))
    assert got.n == 4
    assert math.isnan(estimate([0.5]).sd)
    assert math.isnan(estimate([0.5, math.nan]).mean)


def test_gain_and_cost_are_paired_by_seed():
    rows = [
        *(row("sgd", seed, accuracy=a, seconds=s) for seed, a, s in ((0, 0.5, 0.1), (1, 0.7, 0.2), (2, 0.6, 0.4))),
        *(row("sam", seed, accuracy=a, seconds=s) for seed, a, s in ((2, 0.9, 0.8), (0, 0.6, 0.3))),
        row("adamw+sam", 0, base="adamw"),
    ]
    (panel,) = panels(rows)
    sgd, sam, adamw_sam = summarise(panel)
    assert sgd.gain is None
    assert sgd.cost.mean == 1.0
    assert sam.accuracy.n == 2
    assert sam.gain.mean == pytest.approx(np.mean([0.3, 0.1]))
    assert sam.gain.sd == pytest.approx(np.std([0.3, 0.1], ddof=1))
    assert sam.cost.mean == pytest.approx(np.mean([2.0, 3.0]))
    assert (adamw_sam.gain, adamw_sam.cost) == (None, None)


def test_the_base_is_the_one_with_the_same_settings():
    def with_lr(optimizer, lr, accuracy, **own):
        return row(
            optimizer,
            accuracy=accuracy,
            settings={"lr": lr, "epochs": 2, "batch_size": 64, "sharpness_rho": 0.05, **own},
        )

    rows = [with_lr("sgd", 0.1, 0.3), with_lr("sgd:lr=0.2", 0.2, 0.4), with_lr("sam:lr=0.2", 0.2, 0.9, rho=0.05)]
    rows.append(with_lr("sam:lr=0.3", 0.3, 0.9, rho=0.05))
    (panel,) = panels(rows)
    plain, other, sam, alone = summarise(panel)
    assert (plain.gain, other.gain, alone.gain, alone.cost) == (None, None, None, None)
    assert sam.gain.mean == pytest.approx(0.5)


def test_rows_that_must_not_be_averaged_or_compared_are_refused():
    other = row().settings | {"lr": 0.2}
    with pytest.raises(BenchmarkError, match="sgd on digits with label noise 0 cannot be averaged: they differ in lr;"):
        panels([row(seed=0), row(seed=1, settings=other)])
    with pytest.raises(BenchmarkError, match="sgd and sam on digits .* cannot be compared: they differ in train;"):
        panels([row(), row("sam", examples=row().examples | {"train": 99})])
    with pytest.raises(BenchmarkError, match="sgd and sam on digits .* they differ in epochs;"):
        panels([row(), row("sam", settings=other | {"epochs": 3})])
    with pytest.raises(BenchmarkError, match="seed 3 is there 2 times among the runs of sgd"):
        panels([row(seed=3), row(seed=3)])


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows = [row(seed=0, warnings=["ü"]), row(seed=1, accuracy=1 / 3)]
    for each in rows:
        append_row(path, each)
    assert read_rows(path) == rows
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_diverged_run_is_strict_json_and_comes_back_as_nan(tmp_path):
    path = tmp_path / "runs.jsonl"
    diverged = row()
    diverged.metrics["train_loss"] = diverged.curves["train_loss"][1] = math.inf
    append_row(path, diverged)
    parsed = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert parsed["metrics"]["train_loss"] is None
    (read,) = read_rows(path)
    assert math.isnan(read.metrics["train_loss"])
    assert math.isnan(read.curves["train_loss"][1])
    assert "| nan |" in markdown(panels([read]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no runs"),
        ("not json\n", "line 1 of .* is not a run"),
        ("\n[1]\n", "line 2 of .* expected an object with schema 1"),
        ('{"schema": 2}\n', "expected an object with schema 1"),
        ('{"schema": 1, "task": "digits"}\n', "missing or unknown: base, curves"),
        (
            row().to_json().replace("0.125]", '"x"]').replace('"metrics": {', '"metrics": [], "m": {') + "\n",
            "missing or unknown: m",
        ),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "runs.jsonl"
    path.write_text(content, encoding="utf-8")
    assert main(["report", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_report_renders_the_tables_and_figures_of_a_file(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    for noise in (0.4, 0.0):
        for seed in (0, 1):
            append_row(path, row("sgd", seed, noise, accuracy=0.5 + 0.1 * seed))
            append_row(path, row("sam", seed, noise, accuracy=0.7 + 0.2 * seed, seconds=0.5, warnings=["stuck"]))
    assert main(["report", str(path), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.index("clean labels") < out.index("40% random labels")
    assert re.search(r"sam +2 +80.0 ± 14.1 +\+25.0 ± 7.1 +0.500 +500.00 +2.00", out)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| sam | 2 | 80.0 ± 14.1 | +25.0 ± 7.1 | 0.500 | 500.00 | 2.00 | 0.125 ± 0.000 |" in table
    assert "sam with 40% random labels, seed 1, warned: stuck" in table
    assert "measured on a CPU, threads: 1," in table
    for name in ("digits-accuracy.png", "digits-sharpness.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)


def test_tables_fit_a_terminal_of_80_columns():
    rows = [
        row(name, seed, base="adamw", accuracy=a) for name, a in (("adamw", 0.5), ("adamw+sam", 0.6)) for seed in (0, 1)
    ]
    for each in rows:
        each.metrics["sharpness"] = 0.0021 + 0.0002 * each.seed
    console = Console(width=80, record=True, file=open(os.devnull, "w", encoding="utf-8"))
    for panel in panels(rows):
        console.print(terminal_table(panel))
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"^adamw\+sam +2 +60.0 ± 0.0 .* 0.0022 ± 0.0001 *$", text, re.MULTILINE)


# The command line


def test_help_explains_tasks_optimizers_and_output(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for registry in (TASKS, OPTIMIZERS, COMMANDS):
        for name in registry.names():
            assert re.search(rf"^ +{re.escape(name)}( |$)", text, re.MULTILINE), name
    assert "runs.jsonl" in text
    assert "table.md" in text
    assert max(map(len, text.splitlines())) <= 100


TRAIN = ("train", "--task", "digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "--task", "digts"),
            "unknown task 'digts'; did you mean 'digits'? Known: digits, digits_vit, fashion_mnist, fashion_small",
        ),
        ((*TRAIN, "--optimizers", "sgd,sma"), "unknown optimizer 'sma'; did you mean 'sam'? Known: sgd, sam, asam"),
        (
            (*TRAIN, "--optimizers", "sam:roh=1"),
            "unknown setting of sam 'roh'; did you mean 'rho'? Known: lr, momentum",
        ),
        ((*TRAIN, "--optimizers", "sam:rho=big"), "setting rho of sam must be a number, got 'big'; write sam:rho=0.1"),
        ((*TRAIN, "--optimizers", "sam:rho=-1"), "optimizer 'sam:rho=-1' cannot be made: rho must be"),
        ((*TRAIN, "--optimizers", "sam,sam"), "an optimizer is given twice"),
        ((*TRAIN, "--optimizers", ","), "expected an optimizer, got ','; write a comma-separated list such as sgd,sam"),
        ((*TRAIN, "--label-noise", "1"), "label noise must be a fraction of the training labels in [0, 1), got '1'"),
        ((*TRAIN, "--label-noise=-0.1"), "in [0, 1), got '-0.1'; for 40% write 0.4"),
        ((*TRAIN, "--label-noise", "nan"), "in [0, 1), got 'nan'"),
        ((*TRAIN, "--seeds", "0,x"), "seed must be a whole number >= 0, got 'x'"),
        ((*TRAIN, "--epochs", "0"), "a count must be a whole number >= 1, got '0'"),
        ((*TRAIN, "--sharpness-rho", "0"), "expected a number > 0, got '0'"),
        ((*TRAIN, "--train-size", "3"), "--train-size must be between 10"),
        ((*TRAIN, "--batch-size", "5000"), "--batch-size must be between 1 and the 1437 training examples, got 5000"),
        ((*TRAIN, "--evaluate-on", "train"), "--evaluate-on must be one of test, validation, got 'train'"),
        ((*TRAIN, "--data", "here"), "--data is not used for digits, got 'here'; leave it out"),
        (
            ("train", "--task", "fashion_mnist", "--data", "nowhere"),
            "looks for its images in nowhere; found no such folder",
        ),
        ((*TRAIN, "--device", "warp"), "--device 'warp' cannot be used"),
        (("report", "missing.jsonl"), "missing.jsonl cannot be read"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_earlier_results_are_replaced_only_on_request(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("precious\n", encoding="utf-8")
    arguments = [*TRAIN, "--optimizers", "sgd", "--seeds", "0", "--epochs", "1", "--train-size", "128"]
    arguments += ["--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "holds earlier runs; give another --output, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == "precious\n"
    assert main([*arguments, "--overwrite", "--batch-size", "1000"]) == 2
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8") == "precious\n"
    assert main([*arguments, "--overwrite"]) == 0
    assert len(read_rows(tmp_path / "runs.jsonl")) == 1


def test_fashion_mnist_trains_from_the_command_line(fashion_folder, capsys):
    output = fashion_folder / "out"
    arguments = ["train", "--task", "fashion_mnist", "--data", str(fashion_folder), "--train-size", "40"]
    arguments += [
        "--optimizers",
        "sgd,sam",
        "--seeds",
        "1,2",
        "--label-noise",
        "0.5",
        "--epochs",
        "2",
        "--batch-size",
        "8",
    ]
    assert main([*arguments, "--output", str(output)]) == 0
    rows = read_rows(output / "runs.jsonl")
    assert [(row.optimizer, row.seed) for row in rows] == [("sgd", 1), ("sam", 1), ("sgd", 2), ("sam", 2)]
    first = rows[0]
    assert first.examples == {"train": 40, "randomised": 20, "test": 20}
    assert first.settings == {
        "lr": 0.02,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "epochs": 2,
        "batch_size": 8,
        "sharpness_rho": 0.05,
    }
    assert all(len(curve) == 2 for curve in first.curves.values())
    assert (
        first.metrics["seconds_per_step_q20"]
        <= first.metrics["seconds_per_step"]
        <= first.metrics["seconds_per_step_q80"]
    )
    assert first.environment["torch"] == torch.__version__
    assert "hostname" not in first.to_json()
    assert "[2/2] seed 2, 50% random labels: sgd" in capsys.readouterr().out
    assert sorted(path.name for path in output.glob("*.png")) == [
        "fashion_mnist-accuracy.png",
        "fashion_mnist-sharpness.png",
    ]


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    train_epoch, calls = Run.train_epoch, []

    def interrupted(self, **options):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        train_epoch(self, **options)

    monkeypatch.setattr(Run, "train_epoch", interrupted)
    arguments = [*TRAIN, "--optimizers", "sgd,sam", "--epochs", "1", "--train-size", "128", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert [row.optimizer for row in read_rows(tmp_path / "runs.jsonl")] == ["sgd", "sam"]
    assert "interrupted after 2 finished runs" in capsys.readouterr().out
    assert (tmp_path / "digits-accuracy.png").exists()

    calls[:] = calls[:3]
    assert main([*arguments, "--overwrite"]) == 130
    assert len(read_rows(tmp_path / "runs.jsonl")) == 2, "nothing new is finished, so the earlier runs stay"


def test_a_missing_package_names_the_extra():
    code = "import sys, runpy; sys.modules['rich'] = None; runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'rich is not installed; install them with: python -m pip install "samopt[bench]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commit_is_that_of_this_code_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code = tmp_path / "benchmarks"
    code.mkdir()
    (code / "errors.py").write_text("", encoding="utf-8")
    assert environment.commit(code) == "unknown"
    git("init")
    (tmp_path / "other").write_text("", encoding="utf-8")
    git("add", "other")
    git("commit", "-m", "another project")
    assert environment.commit(code) == "unknown", "installed into an environment inside another checkout"
    git("add", ".")
    git("commit", "-m", "this one")
    assert re.fullmatch("[0-9a-f]{12}", environment.commit(code))
    (code / "errors.py").write_text("changed", encoding="utf-8")
    assert re.fullmatch(r"[0-9a-f]{12}\+changes", environment.commit(code))
