"""The part of WSAM's update that goes past the base: what loops do to the gradients in between, it follows."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.parts.combination import WeightedSharpness
from tests.helpers.cases import (
    BASES,
    Epsilon,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    sam_epsilon,
    same_bits,
    second_gradient,
)

DOUBLE = torch.float64
WEIGHT = 0.8 / 0.2  # of the sharpness, at gamma = 0.8


def wsam(model: nn.Module, base: str = "sgd", **options: object) -> samopt.WSAM:
    return samopt.WSAM(BASES[base](model.parameters()), rho=0.1, gamma=0.8, model=model, **options)


def both_gradients(model: nn.Module, seed: int, epsilon: Epsilon = sam_epsilon) -> list[list[Tensor]]:
    """The gradients at ``w`` and at ``w + epsilon``, with the weights as they were and no gradient left."""
    parameters = list(model.parameters())
    gradients = []

    def backward() -> Tensor:
        loss = loss_of(model, batch(DOUBLE, seed=seed))
        loss.backward()
        gradients.append([p.grad for p in parameters])
        return loss

    second_gradient(parameters, backward, epsilon, 0.1)
    model.zero_grad()
    return gradients


def two_passes(optimizer: samopt.WSAM, model: nn.Module, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(DOUBLE, seed=seed)).backward()
    with optimizer.perturbed():
        loss_of(model, batch(DOUBLE, seed=seed)).backward()


def test_the_base_meets_the_first_gradient() -> None:
    model = mlp(DOUBLE)
    optimizer = wsam(model, "adamw")
    first, _ = both_gradients(model, 0)
    two_passes(optimizer, model, 0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))
    optimizer.step()
    averages = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.allclose(m, 0.1 * g, rtol=1e-9) for m, g in zip(averages, first, strict=True))


def test_clipping_the_norm_scales_both_parts_alike() -> None:
    model = mlp(DOUBLE)
    optimizer = wsam(model)
    rate = optimizer.param_groups[0]["lr"]
    first, second = both_gradients(model, 0)
    length = math.sqrt(sum(float(g.square().sum()) for g in first))
    before = bits(model)
    two_passes(optimizer, model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), length / 3)
    optimizer.step()
    share = 1 / 3
    moves = [-rate * share * (g + WEIGHT * (p - g)) for g, p in zip(first, second, strict=True)]
    for p, old, move in zip(model.parameters(), before, moves, strict=True):
        torch.testing.assert_close(p.detach() - old, move, rtol=1e-5, atol=1e-9)  # torch adds 1e-6 to the norm


def test_groups_have_their_own_rate_and_direction() -> None:
    model = mlp(DOUBLE)
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    groups = [{"params": weights, "lr": 0.3, "maximize": True}, {"params": biases, "lr": torch.tensor(0.2)}]
    optimizer = samopt.WSAM(torch.optim.SGD(groups), rho=0.1, gamma=0.8)
    parameters = list(model.parameters())
    signs = [-1.0 if p.dim() == 2 else 1.0 for p in parameters]  # the ascent goes down the loss where it is maximized

    def downhill(weights: Sequence[Tensor], gradients: Sequence[Tensor], rhos: Sequence[float]) -> list[Tensor]:
        return sam_epsilon(weights, [sign * g for sign, g in zip(signs, gradients, strict=True)], rhos)

    first, second = both_gradients(model, 0, downhill)
    before = bits(model)
    two_passes(optimizer, model, 0)
    optimizer.step()
    for p, old, sign, g, g_p in zip(parameters, before, signs, first, second, strict=True):
        rate = 0.3 if p.dim() == 2 else float(torch.tensor(0.2))
        torch.testing.assert_close(p.detach() - old, -sign * rate * (g + WEIGHT * (g_p - g)), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("between", ["zero_grad", "load_state_dict"])
def test_nothing_is_subtracted_once_its_gradients_are_gone(between: str) -> None:
    model = mlp(DOUBLE)
    optimizer = wsam(model)
    before = bits(model)
    two_passes(optimizer, model, 0)
    if between == "zero_grad":
        optimizer.zero_grad()
    else:
        optimizer.load_state_dict(optimizer.state_dict())
        model.zero_grad()
    optimizer.step()
    assert same_bits(model, before)


def test_a_step_that_a_scaler_skips_leaves_nothing_for_the_next() -> None:
    model, twin = mlp(), mlp()
    optimizer, expected = wsam(model), wsam(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = bits(model)
    for factor in (float("inf"), 1.0):  # an overflow in the second pass, and a step without one
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(seed=1))).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, batch(seed=1)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(model, before) == (factor != 1.0)
    expected.step(closure_of(expected, twin, batch(seed=1)))
    assert same_bits(model, bits(twin))


def test_an_overflow_in_the_first_pass_after_a_whole_step_is_the_bases_business() -> None:
    model, plain = mlp(), mlp()
    optimizer, stock = wsam(model, "adamw"), BASES["adamw"](plain.parameters())
    optimizer.step(closure_of(optimizer, model, batch(seed=2)))
    plain.load_state_dict(model.state_dict())
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for of, own in ((model, optimizer), (plain, stock)):
        own.zero_grad()
        loss_of(of, batch(seed=3)).backward()
        of[0].weight.grad[0, 0] = float("inf")
    with optimizer.perturbed():
        pass
    optimizer.step()
    stock.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def test_a_fused_base_that_a_scaler_has_skip_its_update_moves_nothing() -> None:
    model = mlp()
    base = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    optimizer = samopt.WSAM(base, rho=0.1, gamma=0.8, model=model)
    before = bits(model)
    loss_of(model, batch(seed=1)).backward()
    with optimizer.perturbed():
        (loss_of(model, batch(seed=1)) * float("inf")).backward()
    optimizer.prepare_base_step()
    base.grad_scale, base.found_inf = torch.ones(()), torch.ones(())  # as GradScaler leaves them
    base.step()
    assert same_bits(model, before)


def test_a_base_forgets_a_wrapper_that_is_gone() -> None:
    base = BASES["sgd"](mlp().parameters())
    optimizer = samopt.WSAM(base, rho=0.1)
    assert len(base._optimizer_step_post_hooks) == 1
    del optimizer
    gc.collect()
    assert not base._optimizer_step_post_hooks


def test_bases_without_one_learning_rate_a_step_are_refused_and_left_alone() -> None:
    model = mlp()
    base = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"LBFGS evaluates several points a step; use decouple=False"):
        samopt.WSAM(base, rho=0.1)
    assert "rho" not in base.param_groups[0]
    samopt.WSAM(base, rho=0.1, decouple=False)

    class Rateless(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    with pytest.raises(ValueError, match=r"a parameter group of Rateless has no 'lr'; use decouple=False"):
        samopt.SAM(Rateless(model.parameters()), combination=WeightedSharpness())


@pytest.mark.parametrize("pause", ["rho=0", "is_paused"])
def test_a_step_without_a_second_pass_takes_nothing_of_one_that_the_model_cleared(pause: str) -> None:
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, plain = wsam(model), BASES["sgd"](twin.parameters())
    two_passes(optimizer, model, seed=1)
    model.zero_grad()  # the loop leaves this step out
    if pause == "rho=0":
        optimizer.rho = 0.0
    else:
        optimizer.is_paused = True
    for each, trained in ((model, optimizer), (twin, plain)):
        loss_of(each, batch(DOUBLE, seed=2)).backward()
        trained.step()
    assert same_bits(model, bits(twin))
