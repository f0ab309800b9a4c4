"""The sharpness study measures the models it trains, makes no run twice, and reports what its rows hold."""

import pytest
import torch

from benchmarks.harness.cli import main
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.statistics import panels
from benchmarks.studies import sharpness as study
from benchmarks.studies.sharpness import MEASURES, QUANTITIES, agreement, measure_model, tables
from samopt import sharpness
from tests.helpers.pages import REPOSITORY

COMMAND = ("sharpness", "--task", "digits", "--train-size", "128", "--epochs", "1", "--label-noise", "0.4")


@pytest.fixture
def measured(make_row):
    def row(optimizer, seed, accuracy, value, found=0.9):
        metrics = dict.fromkeys((each.name for each in MEASURES), value)
        metrics |= {"accuracy": accuracy, "found": found, "measured_loss": 0.5, "weight_norm": 10.0}
        curves = {"ascent": [value] * 20, "landscape": [value] * 21}
        return make_row(optimizer, seed, metrics=metrics, curves=curves)

    return row


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


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BATCHES", 1)
    monkeypatch.setattr(study, "BATCH_SIZE", 8)
    assert main([*COMMAND, "--optimizers", "sgd", "--seeds", "0", "--output", str(tmp_path)]) == 0
    (first,) = Log(tmp_path / "runs.jsonl").rows
    assert main([*COMMAND, "--optimizers", "sgd,sam", "--seeds", "0", "--output", str(tmp_path)]) == 0
    again, second = Log(tmp_path / "runs.jsonl").rows
    assert again == first
    assert (second.optimizer, second.seed, second.label_noise) == ("sam", 0, 0.4)
    assert all(label in (tmp_path / "table.md").read_text(encoding="utf-8") for label in QUANTITIES)
    assert {each.name for each in MEASURES} < set(second.metrics)
    for name in ("accuracy.png", "ascent.png", "landscape.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_of_another_length_are_refused(tmp_path, capsys, measured):
    log = open_log(tmp_path)
    log.add(measured("sgd", 0, 0.9, 1.0))
    assert main([*COMMAND, "--output", str(tmp_path)]) == 2
    assert "(2, 64, 0.05)" in capsys.readouterr().err
    assert len(Log(log.path).rows) == 1


def test_agreement_is_kendalls_tau_with_the_error(measured):
    # Within a seed the sharper model is the better one; over all, seed 1 is both sharper and worse.
    models = [("sgd", 0, 0.90, 1.0), ("sam", 0, 0.95, 2.0), ("sgd", 1, 0.50, 3.0), ("sam", 1, 0.55, 4.0)]
    (panel,) = panels([measured(*model) for model in models])
    over_all, within = agreement(panel, "trace")
    assert within == -1
    assert over_all == pytest.approx((4 - 2) / 6)  # concordant pairs less discordant ones, over all six


def test_a_table_has_means_spreads_and_what_the_search_missed(tmp_path, measured):
    log = open_log(tmp_path)
    for model in (("sgd", 0, 0.90, 1.0, 0.6), ("sgd", 1, 0.92, 3.0), ("sam", 0, 0.94, 0.5), ("sam", 1, 0.96, 0.5)):
        log.add(measured(*model))
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| test accuracy, % | 91 ± 1.4 | 95 ± 1.4 |  |  |" in text
    assert "| Hessian trace | 2 ± 1.4 | 0.5 ± 0 |" in text
    assert "found 60.0 to 90.0 % (median 90.00 %)" in text
    assert "at commit abc" in text


def test_the_published_tables_are_those_of_the_published_rows():
    folder = REPOSITORY / "docs" / "results" / "sharpness"
    published = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    for table in tables(Log(folder / "runs.jsonl", must_exist=True).rows):
        assert f"**{table.title}**" in published
        assert all(f"| {' | '.join(row)} |" in published for row in table.rows)
