"""One pass along the momentum when several ranks train: what it computes, that it is exact in between, and resuming."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.distributed.test_distributed_ddp_options import OPTIONS, half
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    VARIANTS,
    assert_same,
    batch,
    bits,
    loss_of,
    mlp,
    parameters_of,
)
from tests.helpers.collectives import Collectives
from tests.helpers.one_pass import hand_step
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full, fully_sharded, own_part, uneven

DOUBLE = torch.float64
RHO = 0.5
WRAPPERS = pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "tensor"])
MOMENTA = pytest.mark.parametrize(("base", "buffer"), [("sgd-momentum", "momentum_buffer"), ("adamw", "exp_avg")])


def unwrapped(wrapper, dtype=DOUBLE):
    return mlp(dtype) if wrapper == "tensor" else uneven(dtype)  # torch cannot cut activations unevenly


def wrapped(wrapper, dtype=DOUBLE):
    model = unwrapped(wrapper, dtype)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp":
        return fully_sharded(model)
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def data_of(wrapper, step, dtype=DOUBLE):
    """A rank's half of a batch; the whole batch where ranks share the work on it."""
    return batch(dtype, seed=step) if wrapper == "tensor" else own_part(step, dtype)


def made(wrapper, variant, base, dtype=DOUBLE):
    model = wrapped(wrapper, dtype)
    wrap = next(kind.wrap for kind in VARIANTS if kind.name == variant)
    return model, wrap(BASES[base](model.parameters()), rho=RHO, direction="momentum", model=model, seed=3)


def step_once(model, optimizer, data):
    optimizer.zero_grad()
    loss_of(model, data).backward()
    optimizer.step()


def train(wrapper, variant, base, steps):
    model, optimizer = made(wrapper, variant, base)
    for step in range(steps):
        step_once(model, optimizer, data_of(wrapper, step))
    return full(parameters_of(optimizer)), [float(optimizer.last_step.applied_radius)]


def by_hand(model, variant, base, buffer, steps):
    """The same in one process and plain torch: the gradient of the whole batch, taken along the stock's momentum."""
    epsilon = next(kind.epsilon for kind in VARIANTS if kind.name == variant)
    stock = BASES[base](model.parameters())
    parameters = list(model.parameters())
    for step in range(steps):
        start = bits(model)
        moves = epsilon(start, [stock.state[p].get(buffer) for p in parameters], [RHO] * len(start))
        with torch.no_grad():
            for p, move in zip(parameters, moves, strict=True):
                p.sub_(move)
        stock.zero_grad()
        loss_of(model, batch(DOUBLE, seed=step)).backward()
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        stock.step()
    return bits(model)


@WRAPPERS
@MOMENTA
@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_ranks_train_as_one_process_does(variant, base, buffer, wrapper):
    (first, radius), (second, other_radius) = run_on_ranks(train, wrapper, variant, base, 5)
    torch.testing.assert_close(first, by_hand(unwrapped(wrapper), variant, base, buffer, 5), **TOLERANCE[DOUBLE])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert radius == other_radius == [pytest.approx(RHO)]


def look_between_forward_and_backward(wrapper, look):
    """What a look after a forward finds, what there was before, and the gradients with a look and without."""
    gradients = []
    for curious in (False, True):
        model, optimizer = made(wrapper, "sam", "sgd-momentum")
        for step in range(2):
            step_once(model, optimizer, data_of(wrapper, step))
        before = full(parameters_of(optimizer))
        with torch.no_grad():
            exact = loss_of(model, data_of(wrapper, 9))
        optimizer.zero_grad()
        loss = loss_of(model, data_of(wrapper, 2))
        moved = full(parameters_of(optimizer))
        seen = None
        if curious and look == "state_dict":
            seen = full(model.state_dict().values()), before
        elif curious:
            model.eval()
            with torch.no_grad():
                seen = loss_of(model, data_of(wrapper, 9)), exact
            model.train()
        loss.backward()
        gradients.append(full(p.grad for p in parameters_of(optimizer)))
        moved_after = full(parameters_of(optimizer))
        assert all(map(torch.equal, before, moved_after))
    return seen, gradients, [not torch.equal(a, b) for a, b in zip(before, moved, strict=True)]


@WRAPPERS
@pytest.mark.parametrize("look", ["state_dict", "evaluation"])
def test_a_look_between_forward_and_backward_finds_exact_weights(look, wrapper):
    """Only the shards of FSDP move, and are put back for the look."""
    for (seen, exact), (plain, after_look), has_moved in run_on_ranks(look_between_forward_and_backward, wrapper, look):
        assert all(has_moved) if wrapper == "fsdp" else not any(has_moved)
        assert_same(seen, exact)
        assert_same(after_look, plain)


def continued_and_resumed(wrapper, base, dtype):
    model, optimizer = made(wrapper, "sam", base, dtype)
    for step in range(3):
        step_once(model, optimizer, data_of(wrapper, step, dtype))
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    other, resumed = made(wrapper, "sam", base, dtype)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    for step in range(3, 6):
        step_once(model, optimizer, data_of(wrapper, step, dtype))
        step_once(other, resumed, data_of(wrapper, step, dtype))
    return full(parameters_of(optimizer)), full(parameters_of(resumed))


@WRAPPERS
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_a_resumed_run_is_the_uninterrupted_one(base, dtype, wrapper):
    for uninterrupted, resumed in run_on_ranks(continued_and_resumed, wrapper, base, dtype):
        assert_same(resumed, uninterrupted)


def accumulate(wrapper, steps):
    """Two micro-batches a step, gradients exchanged after the second only."""
    model, optimizer = made(wrapper, "sam", "sgd-momentum")
    for step in range(steps):
        x, y = data_of(wrapper, step)
        optimizer.zero_grad()
        for last in (False, True):
            part = slice(4, None) if last else slice(0, 4)
            if wrapper == "fsdp":
                model.set_requires_gradient_sync(last)
            with model.no_sync() if wrapper == "ddp" and not last else nullcontext():
                (loss_of(model, (x[part], y[part])) / 2).backward()
        optimizer.step()
    return full(parameters_of(optimizer))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_accumulated_gradients_are_those_of_the_whole_batch(wrapper):
    want = by_hand(unwrapped(wrapper), "sam", "sgd-momentum", "momentum_buffer", 4)
    for weights in run_on_ranks(accumulate, wrapper, 4):
        torch.testing.assert_close(weights, want, **TOLERANCE[DOUBLE])


def train_on_a_mesh(steps):
    """Steps on a mesh of 2 x 2: FSDP over its rows, tensor parallelism over its columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(mlp(DOUBLE), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_sharded(model, mesh=mesh["data"])
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=RHO, direction="momentum", model=model)
    part = mesh["data"].get_local_rank()
    for step in range(steps):
        x, y = batch(DOUBLE, seed=step)
        step_once(model, optimizer, (x.tensor_split(2)[part], y.tensor_split(2)[part]))
    return full(parameters_of(optimizer))


@pytest.mark.slow
def test_a_mesh_of_both_kinds_trains_as_one_process_does():
    want = by_hand(mlp(DOUBLE), "sam", "sgd-momentum", "momentum_buffer", 4)
    for weights in run_on_ranks(train_on_a_mesh, 4, ranks=4):
        torch.testing.assert_close(weights, want, **TOLERANCE[DOUBLE])


def sent(wrapper, wrap):
    model = wrapped(wrapper)
    base = BASES["adamw"](model.parameters())
    optimizer = samopt.ASAM(base, rho=RHO, direction="momentum", model=model) if wrap else base
    for step in range(3):
        step_once(model, optimizer, data_of(wrapper, step))
    with Collectives() as collectives:
        step_once(model, optimizer, data_of(wrapper, 3))
    return collectives.calls


@WRAPPERS
def test_beyond_what_the_base_sends_there_are_only_single_numbers(wrapper):
    for plain, calls in zip(run_on_ranks(sent, wrapper, False), run_on_ranks(sent, wrapper, True), strict=True):
        assert plain
        assert [call for call in calls if call[1] > 1 or call[0] != "allgather_"] == plain
        assert len(calls) - len(plain) <= (0 if wrapper == "ddp" else 4)


def train_beside_the_textbook(kind, options):
    """The weights that one pass and a loop in plain torch reach under the same options of DDP."""
    ours, theirs = (DistributedDataParallel(kind(), **options) for _ in range(2))
    optimizer = samopt.SAM(BASES["sgd-momentum"](ours.parameters()), rho=RHO, direction="momentum", model=ours)
    stock = BASES["sgd-momentum"](theirs.parameters())
    for step in range(5):
        data = half(step)
        step_once(ours, optimizer, data)
        hand_step(stock, lambda data=data: loss_of(theirs, data).backward(), rho=RHO)
    return bits(ours), bits(theirs)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_ddp_change_nothing(option):
    (ours, theirs), (other, _) = run_on_ranks(train_beside_the_textbook, *OPTIONS[option])
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def replicas(dtype, steps):
    model = DistributedDataParallel(uneven(dtype))
    optimizer = samopt.ASAM(BASES["adamw"](model.parameters()), rho=RHO, direction="momentum", model=model)
    for step in range(steps):
        step_once(model, optimizer, own_part(step, dtype))
    return bits(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replicas_stay_equal_bit_for_bit_for_a_thousand_steps(dtype):
    first, second = run_on_ranks(replicas, dtype, 1000)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
