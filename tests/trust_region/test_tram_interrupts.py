"""An interrupt at any line, those of a reference forward included, leaves TRAM's weights exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import batch, bits, closure_of, same_bits
from tests.step.test_interrupts import InterruptAt


def build(region: str) -> tuple[nn.Module, samopt.TRAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, samopt.TRAM(base, model=model, trust_region=region, scale=10.0, warn_on_stall=False)


@pytest.mark.parametrize("region", ["previous", "input_noise"])
def test_interrupt_at_every_line(region: str) -> None:
    model, optimizer = build(region)
    for _ in range(101):  # of these, the first hundred copy more before their first passes: other lines would run
        optimizer.step(closure_of(optimizer, model, batch()))
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def go_back() -> None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        torch.manual_seed(7)

    data = batch(seed=1)
    go_back()
    with InterruptAt(-1) as dry_run:
        optimizer.step(closure_of(optimizer, model, data))
    finished = bits(model)
    assert optimizer.last_step.distance > 0
    owners = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    own = [path.endswith("tram.py") or "trust_region" in path for path, _ in dry_run.lines]
    visits = [line for line in dry_run.first_and_last_visits() if own[line]]
    assert len(visits) > 100

    for line in visits:
        where = dry_run.lines[line]
        go_back()
        before = bits(model)
        with pytest.raises(KeyboardInterrupt), InterruptAt(line):
            optimizer.step(closure_of(optimizer, model, data))
        assert not optimizer.is_perturbed, where
        assert same_bits(model, before) or same_bits(model, finished), where
        for module, parameters, buffers in owners:
            assert module._parameters == parameters and module.training, where
            assert module._buffers.keys() == buffers.keys(), where
            assert all(module._buffers[name] is buffer for name, buffer in buffers.items()), where
        assert model[1].num_batches_tracked <= 102, where
        assert torch.is_autocast_cache_enabled(), where
        # An outermost autocast context drops its copies of the weights only where it finds depth 1.
        assert (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()) == (1, 0), where

        go_back()
        optimizer.step(closure_of(optimizer, model, data))
        assert same_bits(model, finished), where
