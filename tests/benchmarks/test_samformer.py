"""SAMformer on ETTh1: what the study of time series stands on."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.harness.cli import main
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.samformer import INPUT_HOURS, Samformer, read_series, windows
from benchmarks.studies import samformer as study
from benchmarks.studies.samformer import METHODS

MONTH = 720


@pytest.fixture(scope="module")
def series_file(tmp_path_factory):
    """A made-up series in the file's format: a daily wave in each channel, and noise."""
    hours = np.arange(17_420)[:, None]
    values = (
        5 + np.sin(2 * np.pi * (hours / 24 + np.arange(7) / 7)) + np.random.default_rng(0).normal(size=(17_420, 7)) / 10
    )
    path = tmp_path_factory.mktemp("data") / "ETTh1.csv"
    lines = (f"2016-07-01 00:00:00,{','.join(f'{value:.6f}' for value in row)}\n" for row in values)
    path.write_text("date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT\n" + "".join(lines), encoding="utf-8")
    return path


def test_the_parts_are_the_fields_and_standardised_by_the_training_part(series_file):
    series = read_series(series_file)
    raw = np.loadtxt(series_file, delimiter=",", skiprows=1, usecols=range(1, 8))
    train = raw[: 12 * MONTH]
    for name, first, last in (("train", 0, 12), ("validation", 12, 16), ("test", 16, 20)):
        begin = max(0, first * MONTH - INPUT_HOURS)
        expected = (raw[begin : last * MONTH] - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(series[name].numpy(), expected.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("horizon", [96, 720])
def test_every_test_window_forecasts_hours_of_the_test_part_only(series_file, horizon):
    past, future = windows(read_series(series_file)["test"], horizon)
    assert past.shape == (4 * MONTH - horizon + 1, 7, INPUT_HOURS) and future.shape == (len(past), 7, horizon)
    series = read_series(series_file)["test"]
    assert torch.equal(future[0], series[:, INPUT_HOURS : INPUT_HOURS + horizon])  # the first hour of the part
    assert torch.equal(past[-1], series[:, -INPUT_HOURS - horizon : -horizon])
    assert torch.equal(future[-1], series[:, -horizon:])


def test_the_model_is_attention_over_channels_between_reversible_normalisations():
    torch.manual_seed(0)
    model, past = Samformer(24).double(), torch.randn(3, 7, INPUT_HOURS, dtype=torch.float64)
    with torch.no_grad():
        model.scale.uniform_(0.5, 1.5)
        model.shift.normal_()
    out = model(past)
    torch.testing.assert_close(model(3.0 * past + 2.0), 3.0 * out + 2.0, rtol=1e-4, atol=1e-4)
    normal = functional.layer_norm(past, (INPUT_HOURS,)) * model.scale + model.shift
    mixed = functional.scaled_dot_product_attention(model.query(normal), model.key(normal), model.value(normal))
    mean, deviation = past.mean(2, keepdim=True), (past.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = (model.forecast(normal + mixed) - model.shift) / model.scale * deviation + mean
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_what_is_no_such_file_is_explained(tmp_path):
    for content, message in (
        (None, "needs the series ETTh1"),
        ("a,b\n1,2\n", "is not ETTh1.csv"),
        ("d" + ",x" * 7 + "\n" + "0" + ",1" * 7 + "\n", "hours"),
    ):
        path = tmp_path / "ETTh1.csv"
        if content is not None:
            path.write_text(content)
        with pytest.raises(BenchmarkError, match=message) as error:
            read_series(path)
        assert "https://github.com/zhouhaoyi/ETDataset" in str(error.value)


@pytest.mark.slow
def test_the_quick_form_of_the_command_and_its_continuation(series_file, tmp_path, monkeypatch, capsys):
    arguments = ["samformer", "--data", str(series_file), "--output", str(tmp_path)]
    assert main([*arguments, "--quick"]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    assert [row.optimizer.partition(":")[0] for row in rows] == list(METHODS)
    assert all(0 < row.metrics["mse"] < 5 and 0 < row.metrics["mae"] < 3 for row in rows)
    assert [len(row.curves["train_loss"]) for row in rows] == [1, 2, 1, 1, 1]  # twice the epochs
    assert rows[0].examples == {"train": 12 * MONTH - INPUT_HOURS - 95, "test": 4 * MONTH - 95}
    assert (tmp_path / "samformer.png").stat().st_size > 0
    assert "| adam-twice | lr=0.001 | 1 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "(epochs, batch size) = (1, 256), and (3, 256) is asked for" in capsys.readouterr().err


def test_the_table_has_differences_paired_by_seed_and_their_mean_over_horizons(tmp_path, make_row):
    log = open_log(tmp_path)
    errors = {("ETTh1-96", "adam"): (0.40, 0.42), ("ETTh1-96", "sam"): (0.37, 0.41), ("ETTh1-192", "adam"): (0.5, 0.6),
              ("ETTh1-192", "sam"): (0.45, 0.59)}  # fmt: skip
    for (task, name), values in errors.items():
        for seed, mse in enumerate(values):
            label = f"{name}:lr=0.001" + (":rho=1" if name == "sam" else "")
            metrics = {"mse": mse, "mae": mse, "train_loss": 0.1, "seconds_per_step": 2.0 if name == "sam" else 1.0}
            log.add(make_row(label, seed, base="adam", task=task, metrics=metrics))
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| sam | lr=0.001, rho=1 | 2 | 0.3900 ± 0.0283 | 0.3900 ± 0.0283 | -0.0200 [" in text
    assert "| sam | SAM, two passes | 0.4550 | -0.0250 [" in text  # of -0.04 and -0.01, seed by seed
    assert "| 2.00 |" in text
