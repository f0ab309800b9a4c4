"""The geometry of the base's second moment, against fp64 loops around stock bases."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.parts import Momentum, Preconditioned
from tests.helpers.cases import (
    TOLERANCE,
    assert_equal,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    parameters_of,
    refused,
    same_bits,
    second_gradient,
)

DOUBLE = torch.float64
RHO = 0.05

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95)),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.5), amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.7, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def v_hat(base: torch.optim.Optimizer, group: dict, parameter: Tensor) -> Tensor | None:
    """What the update of this base divides by the root of, in fp64; None before its first step."""
    state = base.state.get(parameter)
    if not state or float(state["step"]) == 0:
        return None
    if isinstance(base, torch.optim.RMSprop):
        mean = state["grad_avg"].double() ** 2 if group["centered"] else 0.0
        return (state["square_avg"].double() - mean).clamp(min=0)
    if isinstance(base, torch.optim.Adagrad):
        return state["sum"].double()
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].double()
    return second / (1 - group["betas"][1] ** float(state["step"]))


def epsilon_of(base: torch.optim.Optimizer, damping: float | None = None):
    """``rho T^2 g / ||T g||`` in fp64, with what the base's state says now."""

    def epsilon(weights, gradients, rhos):
        uphill, squares = [], 0.0
        for group in base.param_groups:
            for parameter in group["params"]:
                g, v = gradients[len(uphill)], v_hat(base, group, parameter)
                if g is None or v is None:
                    uphill.append(torch.zeros_like(parameter, dtype=DOUBLE))
                    continue
                root = v.sqrt() + (group["eps"] if damping is None else damping)
                uphill.append(torch.where(v > 0, g.double() / root, 0.0))
                squares += float((g.double() * uphill[-1]).sum())
        return [rho * up / squares**0.5 if squares else up for rho, up in zip(rhos, uphill, strict=True)]

    return epsilon


def by_hand(base, backward, rho=RHO, damping=None) -> Tensor:
    """One step of a stock base in plain torch; returns the loss at ``w``."""
    first, _ = second_gradient(parameters_of(base), backward, epsilon_of(base, damping), rho)
    base.step()
    return first


def on(model: nn.Module, *data) -> Callable[[], Tensor]:
    """Forward and backward of all micro-batches."""

    def backward() -> Tensor:
        losses = []
        for each in data:
            losses.append(loss_of(model, each))
            losses[-1].backward()
        return torch.stack(losses).sum()

    return backward


@pytest.mark.parametrize("damping", [None, 1e-2])
@pytest.mark.parametrize("name", BASES)
def test_training_equals_the_loop_over_each_base(name, damping) -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.PreconditionedSAM(BASES[name](model.parameters()), rho=RHO, damping=damping, model=model)
    stock = BASES[name](expected.parameters())
    for step in range(8):
        data = batch(DOUBLE, seed=step)
        loss = optimizer.step(closure_of(optimizer, model, data))
        torch.testing.assert_close(loss.detach(), by_hand(stock, on(expected, data), RHO, damping))
    assert_equal(model, expected)


def test_each_group_has_its_own_radius_and_decay_and_stabiliser() -> None:
    def base(model):
        first, *others = model.parameters()
        groups = [
            {"params": [first], "eps": 1e-2, "betas": (0.9, 0.7)},
            {"params": others, "rho": 0.2, "eps": 1e-6},
        ]
        return torch.optim.AdamW(groups, lr=0.01)

    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = samopt.PreconditionedSAM(base(model), rho=RHO), base(expected)
    for step in range(5):
        data = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        by_hand(stock, on(expected, data), [RHO, 0.2, 0.2, 0.2])
    assert_equal(model, expected)


def test_accumulated_micro_batches_are_one_batch() -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.PreconditionedSAM(BASES["adamw"](model.parameters()), rho=RHO, model=model)
    stock = BASES["adamw"](expected.parameters())
    for step in range(4):
        parts = [batch(DOUBLE, seed=10 * step + part, size=4 + part) for part in range(3)]
        optimizer.zero_grad()
        for index, part in enumerate(parts):
            optimizer.backward(lambda part=part: loss_of(model, part), last=index == 2)
        optimizer.step()
        by_hand(stock, on(expected, *parts))
    assert_equal(model, expected)


def test_the_first_step_costs_one_pass_and_is_the_bases() -> None:
    model, expected = mlp(), mlp()
    optimizer = samopt.PreconditionedSAM(BASES["adamw"](model.parameters()), rho=RHO, model=model)
    stock = BASES["adamw"](expected.parameters())
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    optimizer.step(closure_of(optimizer, model, batch()))
    stock.step(closure_of(stock, expected, batch()))
    assert (len(forwards), float(optimizer.last_step.radius)) == (1, 0.0)
    assert same_bits(model, bits(expected))
    optimizer.step(closure_of(optimizer, model, batch(seed=1)))
    assert (len(forwards), float(optimizer.last_step.applied_radius)) == (3, pytest.approx(RHO))


def test_a_base_whose_state_was_reset_begins_again() -> None:
    model = mlp()
    optimizer = samopt.PreconditionedSAM(BASES["adamw"](model.parameters()), rho=RHO, model=model)
    for seed in range(2):
        optimizer.step(closure_of(optimizer, model, batch(seed=seed)))
    optimizer.state.clear()
    expected = mlp()
    expected.load_state_dict(model.state_dict())
    stock = BASES["adamw"](expected.parameters())
    optimizer.step(closure_of(optimizer, model, batch(seed=2)))
    stock.step(closure_of(stock, expected, batch(seed=2)))
    assert float(optimizer.last_step.radius) == 0.0
    assert same_bits(model, bits(expected))
    optimizer.step(closure_of(optimizer, model, batch(seed=3)))
    assert float(optimizer.last_step.applied_radius) == pytest.approx(RHO)


def test_entries_that_never_had_a_gradient_stay() -> None:
    """Adam's ``eps`` alone would give the embedding of a token's first occurrence all of the perturbation."""
    table, expected = nn.Embedding(6, 3, dtype=DOUBLE), nn.Embedding(6, 3, dtype=DOUBLE)
    expected.load_state_dict(table.state_dict())
    optimizer = samopt.PreconditionedSAM(BASES["adamw"](table.parameters()), rho=RHO)
    stock = BASES["adamw"](expected.parameters())
    for tokens in ([0, 1, 2], [1, 2, 3], [3, 4, 4]):
        optimizer.zero_grad()
        table(torch.tensor(tokens)).sin().sum().backward()
        before = table.weight.detach().clone()
        with optimizer.perturbed():
            moved = (table.weight.detach() - before).abs().amax(1) > 0
            table(torch.tensor(tokens)).sin().sum().backward()
        optimizer.step()

        def backward(tokens=tokens) -> Tensor:
            loss = expected(torch.tensor(tokens)).sin().sum()
            loss.backward()
            return loss

        by_hand(stock, backward)
    assert moved.tolist() == [False, False, False, True, False, False]
    torch.testing.assert_close(table.weight, expected.weight, **TOLERANCE[DOUBLE])


def test_rows_of_a_sparse_gradient_have_their_own_scale() -> None:
    torch.manual_seed(0)
    table, dense = nn.Embedding(5, 2, sparse=True, dtype=DOUBLE), nn.Embedding(5, 2, dtype=DOUBLE)
    dense.load_state_dict(table.state_dict())
    optimizer = samopt.PreconditionedSAM(torch.optim.SparseAdam(table.parameters(), lr=0.1), rho=RHO)
    expected = torch.optim.SparseAdam(dense.parameters(), lr=0.1)
    for tokens in ([0, 1, 2, 4], [1, 2, 3], [3, 2, 2]):
        optimizer.zero_grad()
        table(torch.tensor(tokens)).sin().sum().backward()
        with optimizer.perturbed():
            table(torch.tensor(tokens)).sin().sum().backward()
        optimizer.step()

        def backward(tokens=tokens) -> Tensor:
            loss = dense(torch.tensor(tokens)).sin().sum()
            loss.backward()
            return loss

        second_gradient([dense.weight], backward, epsilon_of(expected), RHO)
        dense.weight.grad = dense.weight.grad.to_sparse(1)
        expected.step()
    torch.testing.assert_close(table.weight, dense.weight, **TOLERANCE[DOUBLE])


def test_a_parameter_that_is_unfrozen_later_starts_without_a_move() -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.PreconditionedSAM(BASES["adam"](model.parameters()), rho=RHO)
    stock = BASES["adam"](expected.parameters())
    for step in range(6):
        model[0].weight.requires_grad_(step > 2)
        expected[0].weight.requires_grad_(step > 2)
        data = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        by_hand(stock, on(expected, data))
    assert_equal(model, expected)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_low_precision_weights_move_as_fp32_arithmetic_says(norm) -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.PreconditionedSAM(
        BASES["adamw"](model.parameters()), rho=RHO, norm=norm, stochastic_rounding=False, model=model
    )
    optimizer.step(closure_of(optimizer, model, batch(torch.bfloat16)))
    optimizer.zero_grad()
    loss_of(model, batch(torch.bfloat16, seed=1)).backward()
    base, before = optimizer.base_optimizer, bits(model)
    scales = [(v_hat(base, base.param_groups[0], p).sqrt() + 1e-8) ** -0.5 for p in model.parameters()]
    gradients = [p.grad.double() for p in model.parameters()]
    length = sum(float((t * g).square().sum()) for t, g in zip(scales, gradients, strict=True)) ** 0.5
    pairs = zip(scales, gradients, strict=True)
    steps = [RHO * t * g.sign() if norm == "linf" else RHO * t * t * g / length for t, g in pairs]
    want = [(p.double() + step).to(torch.bfloat16) for p, step in zip(before, steps, strict=True)]
    optimizer.ascend()
    for parameter, value in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=2**-7, atol=1e-6)
    assert not same_bits(model, before)
    optimizer.restore()
    assert same_bits(model, before)


def test_a_loss_scale_changes_no_bit() -> None:
    model, plain = mlp(), mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled, alone = (samopt.PreconditionedSAM(BASES["adamw"](m.parameters()), rho=RHO) for m in (model, plain))
    for step in range(4):
        for optimizer, of, scale in ((scaled, model, scaler.scale), (alone, plain, lambda loss: loss)):
            optimizer.zero_grad()
            scale(loss_of(of, batch(seed=step))).backward()
            with optimizer.perturbed() as second:
                if second.is_needed:
                    scale(loss_of(of, batch(seed=step))).backward()
        scaler.step(scaled)
        scaler.update()
        alone.step()
    assert same_bits(model, bits(plain))


@pytest.mark.parametrize("geometry", ["preconditioned", Preconditioned()])
def test_tram_takes_the_geometry(geometry) -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.TRAM(
        BASES["adamw"](model.parameters()),
        model=model,
        geometry=geometry,
        trust_region=lambda: torch.tensor(0.1, dtype=DOUBLE),
        scale=0.7,
    )
    stock = BASES["adamw"](expected.parameters())
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        by_hand(stock, on(expected, data), rho=0.07)
    assert_equal(model, expected)


def test_a_friendly_direction_averages_the_first_gradient_too() -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.PreconditionedSAM(
        BASES["adamw"](model.parameters()), rho=RHO, direction=samopt.parts.Friendly(decay=0.5)
    )
    stock, average = BASES["adamw"](expected.parameters()), None
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        state = {"average": average}

        def epsilon(weights, gradients, rhos, state=state):
            past = state["average"] or [torch.zeros_like(g) for g in gradients]
            state["average"] = [0.5 * m + 0.5 * g for m, g in zip(past, gradients, strict=True)]
            special = [g - m for g, m in zip(gradients, state["average"], strict=True)]
            return epsilon_of(stock)(weights, special, rhos)

        second_gradient(parameters_of(stock), on(expected, data), epsilon, RHO)
        average = state["average"]
        stock.step()
    assert_equal(model, expected)


def test_along_the_momentum_it_points_where_a_preconditioned_momentum_does_at_another_length() -> None:
    """``T^2 m`` is Adam's step, too, but here ``||T^-1 epsilon||`` is ``rho``, and there ``||epsilon||``."""
    moves = []
    for options in (
        {"geometry": Preconditioned(), "direction": Momentum()},
        {"geometry": samopt.parts.Euclidean(), "direction": Momentum(preconditioned=True)},
    ):
        model = mlp(DOUBLE)
        base = BASES["adamw"](model.parameters())
        optimizer = samopt.SharpnessAwareOptimizer(base, rho=0.0, **options)
        optimizer.step(closure_of(optimizer, model, batch(DOUBLE)))
        optimizer.rho = RHO
        before = bits(model)
        optimizer.ascend()
        move = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        optimizer.restore()
        v = torch.cat([v_hat(base, base.param_groups[0], p).flatten() for p in model.parameters()])
        moves.append((move, v.sqrt() + 1e-8))
    (ours, root), (theirs, _) = moves
    torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-9, atol=1e-12)
    assert float((ours.square() * root).sum().sqrt()) == pytest.approx(RHO)
    assert float(theirs.norm()) == pytest.approx(RHO)


def test_a_momentum_step_with_it_equals_the_loop_in_an_unchanged_loop() -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.PreconditionedSAM(
        BASES["adamw"](model.parameters()), rho=RHO, direction="momentum-uphill", model=model
    )
    stock = BASES["adamw"](expected.parameters())
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        momenta = [stock.state[p]["exp_avg"] if stock.state.get(p) else None for p in expected.parameters()]

        def epsilon(weights, gradients, rhos, momenta=momenta):
            return epsilon_of(stock)(weights, momenta, rhos)

        second_gradient(parameters_of(stock), on(expected, data), epsilon, RHO)
        stock.step()
    assert_equal(model, expected)


def test_a_checkpoint_of_the_plain_base_has_all_that_it_needs() -> None:
    model, expected = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = BASES["adamw"](model.parameters()), BASES["adamw"](expected.parameters())
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, batch(DOUBLE, seed=step)))
        stock.step(closure_of(stock, expected, batch(DOUBLE, seed=step)))
    saved = copy.deepcopy(optimizer.state_dict())
    wrapped = samopt.PreconditionedSAM(BASES["adamw"](model.parameters()), rho=RHO)
    wrapped.load_state_dict(saved)
    for step in range(2, 4):
        wrapped.step(closure_of(wrapped, model, batch(DOUBLE, seed=step)))
        by_hand(stock, on(expected, batch(DOUBLE, seed=step)))
    assert_equal(model, expected)


def factored(parameters):
    return torch.optim.Adafactor(parameters)


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"but SGD keeps none \(param group 0 has lr, momentum"),
        (factored, "but Adafactor keeps a factored one"),
        (lambda p: torch.optim.Adamax(p), "but Adamax keeps a largest gradient instead"),
        (lambda p: torch.optim.LBFGS(p), "but LBFGS keeps none"),
        (lambda p: torch.optim.Adadelta(p), "but Adadelta keeps none"),
    ],
)
def test_a_base_without_a_second_moment_is_refused(base, found) -> None:
    model = mlp()
    stock = base(model.parameters())
    with refused(f"second moment that Adam.*{found}.*samopt.ASAM", model, stock, ValueError):
        samopt.PreconditionedSAM(stock, rho=RHO)


class Renamed(torch.optim.AdamW):
    """Keeps its second moment under another name, without rows, or nowhere, as others do."""

    def __init__(self, parameters, kept) -> None:
        super().__init__(parameters, lr=0.01)
        self.kept = kept

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if self.kept:
                    self.state[p] = {"step": torch.tensor(1.0)} | self.kept(p)


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (lambda p: {"variance": torch.ones_like(p)}, r"has no 'exp_avg_sq' in a state of \['step', 'variance'\]"),
        (lambda p: {"exp_avg_sq": torch.ones(3)}, r"keeps torch.float32 of shape \(3,\) for \(12, 6\)"),
        (lambda p: {"exp_avg_sq": torch.ones_like(p).to(torch.uint8)}, r"keeps torch.uint8 of shape \(12, 6\)"),
        (lambda p: {"exp_avg_sq": torch.ones_like(p), "step": None}, "keeps no 'step' to correct it by"),
        (None, "has stepped a parameter on this rank and keeps no state of it"),
    ],
)
def test_a_base_whose_state_does_not_fit_is_refused_at_the_second_step(kept, found) -> None:
    model = mlp()
    optimizer = samopt.PreconditionedSAM(Renamed(model.parameters(), kept), rho=RHO)
    optimizer.backward(lambda: loss_of(model, batch()))
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch()).backward()
    with refused(f"but Renamed {found}", model, optimizer, ValueError):
        optimizer.ascend()


def test_complex_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = samopt.PreconditionedSAM([weight], torch.optim.Adam, rho=RHO)
    optimizer.backward(lambda: weight.abs().sum())
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="Adam keeps torch.complex64"):
        optimizer.backward(lambda: weight.abs().sum())


@pytest.mark.parametrize(("damping", "error"), [(-1e-8, ValueError), (float("nan"), ValueError), ("eps", TypeError)])
def test_a_damping_out_of_range_is_refused(damping, error) -> None:
    with pytest.raises(error, match="damping must be"):
        samopt.PreconditionedSAM(mlp().parameters(), torch.optim.AdamW, damping=damping)


def test_eta_is_refused_and_leads_to_damping() -> None:
    with pytest.raises(TypeError, match=re.escape("PreconditionedSAM sets eta= itself, but got eta=0.1; use damping=")):
        samopt.PreconditionedSAM(mlp().parameters(), torch.optim.AdamW, eta=0.1)


def test_the_geometry_without_an_optimizer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="made of a base optimizer's state"):
        Preconditioned().scale(torch.ones(2), torch.ones(2), 0.0)


def test_kernels_without_its_form_say_so() -> None:
    model = mlp()
    optimizer = samopt.PreconditionedSAM(model.parameters(), torch.optim.AdamW, backend="foreach")
    optimizer.step(closure_of(optimizer, model, batch()))
    with pytest.raises(RuntimeError, match="the preconditioned geometry has no foreach form"):
        optimizer.step(closure_of(optimizer, model, batch()))
