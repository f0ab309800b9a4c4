"""A state that forwards carry on, and an evaluation between clearing the gradients and the next first pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt

RHO = 0.5


class Recurrent(nn.Module):
    """Carries its hidden state from batch to batch, as truncated backpropagation through time does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.double()
        self.hidden = None

    def forward(self, x):
        out, hidden = self.cell(x, self.hidden)
        self.hidden = tuple(each.detach() for each in hidden)
        return self.head(out)


def evaluated_and_put_back(model, x):
    hidden, model.hidden = model.hidden, None
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    model.hidden = hidden


def evaluated_and_reset(model, x):
    model.hidden = None
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    model.hidden = None


def evaluated_and_carried_on(model, x):
    with torch.no_grad():
        model(x)


def evaluated_often_in_training_mode(model, x):
    for _ in range(3):
        with torch.no_grad():
            model(x)
    model.hidden = None


def logged_with_gradients(model, x):
    model(x).sum().item()
    model.hidden = None


@pytest.mark.parametrize(
    "evaluate",
    [
        evaluated_and_put_back,
        evaluated_and_reset,
        evaluated_and_carried_on,
        evaluated_often_in_training_mode,
        logged_with_gradients,
    ],
)
@pytest.mark.parametrize("form", ["perturbed", "first_step"])
def test_both_passes_start_from_the_state_that_the_evaluation_left(evaluate, form):
    ours, theirs = Recurrent(), Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1), rho=RHO, model=ours)
    base = torch.optim.SGD(theirs.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x, held = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))

        ours(x).square().mean().backward()
        if form == "perturbed":
            with optimizer.perturbed():
                ours(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True)
            ours(x).square().mean().backward()
            optimizer.second_step(zero_grad=True)
        evaluate(ours, held)

        start = theirs.hidden
        theirs(x).square().mean().backward()
        end, theirs.hidden = theirs.hidden, start
        weights = copy.deepcopy(theirs.state_dict())
        norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(p.grad * (RHO / norm))
        base.zero_grad()
        theirs(x).square().mean().backward()
        theirs.load_state_dict(weights)
        theirs.hidden = end
        base.step()
        base.zero_grad()
        evaluate(theirs, held)

        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_a_teacher_without_gradients_that_begins_a_pass_begins_the_second_one_too():
    model = Recurrent()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.hidden))
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    x = torch.randn(2, 5, 3, dtype=torch.float64)

    def loss():
        with torch.no_grad():
            target = model(x)
        return (model(x) - 2 * target).square().mean()

    for _ in range(2):
        seen.clear()
        optimizer.zero_grad()
        loss().backward()
        with optimizer.perturbed():
            loss().backward()
        optimizer.step()
        assert seen[2] is seen[0]
        assert seen[3] is not seen[1]  # carried from the teacher's forward at w + epsilon
