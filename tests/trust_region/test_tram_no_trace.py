"""The forward of a trust region's reference leaves no trace in the model, and starts where the measured one started."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import assert_same
from tests.helpers.two_passes import FORMS, state_of

REFERENCES = ("previous", "ema", "pretrained", "input_noise")


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4)
        self.set_up()

    def set_up(self):
        pass

    def forward(self, x):
        return self.update(self.linear(x))


class MomentumEncoder(Stateful):
    def set_up(self):
        self.teacher = nn.Linear(5, 4).requires_grad_(False)

    def update(self, out):
        with torch.no_grad():
            for theirs, ours in zip(self.teacher.parameters(), self.linear.parameters(), strict=True):
                theirs.lerp_(ours, 0.1)
        return out


class LargeCodebookThroughData(Stateful):
    def set_up(self):
        self.codes = nn.Parameter(torch.ones(2_500, 4), requires_grad=False)

    def update(self, out):
        self.codes.data = self.codes.data * 0.9 + 0.1 * out.detach().mean(0)
        return out


class Lists(Stateful):
    def set_up(self):
        self.history, self.counts = [], Counter()

    def update(self, out):
        self.history.append(out.detach().sum().item())
        self.counts["calls"] += 1
        return out


class Arrays(Stateful):
    def set_up(self):
        self.sums = np.zeros(2)

    def update(self, out):
        self.sums += 1
        return out


class OwnGenerators(Stateful):
    def set_up(self):
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)

    def update(self, out):
        return out * (torch.rand(4, generator=self.torch) > 0.5) * self.python.random()


class HiddenState(Stateful):
    def set_up(self):
        self.hidden = torch.zeros(4)

    def update(self, out):
        out = out + self.hidden
        self.hidden = out.detach().mean(0)
        return out


class GrowingBuffer(Stateful):
    def set_up(self):
        self.register_buffer("bank", torch.zeros(1, 4))

    def update(self, out):
        out = out + self.bank.mean(0)
        self.bank = torch.cat([self.bank, out.detach()[:1]])
        return out


KINDS = (MomentumEncoder, LargeCodebookThroughData, Lists, Arrays, OwnGenerators, HiddenState, GrowingBuffer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("form", ["perturbed", "backward"])
def test_state_is_that_of_one_forward_and_an_equal_reference_is_at_no_distance(kind, reference, form):
    model = kind()
    once = copy.deepcopy(model)
    x, y = torch.randn(6, 5), torch.randint(4, (6,))
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = samopt.TRAM(base, model=model, trust_region=reference)
    for _ in range(3):
        FORMS[form](optimizer, lambda: nn.functional.cross_entropy(model(x), y))
        once(x)
        assert_same(state_of(model), state_of(once))
        if reference != "input_noise":
            assert optimizer.last_step.distance.item() == pytest.approx(0.0, abs=1e-7)


def test_a_reference_may_run_a_call_more_than_once():
    model = HiddenState()
    once = copy.deepcopy(model)
    found = []

    class Twice:
        def measure(self, call):
            found.append([call.rerun(), call.rerun(), call.output])
            return torch.tensor(0.1)

    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model, trust_region=Twice())
    x, y = torch.randn(6, 5), torch.randint(4, (6,))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda: nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        once(x)
    assert_same(state_of(model), state_of(once))
    for first, second, own in found:
        assert_same(first, own.detach())
        assert_same(second, own.detach())
