"""Every variant on every kind of base: the promises that do not depend on the formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import (
    BASES,
    DTYPES,
    TOLERANCE,
    VARIANTS,
    Preset,
    Variant,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    parameter_groups,
    rhos_of,
    same_bits,
)
from tests.helpers.published import PRESETS

each_perturbation = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
each_variant = pytest.mark.parametrize("variant", [*VARIANTS, *PRESETS], ids=lambda variant: variant.name)
each_pairing = pytest.mark.parametrize(
    ("variant", "base"),
    [
        pytest.param(variant, base, id=f"{base}-{variant.name}")
        for variant in [*VARIANTS, *PRESETS]
        for base in BASES
        if base not in getattr(variant, "without", ())
    ],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_grouping = pytest.mark.parametrize("factors", [(1.0,), (1.0, 0.3)], ids=["one-group", "two-groups"])

STEPS = 4


def build(
    variant: Variant | Preset, base: str, dtype: torch.dtype, factors: tuple[float, ...], **options: object
) -> tuple[nn.Module, samopt.SharpnessAwareOptimizer]:
    model = mlp(dtype)
    groups = parameter_groups(model, [variant.rho * factor for factor in factors])
    return model, variant.wrap(BASES[base](groups), model=model, **options)


def explicit_step(
    optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    optimizer.zero_grad()
    if optimizer.needs_first_pass:
        with optimizer.first_pass():
            loss = loss_of(model, data)
            loss.backward()
    if optimizer.is_one_pass:
        loss = loss_of(model, data)
        loss.backward()
    else:
        with optimizer.perturbed():
            loss_of(model, data).backward()
    optimizer.step()
    return loss.detach()


def backward_step(
    optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    optimizer.zero_grad()
    loss = optimizer.backward(lambda: loss_of(model, data))
    optimizer.step()
    return loss.detach()


def assert_near(model: nn.Module, reference: nn.Module, dtype: torch.dtype) -> None:
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


@each_pairing
@each_dtype
@each_grouping
@pytest.mark.parametrize("form", ["closure", "explicit", "backward"])
def test_training_equals_the_textbook_loop(variant, base, dtype, factors, form) -> None:
    model, optimizer = build(variant, base, dtype, factors, stochastic_rounding=False)
    reference = mlp(dtype)
    stock = BASES[base](parameter_groups(reference, [variant.rho * factor for factor in factors]))
    by_hand = variant.textbook()
    for step in range(STEPS):
        data = batch(dtype, seed=step)
        if form == "closure":
            loss = optimizer.step(closure_of(optimizer, model, data)).detach()
        else:
            loss = (backward_step if form == "backward" else explicit_step)(optimizer, model, data)
        expected = by_hand(reference, stock, data)
        torch.testing.assert_close(loss, expected, **TOLERANCE[dtype])
    assert_near(model, reference, dtype)


@each_pairing
@each_dtype
@each_grouping
def test_zero_rho_is_the_base_alone_in_one_pass(variant, base, dtype, factors) -> None:
    model, optimizer = build(variant, base, dtype, factors)
    optimizer.rho = 0.0
    reference = mlp(dtype)
    stock = BASES[base](parameter_groups(reference, factors))
    calls = 0

    for step in range(STEPS):
        data = batch(dtype, seed=step)
        closure = closure_of(optimizer, model, data)

        def counted(closure=closure):
            nonlocal calls
            calls += 1
            return closure()

        optimizer.step(counted)
        stock.step(closure_of(stock, reference, data))
    assert calls == STEPS
    assert same_bits(model, bits(reference))


@each_pairing
@each_dtype
@each_grouping
def test_weights_are_exact_after_an_exception_and_training_goes_on_as_before(variant, base, dtype, factors) -> None:
    model, optimizer = build(variant, base, dtype, factors, stochastic_rounding=False)
    clean, undisturbed = build(variant, base, dtype, factors, stochastic_rounding=False)
    for step in range(3):  # up to a step of LookSAM that moves
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
        undisturbed.step(closure_of(undisturbed, clean, batch(dtype, seed=step)))
    before = bits(model)

    def failing():
        if optimizer.is_perturbed or optimizer.is_one_pass:
            assert same_bits(model, before) == optimizer.is_one_pass  # one pass with a model moves no weight
            raise torch.OutOfMemoryError("second pass")
        return closure_of(optimizer, model, batch(dtype))()

    with pytest.raises(torch.OutOfMemoryError, match="second pass"):
        optimizer.step(failing)
    assert same_bits(model, before)
    assert not optimizer.is_perturbed

    for step in range(2):
        later = batch(dtype, seed=step)
        optimizer.step(closure_of(optimizer, model, later))
        undisturbed.step(closure_of(undisturbed, clean, later))
    assert same_bits(model, bits(clean))


@each_pairing
@each_dtype
@each_grouping
def test_resumed_run_is_the_uninterrupted_one(variant, base, dtype, factors) -> None:
    model, optimizer = build(variant, base, dtype, factors)
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))

    resumed_model, resumed = build(variant, base, dtype, factors)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, STEPS):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
        resumed.step(closure_of(resumed, resumed_model, batch(dtype, seed=step)))
    assert same_bits(resumed_model, bits(model))


@each_variant
@each_dtype
@each_grouping
def test_perturbation_leaves_every_bit_when_nothing_is_learned(variant, dtype, factors) -> None:
    model, optimizer = build(variant, getattr(variant, "usual_base", "sgd-momentum"), dtype, factors)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = bits(model)
    for step in range(50):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
    assert same_bits(model, before)


@each_perturbation
@each_grouping
def test_second_gradient_is_taken_where_the_formula_says(variant, factors) -> None:
    model, optimizer = build(variant, "sgd", torch.float64, factors)
    data = batch(torch.float64)
    loss_of(model, data).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in parameters]
    rhos = rhos_of(optimizer)
    expected = variant.epsilon(start, [p.grad for p in parameters], rhos)
    optimizer.ascend()
    for parameter, before, epsilon in zip(parameters, start, expected, strict=True):
        torch.testing.assert_close(parameter - before, epsilon, rtol=1e-9, atol=1e-12)
    optimizer.restore()
    assert all(torch.equal(p, before) for p, before in zip(parameters, start, strict=True))


@each_pairing
def test_class_form_is_the_instance_form(variant, base) -> None:
    first, second = mlp(), mlp()
    needs_model = getattr(variant, "needs_model", False)
    models = [{"model": model} if needs_model else {} for model in (first, second)]
    instance = variant.wrap(BASES[base](first.parameters()), rho=variant.rho, **models[0])
    from_class = variant.wrap(second.parameters(), BASES[base], rho=variant.rho, **models[1])
    for step in range(2):
        instance.step(closure_of(instance, first, batch(seed=step)))
        from_class.step(closure_of(from_class, second, batch(seed=step)))
    assert same_bits(first, bits(second))
