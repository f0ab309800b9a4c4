"""The command line: help, configuration files, errors, and the studies train, demo and report."""

import re

import numpy as np
import pytest

from benchmarks.harness.cli import main, studies
from benchmarks.harness.rows import Log, Row
from benchmarks.harness.statistics import panels
from benchmarks.harness.training import Run
from benchmarks.studies import demo

PNG = b"\x89PNG\r\n\x1a\n"
TRAIN = ("train", "--task", "digits")
SMALL = ("--epochs", "1", "--train-size", "128")


def test_help_lists_every_study_with_a_line(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in studies().items():
        assert re.search(rf"^ +{name} +{re.escape(summary)}$", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("study", [name for name in studies() if name != "hf-finetune"])
def test_every_option_of_every_study_is_explained(study, capsys):
    with pytest.raises(SystemExit) as stop:
        main([study, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for option, explanation in re.findall(r" (--[a-z][a-z-]+)(?: \S+)?(?:, \S+ \S+)? ([A-Z\[(]?\S*)", text):
        assert not explanation.startswith("(type"), f"{option} of {study} has no help text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "unknown study 'trian'; did you mean 'train'? Known: "),
        (
            ("train", "--task", "digts"),
            "unknown task 'digts'; did you mean 'digits'? Known: digits, digits_vit, fashion_mnist, fashion_small",
        ),
        (
            (*TRAIN, "--optimizers", "sgd,sma"),
            "unknown optimizer 'sma'; did you mean 'sam'? Known: sgd, adamw, adam, sam",
        ),
        ((*TRAIN, "--optimizers", "adamww+sam"), "unknown base 'adamww' in 'adamww+sam'; did you mean 'adamw'?"),
        ((*TRAIN, "--optimizers", "sam:roh=1"), "optimizer 'sam:roh=1' cannot be made: "),
        ((*TRAIN, "--optimizers", "sgd:roh=1"), "unknown setting of sgd 'roh'; "),
        ((*TRAIN, "--optimizers", "sam:lr=big"), "setting lr of sam must be a number, got 'big'; write sam:lr=0.1"),
        ((*TRAIN, "--optimizers", "sam:rho=-1"), "optimizer 'sam:rho=-1' cannot be made: rho must be"),
        ((*TRAIN, "--optimizers", "nomod:MySAM"), "nomod:MySAM cannot be imported: No module named 'nomod'"),
        ((*TRAIN, "--optimizers", "sam,sam"), "--optimizers takes a comma-separated list that names each item once"),
        ((*TRAIN, "--optimizers", ","), "--optimizers takes a comma-separated list that names each item once, got no"),
        ((*TRAIN, "--label-noise", "1"), "--label-noise: Not of type Fraction: "),
        ((*TRAIN, "--label-noise=-0.1"), "does not conform to restriction v>=0 and v<1"),
        ((*TRAIN, "--seeds", "0,x"), "--seeds: Not of type NonNegativeInt: "),
        ((*TRAIN, "--epochs", "0"), "--epochs: Not of type PositiveInt: "),
        ((*TRAIN, "--sharpness-rho", "0"), "--sharpness-rho: Not of type PositiveFloat: "),
        ((*TRAIN, "--sedes", "0"), "unrecognized arguments: --sedes 0; did you mean '--seeds'?"),
        ((*TRAIN, "--train-size", "3"), "--train-size must be between 10"),
        ((*TRAIN, "--batch-size", "5000"), "--batch-size must be between 1 and the 1437 training examples, got 5000"),
        ((*TRAIN, "--evaluate-on", "train"), "--evaluate-on: Expected a typing.Literal['test', 'validation']"),
        ((*TRAIN, "--data", "here"), "--data is not used for digits, got 'here'; leave it out"),
        (
            ("train", "--task", "fashion_mnist", "--data", "nowhere"),
            "looks for its images in nowhere; found no such folder",
        ),
        ((*TRAIN, "--device", "warp"), "--device 'warp' cannot be used"),
        (("report", "missing"), "missing/runs.jsonl cannot be read"),
        (("report", ".", "--study", "hf-finetune"), "writes no tables"),
        (("frontier", "--methods", "base,samm"), "unknown method 'samm'; did you mean 'sam'?"),
        (("optimizer", "--cases", "resnet81"), "unknown case 'resnet81'; did you mean 'resnet18'?"),
        (("optimizer", "--clock", "sun"), "--clock: Expected a typing.Literal['wall', 'cpu']"),
        (("wordnet", "--quick", "--data", "nowhere"), "nowhere; found no folder, so not data.adj"),
        (("lightning", "--methods", "sgd,lion"), "unknown method 'lion'"),
    ],
)
def test_mistakes_are_explained_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_options_come_from_a_file_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*TRAIN, *SMALL, "--seeds", "3", "--optimizers", "sgd", "--output", str(tmp_path), "--print_config"])
    (tmp_path / "options.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "options.yaml"), "--label-noise", "0.4"]) == 0
    (row,) = Log(tmp_path / "runs.jsonl").rows
    assert (row.optimizer, row.seed, row.label_noise, row.settings["epochs"]) == ("sgd", 3, 0.4, 1)


def test_train_continues_after_the_last_finished_run(tmp_path, monkeypatch, capsys):
    train_epoch, calls = Run.train_epoch, []

    def interrupted(self, **options):
        calls.append(self.choice.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        train_epoch(self, **options)

    monkeypatch.setattr(Run, "train_epoch", interrupted)
    arguments = [*TRAIN, *SMALL, "--optimizers", "sgd,sam", "--seeds", "0,1", "--output", str(tmp_path)]
    assert main(arguments) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [(row.optimizer, row.seed) for row in Log(tmp_path / "runs.jsonl").rows] == [("sgd", 0), ("sam", 0)]
    assert main(arguments) == 0
    assert calls[4:] == ["sgd", "sam"]
    assert main([*arguments[:-1], arguments[-1], "--optimizers", "sgd,asam"]) == 0
    assert calls[6:] == ["asam", "asam"]
    assert main([*arguments, "--batch-size", "32"]) == 2
    assert "= (1, 64, 0.05), and (1, 32, 0.05) is asked for" in capsys.readouterr().err


def test_fashion_mnist_trains_from_the_command_line(fashion_folder, capsys):
    output = fashion_folder / "out"
    arguments = ["train", "--task", "fashion_mnist", "--data", str(fashion_folder), "--train-size", "40"]
    arguments += ["--optimizers", "sgd,sam", "--seeds", "1,2", "--label-noise", "0.5", "--epochs", "2"]
    assert main([*arguments, "--batch-size", "8", "--output", str(output)]) == 0
    rows = Log(output / "runs.jsonl").rows
    assert [(row.optimizer, row.seed) for row in rows] == [("sgd", 1), ("sam", 1), ("sgd", 2), ("sam", 2)]
    assert rows[0].examples == {"train": 40, "randomised": 20, "test": 50}
    assert rows[0].settings.items() >= {"lr": 0.02, "epochs": 2, "batch_size": 8, "sharpness_rho": 0.05}.items()
    assert all(len(curve) == 2 for curve in rows[0].curves.values())
    assert "hostname" not in (output / "runs.jsonl").read_text(encoding="utf-8")
    assert "[2/2] seed 2, 50% random labels: sgd" in capsys.readouterr().out
    names = ["fashion_mnist-accuracy.png", "fashion_mnist-sharpness.png"]
    assert sorted(path.name for path in output.glob("*.png")) == names


def test_report_writes_the_tables_and_figures_of_a_folder(tmp_path, make_row, capsys):
    log = Log(tmp_path / "runs.jsonl")
    for noise in (0.4, 0.0):
        for seed in (0, 1):
            log.add(make_row("sgd", seed, noise, accuracy=0.5 + 0.1 * seed))
            log.add(make_row("sam", seed, noise, accuracy=0.7 + 0.2 * seed, seconds=0.5, warnings=["stuck"]))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.index("clean labels") < out.index("40% random labels")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    line = "| sam | 2 | 80.0 ± 14.1 | +25.0 [-38.5, +88.5] | 0.500 | 500.00 | 2.00 | 0.125 ± 0.000 |"
    assert table.count(line) == 2
    assert "sam on digits with 40% random labels, seed 1, warned: stuck" in table
    assert "measured on a CPU, threads: 1," in table
    for name in ("digits-accuracy.png", "digits-sharpness.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("folder", "study", "line"),
    [
        ("digits", "train", "| asam | 8 | 91.9 ± 2.0 | +11.3 ["),
        ("frontier", "frontier", "| digits, 40% random labels (90.5 ± 2.6) | 1.25x | momentum-uphill:rho=0.1 | +5.8 ["),
        pytest.param("frontier-again", "frontier", "| momentum-ahead:", marks=pytest.mark.slow),
        ("lightning", "lightning", "| 40% random labels | sgd+sam | 3 | 74.6 ± 1.5 | +0.7 ["),
        pytest.param(
            "performance",
            "optimizer",
            "| samopt-cpu | 11 | 24.95 (24.70 to 25.18) | 17.64 (17.41 to 18.00) | 1.11 (",
            marks=pytest.mark.slow,
        ),
        (
            "performance-again",
            "optimizer",
            "| displaced | 9 | 18.77 (18.26 to 19.61) | 10.32 (10.00 to 11.06) | 0.49 (",
        ),
        ("demo", "demo", "| sam | 2 | 93.6 ± 2.4 | +4.4 [-2.3, +11.0] |"),
        ("sharpness", "sharpness", "| largest Hessian eigenvalue | "),
        ("wordnet/tuned", "wordnet", "| sam:rho=0.02 | 5 | 34.3 ± 0.5 | +0.1 [-0.0, +0.2] |"),
        ("shift", "shift", "| tram-noise | TRAM, noise on the inputs | scale=300 | 5 | 19.3 ± 1.4 | +0.1 ["),
        ("interpolation", "interpolation", "| strong | 0.4 | 42.7 ± 1.6 | +2.3 ["),
    ],
)
def test_published_rows_stay_readable(tmp_path, folder, study, line, request):
    if study == "lightning":
        pytest.importorskip("pytorch_lightning")
    source = request.config.rootpath / "docs" / "results" / folder
    assert main(["report", str(source), "--study", study, "--output", str(tmp_path)]) == 0
    assert line in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_compares_optimizers_in_80_columns_and_ends_with_a_sentence(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("earlier\n", encoding="utf-8")
    assert main(["demo", "--seeds", "0,1", "--epochs", "1", "--output", str(tmp_path)]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    names = ["sgd", "momentum-sam", "sam", "asam", "adamw", "adamw+sam"]
    assert [(row.optimizer, row.label_noise) for row in rows] == 2 * [(n, noise) for noise in (0.0, 0.4) for n in names]
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs.jsonl", "table.md", "landscape.png", "accuracy.png", "sharpness.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    shown = [line for line in printed.splitlines() if not line.startswith("wrote")]  # the folder's name may be long
    assert [line for line in shown if len(line.encode()) > 80] == []
    accuracy = {(row.optimizer, row.label_noise, row.seed): row.metrics["accuracy"] for row in rows}
    by_hand = [100 * (accuracy["sam", 0.4, seed] - accuracy["sgd", 0.4, seed]) for seed in (0, 1)]
    sentence = " ".join(printed.rpartition("wrote")[2].split())
    assert f"SAM (two passes, rho=0.05) gained {sum(by_hand) / 2:+.1f} [" in sentence
    assert "MomentumSAM (one pass, rho=0.3) gained " in sentence


def test_the_demo_draws_every_landscape_from_the_models_of_one_seed_with_the_first_direction_to_the_right():
    places = np.linspace(-0.5, 0.5, 21)
    rises = 1 + 8 * places[:, None] ** 2 + 0 * places  # along the first direction only: 0.5 more at a distance of 0.25
    rows = [
        Row(
            task="digits", optimizer=name, base="sgd", seed=seed, label_noise=0.4, evaluated_on="test", settings={},
            examples={}, metrics={"accuracy": 0.9}, curves={"landscape": (rises + seed).ravel().tolist()}, warnings=[],
            environment={}, timestamp="",
        )
        for name in ("sgd", "momentum-sam", "sam") for seed in (2, 1)
    ]  # fmt: skip
    drawn = demo.draw_landscapes(panels(rows)[0])
    for axes in drawn.axes[:3]:
        assert "loss at + 2.00" in axes.get_title()
        rim = axes.collections[1].get_paths()[0].vertices
        assert np.abs(np.abs(rim[:, 0]) - 0.25).max() < 0.01
        assert np.ptp(rim[:, 1]) > 0.99
