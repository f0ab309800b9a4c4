"""Arguments and options out of range: an error that says what to write instead, and everything left as it was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import samopt
from samopt import kernels
from tests.helpers.cases import BASES, batch, loss_of, mlp, refused

Optimizer = samopt.SharpnessAwareOptimizer


def make() -> tuple[nn.Module, Optimizer]:
    model = mlp(torch.float64)
    return model, samopt.SAM(BASES["adamw"](model.parameters()), model=model)


def enter_again(optimizer: Optimizer) -> None:
    with optimizer.perturbed():
        pytest.fail("entered")


BAD = [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("0.05", TypeError), (None, TypeError)]


def message_for(name: str, value: Any, where: str = "") -> str:
    if isinstance(value, float):
        fix = "; use rho=0 to disable the ascent" if name == "rho" else ""
        return f"^{name} must be >= 0 and finite, got {value}{where}{fix}$"
    return f"^{name} must be a number, got {value!r}{where}$"


@pytest.mark.parametrize("form", ["instance", "class"])
@pytest.mark.parametrize(("value", "error"), BAD)
@pytest.mark.parametrize(("wrap", "name"), [(samopt.SAM, "rho"), (samopt.ASAM, "rho"), (samopt.ASAM, "eta")])
def test_a_bad_option_is_refused(wrap: Any, name: str, value: Any, error: type[Exception], form: str) -> None:
    model = mlp(torch.float64)
    base = BASES["sgd"](model.parameters())
    with refused(message_for(name, value), model, base, error):
        if form == "instance":
            wrap(base, model=model, **{name: value})
        else:
            wrap(model.parameters(), torch.optim.SGD, lr=0.1, **{name: value})
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("act", ["perturbed", "ascend", "closure"])
@pytest.mark.parametrize(("value", "error"), BAD)
@pytest.mark.parametrize("name", ["rho", "eta"])
def test_a_bad_value_set_in_a_group_is_refused_before_anything_moves(
    name: str, value: Any, error: type[Exception], act: str
) -> None:
    model, optimizer = make()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    good, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
    loss_of(model, batch(torch.float64)).backward()
    with refused(message_for(name, value, " in param group 1"), model, optimizer, error):
        if act == "perturbed":
            enter_again(optimizer)
        elif act == "ascend":
            optimizer.ascend()
        else:
            optimizer.step(lambda: pytest.fail("called"))
    assert not optimizer.is_perturbed
    optimizer.param_groups[1][name] = good


@pytest.mark.parametrize(("value", "error"), BAD)
@pytest.mark.parametrize("name", ["rho", "eta"])
def test_a_group_with_a_bad_value_is_refused_whole(name: str, value: Any, error: type[Exception]) -> None:
    model, optimizer = make()
    with refused(message_for(name, value, " in param group 1"), model, optimizer, error):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    model = mlp(torch.float64)
    base = torch.optim.SGD([{"params": list(model.parameters()), name: value}], lr=0.1)
    with refused(message_for(name, value, " in param group 0"), model, base, error):
        samopt.SAM(base, model=model)
    assert not model._forward_pre_hooks


def constructor_errors() -> list[tuple[Callable[[nn.Module, torch.optim.Optimizer], Any], str]]:
    two_forms = r"use SAM\(torch\.optim\.SGD\(model\.parameters\(\), lr=0\.1\), rho=\.\.\.\) or SAM\(model\.para"
    sgd = torch.optim.SGD
    return [
        (lambda m, b: samopt.SAM(samopt.SAM(b)), "SAM cannot wrap SAM, which already wraps SGD; .*" + two_forms),
        (lambda m, b: samopt.ASAM(samopt.SAM(b)), "ASAM cannot wrap SAM, which already wraps SGD"),
        (
            lambda m, b: samopt.SAM(b, lr=0.1, momentum=0.9),
            "instance together with lr=, momentum=, which SAM does not know.*" + two_forms,
        ),
        (
            lambda m, b: samopt.SAM(b, sgd),
            "instance together with <class 'torch.optim.sgd.SGD'>, which SAM does not know.*" + two_forms,
        ),
        (lambda m, b: samopt.SAM(b, 0.1), "instance together with 0.1, which SAM does not.*" + two_forms),
        (lambda m, b: samopt.SAM(m.parameters(), b), "parameters together with an instance of SGD; " + two_forms),
        (lambda m, b: samopt.SAM(m.parameters(), lr=0.1), "got generator and None; " + two_forms),
        (lambda m, b: samopt.SAM(m, sgd, lr=0.1), "SAM got a module, Sequential; write SAM\\(model.parameters\\(\\)"),
        (lambda m, b: samopt.SAM([], sgd, lr=0.1), "empty parameter list"),
        (lambda m, b: samopt.SAM(m.parameters(), sgd, lr=0.1, momentun=0.9), "momentun"),
        (lambda m, b: samopt.SAM(b, norm="l1"), 'norm must be "l2" or "linf", got \'l1\''),
        (
            lambda m, b: samopt.SAM(b, backend="cuda"),
            f"backend must be \"auto\" or one of {re.escape(str(sorted(kernels.BACKENDS)))}, got 'cuda'",
        ),
        (lambda m, b: samopt.SAM(b, model="resnet"), "model must be a torch.nn.Module or a list of modules, got str"),
        (
            lambda m, b: samopt.SAM(b, model=mlp()),
            "given model=Sequential, but none of its parameters is among the 4 that the base optimizer updates; build",
        ),
    ]


@pytest.mark.parametrize("index", range(len(constructor_errors())))
def test_a_wrong_constructor_call_is_refused(index: int) -> None:
    act, message = constructor_errors()[index]
    model = mlp(torch.float64)
    base = BASES["sgd"](model.parameters())
    if "already wraps" in message:
        samopt.SAM(base)  # it adds its options to the groups
    with refused(message, model, base):
        act(model, base)


def test_a_generator_that_was_read_already_is_refused() -> None:
    model = mlp(torch.float64)
    parameters = model.parameters()
    base = torch.optim.SGD(parameters, lr=0.1)
    with refused("empty parameter list; a generator .* can be read only once, so call model.parameters", model, base):
        samopt.SAM(parameters, torch.optim.SGD, lr=0.1)


def test_a_backend_that_cannot_run_is_refused_before_anything_moves() -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), backend="foreach")
    loss_of(model, batch(torch.bfloat16)).backward()
    message = 'backend="foreach" cannot run here: .* has dtype torch.bfloat16.*use backend="auto"'
    with refused(message, model, optimizer, RuntimeError):
        enter_again(optimizer)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize(("kind", "own"), [(samopt.TRAM, "scale"), (samopt.LESAM, "budget")])
def test_a_rho_that_nothing_reads_is_refused_in_a_group(kind, own):
    model, head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    base = torch.optim.SGD([{"params": model.parameters(), "rho": 0.3}], lr=0.1)
    with pytest.raises(ValueError, match=f"group 0 has rho=0.3, which this optimizer does not read.*'{own}'"):
        kind(base, model=model)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(ValueError, match="group 1 has rho=0.2"):
        optimizer.add_param_group({"params": head.parameters(), "rho": 0.2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [samopt.TRAM, samopt.LESAM])
def test_a_rho_of_the_base_or_of_another_wrapper_is_no_mistake(kind):
    model = torch.nn.Linear(3, 2)
    assert kind(torch.optim.Adadelta(model.parameters()), model=model).param_groups[0]["rho"] == 0.9
    wrapped_before = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = samopt.SAM(wrapped_before, rho=0.2, model=model).state_dict()
    kind(wrapped_before, model=model)
    loaded = torch.optim.SGD(model.parameters(), lr=0.1)
    loaded.load_state_dict(saved)
    kind(loaded, model=model)
