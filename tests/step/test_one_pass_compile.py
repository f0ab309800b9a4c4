"""One pass through compiled models: at most one graph more, none after warm-up, and the steps of a loop by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.helpers.cases import batch, bits, same_bits
from tests.helpers.one_pass import GEOMETRIES, RHO, assert_close, hand_step, one_pass, sgd

# "inductor" needs a C++ compiler and takes a while; the other two see the same frames, guards and graph breaks.
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = Block(), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, x):
        return self.scale * self.head(self.block(x))


def loss_of(model, step):
    x, y = batch(DOUBLE, seed=step, size=12)
    return nn.functional.cross_entropy(model(x), y)


def whole(model, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, compiled


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model, model


def part(model, backend):
    model.block = torch.compile(model.block, backend=backend, fullgraph=True)
    return model, model


def part_in_place(model, backend):
    model.block.compile(backend=backend, fullgraph=True)
    return model, model


def compiled_before_wrapping(model, backend):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(2):
        loss_of(compiled, step).backward()
    for p in model.parameters():
        p.grad = None
    model.block.norm.reset_running_stats()
    return compiled, compiled


SETUPS = [whole, in_place, part, part_in_place, compiled_before_wrapping]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("geometry", ["sam", "asam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_trains_as_by_hand_and_is_compiled_no_more_after_the_second_step(backend, geometry, setup):
    counter = CompileCounterWithBackend(backend)
    inner, twin = Model(), Model()
    called, given = setup(inner, counter)
    plain_graphs = counter.frame_count or 1
    optimizer = one_pass(inner, model=given, geometry=geometry)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    stock = sgd(twin.parameters())
    decay = torch.optim.lr_scheduler.StepLR(stock, 1, gamma=0.9)

    def step(index):
        rho = RHO / (1 + index)
        optimizer.param_groups[0]["rho"] = rho
        optimizer.zero_grad()
        exact = bits(inner)
        loss = loss_of(called, index)
        assert same_bits(inner, exact)
        loss.backward()
        assert same_bits(inner, exact)
        optimizer.step()
        schedule.step()
        hand_step(stock, lambda: loss_of(twin, index).backward(), epsilon=GEOMETRIES[geometry][1], rho=rho)
        decay.step()

    for index in range(2):
        step(index)
    warm = counter.frame_count
    assert warm <= plain_graphs + 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(2, 5):
            step(index)
    assert counter.frame_count == warm
    assert not counters["graph_break"]
    assert_close(inner, twin)


@pytest.mark.parametrize("setup", [whole, in_place, part])
def test_evaluation_and_exact_forwards_of_a_compiled_model_are_at_the_exact_weights(setup):
    counter = CompileCounterWithBackend("eager")
    inner = Model()
    called, given = setup(inner, counter)
    optimizer = one_pass(inner, model=given)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(called, step).backward()
        optimizer.step()
    twin = Model()
    twin.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in inner.state_dict().items()})
    x = batch(DOUBLE, seed=9, size=12)[0]
    for _ in range(2):
        moved = called(x)
        twin(x)  # its statistics, too
        with optimizer.exact():
            torch.testing.assert_close(called(x), twin(x), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(moved, twin.train()(x))
        called(x)
        for ours, theirs in zip(inner.buffers(), twin.buffers(), strict=True):
            theirs.copy_(ours)  # statistics were taken at the moved weights
        called.eval()
        torch.testing.assert_close(called(x), twin.eval()(x), rtol=1e-12, atol=1e-13)
        called.train(), twin.train()


def test_an_interrupt_in_a_compiled_model_leaves_exact_weights():
    inner = Model()
    called, given = whole(inner, "eager")
    optimizer = one_pass(inner, model=given)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(called, step).backward()
        optimizer.step()
    exact = bits(inner)
    handle = None

    def interrupt(gradient):
        raise KeyboardInterrupt

    out = called(batch(DOUBLE)[0])
    handle = out.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        out.sum().backward()
    handle.remove()
    assert same_bits(inner, exact)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in inner.parameters())
    with pytest.raises(RuntimeError):
        called(torch.ones(3, 5, dtype=DOUBLE))
    assert same_bits(inner, exact) and all(p.is_leaf for p in inner.parameters())


def test_what_is_compiled_around_a_followed_model_is_right_or_refused():
    """A compiled function that calls the model sees no replacement, so its step is refused."""
    inner = Model()
    optimizer = one_pass(inner)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(inner, step).backward()
        optimizer.step()
    exact = bits(inner)
    run = torch.compile(lambda step: loss_of(inner, step), backend="eager")
    optimizer.zero_grad()
    run(2).backward()
    with pytest.raises(RuntimeError, match="were not taken at the perturbed weights"):
        optimizer.step()
    assert same_bits(inner, exact)
    optimizer.zero_grad()
    with optimizer.perturbed():
        run(2).backward()
    optimizer.step()
    assert not same_bits(inner, exact)
