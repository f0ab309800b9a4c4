"""A thread that evaluates the model while another one trains it: the training is that of the training thread alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import bits, same_bits


class Meeting(nn.Module):
    """Calls ``in_training`` or ``in_evaluation`` in the middle of a forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()

    in_training = in_evaluation = staticmethod(lambda: None)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        (type(self).in_training if torch.is_grad_enabled() else type(self).in_evaluation)()
        # All threads draw from one stream, so an evaluation must draw nothing.
        return self.last(nn.functional.dropout(hidden, 0.4, training=torch.is_grad_enabled()))


def around(kind, evaluate, train):
    """The evaluation begins before the training step and ends after it."""
    inside, done = threading.Event(), threading.Event()
    kind.in_evaluation = staticmethod(lambda: (inside.set(), done.wait()))
    thread = threading.Thread(target=evaluate)
    thread.start()
    inside.wait()
    train()
    done.set()
    thread.join()


def within(kind, evaluate, train):
    """Each training forward has an evaluation in its middle."""

    def meet():
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()

    kind.in_training = staticmethod(meet)
    train()


def overlapping(kind, evaluate, train):
    """The evaluation begins before the first training forward and ends in the middle of it."""
    inside, done = threading.Event(), threading.Event()
    kind.in_evaluation = staticmethod(lambda: (inside.set(), done.wait()))
    thread = threading.Thread(target=evaluate)

    def meet():
        done.set()
        thread.join()

    kind.in_training = staticmethod(meet)
    thread.start()
    inside.wait()
    train()


def alone(kind, evaluate, train):
    train()


def train_with(meeting, form, steps=3):
    """Weights after some steps, in each of which another thread evaluates."""
    kind = type("Met", (Meeting,), {})
    model = kind()
    options = {"direction": "momentum"} if form == "one pass" else {}
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model, **options)

    def evaluate():
        with torch.no_grad():
            model(torch.ones(2, 6, dtype=torch.float64))

    def step(x):
        def loss():
            return model(x).square().mean()

        optimizer.zero_grad()
        if form == "backward":
            optimizer.backward(loss)
        else:
            loss().backward()
            if form == "perturbed":
                with optimizer.perturbed():
                    loss().backward()
        optimizer.step()

    for index in range(steps):
        kind.in_training = kind.in_evaluation = staticmethod(lambda: None)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        torch.manual_seed(index)
        meeting(kind, evaluate, lambda x=x: step(x))
    return model


@pytest.mark.parametrize("form", ["perturbed", "backward", "one pass"])
@pytest.mark.parametrize("meeting", [around, within, overlapping])
def test_training_is_as_without_the_other_thread(meeting, form) -> None:
    assert same_bits(train_with(meeting, form), bits(train_with(alone, form)))


def test_an_evaluation_once_the_gradients_are_cleared_leaves_the_masks_of_the_forward_before_them() -> None:
    trained = []
    for evaluates in (True, False):
        model = Meeting()
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

        def evaluate(model=model):
            with torch.no_grad():
                model(torch.ones(2, 6, dtype=torch.float64))

        for index in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            if evaluates:
                thread = threading.Thread(target=evaluate)
                thread.start()
                thread.join()
            loss.backward()
            with optimizer.perturbed():
                model(x).square().mean().backward()
            optimizer.step()
        trained.append(model)
        torch.manual_seed(0)
    assert same_bits(trained[0], bits(trained[1]))
