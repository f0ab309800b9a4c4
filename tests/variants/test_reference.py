"""The readable loops of ``samopt.reference`` and the package compute the same numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import samopt
from samopt import reference
from tests.helpers.cases import BASES, batch, mlp

LOOPS = {name: getattr(reference, name.replace("-", "_")) for name in samopt.available()}
WITH_MEMORY = {"friendly-sam", "looksam", "flat-lora"}
STEPS = 7  # LookSAM's second pass comes back at the sixth


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """In fp64 throughout."""
    return nn.functional.cross_entropy(model(data[0]), data[1])


def distance() -> torch.Tensor:
    return torch.tensor(0.75, dtype=torch.float64)


@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, base)
        for name in samopt.available()
        for base in ("sgd-momentum", "adamw")
        if (name, base) != ("preconditioned-sam", "sgd-momentum")  # which has no second moment
    ],
)
def test_the_package_computes_what_the_loop_says(name: str, base: str, form: str) -> None:
    ours, theirs = mlp(torch.float64), mlp(torch.float64)
    options = {"trust_region": distance} if name == "tram" else {}
    optimizer = samopt.create(name, BASES[base](list(ours.parameters())), model=ours, **options)
    stock = BASES[base](list(theirs.parameters()))
    loop = functools.partial(LOOPS[name], list(theirs.parameters()), stock)
    extra = {"memory": {}} if name in WITH_MEMORY else {"distance": distance} if name == "tram" else {}
    for step in range(STEPS):
        data = batch(torch.float64, seed=step)
        if form == "closure":

            def closure(data=data) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(ours, data)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        else:
            optimizer.zero_grad()
            loss = optimizer.backward(functools.partial(loss_of, ours, data))
            optimizer.step()
        if name == "functional-sam":
            expected = loop(lambda x=data[0]: theirs(x), lambda f, y=data[1]: nn.functional.cross_entropy(f, y))
        else:
            expected = loop(functools.partial(loss_of, theirs, data), **extra)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-12)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", samopt.available())
def test_a_loop_is_short_enough_to_read(name: str) -> None:
    """Ten to twenty lines of code around a stock optimizer, for every optimizer there is."""
    lines = LOOPS[name].__code__
    first, last = lines.co_firstlineno, max(line for _, _, line in lines.co_lines() if line)
    assert last - first <= 32
