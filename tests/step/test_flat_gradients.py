"""Gradients that are parts of one flat buffer stay there: code that divides, clips or sends the buffer sees them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.two_passes import leave_second_gradients

RHO = 0.5
X, Y = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, index: int = 0) -> Tensor:
    return nn.functional.cross_entropy(model(X[index]), Y)


def flatten(model: nn.Module) -> Tensor:
    """Give every parameter a gradient in one buffer, and return the buffer."""
    parameters = list(model.parameters())
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    return buffer


def is_flat(model: nn.Module, buffer: Tensor) -> bool:
    return all(p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for p in model.parameters())


def gradients(optimizer, model, buffer, form: str) -> None:
    """Both passes in one of the forms, clearing the buffer as a whole where a loop clears gradients."""
    buffer.zero_()
    if form == "backward":
        optimizer.backward(lambda: loss_of(model))
    elif form == "window":
        for index in (0, 1):
            optimizer.backward(lambda index=index: loss_of(model, index) / 2, last=index == 1)
    elif form == "perturbed":
        loss_of(model).backward()
        with optimizer.perturbed():
            buffer.zero_()
            loss_of(model).backward()
    elif form == "first_step":
        loss_of(model).backward()
        optimizer.first_step()
        loss_of(model).backward()
        optimizer.restore()


forms = pytest.mark.parametrize("form", ["backward", "window", "perturbed", "first_step"])


@forms
def test_the_buffer_holds_the_second_gradient_as_by_hand(form) -> None:
    ours, theirs = network(), network()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), rho=RHO, model=ours)
    stock = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    buffer, parameters = flatten(ours), list(theirs.parameters())

    def whole() -> Tensor:
        return (loss_of(theirs, 0) + loss_of(theirs, 1)) / 2 if form == "window" else loss_of(theirs)

    for _ in range(3):
        gradients(optimizer, ours, buffer, form)
        assert is_flat(ours, buffer)
        buffer.div_(2)
        optimizer.step()

        leave_second_gradients(theirs, whole, RHO)
        for p in parameters:
            p.grad.div_(2)
        torch.testing.assert_close(buffer, torch.cat([p.grad.flatten() for p in parameters]), rtol=1e-11, atol=1e-12)
        stock.step()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in samopt.available() if name != "preconditioned-sam"])
@pytest.mark.parametrize("form", ["backward", "perturbed", "closure"])
def test_every_optimizer_trains_as_with_gradients_of_their_own(name, form) -> None:
    trained = []
    for has_buffer in (False, True):
        model = network()
        optimizer = samopt.create(name, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model)
        buffer = flatten(model) if has_buffer else None

        def clear(buffer=buffer, model=model) -> None:
            if buffer is None:
                model.zero_grad()
            else:
                buffer.zero_()

        def closure(model=model, clear=clear) -> Tensor:
            clear()
            loss = loss_of(model)
            loss.backward()
            return loss

        for _ in range(4):
            if form == "closure":
                optimizer.step(closure)
                continue
            optimizer.zero_grad(set_to_none=False)
            if form == "backward":
                optimizer.backward(lambda model=model: loss_of(model))
            else:
                closure()
                with optimizer.perturbed() as second:
                    if second.is_needed:
                        closure()
            optimizer.step()
        assert buffer is None or is_flat(model, buffer)
        trained.append([p.detach() for p in model.parameters()])
    for got, want in zip(*trained, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_gradients_of_another_optimizer_stay_in_their_buffer() -> None:
    model = network()
    buffer = flatten(model)
    optimizer = samopt.SAM(torch.optim.SGD(model[2].parameters(), lr=0.1), rho=RHO, model=model)
    loss_of(model).backward()
    first = [p.grad.clone() for p in model[0].parameters()]
    with optimizer.perturbed():
        buffer.zero_()
        loss_of(model).backward()
    assert is_flat(model, buffer)
    assert all(map(torch.equal, first, [p.grad for p in model[0].parameters()]))


def test_a_pass_that_fails_leaves_the_buffer_cleared_and_in_place() -> None:
    model = network()
    buffer = flatten(model)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="no luck"), optimizer.perturbed():
        raise RuntimeError("no luck")
    assert is_flat(model, buffer)
    assert not buffer.any()


def test_a_parameter_without_a_second_gradient_has_a_zero_one_in_the_buffer() -> None:
    model = network()
    buffer = flatten(model)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    loss_of(model).backward()
    with optimizer.perturbed():
        model[2](X[0] @ torch.ones(5, 6, dtype=torch.float64)).square().mean().backward()
    assert is_flat(model, buffer)
    assert model[2].weight.grad.any()
    assert not model[0].weight.grad.any()


def test_a_closure_that_does_not_clear_the_buffer_is_named_and_leaves_it() -> None:
    model = network()
    buffer = flatten(model)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    buffer.fill_(2)

    def closure() -> Tensor:
        return loss_of(model)

    with pytest.raises(RuntimeError, match="did not clear the gradients"):
        optimizer.step(closure)
    assert is_flat(model, buffer)
    assert bool((buffer == 2).all())
