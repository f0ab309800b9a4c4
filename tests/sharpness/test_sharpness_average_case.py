"""Average-case sharpness against expectations in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from samopt import sharpness
from tests.helpers.cases import batch, mlp
from tests.helpers.quadratics import Weights, normal, quadratic, symmetric


@pytest.mark.parametrize("adaptive", [False, True, "asam"])
@pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
def test_of_a_quadratic_is_half_the_metrics_trace(norm, variance, adaptive):
    """``E[u.TAT.u] / 2 = variance rho^2 sum T_i^2 A_ii / 2``; odd orders cancel pair by pair."""
    matrix = symmetric(12) + 3 * torch.eye(12, dtype=torch.float64)
    model = Weights(normal(2, 3, seed=1), normal(6, seed=2))
    lengths = {
        False: torch.ones(12, dtype=torch.float64),
        True: model.vector().abs(),
        "asam": torch.cat([model.w0.flatten().abs(), torch.ones(6, dtype=torch.float64)]),
    }[adaptive].detach()
    expected = 0.5 * variance * 0.2**2 * float((lengths**2 * torch.diag(matrix)).sum())
    result = sharpness.average_case(
        model, quadratic(matrix), [None], rho=0.2, norm=norm, adaptive=adaptive, samples=400
    )
    assert abs(result.value - expected) < 4 * result.standard_error
    assert result.standard_error < 0.1 * expected


def test_of_a_linear_loss_is_zero_sample_by_sample():
    slope = normal(5, seed=1)
    result = sharpness.average_case(Weights(normal(5)), lambda m, _: m.vector() @ slope, [None], rho=1.0, samples=20)
    assert max(map(abs, result.per_sample)) < 1e-14


def test_is_the_same_for_adaptively_rescaled_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)).double()
    data = [batch(torch.float64)]
    before = sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.1, adaptive=True).per_sample
    plain = sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.1).value
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[0].bias.mul_(8)
        model[2].weight.div_(8)
    after = sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.1, adaptive=True).per_sample
    assert after == pytest.approx(before, rel=1e-9)
    assert sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.1).value > 2 * plain


def test_errors_are_those_of_batches_or_of_samples():
    model = mlp()
    several = sharpness.average_case(model, sharpness.cross_entropy, [batch(seed=s) for s in range(3)], samples=4)
    assert several.standard_error == pytest.approx(
        float(torch.tensor(several.per_batch).std()) / math.sqrt(3), rel=1e-4
    )
    assert len(several.per_sample) == 12
    one = sharpness.average_case(model, sharpness.cross_entropy, [batch()], samples=4)
    assert one.standard_error == pytest.approx(float(torch.tensor(one.per_sample).std()) / 2, rel=1e-4)
    assert sharpness.average_case(model, sharpness.cross_entropy, [batch()], samples=1).standard_error is None


def test_noise_depends_on_the_seed_the_batch_and_the_sample():
    model = mlp()
    twice = sharpness.average_case(model, sharpness.cross_entropy, [batch(), batch()], samples=2)
    assert len(set(twice.per_sample)) == 4
    other = sharpness.average_case(model, sharpness.cross_entropy, [batch(), batch()], samples=2, seed=1)
    assert not set(twice.per_sample) & set(other.per_sample)


def test_its_error_shrinks_as_promised():
    """The spread of the estimate over seeds is what one estimate says of itself."""
    matrix, model = symmetric(20) + 3 * torch.eye(20, dtype=torch.float64), Weights(normal(20))
    results = [
        sharpness.average_case(model, quadratic(matrix), [None], rho=0.1, samples=25, seed=seed) for seed in range(60)
    ]
    spread = float(torch.tensor([result.value for result in results], dtype=torch.float64).std())
    claimed = math.sqrt(sum(result.standard_error**2 for result in results) / 60)
    assert spread == pytest.approx(claimed, rel=0.3)


def test_the_cost_is_the_number_of_forward_passes():
    calls = []

    def loss_fn(model, data):
        calls.append(torch.is_grad_enabled())
        return sharpness.cross_entropy(model, data)

    result = sharpness.average_case(mlp(), loss_fn, [batch(), batch()], samples=3)
    assert calls == [False] * 14
    assert result.cost == pytest.approx(14 / 3)


def test_a_bad_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        sharpness.average_case(mlp(), sharpness.cross_entropy, [batch()], samples=0)
