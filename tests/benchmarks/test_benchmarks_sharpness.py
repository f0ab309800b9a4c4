"""The sharpness study measures the models it trains, makes no run twice, and reports what its rows hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cli import main
from benchmarks.rows import Row, read_rows
from benchmarks.sharpness_study import study
from benchmarks.sharpness_study.measures import MEASURES, measure_model
from benchmarks.sharpness_study.report import QUANTITIES, agreement, markdown
from benchmarks.summary import panels
from samopt import sharpness
from tests.helpers.pages import REPOSITORY

COMMAND = ("sharpness", "--task", "digits", "--train-size", "128", "--epochs", "1", "--label-noise", "0.4")


def row(optimizer: str, seed: int, accuracy: float, value: float) -> Row:
    return Row(
        task="digits",
        optimizer=optimizer,
        base="sgd",
        seed=seed,
        label_noise=0.0,
        evaluated_on="test",
        settings={"lr": 0.1, "epochs": 2, "batch_size": 64, "sharpness_rho": 0.05},
        examples={"train": 128, "randomised": 0, "test": 360},
        metrics={each.name: value for each in MEASURES}
        | {"accuracy": accuracy, "found": 0.9, "measured_loss": 0.5, "weight_norm": 10.0},
        curves={"ascent": [value] * 20, "landscape": [value] * 21},
        warnings=[],
        environment={"device": "CPU", "threads": 1, "dtype": "float32", "torch": "2", "python": "3", "samopt": "0"}
        | {"commit": "abc"},
        timestamp="2026-01-01T00:00:00+00:00",
    )


def test_a_model_is_measured_as_the_measures_measure_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(2)]
    metrics, curves = measure_model(model, batches)
    found = sharpness.worst_case(model, sharpness.cross_entropy, batches, rho=0.05, steps=20)
    longer = sharpness.worst_case(model, sharpness.cross_entropy, batches[:1], rho=0.05, steps=100, restarts=3)
    assert metrics["worst_case"] == found.value
    assert metrics["worst_case_error"] == found.standard_error
    assert metrics["one_step"] == found.curve[0] == curves["ascent"][0]
    assert metrics["found"] == found.per_batch[0] / longer.value
    assert metrics["lambda_max"] == pytest.approx(
        sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches).value, rel=0.02
    )
    assert curves["landscape"][10] == pytest.approx(metrics["measured_loss"])
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert metrics["weight_norm"] == pytest.approx(float(flat.norm()))


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "BATCHES", 1)
    monkeypatch.setattr(study, "BATCH_SIZE", 8)
    assert main([*COMMAND, "--optimizers", "sgd", "--seeds", "0", "--output", str(tmp_path)]) == 0
    (first,) = read_rows(tmp_path / "runs.jsonl")
    assert main([*COMMAND, "--optimizers", "sgd,sam", "--seeds", "0", "--output", str(tmp_path)]) == 0
    again, second = read_rows(tmp_path / "runs.jsonl")
    assert again == first
    assert (second.optimizer, second.seed, second.label_noise) == ("sam", 0, 0.4)
    assert set(QUANTITIES) <= {line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()}
    assert {each.name for each in MEASURES} < set(second.metrics)
    for name in ("accuracy.png", "ascent.png", "landscape.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_of_another_length_are_refused(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.write_text(row("sgd", 0, 0.9, 1.0).to_json() + "\n", encoding="utf-8")
    assert main([*COMMAND, "--output", str(tmp_path)]) == 2
    assert "(2, 64, 0.05)" in capsys.readouterr().err
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_agreement_is_kendalls_tau_with_the_error():
    # Within a seed the sharper model is the better one; over all, seed 1 is both sharper and worse.
    rows = [row("sgd", 0, 0.90, 1.0), row("sam", 0, 0.95, 2.0), row("sgd", 1, 0.50, 3.0), row("sam", 1, 0.55, 4.0)]
    (panel,) = panels(rows)
    over_all, within = agreement(panel, lambda each: each.metrics["trace"])
    assert within == -1
    assert over_all == pytest.approx((4 - 2) / 6)  # concordant pairs less discordant ones, over all six


def test_a_table_has_means_spreads_and_what_the_search_missed():
    rows = [row("sgd", 0, 0.90, 1.0), row("sgd", 1, 0.92, 3.0), row("sam", 0, 0.94, 0.5), row("sam", 1, 0.96, 0.5)]
    rows[0] = replace(rows[0], metrics=rows[0].metrics | {"found": 0.6})
    text = markdown(rows)
    assert "| test accuracy, % | 91 ± 1.4 | 95 ± 1.4 |  |  |" in text
    assert "| Hessian trace | 2 ± 1.4 | 0.5 ± 0 |" in text
    assert "found 60.0 to 90.0 % (median 90.00 %)" in text
    assert "at commit abc" in text


def test_the_published_table_is_that_of_the_published_rows():
    folder = REPOSITORY / "docs" / "results" / "sharpness"
    assert (folder / "table.md").read_text(encoding="utf-8") == markdown(read_rows(folder / "runs.jsonl"))
