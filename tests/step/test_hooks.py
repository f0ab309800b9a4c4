"""Hooks of optimizers fire once a step, hooks of gradients once a pass."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import samopt
from tests.helpers.cases import (
    BASES,
    FORMS,
    TOLERANCE,
    assert_equal,
    batch,
    closure_of,
    loss_of,
    mlp,
    parameters_of,
    sam_epsilon,
    second_gradient,
    textbook_step,
)

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@contextmanager
def counting_hooks(where: str, optimizer: samopt.SAM) -> Generator[list[str]]:
    """Both step hooks of the wrapper, of its base, or of every optimizer; yields what fired, in order."""
    fired: list[str] = []

    def pre(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert args[0] is owner
        fired.append("pre")

    def post(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert args[0] is owner
        fired.append("post")

    if where == "global":
        handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
    else:
        hooked = optimizer if where == "wrapper" else optimizer.base_optimizer
        handles = [hooked.register_step_pre_hook(pre), hooked.register_step_post_hook(post)]
    yield fired
    for handle in handles:
        handle.remove()


@forms
@pytest.mark.parametrize("where", ["wrapper", "base", "global"])
def test_step_hooks_fire_once_a_step(where: str, form: Callable[..., None]) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["adamw"](model.parameters()))
    with counting_hooks(where, optimizer) as fired:
        for step in range(1, 4):
            form(optimizer, model, batch(seed=step))
            assert fired == ["pre", "post"] * step
    form(optimizer, model, batch())
    assert fired == ["pre", "post"] * 3, "a removed hook stays removed"


@pytest.mark.parametrize("where", ["wrapper", "base", "global"])
def test_hooks_of_the_wrapper_and_of_a_scheduler_go_together(where: str) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step
    with counting_hooks(where, optimizer) as fired:
        FORMS["first_step/second_step"](optimizer, model, batch())
    assert fired == ["pre", "post"]


@pytest.mark.parametrize("where", ["wrapper", "base", "global"])
def test_hooks_stay_silent_when_a_step_is_refused(where: str) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()))
    loss_of(model, batch()).backward()
    with counting_hooks(where, optimizer) as fired, pytest.raises(RuntimeError, match="no perturbed pass"):
        optimizer.step()
    assert "post" not in fired


@pytest.mark.parametrize("form", ["positional", "keyword"])
def test_a_pre_hook_may_replace_the_closure(form: str) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    data, replacement = batch(torch.float64, seed=0), batch(torch.float64, seed=1)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.05)
    seen: list[Any] = []

    def swap(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        new = closure_of(optimizer, model, replacement)
        return ((owner, new), {}) if form == "positional" else ((owner,), {"closure": new})

    optimizer.register_step_pre_hook(swap)
    optimizer.register_step_post_hook(lambda owner, args, kwargs: seen.append((args[1:], kwargs)))
    returned = optimizer.step(closure_of(optimizer, model, data))
    first, _ = second_gradient(
        list(expected.parameters()), lambda: backward(loss_of(expected, replacement)), sam_epsilon, 0.05
    )
    BASES["sgd"](expected.parameters()).step()
    assert_equal(model, expected)
    assert float(returned.detach()) == pytest.approx(float(first), rel=1e-6)
    ((args, kwargs),) = seen  # the post-hook sees what the step got, as in torch
    assert len(args) + len(kwargs) == 1


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def test_a_pre_hook_of_the_wrong_shape_is_refused_as_torch_does() -> None:
    model = mlp()
    for optimizer in (BASES["sgd"](model.parameters()), samopt.SAM(BASES["sgd"](model.parameters()))):
        optimizer.register_step_pre_hook(lambda owner, args, kwargs: args)
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            optimizer.step()


@pytest.mark.parametrize("where", ["wrapper", "base", "global"])
def test_a_pre_hook_that_clips_acts_on_the_second_gradients(where: str) -> None:
    """The base's hook runs between the passes and the update, whichever form; the wrapper's before ``step``."""
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = (
        samopt.SAM(BASES["sgd-momentum"](model.parameters())),
        BASES["sgd-momentum"](expected.parameters()),
    )
    clipping = {
        "wrapper": optimizer.register_step_pre_hook,
        "base": optimizer.base_optimizer.register_step_pre_hook,
        "global": register_optimizer_step_pre_hook,
    }[where]
    clips: list[float] = []

    def clip(owner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        clips.append(float(clip_grad_norm_(parameters_of(owner), 0.05)))

    handle = clipping(clip)
    for step in range(3):
        FORMS["explicit"](optimizer, model, batch(torch.float64, seed=step))
    handle.remove()
    for step in range(3):
        data = batch(torch.float64, seed=step)
        second_gradient(
            list(expected.parameters()), lambda data=data: backward(loss_of(expected, data)), sam_epsilon, 0.05
        )
        norm = clip_grad_norm_(expected.parameters(), 0.05)
        stock.step()
        assert clips[step] == pytest.approx(float(norm), rel=1e-9)
    assert_equal(model, expected)


@forms
@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_gradient_hooks_see_both_passes_and_act_in_both(kind: str, form: Callable[..., None]) -> None:
    """Halving every gradient leaves SAM's direction alone and halves the update."""
    model, expected = mlp(torch.float64), mlp(torch.float64)
    seen: list[list[Tensor]] = [[], []]

    def register(parameter: Tensor, record: list[Tensor]) -> None:
        def hook(gradient: Tensor) -> Tensor:
            record.append(gradient.clone())
            return gradient / 2

        def accumulated(leaf: Tensor) -> None:
            assert leaf.grad is not None
            record.append(leaf.grad.clone())
            leaf.grad /= 2

        if kind == "tensor":
            parameter.register_hook(hook)
        else:
            parameter.register_post_accumulate_grad_hook(accumulated)

    for module, record in ((model, seen[0]), (expected, seen[1])):
        for parameter in module.parameters():
            register(parameter, record)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.05)
    stock = BASES["sgd"]([{"params": list(expected.parameters()), "rho": 0.05}])
    for step in range(2):
        form(optimizer, model, batch(torch.float64, seed=step))
        textbook_step(expected, stock, batch(torch.float64, seed=step), sam_epsilon)
    assert len(seen[0]) == len(seen[1]) == 2 * 2 * 4  # steps, passes, parameters
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])
    assert_equal(model, expected)


def test_is_perturbed_tells_a_module_hook_which_pass_it_is() -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), model=model)
    passes: list[bool] = []
    model.register_forward_hook(lambda *_: passes.append(optimizer.is_perturbed))
    for form in FORMS.values():
        form(optimizer, model, batch())
    assert passes == [False, True] * len(FORMS)
    assert not optimizer.is_perturbed
