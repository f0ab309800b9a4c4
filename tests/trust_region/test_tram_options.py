"""TRAM's radius under its options, and what misuse is told."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.trust_region import EMA, InputNoise, PreviousStep
from tests.helpers.cases import batch, bits, closure_of, mlp, same_bits


def test_both_constructor_forms_take_the_same_steps() -> None:
    weights = []
    for wraps in (True, False):
        model = mlp(torch.float64)
        options = {"model": model, "trust_region": EMA(0.5), "divergence": "l2", "scale": 3.0, "max_radius": 0.2}
        if wraps:
            optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), **options)
        else:
            optimizer = samopt.TRAM(model.parameters(), torch.optim.SGD, lr=0.3, momentum=0.9, **options)
        for step in range(3):
            optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step)))
        assert 0 < optimizer.last_step.radius.item() <= 0.2
        weights.append(bits(model))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))


def test_a_larger_scale_is_a_larger_radius_until_the_bound() -> None:
    radii = []
    for scale, bound in ((1.0, None), (8.0, None), (8.0, 1e-3)):
        model = mlp(torch.float64)
        optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, scale=scale, max_radius=bound)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, model, batch(torch.float64)))
        radii.append(optimizer.last_step.radius.item())
    assert radii[1] == pytest.approx(8 * radii[0], rel=1e-12)
    assert radii[2] == 1e-3 < radii[1]


@pytest.mark.parametrize("answer", [math.nan, math.inf, torch.tensor(math.nan), torch.tensor(math.inf)])
def test_a_distance_that_is_no_number_moves_nothing(answer: float | Tensor) -> None:
    model, plain = mlp(), mlp()
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), trust_region=lambda: answer)
    stock = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer.step(closure_of(optimizer, model, batch()))
    stock.step(closure_of(stock, plain, batch()))
    assert same_bits(model, bits(plain))
    bounded = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.1), trust_region=lambda: torch.tensor(math.inf), max_radius=0.25
    )
    bounded.step(closure_of(bounded, model, batch()))
    assert bounded.last_step.radius.item() == 0.25


def test_scale_is_scheduled_as_rho_and_costs_one_pass_at_zero() -> None:
    model = mlp(torch.float64)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, scale=8.0)
    schedule = samopt.RhoScheduler(optimizer, lambda step: 0.0 if step < 2 else 1.0)
    counts, radii = [], []
    for step in range(4):
        forwards = 0
        optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step)))
        schedule.step()
        counts.append(forwards)
        radii.append(optimizer.last_step.radius.item())
    assert counts == [1, 1, 3, 3]  # no reference forward while it is off; the reference itself keeps up
    assert radii[:2] == [0.0, 0.0] and radii[2] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.05}, TypeError, r"got rho=0.05; its radius is scale times .*: use scale=, or samopt.ASAM"),
        ({"scale": -1.0}, ValueError, "scale must be >= 0 and finite, got -1.0"),
        ({"max_radius": 0.0}, ValueError, "max_radius must be > 0, got 0.0; use scale=0"),
        ({"divergence": "js"}, ValueError, r"divergence must be one of \['kl'"),
        (
            {"geometry": "round"},
            ValueError,
            r"geometry must be one of \['adaptive', .*'preconditioned'\]",
        ),
        (
            {"trust_region": "last"},
            ValueError,
            r"one of \['previous', 'ema', 'pretrained', 'input_noise'\].*got 'last'",
        ),
        ({"trust_region": EMA}, TypeError, "trust_region must be a name, an object with measure"),
        ({"trust_region": 3}, TypeError, "trust_region must be a name.*got 3"),
        (
            {"direction": "momentum"},
            ValueError,
            "measures PreviousStep in the first pass, which direction='momentum' does",
        ),
        ({"model": None}, TypeError, "TRAM measures PreviousStep on the model's forward calls, but model= is NoneType"),
    ],
)
def test_misuse_is_explained(options: dict, error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), **({"model": model} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(decay=1.0), r'decay must be between 0 and 1, got 1.0; for 0 use trust_region="previous"'),
        (lambda: InputNoise(std=0.0), "std must be > 0 and finite, got 0.0"),
        (lambda: InputNoise(std=float("inf")), "std must be > 0 and finite, got inf"),
        (lambda: InputNoise(std=float("nan")), "std must be > 0 and finite, got nan"),
        (lambda: InputNoise(kind="laplace"), 'kind must be "normal" or "uniform", got \'laplace\''),
        (lambda: PreviousStep(dtype=torch.float16), "torch.float32 or torch.bfloat16, got dtype=torch.float16"),
    ],
)
def test_bad_options_of_a_trust_region_are_explained(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_one_trust_region_serves_one_optimizer() -> None:
    region, model = PreviousStep(), mlp()
    samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region)
    with pytest.raises(ValueError, match="already serves an optimizer, whose reference it holds; make one for each"):
        samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region)


def test_a_loop_that_calls_another_module_is_told_so() -> None:
    model = mlp()
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    before = bits(model)
    x, y = batch()
    hidden = model[1](model[0](x))
    nn.functional.cross_entropy(model[2](hidden), y).backward()
    with pytest.raises(
        RuntimeError, match="saw no forward call of model=Sequential in this first pass.*the loop calls"
    ):
        optimizer.ascend()
    assert same_bits(model, before) and not optimizer.is_perturbed
