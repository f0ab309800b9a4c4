"""Replicas under DistributedDataParallel: what each mode computes, that ranks stay equal, and what they send."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers.cases import (
    BASES,
    DTYPES,
    TOLERANCE,
    VARIANTS,
    batch,
    bits,
    closure_form,
    explicit_form,
    loss_of,
    mlp,
    sam_epsilon,
)
from tests.helpers.collectives import Collectives
from tests.helpers.ranks import run_on_ranks

MODES = pytest.mark.parametrize("sync", [False, True], ids=["per-rank", "synced"])
PARAMETERS = sum(p.numel() for p in mlp().parameters())


def rank():
    return torch.distributed.get_rank()


def explicit_form_with_first_pass(optimizer, model, data):
    optimizer.zero_grad()
    with optimizer.first_pass():
        loss_of(model, data).backward()
    with optimizer.perturbed():
        loss_of(model, data).backward()
    optimizer.step()


FORMS = {"closure": closure_form, "first_pass": explicit_form_with_first_pass}


def shard(step, dtype=torch.float32, of=None):
    """A rank's half of a step's batch."""
    x, y = batch(dtype, seed=step)
    part = slice(8 * (of := rank() if of is None else of), 8 * of + 8)
    return x[part], y[part]


def replica(dtype=torch.float32, model=None, **options):
    return DistributedDataParallel(mlp(dtype) if model is None else model, **options)


def train(variant, base, sync, form, dtype, steps):
    kind = next(v for v in VARIANTS if v.name == variant)
    model = replica(dtype)
    optimizer = kind.wrap(BASES[base](model.parameters()), rho=kind.rho, model=model, sync_perturbation=sync)
    for step in range(steps):
        FORMS[form](optimizer, model, shard(step, dtype))
    return bits(model)


def expected(variant, base, sync, dtype, steps):
    """The same training in one process and plain torch: one perturbation, or one for each half of the batch."""
    kind = next(v for v in VARIANTS if v.name == variant)
    model = mlp(dtype)
    optimizer = BASES[base](model.parameters())
    for step in range(steps):
        halves = [shard(step, dtype, of) for of in range(2)]
        weights = bits(model)

        def gradient(data, model=model):
            return torch.autograd.grad(loss_of(model, data), list(model.parameters()))

        first = [gradient(data) for data in halves]
        if sync:
            first = 2 * [[(a + b) / 2 for a, b in zip(*first, strict=True)]]
        second = []
        for data, gradients in zip(halves, first, strict=True):
            with torch.no_grad():
                moves = kind.epsilon(weights, gradients, [kind.rho] * len(weights))
                for p, w, move in zip(model.parameters(), weights, moves, strict=True):
                    p.copy_(w + move)
            second.append(gradient(data))
        with torch.no_grad():
            for p, w, a, b in zip(model.parameters(), weights, *second, strict=True):
                p.copy_(w)
                p.grad = (a + b) / 2
        optimizer.step()
    return bits(model)


@MODES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
def test_ranks_train_as_one_process_does(variant, form, sync):
    dtype = torch.float64
    weights = run_on_ranks(train, variant, "sgd-momentum", sync, form, dtype, 5)
    for got in weights:
        torch.testing.assert_close(got, expected(variant, "sgd-momentum", sync, dtype, 5), **TOLERANCE[dtype])


def test_without_the_context_an_explicit_loop_perturbs_along_the_averaged_gradient():
    per_rank = run_on_ranks(train_explicitly)
    torch.testing.assert_close(per_rank[0], expected("sam", "sgd", True, torch.float64, 3), **TOLERANCE[torch.float64])


def train_explicitly():
    model = replica(torch.float64)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.05, model=model)
    for step in range(3):
        explicit_form(optimizer, model, shard(step, torch.float64))
    return bits(model)


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("steps", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_replicas_stay_equal_bit_for_bit(base, dtype, sync, steps):
    first, second = run_on_ranks(train, "sam", base, sync, "closure", dtype, steps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, bits(mlp(dtype)), strict=True))


def sent(sync, form, rho):
    """The sizes of the tensors that ranks exchange in one step, after the steps in which DDP makes its buckets."""
    model = replica()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=rho, model=model, sync_perturbation=sync)
    for step in range(3):
        FORMS[form](optimizer, model, shard(step))
    with Collectives() as collectives:
        FORMS[form](optimizer, model, shard(3))
    return collectives.calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sync", "exchanges"), [(False, 1), (True, 2)], ids=["per-rank", "synced"])
def test_gradients_are_exchanged_once_per_rank_and_twice_synced(form, sync, exchanges):
    for calls in run_on_ranks(sent, sync, form, 0.05):
        assert calls == exchanges * [("allreduce_", PARAMETERS)]


@MODES
def test_without_a_radius_the_closure_form_sends_what_ddp_sends(sync):
    for calls in run_on_ranks(sent, sync, "closure", 0.0):
        assert calls == [("allreduce_", PARAMETERS)]


def step_without_radius(form):
    model = replica()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.0, model=model)
    for step in range(3):
        FORMS[form](optimizer, model, shard(step))
    return bits(model)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_radius_ranks_take_the_base_step(form):
    weights = run_on_ranks(step_without_radius, form)
    plain = run_on_ranks(train_base)
    assert all(torch.equal(a, b) for ours in weights for a, b in zip(ours, plain[0], strict=True))


def train_base():
    model = replica()
    base = BASES["sgd"](model.parameters())
    for step in range(3):
        base.zero_grad()
        loss_of(model, shard(step)).backward()
        base.step()
    return bits(model)


def step_with_a_rank_that_has_nan(sync, form):
    model = replica()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.05, model=model, sync_perturbation=sync)
    FORMS[form](optimizer, model, shard(0))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    x, y = shard(1)
    FORMS[form](optimizer, model, (x * torch.nan, y) if rank() == 1 else (x, y))
    after = bits(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    FORMS[form](optimizer, model, shard(2))
    return after, bits(model)


@MODES
@pytest.mark.parametrize("form", FORMS)
def test_non_finite_gradients_on_one_rank_reach_every_rank_as_they_do_without_sam(form, sync):
    (after, end), (other_after, other_end) = run_on_ranks(step_with_a_rank_that_has_nan, sync, form)
    assert all(a.isnan().all() and b.isnan().all() for a, b in zip(after, other_after, strict=True))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(end, other_end, strict=True))


def step_with_a_rank_without_slope(form):
    model = replica(torch.float64)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.05, model=model)
    x, y = shard(0, torch.float64)
    FORMS[form](optimizer, model, (x, torch.zeros(8, 3, dtype=x.dtype) if rank() == 1 else y))
    return bits(model)


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_with_zero_gradients_contributes_them_and_waits_for_nobody(form):
    model = mlp(torch.float64)
    weights = bits(model)
    data = shard(0, torch.float64, 0)
    gradients = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    moves = sam_epsilon(weights, gradients, [0.05] * len(weights))
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    second = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    want = [w - 0.1 * g / 2 for w, g in zip(weights, second, strict=True)]
    for got in run_on_ranks(step_with_a_rank_without_slope, form):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])
