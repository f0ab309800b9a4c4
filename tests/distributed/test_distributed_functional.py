"""Functional SAM on several ranks: each keeps the derivative at its own outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.distributed.test_distributed_ddp import MODES, shard
from tests.helpers.cases import TOLERANCE, bits, closure_form, loss_of, mlp, sam_epsilon
from tests.helpers.ranks import run_on_ranks

DOUBLE = torch.float64
RHO, STEPS = 0.3, 4


def backward_form(optimizer, model, data):
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_of(model, data))
    optimizer.step()


FORMS = {"closure": closure_form, "backward": backward_form}


def train(sync, form, options):
    model = DistributedDataParallel(mlp(DOUBLE), **options)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.FunctionalSAM(base, rho=RHO, model=model, sync_perturbation=sync)
    for step in range(STEPS):
        FORMS[form](optimizer, model, shard(step, DOUBLE))
    return bits(model)


def expected(sync, options):
    """Plain torch in one process: a Jacobian at each rank's own perturbation, or at the common one."""
    model = mlp(DOUBLE)
    parameters = list(model.parameters())
    base = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        halves = [shard(step, DOUBLE, of) for of in range(2)]
        weights = bits(model)
        gradients, derivatives = [], []
        for x, y in halves:
            z = model(x)
            loss = torch.nn.functional.cross_entropy(z.float(), y)
            derivatives.append(torch.autograd.grad(loss, z, retain_graph=True)[0])
            gradients.append(torch.autograd.grad(loss, parameters))
        # DDP learns a static graph in its first backward, with an exchange: that perturbation is the common one.
        if sync or (step == 0 and options.get("static_graph", False)):
            gradients = 2 * [[(a + b) / 2 for a, b in zip(*gradients, strict=True)]]
        second = []
        for (x, _), v, g in zip(halves, derivatives, gradients, strict=True):
            with torch.no_grad():
                for p, w, move in zip(parameters, weights, sam_epsilon(weights, g, [RHO] * len(weights)), strict=True):
                    p.copy_(w + move)
            second.append(torch.autograd.grad(model(x), parameters, v))
        with torch.no_grad():
            for p, w, a, b in zip(parameters, weights, *second, strict=True):
                p.copy_(w)
                p.grad = (a + b) / 2
        base.step()
    return bits(model)


@MODES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_replicas_train_as_one_process_does(options, form, sync):
    first, second = run_on_ranks(train, sync, form, options)
    torch.testing.assert_close(first, expected(sync, options), **TOLERANCE[DOUBLE])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def step_without_a_forward_call():
    model = DistributedDataParallel(mlp(DOUBLE))
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    before = bits(model)
    x = shard(0, DOUBLE)[0]
    with pytest.raises(RuntimeError, match="saw no forward call"):
        optimizer.backward(lambda: model.module[2](model.module[1](model.module[0](x))).square().sum())
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_call_that_passes_ddp_by_is_refused_on_every_rank():
    assert run_on_ranks(step_without_a_forward_call) == [True, True]
