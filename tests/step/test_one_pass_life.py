"""What a run does around its steps, in one pass along the momentum: averages, abandoned steps, copies, memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import samopt
from tests.helpers.cases import BASES, assert_same, batch, bits, loss_of, mlp, parameters_of, sam_epsilon, same_bits
from tests.helpers.one_pass import hand_step

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
    """The gradient at ``w - rho m / ||m||`` in plain torch, on a copy."""
    moved = mlp(torch.float64)
    moves = sam_epsilon(bits(model), momenta, [RHO] * len(momenta))
    with torch.no_grad():
        for p, w, move in zip(moved.parameters(), model.parameters(), moves, strict=True):
            p.copy_(w - move)
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


@each_base
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", ["between steps", "after forward", "after backward"])
def test_a_copy_made_in_mid_run_goes_on_as_the_original_does(moment, how, base):
    model, optimizer = trained(base)
    optimizer.zero_grad()
    loss = loss_of(model, batch(seed=2)) if moment != "between steps" else None
    if moment == "after backward":
        loss.backward()
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
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


def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))


SCALARS = 2048  # bytes, for numbers that measure the step, and a few entries of each weight


@each_base
@pytest.mark.parametrize("geometry", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("width", [64, 512])
def test_one_copy_of_large_weights_is_kept_and_nothing_of_small_ones(base, geometry, width):
    model, x = nn.Sequential(nn.Linear(width, 256), nn.Linear(256, width)), torch.ones(2, width)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = geometry(BASES[base](model.parameters()), rho=RHO, direction="momentum", model=model)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the base's state, and has no direction
    biases = 4 * (width + 256)
    assert bytes_kept(step) == pytest.approx(weights if width == 512 else 0, abs=SCALARS + biases)
    assert bytes_kept(step) == pytest.approx(0, abs=SCALARS)


@each_base
def test_weights_that_are_moved_themselves_take_one_copy(base):
    model = wide()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = one_pass(model, base, follow=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.base_optimizer.step()
    assert bytes_kept(optimizer.ascend) == pytest.approx(weights, abs=SCALARS)
    assert bytes_kept(optimizer.restore) == pytest.approx(0, abs=SCALARS)
    assert bytes_kept(optimizer.ascend) == pytest.approx(0, abs=SCALARS)
    optimizer.restore()
    assert bytes_kept(optimizer.step) == pytest.approx(0, abs=SCALARS)


def write_copy(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 0.5)


def write_part(model):
    model[0].load_state_dict({name: value * 0.5 for name, value in model[0].state_dict().items()})


def write_data(model):
    for p in model.parameters():
        p.data.mul_(0.5)


def assign_data(model):
    for p in model.parameters():
        p.data = p.data * 0.5


def write_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())


def swap_with_average(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    write_copy(average.module)
    average.update_parameters(model)
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def write_through_numpy(model):
    for p in model.parameters():
        p.detach().numpy()[...] *= 0.5


WRITES = [
    write_copy, write_part, write_data, assign_data, write_vector, swap_with_average, write_through_numpy,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cleared", [True, False], ids=["zero_grad", "no zero_grad"])
def test_a_write_after_a_forward_without_backward_is_in_force(write, cleared):
    """As after ``if not loss.isfinite(): continue``: the weights are the user's, and the next step starts from them."""
    if not cleared and write in (write_data, write_through_numpy):
        pytest.skip("without zero_grad() a write that leaves no trace is met in the next step")
    model, optimizer = trained(dtype=torch.float64)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    loss_of(model, batch(torch.float64, seed=5))
    write(model)
    write(twin)
    assert same_bits(model, bits(twin))
    optimizer.zero_grad() if cleared else model.zero_grad()
    want = gradient_along(twin, momenta, lambda module: loss_of(module, batch(torch.float64, seed=6)).backward())
    loss_of(model, batch(torch.float64, seed=6)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-11, atol=1e-13)
    assert same_bits(model, bits(twin))
    assert torch.equal(model.eval()(batch(torch.float64)[0]), twin.eval()(batch(torch.float64)[0]))


def test_a_forward_after_zero_grad_leaves_the_graph_before_it_alone():
    model, optimizer = trained(dtype=torch.float64)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    halves = [batch(torch.float64, seed=seed) for seed in (11, 12)]
    first = loss_of(model, halves[0])
    optimizer.zero_grad()
    (first + loss_of(model, halves[1])).backward()

    def both(module):
        (loss_of(module, halves[0]) + loss_of(module, halves[1])).backward()

    want = gradient_along(model, momenta, both)
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", ["forward first", "perturbed first"])
def test_both_forms_in_one_step_are_at_one_point(order):
    model, optimizer = trained(dtype=torch.float64)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    halves = [batch(torch.float64, seed=seed) for seed in (11, 12)]
    exact = bits(model)
    optimizer.zero_grad()
    loss = loss_of(model, halves[0]) if order == "forward first" else None
    with optimizer.perturbed():
        assert optimizer.is_perturbed and not same_bits(model, exact)
        loss_of(model, halves[1]).backward()
    assert same_bits(model, exact)
    (loss_of(model, halves[0]) if loss is None else loss).backward()

    def both(module):
        (loss_of(module, halves[0]) + loss_of(module, halves[1])).backward()

    want = gradient_along(model, momenta, both)
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", ["perturbed", "closure"])
def test_a_cached_gradient_loss_has_both_its_forwards_at_the_moved_weights(form):
    """GradCache: representations without a graph, their gradients, then a forward with a graph for each part."""

    def loss_from(z):
        return (z @ z.T).logsumexp(1).mean()

    def cached(module, x, move=None):
        parts = x.split(4)
        with torch.no_grad():
            z = torch.cat([module(part) for part in parts])
        z.requires_grad_()
        loss_from(z).backward()
        for part, gradient in zip(parts, z.grad.split(4), strict=True):
            module(part).backward(gradient)

    model, optimizer = trained(dtype=torch.float64)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    x = batch(torch.float64, seed=4)[0]
    want = gradient_along(model, momenta, lambda module: loss_from(module(x)).backward())
    optimizer.param_groups[0]["lr"] = 0.0
    if form == "perturbed":
        optimizer.zero_grad()
        with optimizer.perturbed():
            cached(model, x)
    else:
        optimizer.detach()
        unfollowed = samopt.SAM(optimizer.base_optimizer, rho=RHO, direction="momentum")

        def closure():
            unfollowed.zero_grad()
            cached(model, x)
            return x.sum()

        unfollowed.step(closure)
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-11, atol=1e-13)


def test_a_cached_gradient_loss_inside_backward_is_refused():
    """Sentence Transformers runs the forwards with a graph in a hook of the loss."""
    model, optimizer = trained()
    x = batch(seed=4)[0]
    with torch.no_grad():
        z = model(x)
    z.requires_grad_()
    loss = z.square().mean()

    def hook(gradient):
        with torch.enable_grad():
            model(x).sum().backward()

    loss.register_hook(hook)
    before = bits(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="began inside a backward pass"):
        loss.backward()
    assert same_bits(model, before)


def test_the_autocast_cache_never_mixes_moved_and_exact_weights():
    model, optimizer = trained()
    x = batch(seed=4)[0]
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    moved = mlp()
    with torch.no_grad():
        moves = sam_epsilon(bits(model), momenta, [RHO] * len(momenta))
        for p, w, move in zip(moved.parameters(), model.parameters(), moves, strict=True):
            p.copy_(w.double() - move)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        want, exact = moved(x), twin(x)
        for _ in range(2):
            assert torch.equal(model.train()(x), want)
            assert torch.equal(model.eval()(x), exact)
            with optimizer.exact():
                assert torch.equal(model.train()(x), exact)
    assert not torch.equal(want, exact)


@pytest.mark.parametrize("uses", [1, 2])
def test_gradients_under_autocast_are_those_of_the_hand_written_loop(uses):
    model, optimizer = trained(steps=0)
    twin = mlp()
    stock = BASES["sgd-momentum"](twin.parameters())

    def backward(module, step):
        x, y = batch(seed=step)
        # autocast keeps the copies of leaves only, so here two uses have a copy each
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=uses == 1):
            loss = nn.functional.cross_entropy(module(x) if uses == 1 else module(x) + module(x.flip(0)), y)
        loss.backward()

    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        hand_step(stock, lambda step=step: backward(twin, step))
    torch.testing.assert_close(bits(model), bits(twin), rtol=1e-6, atol=1e-7)
