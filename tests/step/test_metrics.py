"""What a step reports, against numbers measured by hand, without waiting for the device to make them."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import samopt
from samopt._perturb.perturbation import Perturbation
from samopt.parts import checks
from samopt.step_metrics import as_scalar
from tests.helpers.cases import batch, curved, linear, mlp, tensors, wrapped_step

FORMS = ["closure", "explicit"]
VARIANTS = {"sam": (samopt.SAM, 0.3, None), "asam": (samopt.ASAM, 0.3, 0.01)}
variants = pytest.mark.parametrize("variant", VARIANTS)
forms = pytest.mark.parametrize("form", FORMS)


class Output(NamedTuple):
    """The loss is not the first entry, and the first has one element, too."""

    logits: torch.Tensor
    loss: torch.Tensor


CONTAINERS = {
    "tensor": lambda loss, logits: loss,
    "one entry": lambda loss, logits: loss.reshape(1),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "model output": lambda loss, logits: OrderedDict(loss=loss, logits=logits),
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [{"loss": loss}],
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "number": lambda loss, logits: loss.item(),
    "named tuple": lambda loss, logits: Output(logits.detach()[:1], loss),
    "mapping": lambda loss, logits: UserDict(logits=logits, loss=loss),
}


@forms
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_loss_inside_any_container_reaches_the_metrics(container, form):
    (w,) = tensors((3,))
    slope = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.0)
    returned = []

    def one_pass():
        optimizer.zero_grad()
        loss = (w * slope).sum()
        loss.backward()
        returned.append(CONTAINERS[container](loss, w))
        return returned[-1]

    if form == "closure":
        assert optimizer.step(one_pass) is returned[0]
    else:
        with optimizer.perturbed(loss=one_pass()) as second:
            second.loss = one_pass()
    value = float(w.detach() @ slope)
    metrics = optimizer.last_step
    assert float(metrics.loss) == pytest.approx(value, rel=1e-12)
    assert float(metrics.perturbed_loss) == pytest.approx(value + 0.5 * 5, rel=1e-12)  # rho ||g||
    assert float(metrics.sharpness) == pytest.approx(0.5 * 5, rel=1e-12)
    assert not metrics.loss.requires_grad and metrics.loss.dim() == 0


@pytest.mark.parametrize(
    "nothing", [None, {}, (), torch.ones(2), {"logits": torch.ones(())}, SimpleNamespace()], ids=str
)
def test_a_loss_that_cannot_be_found_is_not_reported(nothing):
    assert as_scalar(nothing) is None
    (w,) = tensors((3,))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.0)

    def closure():
        optimizer.zero_grad()
        w.square().sum().backward()
        return nothing

    assert optimizer.step(closure) is nothing
    assert sorted(optimizer.last_step.to_dict()) == ["applied_radius", "grad_norm", "perturbed_grad_norm", "radius"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@variants
def test_norms_and_radii_are_those_of_the_weights_and_gradients(variant, stochastic, dtype):
    wrap, _, eta = VARIANTS[variant]
    parameters = tensors((30, 20), (40,), (5, 5), (9,), dtype=dtype)
    groups = [
        {"params": parameters[:2], "rho": 0.3},
        {"params": parameters[2:3], "rho": 0.7},
        {"params": parameters[3:], "rho": 5.0, "perturb": False},
    ]
    optimizer = wrap(torch.optim.SGD(groups, lr=0.0), stochastic_rounding=stochastic)
    before = [p.detach().double().clone() for p in parameters]
    first = [s.detach().to(dtype) for s in tensors((30, 20), (40,), (5, 5), (9,), seed=1)]
    second = [s.detach().to(dtype) for s in tensors((30, 20), (40,), (5, 5), (9,), seed=2)]
    linear(parameters, *first)().backward()
    with optimizer.perturbed():
        moved = [(p.detach().double() - b) for p, b in zip(parameters, before, strict=True)]
        linear(parameters, *second)().backward()
    lengths = [b.abs() + eta if eta and b.dim() > 1 else torch.ones(()).double() for b in before]

    def norm(entries):
        return sum(float(e.double().square().sum()) for e in entries) ** 0.5

    metrics = optimizer.last_step.to_dict()
    exact = {torch.float64: 1e-12}.get(dtype, 1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm(first[:3]), rel=exact)
    assert metrics["perturbed_grad_norm"] == pytest.approx(norm(second[:3]), rel=exact)
    assert metrics["radius"] == 0.7
    applied = norm([m / t for m, t in zip(moved[:3], lengths[:3], strict=True)])
    assert metrics["applied_radius"] == pytest.approx(applied, rel=1e-12 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_step_can_be_read_after_later_ones_and_from_a_pickle(dtype, direction):
    model = mlp(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.SAM(base, rho=0.3, model=model, direction=direction)
    x, y = batch(dtype)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    steps = []
    for rho in (0.3, 0.1, 0.7, 0.5):
        optimizer.param_groups[0]["rho"] = rho
        optimizer.step(closure)
        steps.append((optimizer.last_step, optimizer.last_step.to_dict()))
    assert steps[1][1]["applied_radius"] == pytest.approx(0.1, rel=0.3)  # bf16 rounds at random
    for metrics, values in steps:
        assert metrics.to_dict() == pickle.loads(pickle.dumps(metrics)).to_dict() == values


def test_after_a_plain_step_nothing_is_left_of_the_last_perturbed_one():
    parameters = tensors((3, 2))
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3)
    assert optimizer.last_step.to_dict() == {}
    wrapped_step(optimizer, [curved(parameters, (1,))] * 2, "closure")
    optimizer.param_groups[0]["rho"] = 0.0
    loss = float(curved(parameters, (1,))().detach())
    wrapped_step(optimizer, [curved(parameters, (1,))] * 2, "closure")
    assert optimizer.last_step.to_dict() == {"loss": loss, "radius": 0.0}


@pytest.mark.parametrize("why", ["rho", "pause", "no gradients"])
def test_after_a_plain_loops_step_nothing_is_left_of_the_last_perturbed_one(why):
    parameters = tensors((3, 2))
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3)
    wrapped_step(optimizer, [curved(parameters, (1,))] * 2, "closure")
    assert optimizer.last_step.to_dict()["radius"] == pytest.approx(0.3)
    optimizer.zero_grad()
    if why == "rho":
        optimizer.rho = 0.0
    elif why == "pause":
        optimizer.is_paused = True
    if why != "no gradients":
        curved(parameters, (1,))().backward()
    optimizer.step()
    assert optimizer.last_step.to_dict() == {"radius": 0.0}


def test_a_step_without_a_second_pass_keeps_what_backward_measured():
    parameters = tensors((3, 2))
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.0)
    loss = optimizer.backward(curved(parameters, (1,)))
    optimizer.step()
    assert optimizer.last_step.to_dict() == {"loss": float(loss), "radius": 0.0}


def test_gradient_norms_can_be_left_out():
    parameters = tensors((3, 2))
    optimizer = samopt.ASAM(torch.optim.SGD(parameters, lr=0.1), measure_grad_norms=False)
    wrapped_step(optimizer, [curved(parameters, (1,))] * 2, "closure")
    assert optimizer.last_step.grad_norm is None and optimizer.last_step.perturbed_grad_norm is None
    assert optimizer.last_step.sharpness is not None


class NoWaiting(TorchDispatchMode):
    """Fails on whatever reads a tensor's value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@forms
@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_an_accelerator_never_waits_for_it(dtype, variant, form, monkeypatch):
    monkeypatch.setattr(Perturbation, "usable", None)  # an accelerator's: the host cannot tell
    monkeypatch.setattr(checks, "_is_on_host", lambda value: False)
    wrap, rho, _ = VARIANTS[variant]
    parameters = tensors((3, 2), (4,), dtype=dtype)
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "rho": torch.tensor(0.7)}]
    optimizer = wrap(torch.optim.SGD(groups, lr=0.1), rho=rho, backend="reference")
    with NoWaiting():
        for _ in range(3):
            wrapped_step(optimizer, [curved(parameters, (1, 1))] * 2, form)
        metrics = vars(optimizer.last_step) | {
            "asked": optimizer.last_step.radius,
            "applied": optimizer.last_step.applied_radius,
        }
    missing = {"distance"} | ({"loss", "perturbed_loss"} if form == "explicit" else set())
    assert {name for name, value in metrics.items() if value is None} == missing
    assert all(isinstance(value, Tensor) and value.dim() == 0 for name, value in metrics.items() if name not in missing)
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        optimizer.last_step.to_dict()


@pytest.mark.parametrize("kind", [samopt.FriendlySAM, samopt.GSAM, samopt.WSAM, samopt.LookSAM])
def test_norms_are_those_of_the_gradients_also_where_something_is_made_of_them(kind):
    (w,) = tensors((5,))
    curvature = torch.arange(1.0, 6.0, dtype=torch.float64)
    optimizer = kind([w], torch.optim.SGD, rho=0.3, lr=0.1)
    for _ in range(3):
        norm = (curvature * w.detach()).norm()
        optimizer.zero_grad()
        (0.5 * curvature * w * w).sum().backward()
        with optimizer.perturbed() as second:
            there = curvature * w.detach()
            if second.is_needed:
                (0.5 * curvature * w * w).sum().backward()
        optimizer.step()
        step = optimizer.last_step
        if second.is_needed:
            assert float(step.grad_norm) == pytest.approx(float(norm), rel=1e-12)
            assert float(step.perturbed_grad_norm) == pytest.approx(float(there.norm()), rel=1e-12)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_nothing_is_measured_before_the_first_step(direction):
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert samopt.SAM(base, direction=direction, model=model).last_step.to_dict() == {}
