"""Models side by side: values are the measures' own, differences are paired, the verdict says what is so."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from samopt import sharpness
from samopt.sharpness.comparison.differences import difference
from samopt.sharpness.presets import PRESETS, named_measures
from tests.sharpness.test_losses_and_batches import classifier, split
from tests.sharpness.test_sharpness_model import assert_unchanged, conv_net, images, surroundings

LOSS = nn.CrossEntropyLoss()


def relu_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def rescaled(model, factor):
    """The same function with one layer scaled up and the next one down."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(factor)
        twin[0].bias.mul_(factor)
        twin[2].weight.div_(factor)
    return twin


def test_every_value_is_the_measures_own():
    models, data = {"a": classifier(), "b": relu_net()}, split([12, 12, 6])
    comparison = sharpness.compare(models, LOSS, data, accuracy_fn=sharpness.accuracy)
    for label in ("worst_case", "worst_case_plain", "weight_noise", "lambda_max", "trace", "quantization"):
        function, options = PRESETS[label]
        for name, model in models.items():
            assert comparison.results[label][name] == function(model, LOSS, data, **options)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    for name, model in models.items():
        assert comparison.results["loss"][name].value == pytest.approx(LOSS(model(x), y).item(), rel=1e-12)
        hits = (model(x).argmax(1) == y).double().mean().item()
        assert comparison.results["accuracy"][name].value == pytest.approx(hits)
        assert comparison.norms[name] == pytest.approx(
            math.sqrt(sum(p.square().sum().item() for p in model.parameters()))
        )
    assert comparison.cost == pytest.approx(sum(r.cost for row in comparison.results.values() for r in row.values()))


def test_a_difference_is_paired_over_the_batches():
    models, data = {"a": classifier(), "b": relu_net()}, split([12, 8, 4])
    row = {name: sharpness.worst_case(model, LOSS, data) for name, model in models.items()}
    pairs = [b - a for a, b in zip(row["a"].per_batch, row["b"].per_batch, strict=True)]
    shares = [12 / 24, 8 / 24, 4 / 24]
    mean = sum(s * d for s, d in zip(shares, pairs, strict=True))
    error = math.sqrt(sum((s * (d - mean)) ** 2 for s, d in zip(shares, pairs, strict=True)) * 3 / 2)
    found = difference(row["a"], row["b"], [12, 8, 4])
    assert found.value == pytest.approx(mean) and found.standard_error == pytest.approx(error)
    assert found.is_clear == (abs(mean) > 4.30 * error)


@pytest.mark.parametrize(("values", "clear"), [((1.0, 1.02), False), ((1.0, 1.2), True), ((0.0, 0.0), False)])
def test_a_difference_without_an_error_is_clear_above_five_per_cent(values, clear):
    first, second = (sharpness.Result("x", value, None, 0.0, {}) for value in values)
    assert difference(first, second, [1]).is_clear == clear


def test_a_difference_that_is_not_finite():
    first, second = (sharpness.Result("x", value, None, 0.0, {}) for value in (1.0, math.inf))
    assert difference(first, second, [1]).is_clear
    assert not difference(second, second, [1]).is_clear


def test_the_same_function_at_another_scale_is_seen_through():
    model = relu_net()
    data = split([16] * 6)
    verdict = sharpness.compare({"small": model, "large": rescaled(model, 8)}, LOSS, data).verdict
    # The adaptive measures cannot tell the two apart; the plain ones call the rescaled model sharper.
    assert "small is flatter by every measure that tells the two apart" in verdict
    assert "Within the error: worst_case" in verdict and "weight_noise" in verdict


def test_a_disagreement_by_scale_names_the_norms_and_what_to_believe():
    rough, smooth = relu_net(), relu_net()
    with torch.no_grad():
        rough[2].weight.mul_(3)
        for layer in (rough[0], rough[2]):
            layer.weight.mul_(4)
            layer.bias.mul_(4)
    smooth = rescaled(smooth, 30)
    data = split([16] * 6)
    comparison = sharpness.compare(
        {"rough": rough, "smooth": smooth}, LOSS, data, measures=["worst_case", "worst_case_plain", "lambda_max"]
    )
    assert comparison.verdict.startswith("The measures disagree: ")
    assert "The reason is scale" in comparison.verdict
    assert f"{comparison.norms['rough']:.3g}" in comparison.verdict
    assert "Believe worst_case, which move" in comparison.verdict


def test_what_survives_is_said_apart_from_sharpness():
    model = classifier()
    fragile = copy.deepcopy(model)
    with torch.no_grad():
        fragile[0].weight[:, 0] = 40.0  # one large weight a row, so that the others are rounded away
    x, _ = split([64])[0]
    x[:, 0] = 0
    with torch.no_grad():
        model[2].weight.mul_(10)
        fragile[2].weight.mul_(10)
    y = model(x).argmax(1)
    data = list(zip(x.split(8), y.split(8), strict=True))
    comparison = sharpness.compare({"plain": model, "fragile": fragile}, LOSS, data, measures=["quantization"])
    assert comparison.differences["quantization"]["fragile"].is_clear
    assert comparison.results["loss"]["plain"].value == pytest.approx(comparison.results["loss"]["fragile"].value)
    assert "stands rounding of its weights better" in comparison.verdict


def test_equal_models_are_not_told_apart():
    model = classifier()
    comparison = sharpness.compare({"one": model, "two": copy.deepcopy(model)}, LOSS, split([8] * 4))
    assert comparison.verdict.startswith("No measure tells one and two apart")
    assert all(not row["two"].is_clear for row in comparison.differences.values())


def test_a_lower_loss_is_named_where_curvature_follows_it():
    model = classifier()
    x, _ = split([400])[0]
    top = model(x).topk(2, dim=1).values
    x = x[(top[:, 0] - top[:, 1]).topk(96).indices].detach()  # far from every boundary, so that scaling fits them
    data = [(part, model(part).argmax(1)) for part in x.split(16)]
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure[2].weight.mul_(200)
        sure[2].bias.mul_(200)
    comparison = sharpness.compare({"unsure": model, "sure": sure}, LOSS, data, measures=["lambda_max", "trace"])
    assert comparison.results["loss"]["sure"].value < comparison.results["loss"]["unsure"].value / 3
    assert comparison.differences["trace"]["sure"].is_clear and comparison.differences["trace"]["sure"].value < 0
    assert "Careful with" in comparison.verdict and "curvature of cross-entropy shrinks" in comparison.verdict


def test_it_changes_no_model():
    models = {"a": conv_net(), "b": conv_net()}
    before = {name: surroundings(model) for name, model in models.items()}
    sharpness.compare(models, sharpness.cross_entropy, images(), elsewhere=images()[:1])
    for name, model in models.items():
        assert_unchanged(before[name], model)


def test_more_than_two_models_are_compared_with_the_first():
    models = {name: conv_net() for name in "abc"}
    with torch.no_grad():
        models["c"][7].weight.mul_(5)
    comparison = sharpness.compare(models, LOSS, images(), measures=["one_step", "worst_case"], elsewhere=images())
    assert list(comparison.differences["worst_case"]) == ["b", "c"]
    assert len(comparison.verdict.splitlines()) == 2
    table = comparison.table()
    assert [line.split()[0] for line in table.splitlines()[2:-1]] == ["loss", "one_step", "worst_case", "forgetting"]
    assert "c - a" in table.splitlines()[0]
    assert str(comparison) == f"{table}\n\n{comparison.verdict}"
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_the_plot_overlays_the_models():
    comparison = sharpness.compare({"a": conv_net(), "b": conv_net()}, LOSS, images())
    figure = comparison.plot()
    figure.canvas.draw()
    assert figure.get_suptitle() == "a and b"
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "below 1: flatter", "worst case", "worst case plain", "weight noise", "lambda max", "trace", "quantization"
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("models", "kind"),
    [({"a": classifier()}, ValueError), ([classifier(), classifier()], TypeError), ({"a": 1, "b": 2}, TypeError)],
)
def test_what_cannot_be_compared_is_refused(models, kind):
    with pytest.raises(kind):
        sharpness.compare(models, LOSS, split([8]))


def test_measures_by_name():
    chosen = named_measures({"worst_case": {"rho": 0.1}, "mine": partial(sharpness.hessian_trace, samples=1)})
    assert chosen["worst_case"].keywords == {"rho": 0.1, "adaptive": True, "steps": 10}
    assert list(named_measures(["lambda_max", sharpness.active_units])) == ["lambda_max", "active_units"]
    warm = named_measures(["lambda_max"], warm=True)["lambda_max"]
    assert isinstance(warm.keywords["start"], sharpness.WarmStart)
    for wrong, kind in (("worst_case", TypeError), ([], ValueError), (["sharp"], ValueError), ([3], TypeError)):
        with pytest.raises(kind):
            named_measures(wrong)


def test_models_with_other_trainable_weights_are_cautioned_about():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    frozen = copy.deepcopy(whole)
    frozen[0].requires_grad_(False)
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]
    options = {"loss_fn": nn.CrossEntropyLoss(), "batches": data, "measures": ["worst_case_plain"]}
    verdict = sharpness.compare({"whole": whole, "frozen": frozen}, **options).verdict
    assert "Careful: 83 weights move in whole and 27 in frozen" in verdict
    assert "Careful" not in sharpness.compare({"one": whole, "other": copy.deepcopy(whole)}, **options).verdict
