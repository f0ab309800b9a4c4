"""The second passes of two optimizers over parts of one model, at the same time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import samopt

X, Y = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


@pytest.mark.parametrize("entered", ["with", "first_step"])
def test_both_parts_move_as_by_hand(entered) -> None:
    ours, theirs = network(), network()
    optimizers, stocks, parts = [], [], []
    for model, made in ((ours, optimizers), (theirs, stocks)):
        made.append(torch.optim.SGD(model[:2].parameters(), lr=0.1, momentum=0.9))
        made.append(torch.optim.SGD(model[3].parameters(), lr=0.2))
    optimizers[0] = samopt.SAM(optimizers[0], rho=0.5, model=ours[:2])
    optimizers[1] = samopt.SAM(optimizers[1], rho=0.3, model=ours[3])
    parts = [(list(theirs[:2].parameters()), 0.5), (list(theirs[3].parameters()), 0.3)]
    for _ in range(3):
        for each in optimizers:
            each.zero_grad()
        loss_of(ours).backward()
        if entered == "with":
            with optimizers[0].perturbed(), optimizers[1].perturbed():
                loss_of(ours).backward()
        else:
            for each in optimizers:
                each.first_step()
            loss_of(ours).backward()
            for each in reversed(optimizers):
                each.restore()
        for each in optimizers:
            each.step()

        theirs.zero_grad()
        loss_of(theirs).backward()
        buffers = [b.clone() for b in theirs.buffers()]
        start = [p.detach().clone() for p in theirs.parameters()]
        with torch.no_grad():
            for parameters, rho in parts:
                norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
                for p in parameters:
                    p.add_(p.grad * (rho / norm))
        theirs.zero_grad()
        loss_of(theirs).backward()
        with torch.no_grad():
            for p, value in zip(theirs.parameters(), start, strict=True):
                p.copy_(value)
            for b, value in zip(theirs.buffers(), buffers, strict=True):
                b.copy_(value)
        for each in stocks:
            each.step()
    for state in ("parameters", "buffers"):
        for got, want in zip(getattr(ours, state)(), getattr(theirs, state)(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_a_second_pass_inside_one_that_looks_after_the_whole_model_says_what_to_write() -> None:
    model = network()
    optimizers = [samopt.SAM(torch.optim.SGD(model[i].parameters(), lr=0.1), model=model) for i in (0, 3)]
    before = [p.clone() for p in model.parameters()]
    loss_of(model).backward()
    expected = pytest.raises(RuntimeError, match="set aside the gradients of every module in its model=")
    with expected, optimizers[0].perturbed(), optimizers[1].perturbed():
        loss_of(model).backward()
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(each.is_perturbed for each in optimizers)
