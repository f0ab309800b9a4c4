"""An interrupt at any line of ours leaves the weights exact and the optimizer usable."""

from __future__ import annotations

import functools
import gc
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.cases import batch, bits, loss_of, same_bits

PACKAGE = str(Path(samopt.__file__).parent)


class InterruptAt:
    """Raises ``KeyboardInterrupt`` at the n-th line that samopt executes, and lists the lines seen."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.lines: list[tuple[str, int]] = []

    def __enter__(self) -> InterruptAt:
        gc.disable()  # the end of another test's optimizer is no line of this step
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)
        gc.enable()
        # Tracing can strike between the body of a "with torch.no_grad()" and its exit, where a signal never does.
        torch.set_grad_enabled(True)

    def trace(self, frame: FrameType, event: str, argument: object):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            if len(self.lines) == self.target:
                raise KeyboardInterrupt
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def first_and_last_visits(self) -> list[int]:
        """Indices of the first and the last visit of each line."""
        first = {line: index for index, line in reversed(list(enumerate(self.lines)))}
        last = {line: index for index, line in enumerate(self.lines)}
        return sorted({*first.values(), *last.values()})


def seed(number: int) -> None:
    """Seed the CPU's stream alone: ``torch.manual_seed`` formats three call stacks, and this file seeds often."""
    torch.default_generator.manual_seed(number)


def network(dtype: torch.dtype) -> nn.Sequential:
    seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def closure_form(optimizer, model, data) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    optimizer.step(closure)


def explicit_form(optimizer, model, data) -> None:
    optimizer.zero_grad()
    loss_of(model, data).backward()
    with optimizer.perturbed():
        loss_of(model, data).backward()
    optimizer.step()


@pytest.mark.parametrize("take_step", [closure_form, explicit_form])
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        pytest.param(samopt.SAM, torch.float32, id="sam-fp32"),
        pytest.param(
            functools.partial(samopt.ASAM, backend="foreach"),
            torch.float32,
            id="asam-fp32-foreach",
            marks=pytest.mark.slow,
        ),
        pytest.param(samopt.ASAM, torch.bfloat16, id="asam-bf16", marks=pytest.mark.slow),
    ],
)
def test_interrupt_at_every_line(variant, dtype, take_step) -> None:
    data = batch(dtype)

    def fresh() -> tuple[nn.Module, samopt.SharpnessAwareOptimizer]:
        model = network(dtype)
        return model, variant(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model)

    # The first step of a process runs lines that later ones do not: NumPy's stream is read and remembered, for example.
    model, optimizer = fresh()
    take_step(optimizer, model, data)

    finished, optimizer = fresh()
    with InterruptAt(-1) as dry_run:
        take_step(optimizer, finished, data)
    visits = dry_run.first_and_last_visits()
    assert len(visits) > 100

    for line in visits:
        where = dry_run.lines[line]
        model, optimizer = fresh()
        before = bits(model)
        with pytest.raises(KeyboardInterrupt), InterruptAt(line):
            take_step(optimizer, model, data)
        assert not optimizer.is_perturbed, where
        assert same_bits(model, before) or same_bits(model, bits(finished)), where
        assert model[1].num_batches_tracked <= 1, where

        if same_bits(model, before) and dtype is torch.float32:
            assert_goes_on_like_new(model, optimizer, variant, finished, take_step, data)


def assert_goes_on_like_new(model, optimizer, variant, weights: nn.Module, take_step, data) -> None:
    """From here on, the interrupted run is that of a fresh optimizer: no momentum, no recorded masks are left."""
    other = network(torch.float32)
    fresh = variant(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), model=other)
    for each_model, each_optimizer in ((model, optimizer), (other, fresh)):
        each_model.load_state_dict(weights.state_dict())
        seed(3)
        take_step(each_optimizer, each_model, data)
    assert same_bits(model, bits(other))
