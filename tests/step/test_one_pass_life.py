"""What a run does around its steps, in one pass along the momentum: averages, abandoned steps, copies, memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import samopt
from tests.helpers.cases import BASES, assert_same, batch, bits, loss_of, mlp, parameters_of, sam_epsilon, same_bits

RHO = 0.3
MOMENTUM = {"sgd-momentum": "momentum_buffer", "adamw": "exp_avg"}
each_base = pytest.mark.parametrize("base", MOMENTUM)


def one_pass(model, base="sgd-momentum", follow=True):
    given = model if follow else None
    return samopt.SAM(BASES[base](model.parameters()), rho=RHO, direction="momentum", model=given)


def step_once(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, batch(seed=step)).backward()
    optimizer.step()


def trained(base="sgd-momentum", steps=2, dtype=torch.float32):
    model = mlp(dtype)
    optimizer = one_pass(model, base)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(dtype, seed=step)).backward()
        optimizer.step()
    return model, optimizer


def gradient_along(model, momenta, backward):
    """The gradient at ``w + rho m / ||m||`` in plain torch, on a copy."""
    moved = mlp(torch.float64)
    moves = sam_epsilon(bits(model), momenta, [RHO] * len(momenta))
    with torch.no_grad():
        for p, w, move in zip(moved.parameters(), model.parameters(), moves, strict=True):
            p.copy_(w + move)
    backward(moved)
    return [p.grad for p in moved.parameters()]


@each_base
@pytest.mark.parametrize("when", ["after backward", "after the step"])
def test_an_average_of_the_weights_is_one_of_exact_weights(base, when):
    model, optimizer = trained(base, 0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for step in range(4):
        before = bits(model)
        optimizer.zero_grad()
        loss_of(model, batch(seed=step)).backward()
        if when == "after backward":
            average.update_parameters(model)
            seen.append(before)
        optimizer.step()
        if when == "after the step":
            average.update_parameters(model)
            seen.append(bits(model))
    want = seen[0]
    for weights in seen[1:]:
        want = [w.lerp(new, 0.5) for w, new in zip(want, weights, strict=True)]
    torch.testing.assert_close(bits(average.module), want, rtol=1e-6, atol=1e-7)
    assert not same_bits(average.module, bits(model))


def test_a_copy_for_an_average_is_exact_and_trains_nothing():
    model, optimizer = trained()
    exact = bits(model)
    loss_of(model, batch(seed=7)).backward()
    average = copy.deepcopy(model)
    loss_of(average, batch(seed=8)).backward()
    assert same_bits(average, exact)
    optimizer.step()
    assert same_bits(average, exact)


@each_base
def test_gradients_that_are_cleared_leave_no_trace(base):
    (model, optimizer), (plain, expected) = trained(base), trained(base)
    loss_of(model, batch(seed=5)).backward()  # a batch that the user throws away
    optimizer.zero_grad()
    loss_of(model, batch(seed=6))  # a forward that never gets a backward
    optimizer.zero_grad()
    for step in (7, 8):
        step_once(model, optimizer, step)
        step_once(plain, expected, step)
    assert same_bits(model, bits(plain))
    assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


@each_base
@pytest.mark.parametrize("order", ["one backward", "in turn", "last first"])
def test_several_forwards_of_a_step_have_their_gradients_at_one_point(base, order):
    model, optimizer = trained(base, 3, torch.float64)
    halves = [batch(torch.float64, seed=seed) for seed in (11, 12)]
    momenta = [optimizer.state[p][MOMENTUM[base]].clone() for p in model.parameters()]

    def both(module):
        (loss_of(module, halves[0]) + loss_of(module, halves[1])).backward()

    want = gradient_along(model, momenta, both)
    optimizer.zero_grad()
    losses = [loss_of(model, half) for half in halves]
    if order == "one backward":
        sum(losses).backward()
    else:
        for loss in losses if order == "in turn" else losses[::-1]:
            loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-11, atol=1e-13)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_compiled_once(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    inner, plain = mlp(), mlp()
    model = torch.compile(inner, backend=counter, fullgraph=True)
    optimizer = samopt.SAM(BASES["sgd-momentum"](inner.parameters()), rho=RHO, direction="momentum", model=model)
    expected = one_pass(plain)
    for step in range(6):
        step_once(model, optimizer, step)
        step_once(plain, expected, step)
        if step == 0:
            first = counter.frame_count
    assert counter.frame_count == first == 1
    torch.testing.assert_close(bits(inner), bits(plain), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@each_base
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", ["between steps", "after forward", "after backward"])
def test_a_copy_made_in_mid_run_goes_on_as_the_original_does(moment, how, base):
    model, optimizer = trained(base)
    optimizer.zero_grad()
    loss = loss_of(model, batch(seed=2)) if moment != "between steps" else None
    if moment == "after backward":
        loss.backward()
    pair = (optimizer, model)  # in this order: the optimizer puts the weights back
    copied, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert all(p is q for p, q in zip(other.parameters(), parameters_of(copied), strict=True))
    if moment == "after backward":
        optimizer.step()
        copied.zero_grad()  # gradients are no part of either kind of copy, so its step begins again
        loss_of(other, batch(seed=2)).backward()
        copied.step()
    elif moment == "after forward":
        loss.backward()
        optimizer.step()
        step_once(other, copied, 2)
    for step in range(3, 6):
        step_once(model, optimizer, step)
        step_once(other, copied, step)
    assert same_bits(other, bits(model))
    assert_same(copied.state_dict(), optimizer.state_dict())


def bytes_kept(action):
    """How many bytes of tensors there are more after ``action`` than before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@each_base
def test_moved_weights_take_one_copy_and_exact_ones_none(base):
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = one_pass(model, base, follow=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.base_optimizer.step()
    scalars = 256  # bytes, for numbers that measure the step
    assert bytes_kept(optimizer.ascend) == pytest.approx(weights, abs=scalars)
    assert bytes_kept(optimizer.restore) == pytest.approx(-weights, abs=scalars)
    assert bytes_kept(optimizer.step) == pytest.approx(0, abs=scalars)


def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 4096), nn.Tanh(), nn.Linear(4096, 8))


@pytest.mark.parametrize("clear", ["the optimizer", "the model", "nobody"])
def test_the_memory_of_cleared_gradients_takes_the_weights_of_the_next_ascent(clear):
    model, x = wide(), torch.ones(2, 8)
    optimizer = one_pass(model, follow=False)
    matrices = [model[0].weight, model[2].weight]
    for _ in range(2):
        with optimizer.perturbed():
            model(x).sum().backward()
        optimizer.step()
    if clear != "nobody":
        (optimizer if clear == "the optimizer" else model).zero_grad()
    gradients, exact = [None if p.grad is None else p.grad.clone() for p in matrices], bits(model)
    biases, both = 4 * (4096 + 8), 4 * (2 * 8 * 4096)
    assert bytes_kept(optimizer.ascend) == pytest.approx(biases + both * (clear == "nobody"), abs=256)
    assert not same_bits(model, exact)
    assert all(g is None or torch.equal(g, p.grad) for g, p in zip(gradients, matrices, strict=True))
    optimizer.restore()
    assert same_bits(model, exact)


@pytest.mark.parametrize("what", ["evaluation", "state_dict", "ascent", "no ascent"])
def test_the_memory_of_cleared_gradients_is_given_back_when_exact_weights_are_wanted(what):
    model, x = wide(), torch.ones(2, 8)
    optimizer = one_pass(model)
    model(x).sum().backward()
    memory = StorageWeakRef(model[0].weight.grad.untyped_storage())
    optimizer.step()
    optimizer.zero_grad()
    assert not memory.expired()
    if what == "evaluation":
        model.eval()(x)
    elif what == "state_dict":
        model.state_dict()
    elif what == "no ascent":
        optimizer.param_groups[0]["rho"] = 0.0
        model(x)
    else:
        model(x).sum().backward()
    assert memory.expired()
