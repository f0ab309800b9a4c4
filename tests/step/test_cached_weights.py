"""Weights that torch keeps for their next use (``parametrize.cached()``) are those of the pass that uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import samopt
from samopt.sharpness import worst_case
from tests.helpers.one_pass import RHO, hand_step, one_pass, sgd
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, watched_step

X, Y = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


class Symmetric(nn.Module):
    """A parametrization whose backward needs no saved tensors, so that torch lets it run a second time."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if kind == "symmetric":
        parametrize.register_parametrization(model[0], "weight", Symmetric())
    else:
        parametrizations.weight_norm(model[0])
    return model


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


kinds = pytest.mark.parametrize("kind", ["symmetric", "weight_norm"])


@kinds
@pytest.mark.parametrize("form", FORMS)
def test_both_passes_inside_one_cache(kind, form) -> None:
    model = network(kind)
    want = by_hand(model, loss_of, [name for name, _ in model.named_parameters()], 0.5)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    with parametrize.cached():
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_of), want)
        # And what is cached from here on is made of the exact weights.
        torch.testing.assert_close(model(X), copy.deepcopy(model)(X), rtol=0, atol=0)


@kinds
def test_one_pass_between_looks_at_the_exact_weights(kind) -> None:
    ours, theirs = network(kind), network(kind)
    optimizer, stock = one_pass(ours), sgd(theirs.parameters())
    for _ in range(3):
        with parametrize.cached():
            before = ours.eval()(X)
            optimizer.zero_grad()
            loss_of(ours.train()).backward()
            torch.testing.assert_close(ours.eval()(X), before, rtol=0, atol=0)
        optimizer.step()
        hand_step(stock, lambda: loss_of(theirs).backward())
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@kinds
def test_the_forms_of_one_pass_that_move_the_weights_themselves(kind) -> None:
    ours, theirs = network(kind), network(kind)
    optimizer = samopt.SAM(sgd(ours.parameters()), rho=RHO, direction="momentum")
    stock = sgd(theirs.parameters())
    for _ in range(3):
        with parametrize.cached():
            ours(X)
            optimizer.zero_grad()
            optimizer.backward(lambda: loss_of(ours))
        optimizer.step()
        hand_step(stock, lambda: loss_of(theirs).backward())
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@kinds
def test_a_trust_regions_reference_has_weights_of_its_own(kind) -> None:
    distances = []
    for is_cached in (False, True):
        model = network(kind)
        optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.5), model=model, trust_region="pretrained")
        for _ in range(3):
            optimizer.zero_grad()
            if is_cached:
                with parametrize.cached():
                    optimizer.backward(lambda model=model: loss_of(model))
            else:
                optimizer.backward(lambda model=model: loss_of(model))
            optimizer.step()
        distances.append(optimizer.last_step.to_dict()["distance"])
    assert distances[0] == distances[1] > 0


@kinds
def test_a_measure_inside_a_cache(kind) -> None:
    model = network(kind)
    plain = worst_case(model, nn.CrossEntropyLoss(), [(X, Y)], rho=0.1)
    with parametrize.cached():
        model(X)
        found = worst_case(model, nn.CrossEntropyLoss(), [(X, Y)], rho=0.1)
        torch.testing.assert_close(model(X), copy.deepcopy(model)(X), rtol=0, atol=0)
    assert found.value == plain.value > 0
