"""The second pass begins with the values that the first one began with, also of tensors that forwards write into."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import samopt
from samopt._replay.tensor_values import SMALL
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, watched_step

RHO = 0.4
WIDE = SMALL  # with 8 rows, more than what is copied in any case


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 3, dtype=torch.float64)
        self.set_up()

    def forward(self, x):
        return self.head(self.use(torch.tanh(self.body(x))))


class Queue(Base):
    """Contrasts its output with keys of earlier batches, and stores its own."""

    def set_up(self):
        self.register_buffer("keys", torch.randn(8, WIDE, dtype=torch.float64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def use(self, hidden):
        scores = hidden @ self.keys.clone()
        place = int(self.position) + torch.arange(len(hidden))
        self.keys[:, place] = hidden.detach().T
        self.position += len(hidden)
        return hidden * scores.logsumexp(1, keepdim=True)


class SilentQueue(Queue):
    """Writes through ``.data``."""

    def use(self, hidden):
        scores = hidden @ self.keys.data.clone()
        self.keys.data.copy_(self.keys.roll(10, 1))
        self.keys.data[:, : len(hidden)] = hidden.detach().T
        return hidden * scores.logsumexp(1, keepdim=True)


class TensorInAnAttribute(Queue):
    def set_up(self):
        self.position = torch.zeros((), dtype=torch.int64)
        self.keys = torch.randn(8, WIDE, dtype=torch.float64)


class MomentumEncoder(Base):
    """A large parameter of another owner, which each forward moves."""

    def set_up(self):
        self.encoder = nn.Parameter(torch.randn(8, WIDE, dtype=torch.float64), requires_grad=False)
        self.power = nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)

    def use(self, hidden):
        with torch.no_grad():
            self.encoder.mul_(0.9).add_(hidden.mean(0)[:, None])
            self.power.data = self.encoder.norm(dim=1)
        return hidden * self.power / 10


class SpectralNorm(Base):
    def set_up(self):
        self.body = nn.utils.parametrizations.spectral_norm(self.body)

    def use(self, hidden):
        return hidden


class Centered(Base):
    """Reads running averages in training, unlike torch's own norm layers."""

    def set_up(self):
        self.norm = Renormalised(8, dtype=torch.float64)

    def use(self, hidden):
        return self.norm(hidden)


class Renormalised(nn.BatchNorm1d):
    def forward(self, x):
        out = super().forward(x)
        return out - self.running_mean


def loss_on(seed):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda model: nn.functional.cross_entropy(model(x), torch.arange(10) % 3)


def owned(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return samopt.SAM(torch.optim.SGD(trained, lr=0.1, momentum=0.9), rho=RHO, model=model)


KINDS = [Queue, SilentQueue, TensorInAnAttribute, MomentumEncoder, SpectralNorm, Centered]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_that_of_two_passes_from_the_same_state(kind, form):
    model = kind()
    optimizer = optimizer_of(model)
    for seed in range(3):
        want = by_hand(model, loss_on(seed), owned(model), RHO)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed)), want)


@pytest.mark.parametrize("form", ["perturbed", "first_step"])
def test_an_evaluation_in_train_mode_before_the_step_is_no_part_of_either_pass(form):
    model = Queue()
    optimizer = optimizer_of(model)
    for seed in range(3):
        with torch.no_grad():
            loss_on(seed + 10)(model)
        want = by_hand(copy.deepcopy(model), loss_on(seed), owned(model), RHO)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed)), want)


@pytest.mark.parametrize("form", FORMS)
def test_an_attribute_in_the_memory_of_a_weight_does_not_undo_the_move(form):
    class Aliased(Base):
        def set_up(self):
            self.alias = self.head.weight.data
            self.register_buffer("flat", self.head.bias.data)

        def use(self, hidden):
            return hidden

    model = Aliased()
    optimizer = optimizer_of(model)
    for seed in range(3):
        plain = Base.__new__(Base)
        nn.Module.__init__(plain)
        plain.body, plain.head = copy.deepcopy(model.body), copy.deepcopy(model.head)
        plain.use = lambda hidden: hidden
        with torch.no_grad():
            loss_on(seed + 10)(model)
        want = by_hand(plain, loss_on(seed), owned(plain), RHO)
        got = watched_step(model, optimizer, form, loss_on(seed))
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-11, atol=1e-13)


def test_a_window_begins_again_where_its_first_micro_batch_began():
    model, twin = Queue(), Queue()
    optimizer = optimizer_of(model)
    for first in (0, 2):
        want = by_hand(twin, lambda each, k=first: loss_on(k)(each) + loss_on(k + 1)(each), owned(twin), RHO)
        optimizer.zero_grad()
        optimizer.backward(lambda k=first: loss_on(k)(model), last=False)
        optimizer.backward(lambda k=first: loss_on(k + 1)(model))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, want.gradients[name], rtol=1e-10, atol=1e-12)
        optimizer.step()
        twin = copy.deepcopy(model)


def test_nothing_keeps_a_tensor_that_the_model_has_dropped():
    model = Queue()
    optimizer = optimizer_of(model)
    optimizer.backward(lambda: loss_on(0)(model))
    optimizer.step()
    old = weakref.ref(model.keys)
    model.keys = torch.randn(8, WIDE, dtype=torch.float64)
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_on(1)(model))
    gc.collect()
    assert old() is None


def test_the_averages_of_torchs_norm_layers_need_no_copy():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.InstanceNorm1d(8, track_running_stats=True))
    state = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model).two_passes._replay.state
    assert {id(buffer) for buffer in model.buffers()} == state._look().unread


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, Renormalised])
def test_a_trunk_that_is_run_once_keeps_its_averages(norm):
    def train(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 3)).double()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = samopt.SAM(base, rho=RHO, model=model, only="head", **options)
        for seed in range(3):
            optimizer.zero_grad()
            optimizer.backward(lambda seed=seed: loss_on(seed)(model))
            optimizer.step()
        return model.state_dict()

    assert train()["1.num_batches_tracked"] == 3
    torch.testing.assert_close(train(reuse_trunk=True), train(), rtol=1e-12, atol=1e-14)
