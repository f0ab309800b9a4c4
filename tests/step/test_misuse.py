"""Calls out of order: an error that says what to write instead, and everything left as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.cases import (
    BASES,
    VARIANTS,
    Variant,
    assert_equal,
    assert_same,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    refused,
    same_bits,
    textbook_step,
)

Optimizer = samopt.SharpnessAwareOptimizer
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def backward(model: nn.Module, seed: int = 0) -> None:
    loss_of(model, batch(torch.float64, seed=seed)).backward()


def make(variant: Variant = VARIANTS[0], base: str = "adamw", **options: Any) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer after one step, so that there is state to spoil."""
    model = mlp(torch.float64)
    optimizer = variant.wrap(BASES[base](model.parameters()), **{"model": model, **options})
    optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=7)))
    optimizer.zero_grad()
    return model, optimizer


def assert_next_step_is_right(model: nn.Module, optimizer: Optimizer, variant: Variant) -> None:
    expected, base = copy.deepcopy((model, optimizer.base_optimizer))
    optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=1)))
    textbook_step(expected, base, batch(torch.float64, seed=1), variant.epsilon)
    assert_equal(model, expected)


def with_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)


def after_a_step(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)
    with optimizer.perturbed():
        backward(model)
    optimizer.step()


def after_clearing_the_second_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)
    with optimizer.perturbed():
        backward(model)
    optimizer.zero_grad()
    backward(model)


def after_a_forgotten_with(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)
    optimizer.perturbed()
    backward(model)


def after_a_failed_second_pass(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        raise ZeroDivisionError
    backward(model)


STEP = r"step\(\) found gradients but no perturbed pass since the last step.*'with optimizer\.perturbed\(\):.*step\(clo"
RESTORE = r"restore\(\) was called, but the weights are not perturbed; call ascend\(\) first, or use 'with"
LEAVE = "was called while the weights are perturbed; leave 'with optimizer.perturbed\\(\\):' first, or call restore"


@pytest.mark.parametrize(
    ("setup", "act", "message"),
    [
        (with_gradients, lambda opt: opt.step(), STEP),
        (after_a_step, lambda opt: opt.step(), STEP),
        (after_clearing_the_second_gradients, lambda opt: opt.step(), STEP),
        (after_a_forgotten_with, lambda opt: opt.step(), STEP),
        (after_a_failed_second_pass, lambda opt: opt.step(), STEP),
        (with_gradients, lambda opt: opt.restore(), RESTORE),
        (with_gradients, lambda opt: opt.second_step(zero_grad=True), RESTORE),
        (after_a_step, lambda opt: opt.restore(), RESTORE),
        (after_a_failed_second_pass, lambda opt: opt.restore(), RESTORE),
    ],
)
@variants
def test_a_call_out_of_order_is_refused(
    variant: Variant, setup: Callable[..., None], act: Callable[[Optimizer], None], message: str
) -> None:
    model, optimizer = make(variant)
    setup(model, optimizer)
    with refused(message, model, optimizer):
        act(optimizer)
    assert_next_step_is_right(model, optimizer, variant)


def enter_again(optimizer: Optimizer) -> None:
    with optimizer.perturbed():
        pytest.fail("entered")


@pytest.mark.parametrize("way", ["ascend", "perturbed"])
@pytest.mark.parametrize(
    ("act", "found"),
    [
        (lambda opt: opt.ascend(), r"ascend\(\) "),
        (lambda opt: opt.first_step(zero_grad=True), r"ascend\(\) "),
        (enter_again, r"perturbed\(\) "),
        (lambda opt: opt.step(), r"step\(\) "),
        (lambda opt: opt.step(lambda: pytest.fail("called")), r"step\(\) "),
        (copy.deepcopy, "copying or pickling "),
        (pickle.dumps, "copying or pickling "),
    ],
)
@variants
def test_a_call_that_needs_exact_weights_is_refused_while_they_are_perturbed(
    variant: Variant, act: Callable[[Optimizer], None], found: str, way: str
) -> None:
    """And the pass that it interrupted may go on."""
    model, optimizer = make(variant)
    expected, base = copy.deepcopy((model, optimizer.base_optimizer))
    before = bits(model)
    backward(model)
    if way == "ascend":
        optimizer.ascend()
        backward(model)
        with refused(found + LEAVE, model, optimizer):
            act(optimizer)
        optimizer.restore()
    else:
        with optimizer.perturbed():
            backward(model)
            with refused(found + LEAVE, model, optimizer):
                act(optimizer)
    assert same_bits(model, before)
    optimizer.step()
    textbook_step(expected, base, batch(torch.float64), variant.epsilon)
    assert_equal(model, expected)


def test_a_closure_that_steps_is_refused_and_the_weights_come_back() -> None:
    model, optimizer = make()
    before = bits(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(torch.float64))
        loss.backward()
        if optimizer.is_perturbed:
            optimizer.step()
        return loss

    with pytest.raises(RuntimeError, match=r"step\(\) " + LEAVE):
        optimizer.step(closure)
    assert same_bits(model, before)
    assert_next_step_is_right(model, optimizer, VARIANTS[0])


def test_a_loss_instead_of_a_closure_is_refused() -> None:
    model, optimizer = make()
    loss = loss_of(model, batch(torch.float64))
    with refused(
        r"step\(\) takes a closure or nothing, got Tensor\. Write .*optimizer\.perturbed\(\)", model, optimizer
    ):
        optimizer.step(loss)


def test_a_base_that_needs_a_closure_says_so() -> None:
    model = mlp(torch.float64)
    optimizer = samopt.SAM(torch.optim.LBFGS(model.parameters()))
    backward(model)
    with optimizer.perturbed():
        backward(model)
    with refused("closure", model, optimizer):
        optimizer.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("gradients", ["zero", "none", "some none"])
@variants
def test_a_step_without_anything_to_ascend_is_the_stock_bases(variant: Variant, gradients: str, base: str) -> None:
    """``torch.distributed.checkpoint`` initialises optimizer state by a step of zero gradients."""
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = variant.wrap(BASES[base](model.parameters())), BASES[base](expected.parameters())
    for _ in range(2):
        for module, each in ((model, optimizer), (expected, stock)):
            for index, parameter in enumerate(module.parameters()):
                if gradients == "zero" or (gradients == "some none" and index % 2):
                    parameter.grad = torch.zeros_like(parameter)
            each.step(closure=None)
    assert same_bits(model, bits(expected))
    assert_same(optimizer.state_dict()["state"], stock.state_dict()["state"])


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"perturb": False}])
def test_a_plain_loop_is_the_stock_bases_while_nothing_may_move(options: dict[str, Any]) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = samopt.SAM(BASES["adamw"](model.parameters())), BASES["adamw"](expected.parameters())
    optimizer.param_groups[0].update(options)
    for step in range(3):
        for module, each in ((model, optimizer), (expected, stock)):
            each.zero_grad()
            backward(module, step)
            each.step()
    assert same_bits(model, bits(expected))


def forward_alone(model: nn.Module, optimizer: Optimizer) -> None:
    with optimizer.perturbed():
        loss_of(model, batch(torch.float64))


def cleared_after_the_second_backward(model: nn.Module, optimizer: Optimizer) -> None:
    with optimizer.perturbed():
        backward(model)
        optimizer.zero_grad()


def restored_without_a_second_backward(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.ascend()
    optimizer.restore()


@pytest.mark.parametrize(
    "second_pass", [forward_alone, cleared_after_the_second_backward, restored_without_a_second_backward]
)
def test_a_second_pass_without_gradients_is_named_once(second_pass: Callable[[nn.Module, Optimizer], None]) -> None:
    model, optimizer = make()
    before = bits(model)
    with pytest.warns(UserWarning, match="second pass computed no gradients, so this step changes no weight") as caught:
        for _ in range(2):
            backward(model)
            second_pass(model, optimizer)
            optimizer.step()
            assert same_bits(model, before)
    assert len(caught) == 1
    assert_next_step_is_right(model, optimizer, VARIANTS[0])
