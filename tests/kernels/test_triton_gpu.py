"""The Triton kernels on a GPU: against the reference, without waiting, compiled once, captured in a CUDA graph.

Without a GPU, ``TRITON_INTERPRET=1`` runs what does not need one on the CPU, so that a mistake in a test shows there.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import samopt
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.kernels import Block, select
from samopt.kernels.triton.availability import missing
from samopt.parts.geometry import Adaptive, Euclidean, Fisher

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and missing() is not None, reason="needs a CUDA device, or Triton's interpreter"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

GEOMETRIES = {"sam": Euclidean(), "asam": Adaptive(), "fisher": Fisher()}
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [(), (0,), (7, 3), (16_384,), (1000, 1003), *[(i,) for i in range(1, 60)]]
if not CUDA:  # the interpreter is slow
    SHAPES = [(), (0,), (7, 3), (16_389,), (33,)]
WRAPPERS = {
    "sam": lambda base, model, **o: samopt.SAM(base, rho=0.5, model=model, **o),
    "asam": lambda base, model, **o: samopt.ASAM(base, rho=0.5, model=model, **o),
    "tram": lambda base, model, **o: samopt.TRAM(base, model=model, **o),
    "one-pass": lambda base, model, **o: samopt.MomentumSAM(base, rho=0.5, model=model, **o),
}


def targets(kind, radius, shapes=SHAPES):
    torch.manual_seed(0)
    pairs = [[torch.randn(s, device=DEVICE).to(kind) for _ in range(2)] for s in shapes]
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
    assert all(torch.equal(w, b) for w, b in zip(ours.weights, before, strict=True))
    applied = [float(p.move(None, backup)) for p, backup in zip((first, second), backups, strict=True)]
    assert all(torch.equal(displaced[w], w) for w in ours.weights) and float(moved) == applied[0]
    assert applied[0] == pytest.approx(applied[1], rel=1e-4)
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=UNIT[kind], atol=1e-6)
    backups[0].restore()
    assert all(torch.equal(w, b) for w, b in zip(ours.weights, before, strict=True))


@needs_cuda
def test_auto_picks_triton():
    block = Block([torch.zeros(3, device="cuda")], [torch.ones(3, device="cuda")], None, 0.0, False)
    assert select(block, "auto").name == "triton"


@needs_cuda
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
            # The first step counts its gradients too; the others make tables and sums only.
            assert new < (2.5 if step == 0 else 0.5) * weights


def network(kind=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).to(DEVICE, kind)


def batch():
    torch.manual_seed(1)
    return torch.randn(32, 64, device=DEVICE), torch.randint(10, (32,), device=DEVICE)


def closure_of(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(model, expected):
    return all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


@contextmanager
def no_waiting():
    """On a GPU, an operation for which the host would wait for the device raises in this context."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def compiled():
    """How many forms of each kernel there are."""
    from samopt.kernels.triton import stages

    kernels = [stages.sum_chunk, stages.ascend_chunk, stages.restore_chunk]
    return [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels] if CUDA else []


@pytest.mark.parametrize("base", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=1e-3, fused=True)])
@pytest.mark.parametrize("wrapper", ["asam", "one-pass"])
def test_steps_agree_with_the_reference_wait_for_nothing_and_compile_once(wrapper, base):
    x, y = batch()
    models = []
    for name in ("triton", "reference"):
        model = network()
        optimizer = WRAPPERS[wrapper](base(model.parameters()), model, backend=name, warn_on_stall=False)
        closure = closure_of(optimizer, model, x, y)
        for _ in range(2):
            optimizer.step(closure)
        before = compiled()
        with no_waiting() if name == "triton" else torch.enable_grad():
            for step in range(2, 6):
                optimizer.param_groups[0]["rho"] = 0.1 * (step + 1)
                optimizer.step(closure)
        assert compiled() == before
        models.append(model)
    for got, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_grad_scaler_changes_nothing_but_skips_a_step_that_overflows():
    x, y = batch()
    model, twin = network(), network()
    optimizer, plain = (
        samopt.SAM(SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.5, backend=name, warn_on_stall=False)
        for net, name in ((model, "triton"), (twin, "reference"))
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    closure = closure_of(plain, twin, x, y)
    for step in range(4):
        before, inputs = bits(model), x.clone()
        if step == 2:
            inputs[0, 0] = float("inf")
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(inputs), y)).backward()
        with optimizer.perturbed():
            scaler.scale(nn.functional.cross_entropy(model(inputs), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same_bits(model, before) and scaler.get_scale() == 512.0
        else:
            plain.step(closure)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["sam", "one-pass"])
def test_gradients_that_are_views_into_ddps_buckets(wrapper, tmp_path):
    x, y = batch()
    model, twin = network(), network()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl" if CUDA else "gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for net, owner, name in ((wrapped, model, "triton"), (twin, twin, "reference")):
            base = SGD(owner.parameters(), lr=0.1, momentum=0.9)
            optimizer = WRAPPERS[wrapper](base, net, backend=name, warn_on_stall=False)
            closure = closure_of(optimizer, net, x, y)
            for _ in range(4):
                optimizer.step(closure)
        first, *others = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
        assert all(other == first for other in others), "the gradients share one bucket"
    finally:
        torch.distributed.destroy_process_group()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_one_pass_moves_no_weight_and_takes_the_gradient_at_the_displaced_point(adaptive):
    x, y = batch()
    model = network()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.MomentumSAM(base, rho=0.5, adaptive=adaptive, model=model, backend="triton", warn_on_stall=False)
    for step in range(3):
        before, places = bits(model), [p.data_ptr() for p in model.parameters()]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        assert same_bits(model, before)
        loss.backward()
        assert same_bits(model, before) and [p.data_ptr() for p in model.parameters()] == places
        point = [w.double() for w in before]
        if step:  # there is a momentum m: w - rho T^2 m / ||T m||
            momenta = [base.state[p]["momentum_buffer"].double() for p in model.parameters()]
            scales = [w.abs() + 0.01 if adaptive and w.dim() > 1 else torch.ones_like(w) for w in point]
            norm = sum(((t * m) ** 2).sum() for t, m in zip(scales, momenta, strict=True)).sqrt()
            point = [w - 0.5 * t**2 * m / norm for w, t, m in zip(point, scales, momenta, strict=True)]
        twin = network(torch.float64)
        with torch.no_grad():
            for weight, value in zip(twin.parameters(), point, strict=True):
                weight.copy_(value)
        nn.functional.cross_entropy(twin(x.double()), y).backward()
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()


@needs_cuda
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_captured_step_replays(wrapper):
    x, y = batch()
    model = network()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        base = AdamW(net.parameters(), lr=1e-3, capturable=True)
        optimizer = WRAPPERS[wrapper](base, net, backend="triton")
        closure = closure_of(optimizer, net, x, y)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
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
