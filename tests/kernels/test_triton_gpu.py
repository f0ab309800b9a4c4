"""The Triton kernels on a GPU: against the reference, without waiting, compiled once, captured in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import samopt
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.kernels import Block, select
from samopt.parts.geometry import Adaptive, Euclidean, Fisher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GEOMETRIES = {"sam": Euclidean(), "asam": Adaptive(), "fisher": Fisher()}
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [(), (0,), (7, 3), (16_384,), (1000, 1003), *[(i,) for i in range(1, 60)]]


def targets(kind, radius, shapes=SHAPES):
    torch.manual_seed(0)
    pairs = [[torch.randn(s, device="cuda").to(kind) for _ in range(2)] for s in shapes]
    return Targets(Region(radius, 0.1, 1), [weight for weight, _ in pairs], [direction for _, direction in pairs])


@pytest.mark.parametrize("kind", UNIT, ids=str)
@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_norm_ascent_and_restore_agree_with_the_reference(geometry, linf, kind):
    ours, theirs = targets(kind, 0.5), targets(kind, 0.5)
    before = [w.clone() for w in ours.weights]
    first = Perturbation([ours], GEOMETRIES[geometry], linf=linf, backend="triton")
    second = Perturbation([theirs], GEOMETRIES[geometry], linf=linf, backend="reference")
    assert float(first.norm) == pytest.approx(float(second.norm), rel=1e-6)
    assert torch.equal(Perturbation([ours], GEOMETRIES[geometry], linf=linf, backend="triton").norm, first.norm)
    backups = [p.backup(ScratchPool()) for p in (first, second)]
    displaced, moved = first.displaced(ScratchPool())
    applied = [float(p.move(None, backup)) for p, backup in zip((first, second), backups, strict=True)]
    assert all(torch.equal(displaced[w], w) for w in ours.weights) and float(moved) == applied[0]
    assert applied[0] == pytest.approx(applied[1], rel=1e-4)
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=UNIT[kind], atol=1e-6)
    backups[0].restore()
    assert all(torch.equal(w, b) for w, b in zip(ours.weights, before, strict=True))


def test_auto_picks_triton():
    block = Block([torch.zeros(3, device="cuda")], [torch.ones(3, device="cuda")], None, 0.0, False)
    assert select(block, "auto").name == "triton"


def test_the_backup_is_one_copy_of_the_weights_and_is_kept():
    model = network()
    optimizer = samopt.SAM(SGD(model.parameters(), lr=0.1), rho=0.05, backend="triton", measure_grad_norms=False)
    weights, before = sum(p.nbytes for p in model.parameters()), torch.cuda.memory_allocated()
    for step in range(3):
        model(torch.randn(32, 64, device="cuda")).square().sum().backward()
        torch.cuda.reset_peak_memory_stats()
        if step:
            before = torch.cuda.memory_allocated()
        with optimizer.perturbed():
            new = torch.cuda.max_memory_allocated() - before
            assert (
                new < (2.5 if step == 0 else 0.5) * weights
            )  # with the gradients of the first step; then tables and sums


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()


def closure_of(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("base", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=1e-3, fused=True)])
def test_steps_agree_with_the_reference_wait_for_nothing_and_compile_once(base):
    from samopt.kernels.triton import stages

    x, y = torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")
    models, compiled = [], []
    kernels = [stages.sum_chunk, stages.ascend_chunk, stages.restore_chunk]
    for name in ("triton", "reference"):
        model = network()
        optimizer = samopt.ASAM(base(model.parameters()), rho=0.5, backend=name, warn_on_stall=False)
        closure = closure_of(optimizer, model, x, y)
        for step in range(6):
            if step == 2 and name == "triton":
                compiled = [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]
                torch.cuda.set_sync_debug_mode("error")
            optimizer.param_groups[0]["rho"] = 0.1 * (step + 1)
            optimizer.step(closure)
        torch.cuda.set_sync_debug_mode("default")
        models.append(model)
    assert [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels] == compiled
    for got, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_captured_step_replays():
    x, y = torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")
    model = network()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        base = AdamW(net.parameters(), lr=1e-3, capturable=True)
        optimizer = samopt.SAM(base, rho=0.05, model=net, backend="triton")
        closure = closure_of(optimizer, net, x, y)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step(closure)
        torch.cuda.current_stream().wait_stream(stream)
        if net is twin:
            for _ in range(4):
                optimizer.step(closure)
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step(closure)
        for _ in range(4):
            graph.replay()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
