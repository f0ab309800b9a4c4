"""``find_rho``: what it trains and compares, against loops by hand; and that nothing of the user's changes."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

import samopt
from samopt import sharpness
from samopt.sharpness.radius.range_test import range_test
from tests.sharpness.test_losses_and_batches import classifier, hand, split
from tests.sharpness.test_sharpness_model import assert_unchanged, conv_net, surroundings


def learnable(count=96, size=8, noise=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator, dtype=dtype)
    y = (x[:, :3] + 0.1 * x[:, 2:]).argmax(1)
    wrong = torch.rand(count, generator=generator) < noise
    y[wrong] = torch.randint(3, (int(wrong.sum()),), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def by_hand(model, batches, held_out, rho, steps, lr):
    """SAM with plain SGD and a cosine: the held-out accuracy and loss."""
    twin = copy.deepcopy(model).train()
    weights = list(twin.parameters())
    for step in range(steps):
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = batches[step % len(batches)]
        gradient = torch.autograd.grad(hand(twin, batch), weights)
        if rho:
            norm = torch.sqrt(sum(g.square().sum() for g in gradient))
            with torch.no_grad():
                moved = [rho * g / norm for g in gradient]
                for weight, move in zip(weights, moved, strict=True):
                    weight.add_(move)
                gradient = None
            gradient = torch.autograd.grad(hand(twin, batch), weights)
            with torch.no_grad():
                for weight, move in zip(weights, moved, strict=True):
                    weight.sub_(move)
        with torch.no_grad():
            for weight, g in zip(weights, gradient, strict=True):
                weight.sub_(rate * g)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        logits = twin.eval()(x)
    return (logits.argmax(1) == y).double().mean().item(), functional.cross_entropy(logits, y).item()


def test_every_gain_is_that_of_the_same_runs_by_hand():
    model, batches = classifier(), learnable(noise=0.3)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    radii = (0.05, 0.5)
    search = samopt.find_rho(model, nn.CrossEntropyLoss(), batches, optimizer=base, radii=radii, steps=15)
    training = [batch for place, batch in enumerate(batches) if place % 4 != 3]
    held_out = batches[3::4]
    runs = [by_hand(model, training, held_out, rho, 15, 0.5) for rho in (0.0, *radii)]
    assert search.score == "accuracy"
    assert search.base_score == pytest.approx(runs[0][0])
    assert search.gains == pytest.approx([run[0] - runs[0][0] for run in runs[1:]])
    assert search.loss_rises == pytest.approx([run[1] - runs[0][1] for run in runs[1:]], rel=1e-6)
    assert search.cost == 15 * (1 + 2 * 2)


def test_given_validation_data_every_batch_is_trained_on():
    model, batches, validation = classifier(), learnable(), split([24])
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    search = samopt.find_rho(
        model,
        hand,
        batches,
        optimizer=base,
        radii=[0.1],
        steps=10,
        validation=validation,
        accuracy_fn=sharpness.accuracy,
    )
    runs = [by_hand(model, batches, validation, rho, 10, 0.5) for rho in (0.0, 0.1)]
    assert search.base_score == pytest.approx(runs[0][0])
    assert search.gains[0] == pytest.approx(runs[1][0] - runs[0][0])


def test_without_classes_the_loss_decides():
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    batches = [(x, x[:, :1]) for x, _ in learnable()]
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    search = samopt.find_rho(model, nn.MSELoss(), batches, optimizer=base, radii=[0.01, 50.0], steps=20)
    assert search.score == "loss"
    assert search.gains == pytest.approx([-rise for rise in search.loss_rises])
    assert search.gains[1] < 0  # a radius far beyond the weights ruins a linear fit
    assert search.rho != 50.0


def test_a_harmful_radius_is_never_returned():
    model, batches = classifier(), learnable(count=256, size=16)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    search = samopt.find_rho(model, nn.CrossEntropyLoss(), batches, optimizer=base, radii=[30.0], steps=40)
    assert search.rho is None and search.value == 0 and search.standard_error is None
    assert search.advice.startswith("Train without a radius")


def test_folds_hold_out_other_batches():
    model, batches = classifier(), learnable(noise=0.3)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    search = samopt.find_rho(model, hand, batches, optimizer=base, radii=[0.5], steps=10, folds=2)
    gains = []
    for last in (3, 2):
        training = [batch for place, batch in enumerate(batches) if place % 4 != last]
        runs = [by_hand(model, training, batches[last::4], rho, 10, 0.5)[0] for rho in (0.0, 0.5)]
        gains.append(runs[1] - runs[0])
    assert search.gains[0] == pytest.approx(sum(gains) / 2)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "function", "wrapped"])
def test_nothing_of_the_users_changes(kind):
    model = conv_net()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trained = [p for p in model.parameters()]
    optimizers = {
        "sgd": lambda: torch.optim.SGD(trained, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(trained, lr=0.01),
        "wrapped": lambda: samopt.SAM(torch.optim.SGD(trained, lr=0.1, momentum=0.9), model=model),
    }
    optimizer = optimizers.get(kind, lambda: None)()
    if kind in ("sgd", "adamw"):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # so that it has a state
    given = optimizer if optimizer is not None else (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(8)
    ]
    before = surroundings(model)
    state = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None
    random.seed(3)
    before["random"] = random.getstate()
    search = samopt.find_rho(model, nn.CrossEntropyLoss(), data, optimizer=given, radii=[0.05], steps=6)
    assert_unchanged(before, model)
    if optimizer is not None:
        after = optimizer.state_dict()
        assert str(after) == str(state)
    again = samopt.find_rho(model, nn.CrossEntropyLoss(), data, optimizer=given, radii=[0.05], steps=6)
    assert again.to_dict() == search.to_dict()


def test_the_range_test_is_sams_ascent_by_hand():
    model, batches = classifier(), split([12, 8])
    rises, cosines = range_test(model, hand, batches, [0.1, 1.0], False)
    weights = list(model.parameters())
    expected_rises, expected_cosines = [], []
    for rho in (0.1, 1.0):
        rows = []
        for batch in batches:
            loss = hand(model, batch)
            gradient = torch.autograd.grad(loss, weights)
            norm = torch.sqrt(sum(g.square().sum() for g in gradient))
            twin = copy.deepcopy(model)
            with torch.no_grad():
                for weight, g in zip(twin.parameters(), gradient, strict=True):
                    weight.add_(rho * g / norm)
            there = hand(twin, batch)
            other = torch.autograd.grad(there, list(twin.parameters()))
            dot = sum((a * b).sum() for a, b in zip(gradient, other, strict=True))
            other_norm = torch.sqrt(sum(g.square().sum() for g in other))
            rows.append(((there - loss).item(), (dot / norm / other_norm).item()))
        expected_rises.append((12 * rows[0][0] + 8 * rows[1][0]) / 20)
        expected_cosines.append((12 * rows[0][1] + 8 * rows[1][1]) / 20)
    assert rises == pytest.approx(expected_rises, rel=1e-9)
    assert cosines == pytest.approx(expected_cosines, rel=1e-9)


def test_it_draws_three_panels():
    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    figure = samopt.find_rho(model, hand, learnable(), optimizer=base, radii=[0.1, 0.3], steps=5).plot()
    figure.canvas.draw()
    assert [bool(axes.get_xlabel() and axes.get_ylabel()) for axes in figure.axes] == [True] * 3


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"radii": []}, ValueError, "radii must be positive"),
        ({"radii": [0.0]}, ValueError, "radii must be positive"),
        ({"radii": [math.inf]}, ValueError, "radii must be positive"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"folds": 5}, ValueError, "folds must be between 1 and 4"),
        ({"folds": 2, "validation": split([8])}, ValueError, "and 1 with validation="),
        ({"optimizer": 3}, TypeError, "must be a torch optimizer, or a function"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, ValueError, "none of the model's parameters"),
        ({"variant": "sma"}, ValueError, "sma"),
    ],
)
def test_what_cannot_be_searched_is_refused(options, kind, text):
    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(kind, match=text):
        samopt.find_rho(model, hand, learnable(), **({"optimizer": base, "steps": 3} | options))


def test_too_few_batches_are_refused():
    model = classifier()
    with pytest.raises(ValueError, match="there are only 3"):
        samopt.find_rho(model, hand, split([8, 8, 8]), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
