"""Steps on an accelerator: nothing waits for it, and nothing asks what cannot be asked while a graph is captured.

``tests/kernels/test_accelerator.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import samopt
from samopt import sharpness
from samopt.parts.direction import Momentum
from samopt.trust_region import EMA, Pretrained
from tests.helpers.accelerator import DEVICE, Accelerator, on_device
from tests.helpers.cases import batch, closure_form, explicit_form, mlp


def sgd(model):
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def two_groups(model):
    weights, biases = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights, "rho": torch.tensor(0.3)}, {"params": biases, "rho": 0.1, "maximize": True}]
    return samopt.ASAM(groups, SGD, lr=0.1, rho=0.5)


TWO_PASSES = {
    "sam": lambda m: samopt.SAM(sgd(m), rho=0.5),
    "sam, model": lambda m: samopt.SAM(AdamW(m.parameters(), lr=0.01), rho=0.5, model=m),
    "asam, two groups, a radius on the host": two_groups,
    "fisher": lambda m: samopt.FisherSAM(sgd(m), rho=0.1),
    "l-infinity": lambda m: samopt.SAM(sgd(m), rho=0.01, norm="linf"),
    "tram": lambda m: samopt.TRAM(sgd(m), model=m),
    "tram, average": lambda m: samopt.TRAM(sgd(m), model=m, trust_region=EMA(0.9), divergence="mmd"),
    "tram, pretrained": lambda m: samopt.TRAM(sgd(m), model=m, trust_region=Pretrained(), divergence="symmetric_kl"),
    "lesam": lambda m: samopt.LESAM(sgd(m)),
    "friendly": lambda m: samopt.FriendlySAM(sgd(m), rho=0.1),
    "gsam": lambda m: samopt.GSAM(sgd(m), rho=0.1),
    "wsam": lambda m: samopt.WSAM(sgd(m), rho=0.1),
    "look": lambda m: samopt.LookSAM(sgd(m), rho=0.1),
    "functional": lambda m: samopt.FunctionalSAM(sgd(m), rho=0.1, model=m),
}
ONE_PASS = {
    "uphill": lambda m: samopt.SAM(sgd(m), rho=0.5, direction="momentum-uphill", model=m),
    "ahead": lambda m: samopt.MomentumSAM(sgd(m), rho=0.5, model=m),
    "preconditioned": lambda m: samopt.SAM(
        Adam(m.parameters(), lr=0.01), rho=0.5, direction=Momentum(preconditioned=True), model=m
    ),
}


def plain_form(optimizer, model, data):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data[0]).float(), data[1]).backward()
    optimizer.step()


CASES = [
    *[pytest.param(make, form, id=f"{name}, {form.__name__}") for name, make in TWO_PASSES.items()
      for form in (closure_form, explicit_form)],
    *[pytest.param(make, plain_form, id=name) for name, make in ONE_PASS.items()],
]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("make", "form"), CASES)
def test_no_step_waits_and_all_lead_where_they_lead_on_the_cpu(make, form, backend, kind):
    data = [batch(kind, seed=seed) for seed in range(4)]
    model, twin = on_device(mlp(kind)), mlp(kind)
    there = [tuple(map(on_device, pair)) for pair in data]
    with Accelerator() as accelerator:
        optimizer = prepared(make, model, backend)
        for seed, pair in enumerate(there):
            if seed == 2:  # torch's own bases wait where they make their states
                accelerator.waits.clear()
            form(optimizer, model, pair)
        with accelerator.capture():  # which forbids more than waiting does
            form(optimizer, model, there[0])
        assert accelerator.waits == []
        measured = optimizer.last_step.to_dict()
    expected = prepared(make, twin, "reference")
    for pair in (*data, data[0]):
        form(expected, twin, pair)
    exact = backend == "reference" or kind is torch.bfloat16  # which has the reference's arithmetic under "auto" too
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert got.device == DEVICE
        torch.testing.assert_close(got.near, want.detach(), rtol=0 if exact else 2e-5, atol=0 if exact else 2e-6)
    assert measured == pytest.approx(expected.last_step.to_dict(), rel=1e-4, abs=1e-5)


class Split(nn.Module):
    """A model with one layer on the device and one on the CPU."""

    def __init__(self, model, devices):
        super().__init__()
        self.first, self.second = model[0], model[2]
        self.devices = devices

    def forward(self, x):
        return self.second(self.first(x.to(self.devices[0])).tanh().to(self.devices[1])).to("cpu")


SPLIT = [
    *[pytest.param(name, "cpu", id=f"{name}, cpu first") for name in (*TWO_PASSES, *ONE_PASS)],
    *[pytest.param(name, "device", id=f"{name}, device first") for name in ("sam", "l-infinity", "tram", "wsam")],
]


@pytest.mark.parametrize(("name", "first"), SPLIT)
def test_a_model_on_two_devices_leads_where_it_leads_on_the_cpu(name, first):
    make, form = (TWO_PASSES | ONE_PASS)[name], closure_form if name in TWO_PASSES else plain_form
    places = ("cpu", DEVICE) if first == "cpu" else (DEVICE, "cpu")
    ends, measured = [], []
    for moves in (True, False):
        model = mlp()
        with Accelerator():
            if moves:
                on_device(model[places.index(DEVICE) * 2])
            split = Split(model, places if moves else ("cpu", "cpu"))
            optimizer = prepared(make, split, "auto")
            for seed in range(2):
                form(optimizer, split, batch(seed=seed))
            measured.append(optimizer.last_step.to_dict())
        ends.append([getattr(p, "near", p.detach()) for p in model.parameters()])
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert measured[0] == pytest.approx(measured[1], rel=1e-4, abs=1e-5)


def prepared(make, model, backend):
    """The optimizer on a backend; rounding to nearest, as a device that is made up has no generators."""
    optimizer = make(model)
    optimizer._ascent.backend, optimizer._ascent.rounding = backend, None
    return optimizer


@pytest.mark.parametrize(
    "base", [sgd, lambda m: AdamW(m.parameters(), lr=0.01, fused=True)], ids=["sgd", "adamw-fused"]
)
def test_a_gradient_scaler_on_the_device_leads_where_the_cpus_does(base):
    ends = []
    for place, device in ((on_device, DEVICE.type), (lambda thing: thing, "cpu")):
        model = place(mlp())
        with Accelerator() as accelerator:
            optimizer = samopt.SAM(base(model), rho=0.5, backend="reference")
            scaler = torch.amp.GradScaler(device, init_scale=1024.0)
            for seed in range(3):
                x, y = map(place, batch(seed=seed))
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                with optimizer.perturbed():
                    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
        assert {line for _, line in accelerator.waits} <= {"outside samopt"}
        ends.append([getattr(p, "near", p.detach()) for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def half(model):
    return {name: value * 0.5 for name, value in model.state_dict().items()}


MEASURES = {
    "worst case": lambda *on: sharpness.worst_case(*on, rho=0.1, steps=4, restarts=2),
    "worst case, adaptive": lambda *on: sharpness.worst_case(*on, rho=0.01, norm="linf", adaptive=True, steps=4),
    "average case": lambda *on: sharpness.average_case(*on, rho=0.1, samples=3),
    "by layer": lambda *on: sharpness.per_layer(*on, rho=0.1, steps=2),
    "eigenvalues": lambda *on: sharpness.hessian_eigenvalues(*on, k=2),
    "gauss-newton": lambda *on: sharpness.gauss_newton_eigenvalues(*on, k=2),
    "trace": lambda *on: sharpness.hessian_trace(*on),
    "density": lambda *on: sharpness.spectral_density(*on, steps=10, samples=2),
    "landscape": lambda *on: sharpness.landscape(*on, points=3),
    "interpolation": lambda model, *on: sharpness.interpolate(model, *on, half(model), points=3),
    "active units": lambda *on: sharpness.active_units(*on, layers=["1"]),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_find_on_the_device_what_they_find_on_the_cpu(measure, monkeypatch):
    pytest.importorskip("torch.distributed.tensor")  # which annotates with the class that is replaced here
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())  # a device that is made up has none
    values = []
    for place in (on_device, lambda thing: thing):
        model, batches = place(mlp()), [tuple(map(place, batch(seed=seed))) for seed in range(2)]
        with Accelerator():
            before = [p.clone() for p in model.parameters()]
            values.append(MEASURES[measure](model, sharpness.cross_entropy, batches).value)
            assert all(bool((p == b).all()) for p, b in zip(model.parameters(), before, strict=True))
    assert values[0] == values[1]


def test_devices_do_not_mix():
    away, near = on_device(torch.ones(3)), torch.ones(3)
    with Accelerator():
        assert (away + near.sum()).device == DEVICE
        for mixed in (lambda: away + near, lambda: near.add_(away), lambda: torch.stack([away.sum(), near.sum()])):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()


def test_a_wait_is_noticed():
    value = on_device(torch.ones(()))
    with Accelerator() as accelerator:
        assert float(value + 1) == 2.0
        torch.ones(3).to(DEVICE)
        torch.ones(3).to(DEVICE, non_blocking=True)
        value.to("cpu", non_blocking=True)
    waits = [name for name, _ in accelerator.waits]
    assert waits == ["_local_scalar_dense.default", "_to_copy.default", "_to_copy.default"]


@pytest.mark.parametrize("captured", [False, True])
def test_a_captured_step_is_not_read_for_a_stall(captured, monkeypatch):
    read = []
    monkeypatch.setattr("samopt.stall_warning._CHECKS", (3, 400))
    monkeypatch.setattr("samopt.stall_warning.StallDetector._warn_if_held", lambda *_: read.append(True))  # would wait
    model, data = on_device(mlp()), tuple(map(on_device, batch()))
    with Accelerator() as accelerator:
        optimizer = samopt.SAM(sgd(model), rho=0.5)
        for _ in range(2):
            closure_form(optimizer, model, data)
        with accelerator.capture() if captured else nullcontext():
            closure_form(optimizer, model, data)
    assert bool(read) is not captured


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_a_captured_step_says_that_dropout_cannot_be_repeated(rate):
    model = on_device(nn.Sequential(nn.Linear(6, 12), nn.Dropout(rate), nn.Linear(12, 3)))
    data = tuple(map(on_device, batch()))
    with Accelerator() as accelerator:
        optimizer = samopt.SAM(sgd(model), rho=0.5, model=model)
        closure_form(optimizer, model, data)
        with accelerator.capture(), warnings.catch_warnings(record=True) as issued:
            warnings.simplefilter("always")
            for _ in range(2):
                closure_form(optimizer, model, data)
    said = [str(warning.message) for warning in issued if "masks" in str(warning.message)]
    assert len(said) == (1 if rate else 0)
