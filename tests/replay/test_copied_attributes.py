"""A module that was given another's attributes, as meta-learning packages make them, runs its own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.two_passes import backward_form, closure_form, perturbed_form

RATE = 0.5


def clone(module: nn.Module) -> nn.Module:
    """A module of clones of the parameters, with a graph: what learn2learn's ``clone_module`` does."""
    other = module.__new__(type(module))
    vars(other).update(vars(module))
    other._parameters = {name: None if p is None else p.clone() for name, p in module._parameters.items()}
    other._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    other._modules = {name: None if child is None else clone(child) for name, child in module._modules.items()}
    return other


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()


X, Y = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def adapted_loss(model: nn.Module) -> Tensor:
    """MAML's loss: of a clone of the model after one inner step."""
    learner = clone(model)
    inner = nn.functional.cross_entropy(learner(X), Y)
    places = [(child, name) for child in learner.modules() for name in child._parameters]
    gradients = torch.autograd.grad(inner, [child._parameters[name] for child, name in places], create_graph=True)
    for (child, name), gradient in zip(places, gradients, strict=True):
        child._parameters[name] = child._parameters[name] - RATE * gradient
    return nn.functional.cross_entropy(learner(X), Y)


@pytest.mark.parametrize("take_step", [backward_form, perturbed_form, closure_form])
def test_a_meta_learning_step_is_that_of_the_loop_by_hand(take_step) -> None:
    ours, theirs = network(), network()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=ours)
    stock = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        torch.manual_seed(step)
        take_step(optimizer, lambda: adapted_loss(ours))
        streams = torch.get_rng_state()

        torch.manual_seed(step)
        step_by_hand(stock, theirs, step)
        assert torch.equal(streams, torch.get_rng_state())
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def step_by_hand(stock: torch.optim.Optimizer, model: nn.Module, step: int) -> None:
    """SAM by hand, with the same dropout masks in both passes."""
    parameters = list(model.parameters())
    stock.zero_grad()
    adapted_loss(model).backward()
    end = torch.get_rng_state()
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad, alpha=float(0.3 / norm))
    stock.zero_grad()
    torch.manual_seed(step)
    adapted_loss(model).backward()
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    torch.set_rng_state(end)
    stock.step()


@pytest.mark.parametrize("kind", [samopt.SAM, samopt.MomentumSAM])
def test_a_clone_runs_on_its_own_parameters_and_outlives_the_original(kind) -> None:
    model = network().eval()
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model)
    other = clone(model)
    for child in other.modules():
        child._parameters = {name: p * 2 for name, p in child._parameters.items()}
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    torch.testing.assert_close(other(X), plain(X), rtol=0, atol=0)
    del optimizer, model
    torch.testing.assert_close(other(X), plain(X), rtol=0, atol=0)


def test_one_pass_takes_the_tensors_of_a_clone_as_they_are_and_says_so() -> None:
    model = network()
    optimizer = samopt.MomentumSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model)
    adapted_loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.manual_seed(0)
    loss = adapted_loss(model)
    loss.backward()
    torch.manual_seed(0)
    torch.testing.assert_close(loss, adapted_loss(copy.deepcopy(model)), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="gradients were taken at the exact weights"):
        optimizer.step()
