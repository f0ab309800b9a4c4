"""State of modules and objects around a second pass: what is bound, filled, drawn and written is as before it."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn

import samopt
from samopt._replay.module_state import ModuleState


class Noisy(nn.Module):
    """Draws from generators that it holds itself; counts and collects."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)
        self.generators = {
            "torch": torch.Generator().manual_seed(1),
            "python": random.Random(2),
            "numpy": [numpy.random.default_rng(3), numpy.random.RandomState(4)],
        }
        self.drawn = []

    def forward(self, x):
        first, second = self.generators["numpy"]
        scale = self.generators["python"].random() + first.random() + second.rand()
        self.drawn.append(scale)
        return self.inner(x) * scale + torch.rand(3, dtype=torch.float64, generator=self.generators["torch"])


def closure_form(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def explicit_form(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    with optimizer.perturbed():
        loss().backward()
    optimizer.step()


def backward_form(optimizer, loss):
    optimizer.zero_grad()
    optimizer.backward(loss)
    optimizer.step()


@pytest.mark.parametrize("form", [closure_form, explicit_form, backward_form])
def test_generators_of_a_module_draw_the_same_in_both_passes(form):
    model, plain = Noisy(), Noisy()
    scales = []

    class Watching(Noisy):
        def forward(self, x):
            out = super().forward(x)
            scales.append(self.drawn[-1])
            return out

    model.__class__ = Watching
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    x = torch.ones(2, 3, dtype=torch.float64)
    for _ in range(3):
        form(optimizer, lambda: model(x).square().sum())
        plain(x)
    assert scales[0::2] == scales[1::2] == plain.drawn == model.drawn
    assert torch.equal(model.generators["torch"].get_state(), plain.generators["torch"].get_state())


def test_attributes_that_the_loop_sets_between_micro_batches_are_set_again():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, dtype=torch.float64)
            self.level, self.tags, self.seen = 0.0, [], []

        def forward(self, x):
            self.seen.append((self.level, list(self.tags), getattr(self, "extra", None)))
            return self.inner(x) * self.level

    model = Conditioned()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    passes = []
    model.register_forward_pre_hook(lambda m, _: passes.append((m.level, list(m.tags), getattr(m, "extra", None))))
    x = torch.ones(2, 3, dtype=torch.float64)
    for index, level in enumerate((1.0, 2.0, 3.0)):
        model.level = level
        model.tags.append(index)
        if index == 1:
            model.extra = "set"
        elif index == 2:
            del model.extra
        optimizer.backward(lambda: model(x).square().mean(), last=index == 2)
    optimizer.step()
    assert passes[:3] == passes[3:]
    assert model.seen == [(1.0, [0], None), (2.0, [0, 1], "set"), (3.0, [0, 1, 2], None)]
    assert (model.level, model.tags) == (3.0, [0, 1, 2])


def test_buffers_that_the_loop_sets_between_micro_batches_are_set_again():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, dtype=torch.float64)
            self.register_buffer("hidden", torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            passes.append(self.hidden)
            self.hidden = self.inner(x + self.hidden).detach().mean(0)
            return self.inner(x + passes[-1])

    passes = []
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    x = torch.ones(2, 3, dtype=torch.float64)
    for index in range(4):
        if index == 2:  # a new sequence begins
            model.hidden = torch.full((3,), 7.0, dtype=torch.float64)
        optimizer.backward(lambda: model(x).square().mean(), last=index == 3)
    first, second = passes[:4], passes[4:]
    assert all(torch.equal(first[i], second[i]) for i in (0, 2))
    assert all(not torch.equal(first[i], second[i]) for i in (1, 3))  # carried from a forward at w + epsilon
    assert torch.equal(model.hidden, model.inner(x + first[3]).detach().mean(0))


def test_values_that_nothing_wrote_are_put_back_without_counting_as_a_write():
    """A graph that needs them stays usable: BatchNorm in evaluation mode needs its statistics."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    state = ModuleState([model])
    state.begin()
    state.save()
    loss = model(torch.ones(2, 3)).square().sum()
    versions = [value._version for value in model.state_dict(keep_vars=True).values()]
    state.restore()
    assert [value._version for value in model.state_dict(keep_vars=True).values()] == versions
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_objects_besides_modules():
    class Meter:
        def __init__(self):
            self.total, self.values, self.left_alone = torch.zeros(2), [], 0

    meter = Meter()
    state = ModuleState([])
    state.include([], [(meter, ["left_alone"])])

    def update():
        meter.total += 1
        meter.values.append(len(meter.values))
        meter.left_alone += 1
        meter.made = True

    state.begin()
    update()
    state.save()
    assert meter.values == []
    assert not hasattr(meter, "made")
    update()
    state.restore()
    assert (meter.total.tolist(), meter.values, meter.left_alone, meter.made) == ([1.0, 1.0], [0], 2, True)
