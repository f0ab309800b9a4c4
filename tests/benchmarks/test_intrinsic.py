"""Properties of pairs of classes: the examples, the properties and attacks by hand, and the table of correlations."""

import itertools
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from torch.nn import functional

from benchmarks.harness.cli import main
from benchmarks.harness.data import Pool
from benchmarks.harness.datasets import load_mlbench
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.intrinsic import SIZES, errors_of, examples_of, pairs_of, properties_of, train
from benchmarks.harness.rows import Log
from benchmarks.studies import intrinsic as study
from tests.helpers.pages import REPOSITORY


@pytest.fixture(scope="module")
def pool():
    """Five clouds of 520 points in 12 dimensions around 0, 1, 3, 6 and 10 on the first axis, and a number for each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(520)
    inputs = 3 + torch.randn(2600, 12, generator=generator)
    inputs[:, 0] += torch.tensor([0.0, 1.0, 3.0, 6.0, 10.0])[labels]
    return Pool(inputs, labels)


def test_examples_are_balanced_disjoint_and_of_one_scale(pool):
    inputs, labels, test_inputs, test_labels = examples_of(pool, (1, 3), 0)
    assert len(inputs) == len(test_inputs) == len(labels) == len(test_labels) == SIZES[-1]
    for size in SIZES:
        assert abs(2 * int(labels[:size].sum()) - size) <= 1
    everything = torch.cat([inputs, test_inputs])
    assert len(torch.unique(everything, dim=0)) == len(everything)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    assert inputs.square().mean().item() == pytest.approx(1)
    assert inputs[labels == 1, 0].mean() > inputs[labels == 0, 0].mean() + 1  # 1 is the second class
    other = examples_of(pool, (1, 3), 1)
    assert not torch.equal(inputs, other[0])


def test_pairs_are_all_there_are_or_45_of_them(pool):
    assert pairs_of(pool) == list(itertools.combinations(range(5), 2))
    many = pairs_of(Pool(torch.zeros(26, 1), torch.arange(26)))
    assert len(set(many)) == 45 and all(first < second for first, second in many)


def test_label_sharpness_is_one_over_the_smallest_distance_in_root_mean_squared_distances(pool):
    inputs, labels, *_ = examples_of(pool, (0, 1), 0)
    inputs, labels = inputs[:60].double(), labels[:60]
    distances = torch.cdist(inputs, inputs) / (2 * 12) ** 0.5
    between = distances[labels == 0][:, labels == 1]
    found = properties_of(inputs, labels)
    assert found["label_sharpness"] == pytest.approx(1 / between.min().item())
    nearest = torch.cat([between.min(0).values, between.min(1).values])
    assert found["label_sharpness_median"] == pytest.approx((1 / nearest).quantile(0.5).item())
    assert found["bound"] == pytest.approx(found["label_sharpness"] * 60 ** (-1 / found["dimension_mle"]))
    with pytest.raises(BenchmarkError, match="K_F is infinite"):
        properties_of(torch.cat([inputs, inputs[:1]]), torch.cat([labels, 1 - labels[:1]]))


def test_a_pair_of_close_classes_is_sharper_and_harder(pool):
    found = []
    for pair in pairs_of(pool):
        inputs, labels, test_inputs, test_labels = examples_of(pool, pair, 0)
        model = train(inputs, labels, 0, 60)
        found.append((properties_of(inputs, labels)["label_sharpness"], errors_of(model, test_inputs, test_labels)))
    assert kendalltau([sharp for sharp, _ in found], [errors["error"] for _, errors in found]).statistic > 0.5


def test_errors_and_what_an_attack_adds_are_those_by_hand(pool):
    inputs, labels, test_inputs, test_labels = examples_of(pool, (0, 2), 0)
    model = train(inputs, labels, 0, 40)
    found = errors_of(model, test_inputs, test_labels)
    attacked = test_inputs.clone().requires_grad_()
    loss = functional.cross_entropy(model(attacked), test_labels)
    (gradient,) = torch.autograd.grad(loss, attacked)
    moved = model(test_inputs + 0.3 * gradient.sign())
    error, worse = ((logits.argmax(1) != test_labels).double().mean().item() for logits in (model(test_inputs), moved))
    assert found["error"] == pytest.approx(error, abs=1e-6)
    assert found["lost_0.3"] == pytest.approx(worse - error, abs=1e-6)
    expected = (functional.cross_entropy(moved, test_labels) - loss).item()
    assert found["rise_0.3"] == pytest.approx(expected, rel=1e-4)


def test_a_table_of_r_becomes_inputs_and_labels(tmp_path, monkeypatch):
    (tmp_path / "LetterRecognition.rda").touch()
    frame = pd.DataFrame({"lettr": pd.Categorical(["B", "A", "B"]), "x": [1.0, 2.0, 3.0], "y": [4.0, 5.0, 6.0]})
    fake = SimpleNamespace(
        read_r=lambda path: {"LetterRecognition": frame}, PyreadrError=OSError, LibrdataError=OSError
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyreadr", fake)
        pool = load_mlbench("letters", tmp_path)
        assert pool.labels.tolist() == [1, 0, 1] and pool.inputs.tolist() == [[1, 4], [2, 5], [3, 6]]
        (tmp_path / "Satellite.rda").touch()
        with pytest.raises(BenchmarkError, match=r"Satellite.rda is not mlbench's.*apt-get install r-cran-mlbench"):
            load_mlbench("satellite", tmp_path)
    load_mlbench.cache_clear()
    monkeypatch.setitem(sys.modules, "pyreadr", None)
    with pytest.raises(BenchmarkError, match="pip install pyreadr"):
        load_mlbench("letters", tmp_path)
    with pytest.raises(BenchmarkError, match=r"looks for Satellite.rda in .*; it is not there. On Debian"):
        load_mlbench("satellite", tmp_path / "no folder")


@pytest.mark.slow
def test_the_quick_form_of_the_command_and_its_continuation(pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "load_mnist", lambda path: pool)
    monkeypatch.setattr(study, "load_fashion", lambda path: Pool(pool.inputs.flip(1) ** 3, pool.labels))
    arguments = ["intrinsic", "--sets", "mnist,fashion", "--output", str(tmp_path)]
    assert main([*arguments, "--quick"]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    names = [f"{first}-{second}" for first, second in pairs_of(pool)[:6]]
    assert [row.task for row in rows] == [f"{name} {pair}" for name in ("mnist", "fashion") for pair in names]
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    sharp, errors = ([row.curves[key][1] for row in rows] for key in ("label_sharpness", "error"))
    (table,) = text.split("**All pairs: 12 pairs**")[1:]
    line = next(line for line in table.splitlines() if line.startswith("| label sharpness K_F |"))
    assert line.split(" | ")[2].startswith(f"{kendalltau(sharp, errors).statistic:+.2f} [")
    (table,) = text.split("**Pairs of one set, all sets: 12 pairs**")[1:]
    line = next(line for line in table.splitlines() if line.startswith("| label sharpness K_F |"))
    low = min(kendalltau(sharp[part], errors[part]).statistic for part in (slice(6), slice(6, 12)))
    high = max(kendalltau(sharp[part], errors[part]).statistic for part in (slice(6), slice(6, 12)))
    assert low - 0.01 <= float(line.split(" | ")[2].split()[0]) <= high + 0.01
    assert (tmp_path / "intrinsic.png").stat().st_size > 0
    assert main(arguments) == 2
    assert "steps = 10, and 300 is asked for" in capsys.readouterr().err


def test_the_published_tables_are_those_of_the_published_rows():
    folder = REPOSITORY / "docs" / "results" / "intrinsic"
    published = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    assert len({(row.task, row.seed) for row in rows}) == len(rows) == 450
    for table in study.tables(rows):
        assert f"**{table.title}**" in published
        assert all(f"| {' | '.join(row)} |" in published for row in table.rows)
