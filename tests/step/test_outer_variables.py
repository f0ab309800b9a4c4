"""Windows whose loss function reads the batch from anywhere, and loss functions with random generators of their own."""

from __future__ import annotations

import random
import types
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import mlp, sam_epsilon, second_gradient

DOUBLE = torch.float64
RHO = 0.3
COUNT = 3


def batches():
    generator = torch.Generator().manual_seed(1)
    size = (8,)
    return [
        (torch.randn(8, 6, generator=generator, dtype=DOUBLE), torch.randint(3, size, generator=generator))
        for _ in range(COUNT)
    ]


def expected():
    model = mlp(DOUBLE)

    def one_pass():
        losses = [loss(model, x, y) for x, y in batches()]
        sum(losses).backward()
        return sum(losses)

    second_gradient(list(model.parameters()), one_pass, sam_epsilon, RHO)
    return [p.grad for p in model.parameters()]


def loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y) / COUNT


class Owner:
    """A training script written as a class."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def compute(self):
        self.calls += 1
        return loss(self.model, self.x, self.y)

    __call__ = compute


class Slotted:
    __slots__ = ("x", "y")


def bound_method(model, backward):
    owner = Owner(model)
    for i, (owner.x, owner.y) in enumerate(batches()):
        backward(owner.compute, i)
    assert owner.x is not None and owner.calls == COUNT  # once for each micro-batch, as without samopt
    return lambda: (owner.x, owner.y)


def lambda_over_self(model, backward):
    owner = Owner(model)
    for i, (owner.x, owner.y) in enumerate(batches()):
        backward(lambda: owner.compute(), i)
    return lambda: (owner.x, owner.y)


def callable_object(model, backward):
    owner = Owner(model)
    for i, (owner.x, owner.y) in enumerate(batches()):
        backward(owner, i)
    return lambda: (owner.x, owner.y)


def object_in_an_object(model, backward):
    owner = types.SimpleNamespace(trainer=Owner(model))
    for i, (owner.trainer.x, owner.trainer.y) in enumerate(batches()):
        backward(lambda: owner.trainer.compute(), i)
    return lambda: (owner.trainer.x, owner.trainer.y)


def slots(model, backward):
    held = Slotted()
    for i, (held.x, held.y) in enumerate(batches()):
        backward(lambda: loss(model, held.x, held.y), i)
    return lambda: (held.x, held.y)


def refilled_dict(model, backward):
    batch = {}
    for i, (x, y) in enumerate(batches()):
        batch.clear()
        batch.update(x=x, y=y)
        backward(lambda: loss(model, batch["x"], batch["y"]), i)
    return lambda: (batch["x"], batch["y"])


def refilled_list(model, backward):
    batch = [None, None]
    for i, pair in enumerate(batches()):
        batch[:] = pair
        backward(lambda: loss(model, *batch), i)
    return lambda: tuple(batch)


def popped_queue(model, backward):
    queue = deque([(None, None), *batches()])
    for i in range(COUNT):
        queue.popleft()
        backward(lambda: loss(model, *queue[0]), i)
    return lambda: queue[0]


def helper_with_a_variable_of_its_own(model, backward):
    x = y = None

    def outputs():
        return model(x)

    def compute():
        return nn.functional.cross_entropy(outputs(), y) / COUNT

    for i, (x, y) in enumerate(batches()):  # noqa: B007  # read by the functions
        backward(compute, i)
    return lambda: (x, y)


def global_variables_and_helpers(model, backward):
    space = {
        "model": model,
        "backward": backward,
        "batches": batches,
        "CE": nn.functional.cross_entropy,
        "N": COUNT,
    }
    script = """
def outputs(): return model(x)
def compute(): return CE(outputs(), y) / N
for i, (x, y) in enumerate(batches()): backward(compute, i)
"""
    exec(script, space)
    return lambda: (space["x"], space["y"])


WAYS = [
    bound_method,
    lambda_over_self,
    callable_object,
    object_in_an_object,
    slots,
    refilled_dict,
    refilled_list,
    popped_queue,
    helper_with_a_variable_of_its_own,
    global_variables_and_helpers,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_window_repeats_each_micro_batch_wherever_its_function_reads_it(way):
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    current = way(model, lambda compute, i: optimizer.backward(compute, last=i == COUNT - 1))
    for found, wanted in zip(model.parameters(), expected(), strict=True):
        torch.testing.assert_close(found.grad, wanted, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(current(), batches()[-1], strict=True):  # the loop goes on with its own values
        assert torch.equal(found, wanted)


def test_the_loops_variables_are_its_own_again_after_a_second_pass_that_fails():
    owner = Owner(mlp(DOUBLE))
    optimizer = samopt.SAM(torch.optim.SGD(owner.model.parameters(), lr=0.1), rho=RHO, model=owner.model)

    def compute():
        if optimizer.is_perturbed:
            raise ZeroDivisionError
        return owner.compute()

    first, second = batches()[:2]
    owner.x, owner.y = first
    optimizer.backward(compute, last=False)
    owner.x, owner.y = second
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(compute)
    assert owner.x is second[0] and owner.y is second[1]


@pytest.mark.parametrize("place", ["variable", "dict"])
def test_a_tensor_that_the_loop_overwrites_is_refused_by_name(place):
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    (x, y), (other, _) = batches()[:2]
    batch = {"x": x}
    compute = (lambda: loss(model, x, y)) if place == "variable" else (lambda: loss(model, batch["x"], y))
    optimizer.backward(compute, last=False)
    x.copy_(other)
    name = "'x'" if place == "variable" else r"\"batch\['x'\]\""
    with pytest.raises(RuntimeError, match=f"{name}, a torch.float64 tensor of shape .8, 6.* x.clone"):
        optimizer.backward(compute)
    optimizer.zero_grad()
    optimizer.backward(compute)
    optimizer.step()


class Mixer:
    """An augmentation with a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __call__(self):
        return self.generator.random()


GENERATORS = {
    "torch": lambda: (lambda g: lambda: torch.rand((), generator=g).item())(torch.Generator().manual_seed(3)),
    "random": lambda: random.Random(3).random,
    "numpy": lambda: (lambda g: lambda: g.random())(np.random.default_rng(3)),
    "numpy, old": lambda: (lambda g: lambda: g.random_sample())(np.random.RandomState(3)),
    "object": Mixer,
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("form", ["backward", "window", "closure"])
def test_generators_that_the_loss_function_reads_draw_the_same_in_both_passes(kind, form):
    model = mlp(DOUBLE)
    draw, plain = GENERATORS[kind](), GENERATORS[kind]()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    (x, y), drawn = batches()[0], []

    def compute():
        share = draw()
        drawn.append(share)
        return loss(model, share * x + (1 - share) * x.flip(0), y)

    def closure():
        optimizer.zero_grad()
        value = compute()
        value.backward()
        return value

    for _ in range(2):
        drawn.clear()
        optimizer.zero_grad()
        if form == "closure":
            optimizer.step(closure)
        else:
            if form == "window":
                optimizer.backward(compute, last=False)
            optimizer.backward(compute)
            optimizer.step()
        half = len(drawn) // 2
        assert drawn[:half] == drawn[half:] == [plain() for _ in range(half)]
