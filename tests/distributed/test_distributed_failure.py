"""What is left when a rank fails in the second pass, and how a run goes on after it."""

import datetime
import time

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers.cases import BASES, batch, bits, closure_form, loss_of, mlp, same_bits
from tests.helpers.ranks import run_on_ranks

TIMEOUT = 3.0  # seconds


def step_that_fails_on_the_last_rank(sync, form):
    group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    model = DistributedDataParallel(mlp(), process_group=group)
    optimizer = samopt.SAM(BASES["adamw"](model.parameters()), rho=0.5, model=model, sync_perturbation=sync)
    data = batch(seed=torch.distributed.get_rank())
    closure_form(optimizer, model, data)
    before = bits(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        if optimizer.is_perturbed and torch.distributed.get_rank() == 1:
            raise ZeroDivisionError
        loss.backward()
        return loss

    error = None
    start = time.monotonic()
    try:
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            with optimizer.first_pass():
                loss_of(model, data).backward()
            with optimizer.perturbed():
                closure()
            optimizer.step()
    except (ZeroDivisionError, RuntimeError) as raised:
        error = type(raised).__name__
    return error, time.monotonic() - start, same_bits(model, before), optimizer.is_perturbed


@pytest.mark.parametrize("sync", [False, True], ids=["per-rank", "synced"])
@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_a_failing_rank_leaves_all_weights_exact_and_holds_nobody_beyond_the_timeout(form, sync):
    waiting, failing = run_on_ranks(step_that_fails_on_the_last_rank, sync, form)
    assert failing[0] == "ZeroDivisionError"
    assert waiting[0] == "RuntimeError"  # gloo's, for a rank that did not come
    assert waiting[1] < TIMEOUT + 10
    for _, _, exact, is_perturbed in (waiting, failing):
        assert exact
        assert not is_perturbed
