"""What survives rounding, noise, attacks and further training, against loops written by hand in fp64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from samopt import sharpness
from tests.sharpness.test_losses_and_batches import classifier, hand, split

LOSS = nn.CrossEntropyLoss()


def mean(model, batches, function=hand):
    total = sum(len(batch[1]) for batch in batches)
    with torch.no_grad():
        return sum(len(batch[1]) * float(function(model, batch)) for batch in batches) / total


@pytest.mark.parametrize("sizes", [[24], [20, 4]])
def test_quantization_is_rounding_each_row_by_hand(sizes):
    model, data = classifier(), split(sizes)
    result = sharpness.quantization(model, LOSS, data, bits=[8, 4, 2], accuracy_fn=sharpness.accuracy)
    assert result.loss == pytest.approx(mean(model, data), rel=1e-12)
    accuracies = [mean(model, data, sharpness.accuracy)]
    for bits, rise in zip([8, 4, 2], result.rises, strict=True):
        rounded = copy.deepcopy(model)
        for weight in (rounded[0].weight, rounded[2].weight):
            for row in weight.data:
                step = row.abs().max() / (2 ** (bits - 1) - 1)
                row.copy_(torch.stack([step * round(float(value / step)) for value in row]))
        assert rise == pytest.approx(mean(rounded, data) - result.loss, abs=1e-12)
        accuracies.append(mean(rounded, data, sharpness.accuracy))
    assert result.value == result.rises[-1]
    assert result.accuracies == pytest.approx(accuracies)


def test_rounding_leaves_a_row_of_zeros_alone():
    model = classifier()
    model[0].weight.data[2] = 0
    assert sharpness.quantization(model, LOSS, split([8]), bits=[8]).value == pytest.approx(0, abs=0.01)


def test_weight_noise_is_the_average_case_at_each_scale():
    model, data = classifier(), split([12, 12])
    result = sharpness.weight_noise(model, LOSS, data, scales=[0.1, 0.3], samples=3)
    each = [sharpness.average_case(model, LOSS, data, rho=rho, adaptive=True, samples=3) for rho in (0.1, 0.3)]
    assert result.rises == tuple(one.value for one in each)
    assert result.errors == tuple(one.standard_error for one in each)
    assert result.cost == sum(one.cost for one in each)


@pytest.mark.parametrize("kind", ["pair", "dict"])
@pytest.mark.parametrize("bounds", [None, (-0.5, 0.5)])
def test_fgsm_is_a_signed_step_by_hand(kind, bounds):
    model, data = classifier(), split([20, 4])
    moved = []
    for x, y in data:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y), [leaf])
        step = x + 0.2 * gradient.sign()
        moved.append((step if bounds is None else step.clamp(*bounds), y))
    given = data if kind == "pair" else [{"x": x, "labels": y} for x, y in data]
    result = sharpness.fgsm(model, LOSS, given, sizes=[0.0, 0.2], bounds=bounds, accuracy_fn=sharpness.accuracy)
    assert result.value == pytest.approx(mean(model, moved) - mean(model, data), rel=1e-12)
    assert result.accuracies[-1] == pytest.approx(mean(model, moved, sharpness.accuracy))
    if bounds is None:
        assert result.rises[0] == 0
        assert result.value > 0


def test_fgsm_refuses_inputs_that_cannot_move():
    with pytest.raises(TypeError, match="floating-point tensor"):
        sharpness.fgsm(classifier(), LOSS, [(torch.zeros(4, 5, dtype=torch.long), torch.zeros(4).long())])


def test_forgetting_is_the_same_training_by_hand():
    model, old, new = classifier(), split([12, 12]), split([6, 6])
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    result = sharpness.forgetting(model, LOSS, old, new, steps=8, optimizer=sgd)
    twin = copy.deepcopy(model)
    optimizer = sgd(twin.parameters())
    rises, learned = [], [mean(twin, new)]
    for step in range(8):
        optimizer.zero_grad()
        hand(twin, new[step % 2]).backward()
        optimizer.step()
        if step % 2:
            rises.append(mean(twin, old) - mean(model, old))
            learned.append(mean(twin, new))
    assert result.levels == (2, 4, 6, 8)
    assert result.rises == pytest.approx(rises, rel=1e-9)
    assert result.new_losses == pytest.approx(learned, rel=1e-9)


def test_forgetting_trains_normalisation_and_measures_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    twin = copy.deepcopy(model)
    data = split([12])
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    result = sharpness.forgetting(model, LOSS, data, data, steps=3, optimizer=sgd)
    optimizer = sgd(twin.parameters())
    before = mean(twin, data)
    for _ in range(3):
        twin.train()
        optimizer.zero_grad()
        hand(twin, data[0]).backward()
        optimizer.step()
    assert result.value == pytest.approx(mean(twin.eval(), data) - before, rel=1e-9)
    assert not model.training


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (sharpness.quantization, {"bits": [1]}),
        (sharpness.quantization, {"bits": []}),
        (sharpness.weight_noise, {"scales": []}),
        (sharpness.weight_noise, {"scales": [-1.0]}),
        (sharpness.fgsm, {"sizes": [-0.1]}),
    ],
)
def test_options_out_of_range_are_refused(measure, options):
    with pytest.raises(ValueError):
        measure(classifier(), LOSS, split([8]), **options)
