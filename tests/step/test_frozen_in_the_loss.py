"""A loss function that thaws weights at its start and freezes them at its end, as loops over several networks do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.one_pass import hand_step, one_pass, sgd
from tests.helpers.two_passes import leave_second_gradients

RHO = 0.5
X, Y = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def thawed_pass(model: nn.Module, part: nn.Module) -> Tensor:
    """A forward and backward for which a part of the model is trained, and not before or after."""
    part.requires_grad_(True)
    loss = loss_of(model)
    loss.backward()
    part.requires_grad_(False)
    return loss


def sam_by_hand(stock: torch.optim.Optimizer, model: nn.Module) -> None:
    leave_second_gradients(model, lambda: loss_of(model), RHO)
    stock.step()


parts = pytest.mark.parametrize("frozen", ["the whole model", "one layer"])


@parts
def test_a_closures_passes_both_move_what_they_train(frozen) -> None:
    ours, theirs = network(), network()
    part = ours if frozen == "the whole model" else ours[0]
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), rho=RHO, model=ours)
    stock = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return thawed_pass(ours, part)

    for _ in range(3):
        part.requires_grad_(False)
        optimizer.step(closure)
        sam_by_hand(stock, theirs)
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@parts
@pytest.mark.parametrize("clears", ["not at all", "to None", "to zero"])
def test_the_explicit_form_refuses_it_and_leaves_exact_weights(clears, frozen) -> None:
    """There, a gradient of a frozen parameter may be an old one, which is left alone."""
    model = network()
    part = model if frozen == "the whole model" else model[0]
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    before = [p.clone() for p in model.parameters()]
    thawed_pass(model, part)
    expected = pytest.raises(RuntimeError, match=r"\d parameters had gradients but requires_grad=False")
    with expected, optimizer.perturbed():
        if clears != "not at all":
            optimizer.zero_grad(set_to_none=clears == "to None")
        thawed_pass(model, part)
    assert all(map(torch.equal, before, model.parameters()))
    model.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_of(model))
    optimizer.step()
    other = network()
    sam_by_hand(torch.optim.SGD(other.parameters(), lr=0.1), other)
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("clears", ["not at all", "to None", "to zero"])
def test_old_gradients_of_a_frozen_layer_are_no_such_case(clears) -> None:
    model = network()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    optimizer.backward(lambda: loss_of(model))
    optimizer.step()
    model[0].requires_grad_(False)
    for p in model[2].parameters():
        p.grad = None
    loss_of(model).backward()
    with optimizer.perturbed():
        if clears != "not at all":
            optimizer.zero_grad(set_to_none=clears == "to None")
        loss_of(model).backward()
    assert optimizer.waits_for_step


def test_one_pass_moves_what_is_trained_in_the_forward() -> None:
    ours, theirs = network(), network()
    optimizer, stock = one_pass(ours), sgd(theirs.parameters())
    for _ in range(3):
        ours.requires_grad_(False)
        optimizer.zero_grad()
        thawed_pass(ours, ours)
        optimizer.step()
        hand_step(stock, lambda: loss_of(theirs).backward())
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["gsam", "wsam", "friendly-sam", "looksam", "functional-sam"])
def test_what_is_made_of_both_gradients_counts_them(name) -> None:
    trained = []
    for freezes in (False, True):
        model = network()
        optimizer = samopt.create(name, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model)

        def closure(optimizer=optimizer, model=model, freezes=freezes) -> Tensor:
            optimizer.zero_grad()
            return thawed_pass(model, model[0] if freezes else nn.Identity())

        for _ in range(3):
            optimizer.step(closure)
        trained.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_flat_lora_refuses_it() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = samopt.FlatLoRA(base, model=model, perturbation="gradient")

    def closure() -> Tensor:
        optimizer.zero_grad()
        return thawed_pass(model, model[0])

    with pytest.raises(RuntimeError, match="FlatLoRA perturbs layers that are trainable when the second pass begins"):
        optimizer.step(closure)


def test_a_layer_that_is_frozen_for_good_stays_where_it_is() -> None:
    model = network()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    optimizer.backward(lambda: loss_of(model))
    optimizer.step()
    model[0].requires_grad_(False)
    before = [p.clone() for p in model[0].parameters()]
    optimizer.zero_grad()
    loss_of(model).backward()
    with optimizer.perturbed():
        assert all(map(torch.equal, before, model[0].parameters()))
        loss_of(model).backward()
    optimizer.step()
    assert all(map(torch.equal, before, model[0].parameters()))
