"""Values that a forward writes into tensors: both passes begin with the same ones, in fp64 by hand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import samopt
from samopt._replay import module_state
from tests.helpers.two_passes import assert_leaves_no_trace, by_hand, watched_step

each_form = pytest.mark.parametrize("form", ["backward", "closure", "perturbed", "first_step"])


class Contrast(nn.Module):
    """An encoder, a slow copy of it, and a queue of the copy's keys, which are the negatives; made for 6 inputs."""

    def __init__(self, width=8, length=40):
        super().__init__()
        self.enqueues = True
        self.encoder = nn.Linear(6, width)
        self.slow = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.randn(width, length))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
                slow.mul_(0.7).add_(fast, alpha=0.3)
            keys = nn.functional.normalize(self.slow(x), dim=1)
        queries = nn.functional.normalize(self.encoder(x), dim=1)
        scores = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()], 1)
        if self.enqueues:
            at = int(self.pointer)
            self.queue[:, at : at + len(x)] = keys.T
            self.pointer[0] = (at + len(x)) % self.queue.shape[1]
        return scores


class ManyKeys(Contrast):
    """So large that a copy is made only for a reason."""

    def __init__(self):
        super().__init__(width=70, length=80)


class Normed(nn.Module):
    """Power iterations, whose vectors each training forward advances."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5000))
        self.last = nn.Linear(5000, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.hidden(x)))


def batch(seed):
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(scores):
    return nn.functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


def made(kind):
    torch.manual_seed(0)
    return kind().double()


def trained_by(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@each_form
@pytest.mark.parametrize("owns", ["what is trained", "everything"])
@pytest.mark.parametrize("kind", [Contrast, ManyKeys, Normed])
def test_both_passes_see_the_same_queue_teacher_and_vectors(kind, owns, form):
    model = made(kind)
    owned = [p for p in model.parameters() if owns == "everything" or p.requires_grad]
    optimizer = samopt.SAM(torch.optim.SGD(owned, lr=0.1), rho=0.3, model=model)
    for seed in range(4):

        def compute_loss(each, seed=seed):
            return loss_of(each(batch(seed)))

        want = by_hand(model, compute_loss, trained_by(model), 0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = watched_step(model, optimizer, form, compute_loss)
        assert_leaves_no_trace(got, want)


@pytest.mark.parametrize("why", ["in eval mode", "unwritten for long", "larger than what is trained"])
def test_a_large_tensor_without_a_copy_is_told_once_and_copied_from_then_on(why, monkeypatch):
    model = made(ManyKeys)
    if why == "in eval mode":
        model.slow = nn.Linear(6, 800, dtype=torch.float64).requires_grad_(False).eval()
        model.encoder = nn.Linear(6, 800, dtype=torch.float64)
        model.queue = torch.randn(800, 20, dtype=torch.float64)
    elif why == "unwritten for long":
        monkeypatch.setattr(module_state, "_LEARNING", 2)
        model.enqueues = False
    else:
        monkeypatch.setattr(module_state, "_SPARE", 4096)

    optimizer = samopt.SAM(torch.optim.SGD(model.encoder.parameters(), lr=0.1), rho=0.3, model=model)
    for seed in range(5):
        if seed == 3:
            model.enqueues = True
        is_told = seed == (3 if why == "unwritten for long" else 0)

        def compute_loss(each, seed=seed):
            return loss_of(each(batch(seed)))

        want = by_hand(model, compute_loss, trained_by(model), 0.3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = watched_step(model, optimizer, "backward", compute_loss)
        assert len(told) == is_told, [str(each.message) for each in told]
        if is_told:
            assert "the first pass wrote into" in str(told[0].message)
        else:
            assert_leaves_no_trace(got, want)


@pytest.mark.parametrize("how", ["in place", "through .data"])
def test_what_a_loop_writes_between_micro_batches_is_repeated(how):
    """As a callback does that moves a teacher after each batch."""

    def follow(model):
        for slow, fast in zip(model.slow.parameters(), model.encoder.parameters(), strict=True):
            if how == "in place":
                with torch.no_grad():
                    slow.lerp_(fast, 0.5).add_(1)
            else:
                slow.data = slow.data * 0.5 + fast.data * 0.5 + 1

    model = made(Contrast)
    first = copy.deepcopy(model)
    with torch.no_grad():
        states = []
        for seed in range(2):  # what the teacher is when each micro-batch begins
            states.append(copy.deepcopy(first.slow.state_dict()))
            first(batch(seed))
            follow(first)
    optimizer = samopt.SAM(torch.optim.SGD(model.encoder.parameters(), lr=0.1), rho=0.3, model=model)
    start = copy.deepcopy(model)

    def gradients(each, moves=None):
        each.zero_grad()
        if moves is not None:
            with torch.no_grad():
                for p, move in zip(each.encoder.parameters(), moves, strict=True):
                    p += move
        for seed in range(2):
            each.slow.load_state_dict(states[seed])
            loss_of(each(batch(seed))).backward()
        return [p.grad.clone() for p in each.encoder.parameters()]

    at_w = gradients(copy.deepcopy(start))
    norm = torch.sqrt(sum((g**2).sum() for g in at_w))
    want = gradients(copy.deepcopy(start), [0.3 * g / norm for g in at_w])

    optimizer.zero_grad()
    for seed in range(2):
        x = batch(seed)
        optimizer.backward(lambda x=x: loss_of(model(x)), last=seed == 1)
        if seed == 0:
            follow(model)
    for parameter, gradient in zip(model.encoder.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-13)
    follow(model)
    for key, value in first.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("kind", [Contrast, ManyKeys])
@pytest.mark.parametrize("form", ["perturbed", "first_step"])
def test_an_evaluation_before_the_first_pass_may_write_too(kind, form):
    """The model is called in train mode without gradients before the step: that belongs to no pass, but stays."""
    model = made(kind)
    optimizer = samopt.SAM(torch.optim.SGD(model.encoder.parameters(), lr=0.1), rho=0.3, model=model)
    for seed in range(3):
        start = copy.deepcopy(model)
        with torch.no_grad():
            start(batch(50 + seed))
        want = by_hand(start, lambda each, seed=seed: loss_of(each(batch(seed))), trained_by(model), 0.3)
        calls = []

        def compute_loss(each, seed=seed, calls=calls):
            if not calls:
                with torch.no_grad():
                    each(batch(50 + seed))
            calls.append(1)
            return loss_of(each(batch(seed)))

        assert_leaves_no_trace(watched_step(model, optimizer, form, compute_loss), want)


def test_nothing_is_copied_before_a_step_without_a_second_pass():
    model = made(ManyKeys)
    optimizer = samopt.SAM(torch.optim.SGD(model.encoder.parameters(), lr=0.1), rho=0.0, model=model)
    optimizer.backward(lambda: loss_of(model(batch(0))))
    assert not optimizer.two_passes._replay.state._starts
