"""Both passes of a step by hand, on copies of a model, and the step in every form that the package has.

The oracle of the tests about what a second pass may leave behind: one stock pass on a deep copy says what the state
must be, and a second one on another copy, moved by hand, says what the gradient must be.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.cases import assert_same

Loss = Callable[[nn.Module], Tensor]

_TORCH_OWN = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


def closure_form(optimizer: samopt.SharpnessAwareOptimizer, compute_loss: Callable[[], Tensor]) -> None:
    """``step(closure)``."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss

    optimizer.step(closure)


def perturbed_form(optimizer: samopt.SharpnessAwareOptimizer, compute_loss: Callable[[], Tensor]) -> None:
    """``with perturbed():``."""
    optimizer.zero_grad()
    loss = compute_loss()
    loss.backward()
    with optimizer.perturbed(loss):
        compute_loss().backward()
    optimizer.step()


def backward_form(optimizer: samopt.SharpnessAwareOptimizer, compute_loss: Callable[[], Tensor]) -> None:
    """``backward(compute_loss)``."""
    optimizer.zero_grad()
    optimizer.backward(compute_loss)
    optimizer.step()


def script_form(optimizer: samopt.SharpnessAwareOptimizer, compute_loss: Callable[[], Tensor]) -> None:
    """``first_step`` and ``second_step``, which clears the gradients at its end."""
    compute_loss().backward()
    optimizer.first_step(zero_grad=True)
    compute_loss().backward()
    optimizer.second_step(zero_grad=True)


FORMS: dict[str, Callable[..., None]] = {
    "closure": closure_form,
    "perturbed": perturbed_form,
    "backward": backward_form,
    "first_step": script_form,
}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Copies of every parameter, buffer and plain attribute of every module, by name."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            found[f"{prefix}.{name}"] = None if value is None else value.detach().clone()
        for name, value in vars(module).items():
            if name not in _TORCH_OWN or name == "training":
                found[f"{prefix}.{name}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, deque | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, list | tuple):
        return type(value)([_plain(each) for each in value])
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return _plain(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return _plain(value.get_state())
    if hasattr(value, "__slots__") and type(value).__module__.startswith("tests."):
        return {name: _plain(getattr(value, name)) for name in value.__slots__ if hasattr(value, name)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if hasattr(value, "__dict__") and type(value).__module__.startswith("tests."):
        return {name: _plain(each) for name, each in vars(value).items() if name != "owner"}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return copy.deepcopy(value)


@dataclass
class Step:
    """What there was just before the base's step.

    Attributes:
        state: Of ``state_of``.
        gradients: Of every parameter of the model, by name.
    """

    state: dict[str, Any]
    gradients: dict[str, Tensor | None]


def leave_second_gradients(model: nn.Module, compute_loss: Callable[[], Tensor], rho: float) -> None:
    """Give every parameter the gradient at ``w + epsilon``, with the weights at ``w``: SAM by hand.

    Args:
        model: What is trained; its gradients are cleared first.
        compute_loss: Of one pass.
        rho: The radius.
    """
    parameters = list(model.parameters())
    model.zero_grad()
    compute_loss().backward()
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(p.grad * (rho / norm))
    model.zero_grad()
    compute_loss().backward()
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)


def by_hand(model: nn.Module, compute_loss: Loss, owned: Sequence[str], rho: float, seed: int = 0) -> Step:
    """Both passes on copies of the model.

    Both start from the state before the step. But the second pass has the parameters and modules that the first one
    put in place of others, and what that wrote into the weights that move.

    Args:
        model: The model before the step; it is not changed.
        compute_loss: Of one pass.
        owned: Names of the parameters that the optimizer has.
        rho: The radius.
        seed: Of every global stream at the start of each pass.
    """
    first = copy.deepcopy(model)
    for (name, theirs), (_, ours) in zip(first.named_parameters(), model.named_parameters(), strict=True):
        if name not in owned and ours.grad is not None:  # those of other owners add up until their owner clears them
            theirs.grad = ours.grad.clone()
    present = dict(first.named_parameters())
    torch.manual_seed(seed)
    loss = compute_loss(first)
    loss.backward()
    state = state_of(first)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in first.named_parameters()}

    second, before = copy.deepcopy(first), dict(copy.deepcopy(model).named_modules())
    for name, module in second.named_modules():
        if name not in before:
            continue
        own = {key: value for key, value in vars(before[name]).items() if key not in _TORCH_OWN}
        for key in [key for key in vars(module) if key not in _TORCH_OWN and key not in own]:
            delattr(module, key)
        vars(module).update(own)
        module._buffers.clear()
        module._buffers.update(before[name]._buffers)
    made = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        moves = name in owned and gradients[name] is not None
        if present.get(name) is made[name] and not moves:
            parameter.data = model.get_parameter(name).data.clone()
    moving = {name: p for name, p in second.named_parameters() if name in owned}
    along = {name: gradients[name].to_dense() for name in moving if gradients[name] is not None}
    norm = sum(float(g.double().square().sum()) for g in along.values()) ** 0.5
    with torch.no_grad():
        for name, p in moving.items():
            if name in along:
                p.add_(along[name] * (rho / norm))
    for p in second.parameters():
        p.grad = None
    torch.manual_seed(seed)
    compute_loss(second).backward()
    for name, p in second.named_parameters():
        if name in moving:
            gradients[name] = p.grad
    return Step(state, gradients)


def watched_step(
    model: nn.Module,
    optimizer: samopt.SharpnessAwareOptimizer,
    form: str,
    compute_loss: Loss,
    seed: int = 0,
) -> Step:
    """One step by the package in one of ``FORMS``, and what there was just before the base's step."""
    seen: list[Step] = []

    def look(*_: object) -> None:
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        seen.append(Step(state_of(model), gradients))

    # The base's own step calls a closure inside, so its gradients are there only when the update is made.
    base = optimizer.base_optimizer
    original = type(base).step
    handle = base.register_step_pre_hook(look) if form != "closure" else None
    torch.manual_seed(seed)
    try:
        if form == "closure":

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = compute_loss(model)
                loss.backward()
                return loss

            def step(closure: Any = None) -> Any:
                with torch.enable_grad():
                    loss = closure()
                look()
                original(base)
                return loss

            base.step = step  # type: ignore[method-assign]
            optimizer.step(closure)
        else:
            FORMS[form](optimizer, lambda: compute_loss(model))
    finally:
        if handle is not None:
            handle.remove()
        vars(base).pop("step", None)
    (result,) = seen
    return result


def assert_leaves_no_trace(got: Step, want: Step) -> None:
    """State exactly as after one pass, and the gradients of both passes by hand."""
    assert_same(got.state, want.state)
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        found = got.gradients[name]
        assert (found is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(
                found.to_dense(), gradient.to_dense(), rtol=1e-11, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
            )
