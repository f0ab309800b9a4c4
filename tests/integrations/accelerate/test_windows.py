"""Gradients that the loop touches inside an accumulation window: cleared, they are forgotten; changed, an error."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate shares its state between instances."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network():
    torch.manual_seed(0)
    return nn.Linear(6, 3, dtype=torch.float64)


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    return list(zip(x, torch.randint(3, (4, 5), generator=generator), strict=True))


def sam_step(model, window):
    """One SAM step over a window, by hand."""

    def gradients():
        losses = [nn.functional.cross_entropy(model(x), y) / 2 for x, y in window]
        return torch.autograd.grad(sum(losses), list(model.parameters()))

    at_w = gradients()
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in at_w))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), at_w, strict=True):
            parameter += 0.3 * gradient / norm
    above = gradients()
    with torch.no_grad():
        for parameter, gradient, second in zip(model.parameters(), at_w, above, strict=True):
            parameter -= 0.3 * gradient / norm + 0.1 * second


def with_accelerate(model):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    backward = SharpnessAwareBackward(accelerator, prepared, optimizer)

    def micro_batch(batch, last):
        accelerator.gradient_state._set_sync_gradients(last)
        backward(lambda x, y: nn.functional.cross_entropy(prepared(x), y), *batch)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return micro_batch


def with_the_engine(model):
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

    def micro_batch(batch, last):
        x, y = batch
        optimizer.backward(lambda: nn.functional.cross_entropy(model(x), y) / 2, last=last)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return micro_batch


LOOPS = {"accelerate": with_accelerate, "backward()": with_the_engine}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_window_that_the_model_s_zero_grad_gives_up(loop, set_to_none):
    model, expected = network(), network()
    micro_batch = LOOPS[loop](model)
    data = batches()
    micro_batch(data[0], last=False)
    model.zero_grad(set_to_none=set_to_none)  # its loss was not finite, say
    micro_batch(data[1], last=False)
    micro_batch(data[2], last=True)
    sam_step(expected, data[1:3])
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", ["clip", "another backward"])
@pytest.mark.parametrize("loop", LOOPS)
def test_gradients_changed_inside_a_window_are_an_error(loop, change):
    model, expected = network(), network()
    micro_batch = LOOPS[loop](model)
    data = batches()
    micro_batch(data[0], last=False)
    if change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    else:
        (0.1 * model.weight.square().sum()).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"changed between two micro-batches.*would lose that\. Clip or mask"):
        micro_batch(data[1], last=True)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    micro_batch(data[2], last=False)
    micro_batch(data[3], last=True)
    sam_step(expected, data[2:4])
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loop", LOOPS)
def test_gradients_from_before_a_window_are_an_error(loop):
    """They would turn the perturbation, and the second pass would replace them."""
    model, expected = network(), network()
    micro_batch = LOOPS[loop](model)
    data = batches()
    (0.1 * model.weight.square().sum()).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"found gradients that no call of backward\(\) in this window made"):
        micro_batch(data[0], last=False)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    micro_batch(data[1], last=False)
    micro_batch(data[2], last=True)
    sam_step(expected, data[1:3])
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def scheduled(inside):
    """A run with a schedule of the radius, stepped with the optimizer, or also inside a window."""
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), network()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.6, model=model)
    schedule = samopt.RhoScheduler(optimizer, lambda step: 0.5 if step else 1.0)
    prepared, wrapped, same = accelerator.prepare(model, optimizer, schedule)
    assert same is schedule
    backward = SharpnessAwareBackward(accelerator, prepared, wrapped)
    for number, batch in enumerate(batches()):
        with accelerator.accumulate(prepared):
            backward(lambda x, y: nn.functional.cross_entropy(prepared(x), y), *batch)
            wrapped.step()
            if inside or accelerator.sync_gradients:
                schedule.step()
            wrapped.zero_grad()
            if number == 1:  # the second window has the radius of ``sam_step``
                with torch.no_grad():
                    model.load_state_dict(network().state_dict())
    return model


def test_a_schedule_of_the_radius_is_stepped_with_the_optimizer():
    model, expected = scheduled(inside=False), network()
    sam_step(expected, batches()[2:])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_a_schedule_of_the_radius_that_counts_micro_batches_is_an_error():
    with pytest.raises(RuntimeError, match=r"inside an accumulation window.*if accelerator\.sync_gradients: rho_sch"):
        scheduled(inside=True)
