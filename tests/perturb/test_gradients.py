"""Gradients that are missing, zero, huge, tiny, not finite or accumulated, against stock torch and fp64 formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt
from samopt._perturb.perturbation import Perturbation
from tests.helpers.cases import batch, curved, general_epsilon, linear, mlp, tensors, two_pass_step, wrapped_step

INF, NAN = float("inf"), float("nan")
FORMS = ["closure", "explicit"]
VARIANTS = {"sam": (samopt.SAM, 0.3, None), "asam": (samopt.ASAM, 0.3, 0.01)}
variants = pytest.mark.parametrize("variant", VARIANTS)
forms = pytest.mark.parametrize("form", FORMS)


SOME_MISSING = {
    "only in the first pass": [((1, 1, 1), (1, 0, 1))] * 3,
    "only in the second pass": [((1, 0, 1), (1, 1, 1))] * 3,
    "in opposite passes": [((1, 1, 0), (0, 1, 1))] * 3,
    "in some steps": [((1, 1, 1), (1, 1, 1)), ((1, 0, 0), (1, 0, 0)), ((0, 1, 1), (0, 1, 1)), ((1, 1, 1), (1, 1, 1))],
}


@forms
@variants
@pytest.mark.parametrize("case", SOME_MISSING)
def test_parameters_without_a_gradient_in_some_pass(case, variant, form):
    wrap, rho, eta = VARIANTS[variant]
    ours, theirs = (tensors((3, 2), (4,), (2, 2)) for _ in range(2))
    optimizer = wrap(torch.optim.SGD(ours, lr=0.1, momentum=0.9), rho=rho)
    base = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for first, second in SOME_MISSING[case]:
        wrapped_step(optimizer, [curved(ours, first), curved(ours, second)], form)
        two_pass_step(base, [curved(theirs, first), curved(theirs, second)], [rho] * 3, eta)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


BASES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
}


@forms
@pytest.mark.parametrize("base", BASES)
@variants
@pytest.mark.parametrize("slope", [0.0, INF, -INF, NAN])
def test_zero_and_non_finite_first_gradients_leave_the_base_alone(slope, variant, base, form):
    wrap, rho, eta = VARIANTS[variant]
    shapes = ((3, 2), (4,), (2,))
    ours, theirs = tensors(*shapes), tensors(*shapes)
    optimizer, alone = wrap(BASES[base](ours), rho=rho), BASES[base](theirs)

    def ordinary_step():
        wrapped_step(optimizer, [curved(ours, (1, 1, 1))] * 2, form)
        two_pass_step(alone, [curved(theirs, (1, 1, 1))] * 2, [rho] * 3, eta)

    ordinary_step()
    # The copies agree to rounding; from here on they must agree bit for bit.
    alone.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    odd, zero = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    odd[1, 1] = slope
    weights_seen = []

    def second_pass():  # with a gradient for the third parameter, which has none in the first
        weights_seen.append([p.detach().clone() for p in ours])
        return linear(ours, odd, zero + 1, zero[:2] + 1)()

    before = [p.detach().clone() for p in ours]
    made = wrapped_step(optimizer, [linear(ours, odd, zero, None), second_pass], form)
    assert (made, len(weights_seen)) == ((1, 0) if form == "closure" else (2, 1))
    for seen in weights_seen:
        assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))
    assert float(optimizer.last_step.applied_radius) == 0.0

    alone.zero_grad()
    linear(theirs, odd, zero, None)().backward()
    alone.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if slope == 0.0:
        ordinary_step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_first_gradient_at_all_is_a_plain_step_of_a_closure_and_an_error_elsewhere():
    ours, theirs = tensors((3, 2)), tensors((3, 2))
    optimizer, alone = samopt.SAM(torch.optim.SGD(ours, lr=0.1), rho=0.3), torch.optim.SGD(theirs, lr=0.1)
    passes = [lambda: torch.zeros((), requires_grad=True), curved(ours, (1,))]
    assert wrapped_step(optimizer, passes, "closure") == 1
    alone.step()
    assert torch.equal(ours[0], theirs[0])
    with pytest.raises(RuntimeError, match="found no gradients at w"):
        wrapped_step(optimizer, passes, "explicit")
    assert torch.equal(ours[0], theirs[0])


@variants
@pytest.mark.parametrize("sizes", [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-30), (1e-42, 1e-42)])
def test_huge_and_tiny_gradients_move_by_the_right_amount(sizes, variant):
    wrap, rho, eta = VARIANTS[variant]
    parameters = tensors((20, 5), (30,), dtype=torch.float32)
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.0), rho=rho)
    slopes = [s.detach() * size for s, size in zip(tensors((20, 5), (30,), seed=3), sizes, strict=True)]
    before = [p.detach().double() for p in parameters]
    linear(parameters, *[s.float() for s in slopes])().backward()
    want = general_epsilon(parameters, [rho] * 2, eta)
    with optimizer.perturbed():
        moved = [p.detach().double() - b for p, b in zip(parameters, before, strict=True)]
        linear(parameters, *[s.float() for s in slopes])().backward()
    if sizes[0] == 1e-42:  # its reciprocal is no fp32 number: what is applied is smaller, and the metrics say so
        t = [b.abs() + eta if eta and b.dim() > 1 else torch.ones(()) for b in before]
        applied = sum(float((m / a).square().sum()) for m, a in zip(moved, t, strict=True)) ** 0.5
        assert 0 < applied < rho / 2
        assert float(optimizer.last_step.applied_radius) == pytest.approx(applied, rel=1e-2)
        return
    for m, w, b in zip(moved, want, before, strict=True):
        assert bool(((m - w).abs() <= 2.0**-24 * (b.abs() + 16 * w.abs())).all())
    assert float(optimizer.last_step.applied_radius) == pytest.approx(rho, rel=1e-6)


@forms
@variants
def test_micro_batches_add_up_to_the_full_batch(variant, form):
    wrap, rho, _ = VARIANTS[variant]

    def train(size):
        model = mlp(torch.float64)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho)
        losses = []
        for seed in range(3):
            x, y = batch(torch.float64, seed)
            micro_batches = list(zip(x.split(size), y.split(size), strict=True))

            def one_pass(micro_batches=micro_batches):
                total = torch.zeros((), dtype=torch.float64)
                for inputs, labels in micro_batches:
                    loss = nn.functional.cross_entropy(model(inputs), labels) / len(micro_batches)
                    loss.backward()
                    total += loss.detach()
                return total

            if form == "closure":
                losses.append(optimizer.step(lambda f=one_pass: (optimizer.zero_grad(), f())[1]))
                continue
            losses.append(one_pass())
            with optimizer.perturbed():
                one_pass()
            optimizer.step()
            optimizer.zero_grad()
        return losses, list(model.parameters())

    torch.testing.assert_close(train(4), train(16), rtol=1e-12, atol=1e-12)


@forms
@variants
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_maximising_is_minimising_the_negative(base, variant, form):
    wrap, rho, _ = VARIANTS[variant]
    up, down = (tensors((3, 2), (4,)) for _ in range(2))
    climber = wrap(up, base, rho=rho, lr=0.1, maximize=True)
    faller = wrap(down, base, rho=rho, lr=0.1)
    for _ in range(3):
        wrapped_step(climber, [curved(up, (1, 1))] * 2, form)
        wrapped_step(faller, [lambda: -curved(down, (1, 1))()] * 2, form)
        torch.testing.assert_close(up, down, rtol=1e-14, atol=1e-14)


@pytest.fixture
def accelerator(monkeypatch):
    """The path on which the host cannot know whether the first gradients are finite."""
    monkeypatch.setattr(Perturbation, "usable", None)


KINDS = {
    "dense": lambda: tensors((3, 2)),
    "after an empty one": lambda: [nn.Parameter(torch.zeros(0)), *tensors((3, 2))],
    "scalar": lambda: tensors(()),
    "complex": lambda: [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
    "bf16": lambda: tensors((3, 2), dtype=torch.bfloat16),
    "sparse": lambda: tensors((4, 2)),
}


def loss_with_slope(parameters, kind, slope):
    if kind == "sparse":
        return nn.functional.embedding(torch.tensor([2, 0]), parameters[0], sparse=True).sum() * slope
    return sum(p.abs().sum() for p in parameters) * slope


@forms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slope", [INF, NAN])
def test_on_an_accelerator_a_non_finite_first_pass_reaches_the_base(slope, kind, form, accelerator):
    parameters = KINDS[kind]()
    before = [p.detach().clone() for p in parameters]
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3)
    seen = []

    def second_pass():
        seen.append(all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)))
        return loss_with_slope(parameters, kind, 1.0)

    wrapped_step(optimizer, [lambda: loss_with_slope(parameters, kind, slope), second_pass], form)
    assert seen == [True]
    assert float(optimizer.last_step.applied_radius) == 0.0
    entries = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters]
    assert sum(int((~torch.isfinite(e)).sum()) for e in entries) == 1
    assert any(not bool(torch.isfinite(p).all()) for p in parameters)  # as it would have been alone


@pytest.mark.parametrize("slopes, steps", [((INF, 1.0), 0), ((1.0, INF), 0), ((1.0, 1.0), 1)])
def test_on_an_accelerator_a_scaler_skips_what_is_not_finite_in_either_pass(slopes, steps, accelerator):
    parameters = tensors((3, 2), dtype=torch.float32)
    before = parameters[0].detach().clone()
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(parameters[0].sum() * slopes[0]).backward()
    with optimizer.perturbed():
        scaler.scale(parameters[0].sum() * slopes[1]).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(parameters[0].detach(), before - 0.1 * steps)
    assert scaler.get_scale() == (16.0 if steps else 8.0)


@forms
@variants
def test_on_an_accelerator_finite_and_zero_gradients_do_as_elsewhere(variant, form, monkeypatch):
    wrap, rho, _ = VARIANTS[variant]
    runs = []
    for usable in (Perturbation.usable, None):
        monkeypatch.setattr(Perturbation, "usable", usable)
        parameters = tensors((3, 2), (4,))
        optimizer = wrap(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), rho=rho)
        zero = [torch.zeros(3, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
        for loss in (curved(parameters, (1, 1)), linear(parameters, *zero), curved(parameters, (1, 1))):
            wrapped_step(optimizer, [loss] * 2, form)
        runs.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
