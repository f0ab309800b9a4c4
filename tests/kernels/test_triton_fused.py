"""Restore and base step in one pass, in Triton's interpreter: torch's own steps, from weights that are exact.

``tests/kernels/test_triton.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import samopt
from samopt._perturb.perturbation import Perturbation
from tests.helpers.cases import (
    assert_same,
    batch,
    bits,
    closure_form,
    closure_of,
    explicit_form,
    mlp,
    same_bits,
    tensors,
)
from tests.step.test_interrupts import InterruptAt

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="tests/kernels/test_triton.py runs these with the interpreter"
)
FUSED = "triton-fused"
KERNELS = {"base_steps.py", "elements.py", "stages.py"}

BASES = {
    "sgd": lambda p, **o: SGD(p, lr=0.1, **o),
    "sgd-momentum": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "sgd-nesterov": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, nesterov=True, **o),
    "sgd-dampened": lambda p, **o: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, maximize=True, **o),
    "adam": lambda p, **o: Adam(p, lr=0.01, weight_decay=0.1, **o),
    "adam-amsgrad": lambda p, **o: Adam(p, lr=0.01, amsgrad=True, maximize=True, **o),
    "adamw": lambda p, **o: AdamW(p, lr=0.01, **o),
    "adamw-amsgrad": lambda p, **o: AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.2, betas=(0.8, 0.95), **o),
}


def trained(base, backend, steps=4, model=None, form=closure_form, **options):
    model = mlp() if model is None else model
    optimizer = samopt.ASAM(base(model.parameters(), **options), rho=0.5, backend=backend)
    for seed in range(steps):
        form(optimizer, model, batch(seed=seed))
    return model, optimizer


def assert_close(model, twin):
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("base", BASES)
def test_steps_states_and_measurements_are_those_of_torchs_own_base(base, options):
    model, ours = trained(BASES[base], FUSED, **options)
    twin, theirs = trained(BASES[base], "reference", **options)
    assert_close(model, twin)
    assert ours.last_step.to_dict() == pytest.approx(theirs.last_step.to_dict(), rel=2e-5)
    for got, want in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        assert list(got) == list(want)
        for name, value in want.items():
            assert got[name].dtype is value.dtype and got[name].stride() == value.stride()
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=["plain", "fused"])
def test_a_learning_rate_in_a_tensor(options):
    runs = [
        trained(lambda p, rate=rate, **o: AdamW(p, lr=rate, **o), FUSED, **options)[0]
        for rate in (0.01, torch.tensor(0.01, dtype=torch.float64))
    ]
    assert same_bits(runs[0], bits(runs[1]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_steps_are_computed_in_fp32_and_rounded_once(kind):
    weights = tensors((7, 5), (33,), dtype=kind)
    start = [w.detach().float() for w in weights]
    slopes = [w.detach() for w in tensors((7, 5), (33,), dtype=kind, seed=1)]
    optimizer = samopt.SAM(weights, SGD, lr=0.1, momentum=0.9, weight_decay=0.1, rho=0.5, backend=FUSED)

    def closure():
        optimizer.zero_grad()
        loss = sum((w * s).sum() for w, s in zip(weights, slopes, strict=True))
        loss.backward()
        return loss

    optimizer.step(closure)
    for w, was, slope in zip(weights, start, slopes, strict=True):
        assert torch.equal(w.detach(), torch.add(was, slope.float() + 0.1 * was, alpha=-0.1).to(kind))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_without_a_learning_rate_every_bit_stays(base):
    model = mlp()
    before = bits(model)
    optimizer = samopt.SAM({"sgd": SGD, "adamw": AdamW}[base](model.parameters(), lr=0.0), rho=0.5, backend=FUSED)
    for seed in range(10):
        closure_form(optimizer, model, batch(seed=seed))
    assert same_bits(model, before)


def test_checkpoints_go_both_ways():
    model, optimizer = trained(BASES["adamw"], FUSED, steps=2)
    whole, _ = trained(BASES["adamw"], FUSED, steps=4)
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    stock = samopt.ASAM(BASES["adamw"](twin.parameters()), rho=0.5, backend="reference")
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = samopt.ASAM(BASES["adamw"](model.parameters()), rho=0.5, backend=FUSED)
    back.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert_same(back.state_dict()["state"], optimizer.state_dict()["state"])
    for seed in (2, 3):
        closure_form(stock, twin, batch(seed=seed))
        closure_form(back, model, batch(seed=seed))
    assert same_bits(model, bits(whole))
    assert_close(twin, whole)


def test_hooks_run_once_and_find_what_they_find_without_fusion():
    seen = []
    model = mlp()
    base = SGD(model.parameters(), lr=0.1)
    optimizer = samopt.SAM(base, rho=0.5, backend=FUSED)
    before = bits(model)
    handles = [
        base.register_step_pre_hook(lambda *_: seen.append(("base before", same_bits(model, before)))),
        base.register_step_post_hook(lambda *_: seen.append(("base after", same_bits(model, before)))),
        optimizer.register_step_pre_hook(lambda *_: seen.append(("before", same_bits(model, before)))),
        optimizer.register_step_post_hook(lambda *_: seen.append(("after", same_bits(model, before)))),
        register_optimizer_step_post_hook(lambda which, *_: seen.append(("global", which is base))),
    ]
    try:
        closure_form(optimizer, model, batch())
    finally:
        for handle in handles:
            handle.remove()
    wanted = [("before", True), ("base before", True), ("base after", False), ("global", True), ("after", False)]
    assert seen == wanted


def test_groups_step_with_their_own_numbers_and_leave_out_what_torch_leaves_out():
    def run(backend):
        weights = tensors((6, 4), (40,), (5,), (3, 3), dtype=torch.float32)
        weights[3].requires_grad_(False)
        groups = [
            {"params": [weights[0]], "lr": 0.3, "rho": 0.2},
            {"params": weights[1:2], "momentum": 0.5, "perturb": False},
            {"params": weights[2:], "weight_decay": 0.1, "maximize": True},
        ]
        optimizer = samopt.SAM(SGD(groups, lr=0.1, foreach=False), rho=0.5, backend=backend)
        calls = []

        def closure():
            calls.append(None)
            optimizer.zero_grad()
            used = weights[:2] if len(calls) % 2 == 0 else weights[:3]  # the third has no second gradient
            loss = sum((w**2).sum() + w.sin().sum() for w in used)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return weights

    for got, want, was in zip(run(FUSED), run("reference"), tensors((6, 4), (40,), (5,), (3, 3)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)
        if got.shape in ((5,), (3, 3)):
            assert torch.equal(got, was.float())  # moved and put back, but never stepped


def test_weights_are_exact_after_an_exception_in_the_second_pass():
    model = mlp()
    optimizer = samopt.SAM(SGD(model.parameters(), lr=0.1), rho=0.5, backend=FUSED)
    before, calls = bits(model), []
    inner = closure_of(optimizer, model, batch())

    def closure():
        calls.append(same_bits(model, before))
        if len(calls) == 2:
            raise RuntimeError("in between")
        return inner()

    with pytest.raises(RuntimeError, match="in between"):
        optimizer.step(closure)
    assert calls == [True, False] and same_bits(model, before)
    closure_form(optimizer, model, batch())
    assert not same_bits(model, before) and not optimizer.is_perturbed


class InterruptOutsideKernels(InterruptAt):
    """A GPU runs a kernel as a whole; the interpreter's lines of it are not the host's."""

    def trace(self, frame, event, argument):
        return None if Path(frame.f_code.co_filename).name in KERNELS else super().trace(frame, event, argument)


@pytest.mark.parametrize("backend", [FUSED, "triton-swap"])
def test_an_interrupt_anywhere_on_the_host_leaves_the_weights_exact(backend):
    def attempt(target):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = samopt.SAM(SGD(model.parameters(), lr=0.0), rho=0.5, backend=backend, warn_on_stall=False)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(1, 3)).square().sum()
            loss.backward()
            return loss

        before = bits(model)
        with InterruptOutsideKernels(target) as interrupt:
            try:
                optimizer.step(closure)
            except KeyboardInterrupt:
                pass
        assert same_bits(model, before), interrupt.lines[-1:]
        return interrupt

    visits = attempt(-1).first_and_last_visits()
    assert len(visits) > 200
    for target in visits[:: max(1, len(visits) // 50)]:
        attempt(target)


def test_what_has_no_fused_form_is_refused_or_restored_apart():
    model = mlp()
    optimizer = samopt.SAM(torch.optim.RMSprop(model.parameters()), backend=FUSED)
    with pytest.raises(RuntimeError, match='RMSprop is none of torch\'s SGD, Adam and AdamW; use backend="triton"'):
        closure_form(optimizer, model, batch())
    base = SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(base, 1)
    with pytest.raises(RuntimeError, match="the step method of this SGD was replaced"):
        closure_form(samopt.SAM(base, backend=FUSED), model, batch())

    for wrap in (samopt.GSAM, samopt.TRAM):  # they act before the update, on weights that have to be exact
        runs = []
        for backend in (FUSED, "reference"):
            torch.manual_seed(0)
            net = mlp()
            options = {"model": net} if wrap is samopt.TRAM else {}
            optimizer = wrap(SGD(net.parameters(), lr=0.1), backend=backend, **options)
            for seed in range(2):
                closure_form(optimizer, net, batch(seed=seed))
            runs.append(net)
        assert_close(*runs)
    assert_close(trained(BASES["sgd"], FUSED, form=explicit_form)[0], trained(BASES["sgd"], "reference")[0])


def test_groups_whose_weights_share_memory_are_restored_apart():
    def run(backend):
        torch.manual_seed(0)
        room = torch.randn(20)
        weights = [nn.Parameter(room[:15]), nn.Parameter(room[5:])]
        groups = [{"params": [weights[0]], "rho": 0.3}, {"params": [weights[1]], "rho": 0.5}]
        optimizer = samopt.SAM(groups, SGD, lr=0.1, momentum=0.9, backend=backend, measure_grad_norms=False)

        def closure():
            optimizer.zero_grad()
            loss = sum((w**2).sum() for w in weights)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return room

    torch.testing.assert_close(run(FUSED), run("reference"), rtol=2e-6, atol=2e-7)


def test_states_of_another_memory_format_are_left_to_the_base():
    def run(backend):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        optimizer = samopt.SAM([weight], AdamW, lr=0.1, rho=0.5, backend=backend)

        def closure():
            optimizer.zero_grad()
            loss = (weight**2).sum() + weight.sin().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].contiguous()
        optimizer.load_state_dict(state)
        optimizer.step(closure)
        return weight.detach()

    torch.testing.assert_close(run(FUSED), run("reference"), rtol=2e-6, atol=2e-7)


class Operations(TorchDispatchMode):
    """Lists torch's operations other than views, allocations and host numbers: those that an accelerator launches."""

    FREE = (
        "detach.",
        "alias.",
        "view.",
        "select.",
        "slice.",
        "unbind.",
        "empty",
        "lift_fresh.",
        "zeros.",
        "_record_function",
    )

    def __init__(self):
        super().__init__()
        self.names = []
        self.listens = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.listens and not func.__name__.startswith(self.FREE):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


NORM, MEASURED = ["sum_chunk", "join_sums"], ["sum_chunk", "join_sums"]


@pytest.mark.parametrize(
    ("kind", "backend", "measure", "launches"),
    [
        (torch.float32, "triton", False, [*NORM, "ascend_chunk", "restore_chunk", "add_.Tensor"]),
        (torch.float32, FUSED, False, [*NORM, "ascend_chunk", "add_.Tensor", "sgd_chunk"]),
        (torch.bfloat16, "triton", False, [*NORM, "ascend_chunk", "restore_chunk", "add_.Tensor"]),
        (torch.bfloat16, FUSED, False, [*NORM, "ascend_chunk", "add_.Tensor", "sgd_chunk"]),
        (torch.float32, FUSED, True, [*NORM, "ascend_chunk", "add_.Tensor", *MEASURED, "sgd_chunk"]),
        (torch.float32, "triton-swap", False, [*NORM, "ascend_chunk", "add_.Tensor"]),
        (torch.bfloat16, "triton-swap", False, [*NORM, "ascend_chunk", "add_.Tensor"]),
    ],
    ids=["restore", "fused", "restore-bf16", "fused-bf16", "fused-measured", "swap", "swap-bf16"],
)
def test_what_a_step_launches_on_an_accelerator(kind, backend, measure, launches, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    from samopt.kernels.triton import fused, launch
    from samopt.kernels.triton.tables import pointer_table

    operations, interpret = Operations(), InterpretedFunction.run

    def unlisted(function, name=None):
        def call(*arguments, **options):
            operations.names.extend([] if name is None else [name])
            operations.listens = False
            try:
                return function(*arguments, **options)
            finally:
                operations.listens = True

        return call

    def run(self, *arguments, **options):  # how the interpreter does it is no matter
        unlisted(interpret, self.fn.__name__)(self, *arguments, **options)

    for module in (launch, fused):  # tables are made on the host
        monkeypatch.setattr(module, "pointer_table", unlisted(pointer_table))
    monkeypatch.setattr(Perturbation, "usable", None)  # as on an accelerator, where the norm is not read
    monkeypatch.setattr(InterpretedFunction, "run", run)
    weights = [nn.Parameter(torch.randn(1000).to(kind)) for _ in range(6)]
    slopes = [torch.ones_like(w) for w in weights]
    optimizer = samopt.SAM(
        SGD(weights, lr=0.1, momentum=0.9), rho=0.5, backend=backend, measure_grad_norms=measure, warn_on_stall=False
    )

    def closure():
        for w, slope in zip(weights, slopes, strict=True):
            w.grad = slope
        return torch.zeros(())

    def step():
        if backend == FUSED:
            optimizer.step(closure)
        else:
            closure()
            with optimizer.perturbed():
                closure()

    step()  # makes the tables and the momenta
    operations.names.clear()
    with operations:
        step()
    assert " ".join(operations.names) == " ".join(launches)


@pytest.mark.parametrize("backend", [FUSED, "triton", "reference"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
def test_a_base_on_an_accelerator_meets_a_first_gradient_that_was_not_finite(kind, backend, monkeypatch):
    monkeypatch.setattr(Perturbation, "usable", None)  # as on an accelerator, where the norm is not read
    weights = tensors((4,), (3,), dtype=kind)
    before = [w.detach().clone() for w in weights]
    optimizer = samopt.SAM(SGD(weights, lr=0.5, foreach=False), rho=0.5, backend=backend, warn_on_stall=False)
    slopes = iter([torch.inf, 1.0, 60_000.0, 1.0])

    def closure():
        slope = next(slopes)
        for w in weights:
            w.grad = torch.full_like(w, slope)
        return torch.zeros(())

    optimizer.step(closure)
    assert bool(weights[0][0].isnan()) and not bool(weights[0][1:].isnan().any())
    assert torch.equal(weights[0][1:].detach(), before[0][1:] - 0.5) and torch.equal(
        weights[1].detach(), before[1] - 0.5
    )
    with torch.no_grad():
        weights[0].copy_(before[0])
    optimizer.step(closure)  # the norm is more than fp16 can hold
    assert torch.equal(weights[0].detach(), before[0] - 0.5) and torch.equal(weights[1].detach(), before[1] - 0.5 - 0.5)
