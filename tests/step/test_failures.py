"""A failure anywhere in a second pass leaves exact weights, a clear error, and a usable optimizer."""

from __future__ import annotations

import gc
import random
import signal
import time

import pytest
import torch
from torch import nn

import samopt
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.module_state import ModuleState
from tests.helpers.cases import bits, same_bits
from tests.helpers.two_passes import FORMS

each_form = pytest.mark.parametrize("form", FORMS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_on(model, seed=0):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.cross_entropy(model(x), torch.arange(10) % 3)


class Refusing(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError("in backward")


def make():
    model = network()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model)
    return model, optimizer


def goes_on_like_new(model, optimizer, form):
    twin, fresh = make()
    twin.load_state_dict(model.state_dict())
    for each, trained in ((model, optimizer), (twin, fresh)):
        torch.manual_seed(5)
        trained.zero_grad()
        FORMS[form](trained, lambda each=each: loss_on(each, 1))
    assert same_bits(model, bits(twin))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@each_form
@pytest.mark.parametrize("where", ["forward", "backward", "hook"])
def test_an_exception_in_the_second_pass(where, form):
    model, optimizer = make()
    before = bits(model)

    def compute_loss():
        loss = loss_on(model)
        if optimizer.is_perturbed:
            if where == "forward":
                raise MemoryError("in forward")
            if where == "hook":
                model[0].weight.register_hook(lambda gradient: 1 / 0)
            else:
                loss = Refusing.apply(loss)
        return loss

    with pytest.raises((MemoryError, ZeroDivisionError)):
        FORMS[form](optimizer, compute_loss)
    if form == "first_step":
        optimizer.restore()
    assert same_bits(model, before)
    assert not optimizer.is_perturbed
    model[0].weight._backward_hooks = None
    goes_on_like_new(model, optimizer, form)


@pytest.mark.parametrize("what", ["weights", "state", "both"])
@pytest.mark.parametrize("form", ["closure", "perturbed", "backward"])
def test_an_error_while_the_pass_is_put_back(what, form, monkeypatch):
    """The first attempt of each fails, as at an interrupt; the second one completes it."""
    model, optimizer = make()
    before, failed = bits(model), []

    def failing_once(method):
        def run(self):
            if method not in failed:
                failed.append(method)
                raise KeyboardInterrupt
            method(self)

        return run

    if what != "state":
        monkeypatch.setattr(WeightBackup, "restore", failing_once(WeightBackup.restore))
    if what != "weights":
        monkeypatch.setattr(ModuleState, "restore", failing_once(ModuleState.restore))
    with pytest.raises(KeyboardInterrupt):
        FORMS[form](optimizer, lambda: loss_on(model))
    assert same_bits(model, before)
    assert not optimizer.is_perturbed
    assert model[1].num_batches_tracked == 1
    monkeypatch.undo()
    goes_on_like_new(model, optimizer, form)


@pytest.mark.parametrize("clearing", ["missing", "only some"])
def test_a_closure_that_does_not_clear_is_named(clearing):
    model, optimizer = make()
    calls = []

    def closure():
        calls.append(0)
        if clearing == "only some":
            model[0].zero_grad()
        loss = loss_on(model)
        loss.backward()
        return loss

    loss_on(model).backward()
    before = bits(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="did not clear the gradients that were there.*optimizer.zero_grad"):
        optimizer.step(closure)
    assert len(calls) == 1
    assert same_bits(model, before)
    assert not optimizer.is_perturbed
    assert all(g.isfinite().all() for g in gradients)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    goes_on_like_new(model, optimizer, "closure")


@pytest.mark.parametrize(
    "clear",
    [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
        lambda model, optimizer: optimizer.base_optimizer.zero_grad(),
        lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
        lambda model, optimizer: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
    ],
)
def test_every_way_to_clear_in_a_closure_is_accepted(clear):
    model, optimizer = make()
    twin, fresh = make()
    for step in range(3):
        for each, trained, how in ((model, optimizer, clear), (twin, fresh, lambda m, o: o.zero_grad())):
            torch.manual_seed(step)

            def closure(each=each, trained=trained, how=how, step=step):
                how(each, trained)
                loss = loss_on(each, step)
                loss.backward()
                return loss

            trained.step(closure)
    assert same_bits(model, bits(twin))


def test_the_idiom_of_the_widely_used_script_is_named_and_not_executed_three_times():
    """It calls backward, and then ``step`` with a closure that does not clear."""
    model, optimizer = make()
    calls = []

    def closure():
        calls.append(0)
        loss = loss_on(model)
        loss.backward()
        return loss

    loss = loss_on(model)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"do not call backward before step\(closure\)"):
        optimizer.step(closure)
    assert len(calls) == 1


@pytest.mark.parametrize("inside", ["perturbed", "first_step"])
def test_a_second_pass_for_each_micro_batch_is_refused(inside):
    model, optimizer = make()
    before = bits(model)
    loss_on(model, 0).backward()
    if inside == "perturbed":
        with optimizer.perturbed():
            loss_on(model, 0).backward()
    else:
        optimizer.first_step()
        loss_on(model, 0).backward()
        optimizer.restore()
    waiting = [p.grad.clone() for p in model.parameters()]
    loss_on(model, 1).backward()
    with pytest.raises(RuntimeError, match="while the gradients of a second pass wait"):
        optimizer.perturbed().__enter__()
    assert same_bits(model, before) and len(waiting) == 6
    optimizer.zero_grad()
    goes_on_like_new(model, optimizer, "perturbed")


def test_no_first_gradients_names_both_likely_mistakes():
    model, optimizer = make()
    before = bits(model)
    with pytest.raises(RuntimeError, match=r'first backward is missing.*direction="momentum"'):
        with optimizer.perturbed():
            pytest.fail("entered")
    assert same_bits(model, before)
    goes_on_like_new(model, optimizer, "perturbed")


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["model", "no-model"])
def test_real_signals_find_exact_weights_in_the_users_handler(given):
    """At 5,000 random times on and around ``perturbed()``, in each of two cases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.ReLU(), nn.Linear(60, 30))
    x, y = torch.randn(6, 4), torch.randint(30, (6,))
    optimizer = samopt.SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model if given else None, warn_on_stall=False
    )
    draw, hits, inexact = random.Random(1), 0, 0
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(20_000):
            if hits == 5000:
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            before = bits(model)
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 2e-3))
                with optimizer.perturbed():
                    nn.functional.cross_entropy(model(x), y).backward()
                time.sleep(0.003)
            except KeyboardInterrupt:
                hits += 1
                inexact += not same_bits(model, before)
            torch.set_grad_enabled(True)  # a signal may hit torch's own context managers
            assert same_bits(model, before)
            assert not optimizer.is_perturbed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert hits == 5000
    assert inexact == 0


def test_an_optimizer_that_is_dropped_in_its_second_pass_leaves_the_random_streams_alone():
    model, optimizer = make()
    before = bits(model)
    loss_on(model).backward()
    optimizer.ascend()
    assert not same_bits(model, before)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    del optimizer
    gc.collect()
    assert torch.equal(torch.rand(3), expected)
    assert same_bits(model, before)
