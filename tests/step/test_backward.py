"""``backward(compute_loss)``: every optimizer, windows of micro-batches, and all that lies between loss and step."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    VARIANTS,
    assert_equal,
    batch,
    bits,
    loss_of,
    mlp,
    sam_epsilon,
    same_bits,
    second_gradient,
)
from tests.helpers.published import PRESETS

DOUBLE = torch.float64
VARIANTS_HERE = [variant for variant in [*VARIANTS, *PRESETS] if variant.name != "reused"]


def network(dtype=DOUBLE):
    """Dropout and BatchNorm, whose masks and statistics a window has one of for each micro-batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.4), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def window_by_hand(model, base, batches, rho, seed, scale):
    """Both passes over a window in plain torch; each starts with the same seed, and statistics are the first pass's."""
    parameters = list(model.parameters())
    statistics = []

    def one_pass():
        torch.manual_seed(seed)
        total = torch.zeros((), dtype=DOUBLE)
        for data in batches:
            loss = loss_of(model, data) * scale
            loss.backward()
            total += loss.detach()
        statistics.append([b.clone() for b in model.buffers()])
        return total

    losses = second_gradient(parameters, one_pass, sam_epsilon, rho)
    for buffer, value in zip(model.buffers(), statistics[0], strict=True):
        buffer.copy_(value)
    base.step()
    return losses


@pytest.mark.parametrize("size", [1, 2, 5])
def test_windows_equal_the_loop_by_hand(size) -> None:
    ours, theirs = network(), network()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), rho=0.2, model=ours)
    base = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        batches = [batch(DOUBLE, seed=10 * step + i, size=8) for i in range(size)]
        torch.manual_seed(step)
        optimizer.zero_grad()
        for i, (x, y) in enumerate(batches):
            optimizer.backward(lambda: nn.functional.cross_entropy(ours(x).float(), y) / size, last=i + 1 == size)  # noqa: B023  # on purpose
        x, y = None, None  # the batches must have been kept
        optimizer.step()
        first, second = window_by_hand(theirs, base, batches, 0.2, step, 1 / size)
        assert float(optimizer.last_step.loss) == pytest.approx(float(first), rel=1e-6)
        assert float(optimizer.last_step.perturbed_loss) == pytest.approx(float(second), rel=1e-6)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the loss is taken in fp32


def test_functions_that_read_variables_in_every_way_are_called_with_the_batch_of_their_turn() -> None:
    class Trainer:
        def __init__(self, model):
            self.model = model

        def loss(self, data):
            return loss_of(self.model, data)

    def through_a_helper(model, data):
        def inner():
            return loss_of(model, data)

        return lambda: inner()

    def with_default(model, data):
        return lambda pair=data: loss_of(model, pair)

    def run(make):
        model = mlp(DOUBLE)
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
        optimizer.zero_grad()
        for i in range(3):
            data = batch(DOUBLE, seed=i)
            optimizer.backward(make(model, data), last=i == 2)
        optimizer.step()
        return model

    def global_batch(model, data):
        globals()["_batch_now"] = data
        globals()["_model_now"] = model
        return lambda: loss_of(_model_now, _batch_now)  # noqa: F821

    want = mlp(DOUBLE)
    base = torch.optim.SGD(want.parameters(), lr=0.1)

    def one_pass():
        losses = [loss_of(want, batch(DOUBLE, seed=i)) for i in range(3)]
        sum(losses).backward()
        return sum(losses).detach()

    second_gradient(list(want.parameters()), one_pass, sam_epsilon, 0.3)
    base.step()
    makers = {
        "lambda": lambda model, data: lambda: loss_of(model, data),
        "partial": lambda model, data: functools.partial(loss_of, model, data),
        "method": lambda model, data: functools.partial(Trainer(model).loss, data),
        "helper": through_a_helper,
        "default": with_default,
        "global": global_batch,
    }
    for name, make in makers.items():
        got = run(make)
        for a, b in zip(got.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("seed_after", [False, True])
def test_numbers_drawn_outside_every_forward_repeat(seed_after) -> None:
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, model=model)
    drawn = []
    x, y = batch(DOUBLE)

    def compute_loss():
        numbers = torch.rand(3).tolist(), random.random(), float(np.random.rand())
        drawn.append(numbers)
        return nn.functional.cross_entropy(model(x * numbers[1]) * numbers[2], y) + numbers[0][0]

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(compute_loss, last=False)
        if seed_after:
            torch.rand(7)
        optimizer.backward(compute_loss)
        after = torch.get_rng_state(), random.getstate()
        optimizer.step()
        assert drawn[-4:-2] == drawn[-2:]
        assert drawn[-4] != drawn[-3]
        assert torch.equal(after[0], torch.get_rng_state())
    assert drawn[0] != drawn[4]


def test_what_compute_loss_returns_comes_back_and_holds_the_loss() -> None:
    x, y = batch(DOUBLE)
    kinds = {
        "tensor": lambda loss: loss,
        "dict": lambda loss: {"loss": loss, "logits": 3},
        "tuple": lambda loss: (loss, "more"),
        "list": lambda loss: [loss],
        "object": lambda loss: SimpleNamespace(loss=loss),
        "one element": lambda loss: loss.reshape(1),
    }
    for name, wrap in kinds.items():
        model = mlp(DOUBLE)
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
        made = []

        def compute_loss(model=model, wrap=wrap, made=made):
            made.append(wrap(nn.functional.cross_entropy(model(x), y)))
            return made[-1]

        result = optimizer.backward(compute_loss)
        assert result is made[0], name
        assert len(made) == 2
        optimizer.step()


def test_clipping_between_backward_and_step_clips_the_second_gradient() -> None:
    ours, theirs = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.5), rho=0.3, model=ours)
    base = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for step in range(3):
        data = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        optimizer.backward(lambda data=data: loss_of(ours, data))
        nn.utils.clip_grad_norm_(ours.parameters(), 0.05)
        optimizer.step()

        def one_pass(data=data):
            loss = loss_of(theirs, data)
            loss.backward()
            return loss

        second_gradient(list(theirs.parameters()), one_pass, sam_epsilon, 0.3)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        base.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unscale", [True, False])
def test_a_scaler_inside_compute_loss(unscale) -> None:
    ours, theirs = mlp(), mlp()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.5), rho=0.3, model=ours)
    plain = samopt.SAM(torch.optim.SGD(theirs.parameters(), lr=0.5), rho=0.3, model=theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        data = batch(seed=step)
        optimizer.zero_grad()
        optimizer.backward(lambda data=data: scaler.scale(loss_of(ours, data)))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        plain.backward(lambda data=data: loss_of(theirs, data))
        plain.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_an_overflow_in_either_pass_skips_the_step_and_halves_the_scale() -> None:
    for bad_pass in (0, 1):
        model = mlp()
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.3, model=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        before, calls = bits(model), []

        def compute_loss(model=model, calls=calls, scaler=scaler, bad_pass=bad_pass):
            calls.append(0)
            loss = loss_of(model, batch())
            return scaler.scale(loss * torch.inf if len(calls) - 1 == bad_pass else loss)

        optimizer.backward(compute_loss)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(model, before)
        assert scaler.get_scale() == 128.0
        calls.extend([0] * 5)
        optimizer.zero_grad()
        optimizer.backward(compute_loss)
        scaler.step(optimizer)
        assert not same_bits(model, before)


@pytest.mark.parametrize("variant", VARIANTS_HERE, ids=lambda variant: variant.name)
def test_every_optimizer_takes_the_step_of_its_closure_form(variant) -> None:
    models = [mlp(DOUBLE), mlp(DOUBLE)]
    bases = [BASES[getattr(variant, "usual_base", "sgd-momentum")](model.parameters()) for model in models]
    optimizers = [variant.wrap(base, rho=variant.rho, model=m) for base, m in zip(bases, models, strict=True)]
    by_backward, by_closure = optimizers
    for step in range(7):
        data = batch(DOUBLE, seed=step)
        by_backward.zero_grad()
        loss = by_backward.backward(lambda data=data: loss_of(models[0], data))
        by_backward.step()

        def closure(data=data):
            by_closure.zero_grad()
            loss = loss_of(models[1], data)
            loss.backward()
            return loss

        torch.testing.assert_close(loss, by_closure.step(closure), rtol=1e-6, atol=1e-8)
    assert_equal(*models)


def test_quiet_steps_are_one_pass() -> None:
    model = mlp(DOUBLE)
    calls = []

    def compute_loss():
        calls.append(0)
        return loss_of(model, batch(DOUBLE))

    def passes(optimizer):
        calls.clear()
        optimizer.zero_grad()
        optimizer.backward(compute_loss)
        optimizer.step()
        return len(calls)

    off = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.0, model=model)
    assert passes(off) == 1
    assert off.last_step.perturbed_loss is None and off.last_step.grad_norm is None
    looking = samopt.LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model, every=3)
    assert [passes(looking) for _ in range(6)] == [2, 1, 1, 2, 1, 1]
    ahead = samopt.MomentumSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model)
    assert [passes(ahead) for _ in range(3)] == [1, 1, 1]


def make(**options):
    model = mlp(DOUBLE)
    return model, samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model, **options)


def test_misuse_is_refused_and_leaves_everything_usable() -> None:
    model, optimizer = make()
    before = bits(model)
    with pytest.raises(TypeError, match="takes a function that computes the loss, got Tensor"):
        optimizer.backward(loss_of(model, batch(DOUBLE)))
    with pytest.raises(TypeError, match="needs a function that returns the loss.*got NoneType. Do not call backward"):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)).backward())
    optimizer.zero_grad()
    x, y = batch(DOUBLE)
    with pytest.raises(TypeError, match="got tuple that begins with a torch.float64 tensor of shape .*; put the loss"):
        optimizer.backward(lambda: (logits := model(x), nn.functional.cross_entropy(logits, y)))
    with pytest.raises(RuntimeError, match="no graph"):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)).detach())
    with pytest.raises(RuntimeError, match=r"after 1 call\(s\) of backward\(..., last=False\)"):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)), last=False)
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
    with pytest.raises(RuntimeError, match="backward.. was called while the gradients of a second pass wait"):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
    optimizer.zero_grad()
    loss_of(model, batch(DOUBLE)).backward()
    with optimizer.perturbed():
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
        loss_of(model, batch(DOUBLE)).backward()
    assert same_bits(model, before)
    optimizer.step()
    twin, other = make()
    loss_of(twin, batch(DOUBLE)).backward()
    with other.perturbed():
        loss_of(twin, batch(DOUBLE)).backward()
    other.step()
    assert same_bits(model, bits(twin))


def after_a_step(model, optimizer):
    optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
    optimizer.step()


def after_another_loss(model, optimizer):
    (1e-3 * sum(p.square().sum() for p in model.parameters())).backward()


def after_a_backward_that_failed(model, optimizer):
    def fail(weight):
        raise ZeroDivisionError

    handle = model[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
    handle.remove()


def after_a_checkpoint_was_loaded_in_a_window(model, optimizer):
    optimizer.backward(lambda: loss_of(model, batch(DOUBLE)), last=False)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "left", [after_a_step, after_another_loss, after_a_backward_that_failed, after_a_checkpoint_was_loaded_in_a_window]
)
@pytest.mark.parametrize("last", [True, False])
def test_a_window_does_not_begin_with_gradients_of_another(left, last) -> None:
    model, optimizer = make()
    left(model, optimizer)
    before, gradients = bits(model), [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="found gradients that no call of backward.* Call optimizer.zero_grad"):
        optimizer.backward(lambda: loss_of(model, batch(DOUBLE)), last=last)
    assert same_bits(model, before)
    assert all(torch.equal(p.grad, g) for p, g in gradients)


@pytest.mark.parametrize("clear", [lambda o: o.zero_grad(set_to_none=False), lambda o: o.zero_grad()])
def test_a_window_begins_with_cleared_gradients(clear) -> None:
    model, optimizer = make()
    after_a_step(model, optimizer)
    clear(optimizer)
    after_a_step(model, optimizer)


def test_without_a_perturbation_gradients_add_up_as_in_the_base() -> None:
    model, optimizer = make()
    optimizer.rho = 0.0
    after_another_loss(model, optimizer)
    optimizer.backward(lambda: loss_of(model, batch(DOUBLE)))
    twin = make()[0]
    after_another_loss(twin, None)
    loss_of(twin, batch(DOUBLE)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("bad_call", range(4))
def test_a_failure_anywhere_in_a_window_leaves_weights_and_the_next_window(bad_call, error) -> None:
    model, optimizer = make()
    twin, other = make()
    before, calls = bits(model), []

    def compute_loss(seed, of, fails):
        calls.append(0)
        loss = loss_of(of, batch(DOUBLE, seed=seed))
        if fails and len(calls) - 1 == bad_call:
            raise error
        return loss

    def window(of, trained, fails):
        trained.zero_grad()
        trained.backward(lambda: compute_loss(0, of, fails), last=False)
        trained.backward(lambda: compute_loss(1, of, fails))
        trained.step()

    with pytest.raises(error):
        window(model, optimizer, True)
    assert same_bits(model, before)
    assert not optimizer.is_perturbed
    window(model, optimizer, False)
    window(twin, other, False)
    assert same_bits(model, bits(twin))


def test_clipping_meets_what_the_base_gets_in_a_step_without_a_second_pass_too() -> None:
    """LookSAM adds a component to the gradient of such a step: in every form before the loop clips it."""
    results = []
    for form in ("backward", "perturbed"):
        model = mlp(DOUBLE)
        optimizer = samopt.LookSAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.5, every=3, model=model)
        for _ in range(4):
            optimizer.zero_grad()
            if form == "backward":
                optimizer.backward(lambda model=model: loss_of(model, batch(DOUBLE)))
            else:
                loss_of(model, batch(DOUBLE)).backward()
                with optimizer.perturbed():
                    loss_of(model, batch(DOUBLE)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
            optimizer.step()
            for p, (w, g) in zip(model.parameters(), before, strict=True):
                torch.testing.assert_close(p.detach(), w - 0.5 * g, rtol=1e-12, atol=1e-14)
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_the_model_cleared_begin_a_new_window(set_to_none):
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    trained = []
    for each, is_left in ((model, True), (twin, False)):
        optimizer = samopt.SAM(BASES["sgd"](each.parameters()), rho=0.3, model=each)
        if is_left:
            optimizer.backward(lambda each=each: loss_of(each, batch(DOUBLE, seed=7)), last=False)
            each.zero_grad(set_to_none=set_to_none)
        optimizer.backward(lambda each=each: loss_of(each, batch(DOUBLE, seed=8)))
        optimizer.step()
        trained.append(each)
    assert same_bits(trained[0], bits(trained[1]))
