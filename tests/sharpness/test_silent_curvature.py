"""Curvature of models that have several outputs, repeated eigenvalues, or none at all."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import samopt
from samopt import sharpness
from samopt.sharpness._measuring.losses import cross_entropy
from samopt.sharpness.radius.range_test import range_test


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("measure", [sharpness.hessian_eigenvalues, sharpness.gauss_newton_eigenvalues])
def test_an_eigenvalue_that_occurs_several_times_is_found_as_often(measure, which):
    """Oracle: the Hessian of a regression with 5 outputs is X^T X, once for each output."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(64, 12, generator=generator), torch.randn(64, 5, generator=generator)
    torch.manual_seed(0)
    found = measure(nn.Linear(12, 5, bias=False), nn.MSELoss(), [(inputs, targets)], k=7, which=which)
    once = torch.linalg.eigvalsh(2 * inputs.double().T @ inputs.double() / (64 * 5))
    every = sorted([float(value) for value in once for _ in range(5)], reverse=which != "smallest")
    assert found.values == pytest.approx(every[:7], rel=2e-3)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_repeated_eigenvalues_of_both_signs(which):
    diagonal = torch.tensor([3.0] * 3 + [-3.5] * 3 + [1.0] * 40 + [-1.0] * 40)
    model = nn.Linear(86, 1, bias=False)
    found = sharpness.hessian_eigenvalues(
        model, lambda model, batch: (diagonal * model.weight**2).sum() / 2, [None], k=4, which=which
    )
    expected = {"largest": [3, 3, 3, 1], "smallest": [-3.5, -3.5, -3.5, -1], "magnitude": [-3.5, -3.5, -3.5, 3]}
    assert found.values == pytest.approx(expected[which], rel=2e-3)


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = nn.Linear(6, 3), kind

    def forward(self, batch):
        logits = self.layer(batch[0])
        if self.kind == "the loss first":
            return functional.cross_entropy(logits, batch[1]), logits
        return (logits, self.layer(batch[0] + 1)) if self.kind == "two heads" else (logits, logits.tanh())


def head_losses(model, batch):
    first, second = model(batch)
    return functional.cross_entropy(first, batch[1]) + 100 * second.square().mean()


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("the loss first", lambda model, batch: model(batch)[0]), ("two heads", head_losses)],
)
def test_gauss_newton_refuses_several_outputs_that_reach_the_loss(kind, loss):
    with pytest.raises(ValueError, match="Outputs returns several outputs"):
        sharpness.gauss_newton_eigenvalues(Outputs(kind), loss, batches())


def test_gauss_newton_takes_the_first_output_where_the_others_do_not_reach_the_loss():
    found = sharpness.gauss_newton_eigenvalues(
        Outputs("features"), lambda model, batch: functional.cross_entropy(model(batch)[0], batch[1]), batches()
    )
    torch.manual_seed(0)
    plain = nn.Linear(6, 3)
    assert found.value == pytest.approx(sharpness.gauss_newton_eigenvalues(plain, cross_entropy, batches()).value)


def test_gauss_newton_refuses_a_loss_beside_the_outputs():
    def loss(model, batch):
        model(batch[0])
        return functional.cross_entropy(model[2](model[1](model[0](batch[0]))), batch[1])

    with pytest.raises(ValueError, match="does not depend on the outputs of Sequential"):
        sharpness.gauss_newton_eigenvalues(mlp(), loss, batches())


NO_CURVATURE = [
    sharpness.hessian_eigenvalues,
    partial(sharpness.hessian_eigenvalues, parameters="2.bias"),
    sharpness.hessian_trace,
    sharpness.spectral_density,
]


@pytest.mark.parametrize("measure", NO_CURVATURE)
def test_curvature_that_is_not_finite_is_an_error(measure):
    def loss(model, batch):
        return cross_entropy(model, batch) + model[2].bias.abs().pow(1.5).sum()

    model = mlp()
    nn.init.zeros_(model[2].bias)
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        measure(model, loss, batches())


@pytest.mark.parametrize("measure", NO_CURVATURE)
@pytest.mark.parametrize("kind", ["an input that is no number", "no label that counts"])
def test_curvature_of_a_loss_that_is_no_number_is_an_error(measure, kind):
    """Without a label that counts the gradient is 0, which lowered the mean over the batches."""
    data = batches()
    if kind == "no label that counts":
        data[1] = (data[1][0], torch.full_like(data[1][1], -100))
    else:
        data[1][0][0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss of batch 1 is nan at the weights themselves"):
        measure(mlp(), nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize("measure", [sharpness.worst_case, sharpness.gauss_newton_eigenvalues, *NO_CURVATURE])
def test_a_loss_of_another_model_is_refused(measure):
    other = mlp()
    with pytest.raises(ValueError, match="none of the trainable parameters of Sequential.*another model"):
        measure(mlp(), lambda model, batch: functional.cross_entropy(other(batch[0]), batch[1]), batches())


def test_adagrad_divides_its_learning_rate_by_the_steps():
    """Oracle: torch's own next step, over the gradient, for a weight whose accumulator does not change."""
    model = nn.Linear(3, 1, bias=False)
    diagonal = torch.tensor([1.0, 2.0, 3.0])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, lr_decay=0.5)
    for _ in range(5):
        model.weight.grad = torch.ones(1, 3)
        before = model.weight.detach().clone()
        optimizer.step()
    moved = (before - model.weight.detach()) / 0.1  # P^-1 g of the last step, with g = 1
    found = sharpness.preconditioned_eigenvalues(
        model, lambda model, batch: (diagonal * model.weight**2).sum() / 2, [None], optimizer
    )
    assert found.value == pytest.approx(float((moved * diagonal).max()), rel=1e-4)


def test_groups_of_different_momentum_have_no_one_threshold():
    model = mlp()
    groups = [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters(), "momentum": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="differ in their momentum"):
        sharpness.preconditioned_eigenvalues(model, nn.CrossEntropyLoss(), batches(), optimizer)
    one = sharpness.preconditioned_eigenvalues(model, nn.CrossEntropyLoss(), batches(), optimizer, parameters="0")
    assert one.threshold == pytest.approx(38.0)


@pytest.mark.parametrize("which", ["smallest", "magnitude"])
def test_the_most_negative_eigenvalue_is_no_vote_on_flatness(which):
    steep = mlp()
    for weight in steep.parameters():
        weight.data.mul_(3)
    found = sharpness.compare(
        {"a": mlp(), "b": steep},
        nn.CrossEntropyLoss(),
        batches(),
        measures={which: partial(sharpness.hessian_eigenvalues, which=which)},
    )
    assert "flatter by" not in found.verdict


def warm_up(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))


def one_cycle(optimizer):
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)


@pytest.mark.parametrize("schedule", [warm_up, one_cycle])
def test_find_rho_trains_at_the_peak_of_a_schedule(schedule):
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule(base)
    before = base.param_groups[0]["lr"]
    options = {"radii": (0.1,), "steps": 6, "folds": 2}
    found = samopt.find_rho(model, nn.CrossEntropyLoss(), batches(6), optimizer=base, **options)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    momentum = base.param_groups[0]["momentum"]  # a cycle schedules it, too
    plain.param_groups[0]["momentum"] = momentum
    expected = samopt.find_rho(model, nn.CrossEntropyLoss(), batches(6), optimizer=plain, **options)
    assert found.loss_rises == expected.loss_rises and base.param_groups[0]["lr"] == before < 0.1


def test_find_rho_refuses_a_learning_rate_of_zero():
    model = mlp()
    with pytest.raises(ValueError, match="learning rate is 0"):
        samopt.find_rho(
            model, nn.CrossEntropyLoss(), batches(6), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), steps=2
        )


def test_the_range_test_of_asam_is_its_own_ascent():
    model = mlp()
    found = samopt.find_rho(
        model,
        nn.CrossEntropyLoss(),
        batches(8),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-12),
        radii=(0.5,),
        variant="asam",
        steps=1,
        folds=2,
    )
    options = {"rho": found.tested_radii[4], "adaptive": "asam", "eta": 0.01, "steps": 1, "mode": "train"}
    trained_on = [batches(8)[place] for place in (0, 1, 2, 4)]  # every fourth is held out
    expected = sharpness.worst_case(model, nn.CrossEntropyLoss(), trained_on, **options)
    assert found.rises[4] == pytest.approx(expected.value, rel=1e-4)


def test_the_range_test_of_bf16_weights_sees_small_radii():
    radii = [0.002, 0.02]
    precise, _ = range_test(mlp(), cross_entropy, batches(8), radii, False)
    rounded, _ = range_test(mlp().bfloat16(), cross_entropy, [(x.bfloat16(), y) for x, y in batches(8)], radii, False)
    assert rounded[0] > 0.3 * precise[0] and rounded[1] == pytest.approx(precise[1], rel=0.2)


def test_the_range_test_of_sparse_and_of_complex_gradients():
    def words(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(20, 6, sparse=sparse), nn.Linear(6, 3))

    data = [(torch.randint(20, (8, 4)), torch.randint(3, (8,)))]
    results = [range_test(words(sparse), cross_entropy, data, [0.1], False) for sparse in (True, False)]
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other)

    def cosine(weight):
        model = nn.Module()
        model.weight = nn.Parameter(weight)
        square = lambda model, batch: torch.view_as_real(model.weight).square().mul(scale).sum() / 2  # noqa: E731
        real = lambda model, batch: model.weight.square().mul(scale).sum() / 2  # noqa: E731
        return range_test(model, square if weight.is_complex() else real, [None], [0.5], False)

    scale = torch.tensor([[1.0, 5.0], [2.0, 9.0]])
    weight = torch.tensor([[0.3, -0.2], [0.5, 0.1]])
    for one, other in zip(cosine(torch.view_as_complex(weight.clone())), cosine(weight.clone()), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_monitor_measures_once_for_a_step_and_after_one_that_was_left_out():
    def record(steps, every):
        monitor = sharpness.SharpnessMonitor(
            mlp(), nn.CrossEntropyLoss(), batches(), every=every, measures=["one_step"], max_fraction=None
        )
        for step in steps:
            monitor.step(step)
        return [each["step"] for each in monitor.history]

    assert record([1, 1, 2, 2, 3, 3, 4, 4], 2) == [2, 4]  # at each micro-batch
    assert record(range(3, 31, 3), 5) == [6, 12, 15, 21, 27, 30]  # two optimizers that count together skip numbers
    assert record([1001, 1002], 5) == []  # a run that goes on
