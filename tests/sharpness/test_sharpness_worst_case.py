"""Worst-case sharpness against closed forms, against SAM, and under the reparametrisations it should not see."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

import samopt
from samopt import sharpness
from tests.helpers.cases import batch, mlp
from tests.helpers.quadratics import Weights, linear, normal, quadratic


def positive(values):
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=5))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def worst_quadratic(matrix, gradient, rho):
    """The maximum of ``g.d + d.A.d / 2`` over ``||d|| = rho``, from the trust-region problem's secular equation."""
    eigenvalues, basis = torch.linalg.eigh(matrix)
    g = basis.T @ gradient

    def excess(multiplier):
        return float(((g / (multiplier - eigenvalues)) ** 2).sum()) ** 0.5 - rho

    top = float(eigenvalues[-1])
    multiplier = brentq(excess, top + 1e-9, top + 1e6, xtol=1e-14, rtol=1e-14)
    d = g / (multiplier - eigenvalues)
    return float(g @ d + 0.5 * (eigenvalues * d * d).sum())


@pytest.mark.parametrize("adaptive", [False, True, "asam"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_of_a_linear_loss_is_the_dual_norm_of_its_slope(norm, adaptive):
    model = Weights(normal(2, 3), normal(4, seed=1))
    slope = normal(10, seed=2)
    eta = 0.01 if adaptive == "asam" else 0.0
    lengths = {
        False: torch.ones(10, dtype=torch.float64),
        True: model.vector().abs(),
        "asam": torch.cat([model.w0.flatten().abs() + 0.01, torch.ones(4, dtype=torch.float64)]),
    }[adaptive].detach()
    dual = float((lengths * slope).norm() if norm == "l2" else (lengths * slope).abs().sum())
    result = sharpness.worst_case(model, linear(slope), [None], rho=0.3, norm=norm, adaptive=adaptive, eta=eta, steps=4)
    torch.testing.assert_close(torch.tensor(result.curve), torch.full((4,), 0.3 * dual), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_of_a_quadratic_solves_the_trust_region_problem(rho):
    matrix, slope = positive([0.5, 1.0, 2.0, 4.0, 5.0]), normal(5, seed=3)
    model = Weights(normal(5, seed=4))
    gradient = (matrix @ model.vector() + slope).detach()
    result = sharpness.worst_case(model, quadratic(matrix, slope), [None], rho=rho, steps=200)
    assert result.value == pytest.approx(worst_quadratic(matrix, gradient, rho), rel=1e-5)


def test_of_a_quadratic_in_the_adaptive_ball_is_that_of_the_rescaled_quadratic():
    matrix, slope = positive([0.5, 1.0, 2.0, 4.0, 5.0]), normal(5, seed=3)
    model = Weights(normal(5, seed=4))
    lengths = model.vector().abs().detach()
    gradient = lengths * (matrix @ model.vector() + slope).detach()
    rescaled = lengths[:, None] * matrix * lengths
    result = sharpness.worst_case(model, quadratic(matrix, slope), [None], rho=0.7, adaptive=True, steps=200)
    assert result.value == pytest.approx(worst_quadratic(rescaled, gradient, 0.7), rel=1e-5)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_of_one_example_under_a_linear_softmax_is_in_closed_form(norm, dual, adaptive):
    x, w = normal(6, seed=1), normal(6)
    model = Weights(w)

    def loss_fn(model, batch):
        return torch.nn.functional.softplus(-(model.vector() @ x))

    lengths = w.abs() if adaptive else torch.ones_like(w)
    margin = float(w @ x) - 0.4 * float(torch.linalg.vector_norm(lengths * x, dual))
    expected = math.log1p(math.exp(-margin)) - math.log1p(math.exp(-float(w @ x)))
    result = sharpness.worst_case(model, loss_fn, [None], rho=0.4, norm=norm, adaptive=adaptive, steps=10)
    assert result.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (samopt.SAM, {"rho": 0.5}),
        (samopt.ASAM, {"rho": 0.5, "adaptive": "asam", "eta": 0.01}),
    ],
)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_step_is_what_the_optimizer_measures(variant, options, norm, dtype):
    model, data = mlp(dtype), batch(dtype)
    result = sharpness.worst_case(model, sharpness.cross_entropy, [data], norm=norm, steps=1, **options)
    optimizer = variant(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, norm=norm)

    def closure():
        optimizer.zero_grad()
        loss = sharpness.cross_entropy(model, data)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert result.value == float(optimizer.last_step.sharpness) > 0


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_one_step_is_the_optimizers_with_dropout_and_batch_norm(mode):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 3))
    data = batch()
    model.train(mode == "train")
    torch.manual_seed(7)
    result = sharpness.worst_case(model, sharpness.cross_entropy, [data], rho=0.5, steps=1, mode=mode)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)

    def closure():
        optimizer.zero_grad()
        loss = sharpness.cross_entropy(model, data)
        loss.backward()
        return loss

    torch.manual_seed(7)
    optimizer.step(closure)
    assert result.value == float(optimizer.last_step.sharpness)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_more_steps_and_restarts_find_no_less(norm, adaptive):
    options = {"rho": 0.2 if norm == "linf" else 0.5, "norm": norm, "adaptive": adaptive}
    model, batches = mlp(), [batch(seed=1), batch(seed=2)]
    once = sharpness.worst_case(model, sharpness.cross_entropy, batches, steps=1, **options)
    short = sharpness.worst_case(model, sharpness.cross_entropy, batches, steps=5, **options)
    long = sharpness.worst_case(model, sharpness.cross_entropy, batches, steps=30, **options)
    again = sharpness.worst_case(model, sharpness.cross_entropy, batches, steps=30, restarts=3, **options)
    assert 0 < once.value < short.value < long.value <= again.value
    assert long.curve[0] == once.value
    assert list(long.curve) == sorted(long.curve)
    assert long.value == long.curve[-1] == sum(long.per_batch) / 2


def test_a_restart_finds_the_higher_of_two_hills():
    def two_hills(model, batch):
        w = model.vector()[0]
        return torch.where(w > 0, 2 * w, -3 * w)  # uphill from 0.1 is the lower hill

    model = Weights([0.1])
    assert sharpness.worst_case(model, two_hills, [None], rho=1.0).value == pytest.approx(2.0)
    found = sharpness.worst_case(model, two_hills, [None], rho=1.0, restarts=8).value
    assert found == pytest.approx(3 * 0.9 - 0.2)


def test_is_zero_at_a_maximum_and_at_radius_zero():
    model = Weights([1.0, 2.0])
    downhill = sharpness.worst_case(
        model, lambda model, batch: -((model.vector() - torch.tensor([1.0, 2.0]).double()) ** 2).sum(), [None], rho=0.5
    )
    assert downhill.value == 0
    assert sharpness.worst_case(model, linear(normal(2)), [None], rho=0.0).value == 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_search_stays_in_the_ball(norm):
    model = Weights(normal(2, 3), normal(4, seed=1))
    centre = model.vector().detach()
    lengths = centre.abs()
    visited = []

    def loss_fn(model, batch):
        visited.append((model.vector().detach() - centre) / lengths)
        return model.vector().sin().sum() * 3

    sharpness.worst_case(model, loss_fn, [None], rho=0.8, norm=norm, adaptive=True, steps=40, restarts=3)
    sizes = [float(torch.linalg.vector_norm(u, 2 if norm == "l2" else math.inf)) for u in visited]
    assert len(visited) == 3 * 41
    assert max(sizes) == pytest.approx(0.8, rel=1e-9)


def rescaled(model, factor):
    """The same ReLU network with its first layer scaled up and its last scaled down."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(factor)
        other[0].bias.mul_(factor)
        other[2].weight.div_(factor)
    return other


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_adaptive_measure_does_not_see_a_rescaling_of_layers(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    data = [batch(torch.float64)]

    def measure(model, **options):
        return sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.1, norm=norm, steps=20, **options).value

    other = rescaled(model, 8.0)  # a power of two: no weight is rounded
    assert measure(model, adaptive=True) == pytest.approx(measure(other, adaptive=True), rel=1e-9)
    assert measure(other) > 1.5 * measure(model)
    assert measure(other, adaptive="asam") != pytest.approx(measure(model, adaptive="asam"), rel=1e-3)  # its biases


def test_normalised_logits_do_not_see_their_scale():
    model = mlp(torch.float64)
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder[2].weight.mul_(4)
        louder[2].bias.mul_(4)
    data = [batch(torch.float64)]

    def measure(model, **options):
        return sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.1, adaptive=True, **options).value

    assert measure(model, normalize_logits=True) == pytest.approx(measure(louder, normalize_logits=True), rel=1e-9)
    assert measure(louder) > 2 * measure(model)


def test_m_measures_pieces_of_batches():
    model, (x, y) = mlp(), batch(size=16)
    whole = sharpness.worst_case(model, sharpness.cross_entropy, [(x, y)], steps=3, m=5)
    pieces = [(x[start : start + 5], y[start : start + 5]) for start in (0, 5, 10)]
    by_hand = sharpness.worst_case(model, sharpness.cross_entropy, pieces, steps=3)
    assert whole.per_batch == by_hand.per_batch
    assert len(whole.per_batch) == 3


def test_the_error_is_that_of_the_mean_over_batches():
    model = mlp()
    result = sharpness.worst_case(model, sharpness.cross_entropy, [batch(seed=s) for s in range(4)], steps=2)
    assert result.standard_error == pytest.approx(float(torch.tensor(result.per_batch).std()) / 2, rel=1e-5)
    assert sharpness.worst_case(model, sharpness.cross_entropy, [batch()], steps=2).standard_error is None


def test_the_cost_is_the_number_of_passes():
    passes = []

    def loss_fn(model, data):
        passes.append(torch.is_grad_enabled())
        return sharpness.cross_entropy(model, data)

    result = sharpness.worst_case(mlp(), loss_fn, [batch(), batch(seed=1)], steps=6, restarts=2)
    assert len(passes) == 2 * 2 * 7
    assert result.cost == pytest.approx(2 * 2 * (6 + 1 / 3))


def test_parameters_without_a_gradient_and_shared_gradients_are_fine():
    model = Weights([1.0, 2.0], [3.0, 4.0], [5.0])
    result = sharpness.worst_case(model, lambda model, batch: (model.w0 + model.w1).sum(), [None], rho=1.0, steps=5)
    assert result.value == pytest.approx(2.0)  # the slope is (1, 1, 1, 1)


def test_a_gradient_that_is_the_batch_itself_leaves_the_batch_alone():
    class Handed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, x):
            ctx.save_for_backward(x)
            return weight @ x

        @staticmethod
        def backward(ctx, grad_output):
            return ctx.saved_tensors[0], None

    x = normal(3)
    before = x.clone()
    result = sharpness.worst_case(Weights(normal(3, seed=1)), lambda model, x: Handed.apply(model.w0, x), [x], rho=0.5)
    assert torch.equal(x, before)
    assert result.value == pytest.approx(0.5 * float(x.norm()))


def test_sparse_gradients_are_measured_as_dense_ones():
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    dense = copy.deepcopy(sparse)
    dense[0].sparse = False
    data = [(torch.randint(10, (16, 2)), torch.randint(3, (16,)))]
    values = [
        sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.5, steps=8).value for model in (sparse, dense)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_an_infinite_rise_is_reported():
    model = Weights([1.0])
    result = sharpness.worst_case(model, lambda model, batch: -torch.log(2 - model.w0).sum(), [None], rho=1.0, steps=1)
    assert result.value == math.inf


def test_a_rise_that_is_no_number_ends_the_search():
    model = Weights([1.0])
    with pytest.warns(UserWarning, match="the loss was NaN at points within rho=1 "):
        result = sharpness.worst_case(model, lambda model, batch: -torch.log(1.5 - model.w0).sum(), [None], rho=1.0)
    assert result.value == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho must be >= 0 and finite, got -0\.1"),
        ({"norm": "l1"}, r'norm must be "l2" or "linf", got \'l1\''),
        ({"adaptive": "both"}, r'adaptive must be True, False or "asam", got \'both\''),
        ({"eta": -1.0}, r"eta must be >= 0"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"restarts": 0}, r"restarts must be at least 1, got 0"),
        ({"m": 0}, r"m must be at least 1, got 0"),
        ({"m": 17}, r"no batches to measure on that hold m=17 examples"),
        ({"mode": "test"}, r'mode must be "eval", "train" or "keep", got \'test\''),
        ({"parameters": "conv"}, r"parameters='conv' selects none of the 4 trainable parameters .* 0\.weight, 0\.bias"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness.worst_case(mlp(), sharpness.cross_entropy, [batch()], **options)


def test_a_diverged_model_is_refused():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss of batch 1 is nan at the weights themselves"):
        sharpness.worst_case(model, lambda m, b: b(m), [lambda m: m[2].weight.sum(), lambda m: m[0].weight.sum()])
