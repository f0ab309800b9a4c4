"""``find_rho``: what it trains and compares, against loops by hand; and that nothing of the user's changes."""

from __future__ import annotations

import copy
import math
import random
import statistics

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
    search = samopt.find_rho(model, nn.CrossEntropyLoss(), batches, optimizer=base, radii=radii, steps=15, folds=1)
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
    assert len(search.fold_gains[0]) == 2 and search.cost == 2 * 40 * 3  # two folds were enough to tell


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
    assert search.fold_gains[0] == pytest.approx(gains)


@pytest.mark.parametrize("given", [None, 2, 3])
def test_an_error_is_the_larger_of_that_over_examples_and_that_over_folds(given):
    model, batches = classifier(), learnable(count=128, size=16, noise=0.3)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    search = samopt.find_rho(model, hand, batches, optimizer=base, radii=[0.5], steps=10, folds=given)
    pieces, folds = [], []
    for last in (3, 2, 1, 0)[: given or 4]:
        training = [batch for place, batch in enumerate(batches) if place % 4 != last]
        held_out = batches[last::4]  # each a piece of 16 examples
        of_fold = [
            by_hand(model, training, [piece], 0.5, 10, 0.5)[0] - by_hand(model, training, [piece], 0.0, 10, 0.5)[0]
            for piece in held_out
        ]
        pieces += of_fold
        folds.append(statistics.mean(of_fold))
    over_pieces, over_folds = (statistics.stdev(values) / len(values) ** 0.5 for values in (pieces, folds))
    assert search.errors[0] == pytest.approx(max(over_pieces, over_folds))


def result(**changes):
    known = {
        "measure": "find_rho",
        "value": 0.0,
        "standard_error": None,
        "cost": 1.0,
        "settings": {"steps": 10, "folds": 4},
        "rho": None,
        "radii": (0.1, 0.3, 1.0),
        "score": "accuracy",
        "base_score": 0.5,
        "gains": (0.03, 0.02, -math.inf),
        "errors": (0.04, 0.009, math.nan),
        "loss_rises": (0.1, 0.2, math.nan),
        "fold_gains": ((0.03, 0.03), (0.02,) * 4, (0.0,)),
        "tested_radii": (0.1, 1.0),
        "rises": (0.1, 0.4),
        "agreements": (0.9, 0.1),
    }
    return sharpness.RhoSearch(**(known | changes))


def test_the_advice_is_about_the_radius_that_is_chosen_though_one_that_dropped_out_gained_more():
    assert result(rho=0.3).advice == (
        "Use rho=0.3: it gained +0.02 ± 0.009 in held-out accuracy over the base optimizer alone."
    )


def test_the_advice_says_when_a_rise_of_the_loss_spoke_against_a_radius():
    assert result().advice == (
        "Train without a radius: the best of 3, 0.3, gained +0.02 ± 0.009 in held-out accuracy, but raised the "
        "held-out loss by 0.2."
    )


def test_the_advice_says_when_a_gain_may_be_chance():
    assert result(errors=(0.04, 0.015, math.nan)).advice == (
        "Train without a radius: the best of 3, 0.3, gained +0.02 ± 0.015 in held-out accuracy, less than two standard "
        "errors."
    )


def test_the_advice_says_when_no_loss_stayed_finite():
    nothing = result(gains=(-math.inf,) * 3, errors=(math.nan,) * 3)
    assert nothing.advice == "Train without a radius: with none of 3 did the held-out loss stay finite."
    nothing.plot().canvas.draw()


def test_a_radius_whose_loss_is_not_finite_drops_out_at_once():
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()

    def loss(model, batch):
        broken = math.nan if model.weight.norm() > 3 else 1.0
        return broken * functional.mse_loss(model(batch[0]), batch[1])

    batches = [(x, x[:, :1]) for x, _ in learnable()]
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    search = samopt.find_rho(model, loss, batches, optimizer=base, radii=[0.01, 30.0], steps=5)
    assert search.gains[1] == -math.inf and search.rho != 30.0
    assert [len(gains) for gains in search.fold_gains] == [4, 1]
    assert search.cost == 5 * (4 * 3 + 2)
    search.plot().canvas.draw()


def test_a_base_that_diverges_is_refused():
    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=1e308)
    with pytest.raises(ValueError, match="the base optimizer alone ends with a held-out loss of nan after 5 steps"):
        samopt.find_rho(model, hand, learnable(), optimizer=base, steps=5)


def test_every_run_sees_the_same_numbers_from_python_too():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + random.gauss(0, 1) if self.training else x)

    torch.manual_seed(0)
    model = Noisy(5, 3).double()
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    search = samopt.find_rho(model, hand, learnable(), optimizer=base, radii=[1e-13], steps=10)
    assert search.loss_rises[0] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler"])
def test_the_generator_of_a_loader_is_put_back(place):
    x, y = (torch.cat(parts) for parts in zip(*learnable(), strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    generator = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    loader = torch.utils.data.DataLoader(
        data,
        **{
            "loader": {"batch_size": 8, "shuffle": True, "generator": generator},
            "sampler": {"batch_size": 8, "sampler": sampler},
            "batch sampler": {"batch_sampler": torch.utils.data.BatchSampler(sampler, 8, drop_last=True)},
        }[place],
    )
    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before, around = generator.get_state(), torch.get_rng_state()
    search = samopt.find_rho(model, hand, loader, optimizer=base, radii=[0.1], steps=3)
    assert torch.equal(before, generator.get_state())
    assert torch.equal(around, torch.get_rng_state())
    given = samopt.find_rho(model, hand, list(loader), optimizer=base, radii=[0.1], steps=3)
    assert given.gains == search.gains  # the loader's order was its first one


@pytest.mark.parametrize(
    ("outputs", "labels", "score"),
    [
        ((2,), torch.arange(64) % 2, "accuracy"),
        ((1,), torch.arange(64) % 2, "loss"),  # a logit for BCEWithLogitsLoss
        ((), torch.arange(64) % 2, "loss"),
        ((1,), torch.arange(64).reshape(64, 1) % 5, "loss"),  # counts
        ((3,), torch.arange(64 * 3).reshape(64, 3) % 2, "loss"),  # several labels each
        ((4, 5), torch.arange(64 * 4).reshape(64, 4) % 5, "loss"),  # tokens, perhaps shifted by the loss
        ((3,), torch.arange(64) % 5, "loss"),  # more labels than outputs
    ],
)
def test_an_accuracy_decides_only_where_each_example_has_one_class(outputs, labels, score):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, max(1, math.prod(outputs)))

        def forward(self, x):
            return self.inner(x).reshape(len(x), *outputs)

    torch.manual_seed(0)
    x, model = torch.randn(64, 5), Net()
    batches = list(zip(x.split(8), labels.split(8), strict=True))

    def loss(model, batch):
        return (model(batch[0]) - batch[1].double().mean()).square().mean()

    base = torch.optim.SGD(model.parameters(), lr=0.01)
    assert samopt.find_rho(model, loss, batches, optimizer=base, radii=[0.1], steps=3).score == score


def test_a_variant_without_a_radius_is_refused_before_any_run():
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return hand(model, batch)

    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="TRAM sets rho= itself"):
        samopt.find_rho(model, loss, learnable(), optimizer=base, variant="tram", steps=3)
    assert calls == []


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
    with pytest.raises(ValueError, match="needs 4 or more, but got 3"):
        samopt.find_rho(model, hand, split([8, 8, 8]), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=3)


def test_a_single_batch_in_place_of_several_is_refused():
    model = classifier()
    with pytest.raises(TypeError, match="got a single batch"):
        samopt.find_rho(model, hand, split([8])[0], optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=3)


def test_a_single_held_out_piece_is_refused_since_it_tells_no_error():
    model = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="one such piece only"):
        samopt.find_rho(model, hand, split([8] * 4), optimizer=base, steps=3, folds=1)
    assert samopt.find_rho(model, hand, split([8] * 4), optimizer=base, radii=[0.1], steps=3).errors[0] >= 0
