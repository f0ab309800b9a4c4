"""Launches as Triton's just-in-time compiler takes them for a GPU that is not here: all but the run of the kernel."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import samopt
from samopt._perturb.perturbation import Perturbation
from samopt.kernels.triton import availability
from tests.helpers.cases import batch, closure_form, mlp

triton = pytest.importorskip("triton", minversion="3.5")

BASES = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adam-fused": lambda p: Adam(p, lr=0.01, fused=True, amsgrad=True, weight_decay=0.1),
}


TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


class Driver:
    """What the compiler asks a driver, of a GPU on which nothing runs."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self):
        return list(TARGETS).index(self.target)  # a kernel keeps one target for each

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=["sm_90"])
def compiled(request, monkeypatch):
    """Has launches stop short of the GPU; the kernels that were compiled, by name."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from samopt.kernels.triton import launch as launches

    kernels = collections.defaultdict(set)
    launch = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        assert {"cubin", "hsaco"} & set(kernel.asm) and kernel.metadata.num_warps == options["num_warps"]
        kernels[self.fn.__name__].add(kernel.hash)
        return kernel

    monkeypatch.setattr(availability, "interprets", lambda: True)  # launches, which ask elsewhere, are none the wiser
    monkeypatch.setattr(availability, "_unfit_numpy", lambda version: None)  # there is no interpreter to refuse it
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(Perturbation, "usable", None)  # as where the norm is on a GPU
    if request.param == "gfx942":
        monkeypatch.delitem(launches.OPTIONS, "maxnreg")  # as where torch is built for ROCm
    before = driver._active
    driver.set_active(Driver(request.param))
    yield kernels
    driver.set_active(before)


def copied(kernels):
    return {name: set(hashes) for name, hashes in kernels.items()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_nothing_is_compiled_again_whatever_the_numbers(base, kind, compiled):
    model = mlp(kind)
    optimizer = samopt.ASAM(BASES[base](model.parameters()), rho=0.5, backend="triton")
    group = optimizer.param_groups[0]
    for seed in range(2):
        closure_form(optimizer, model, batch(kind, seed=seed))
        optimizer.last_step.to_dict()
    names = {"sum_chunk", "join_sums", "ascend_chunk"} | ({"join_moves"} if kind is torch.bfloat16 else set())
    assert set(compiled) == names | {"restore_chunk"}
    first = copied(compiled)
    for rho, lr in ((0.1, 0.1), (1, 1), (0, 0.01), (16, 16.0), (2.0**30, 1e-9), (1e-30, 0.0)):
        group["rho"], group["lr"] = rho, lr
        group["eta"] = 0.5
        closure_form(optimizer, model, batch(kind, seed=3))
        optimizer.last_step.to_dict()
    assert copied(compiled) == first


@pytest.mark.parametrize("compiled", ["gfx942"], indirect=True)
@pytest.mark.parametrize("base", ["sgd-momentum", "adam-fused"])
def test_launches_for_an_amd_gpu(base, compiled):
    model = mlp(torch.bfloat16)
    optimizer = samopt.FisherSAM(BASES[base](model.parameters()), rho=0.5, backend="triton")
    closure_form(optimizer, model, batch(torch.bfloat16))
    assert {"sum_chunk", "ascend_chunk", "join_sums"} < set(compiled)


def test_a_radius_on_the_device_is_one_more_kernel_whatever_its_value(compiled):
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=torch.tensor(0.5), backend="triton")
    closure_form(optimizer, model, batch())
    first = copied(compiled)
    for value in (0.0, 1.0, 16.0):
        optimizer.param_groups[0]["rho"].fill_(value)
        closure_form(optimizer, model, batch())
    assert copied(compiled) == first and len(first["ascend_chunk"]) == 1


@pytest.mark.parametrize("shape", [(1,), (16,), (16, 16), (1, 1030), (70_000,)], ids=str)
def test_sizes_are_no_reason_to_compile(shape, compiled):
    for sizes in ((3,), shape, (shape, shape)):
        shapes = sizes if isinstance(sizes[0], tuple) else (sizes,)
        weights = [nn.Parameter(torch.ones(size)) for size in shapes]
        optimizer = samopt.SAM(weights, SGD, lr=0.1, backend="triton")

        def closure(weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((w**2).sum() for w in weights)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)
