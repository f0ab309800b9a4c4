"""The move to ``w + epsilon`` in place and elsewhere, for every kind of tensor, against fp64 and against each other."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn

import samopt
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.parts.geometry import Adaptive, Euclidean, Fisher

GEOMETRIES = [Euclidean(), Adaptive(), Fisher()]
ETA = 0.1


def randn(*shape, kind=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(kind)


def sparse(rows, kind=torch.float32):
    values = randn(len(rows), 4, kind=kind, seed=2)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (9, 4), check_invariants=True)


def shared():
    memory = randn(24)
    return [nn.Parameter(memory.view(4, 6)), nn.Parameter(memory[3:15]), nn.Parameter(memory.view(6, 4).t())]


KINDS = {
    "fp32": lambda: [nn.Parameter(randn(6, 4)), nn.Parameter(randn(33))],
    "fp64": lambda: [nn.Parameter(randn(6, 4, kind=torch.float64)), nn.Parameter(randn(33, kind=torch.float64))],
    "bf16": lambda: [nn.Parameter(randn(6, 4, kind=torch.bfloat16)), nn.Parameter(randn(33, kind=torch.bfloat16))],
    "fp16": lambda: [nn.Parameter(randn(6, 4, kind=torch.float16))],
    "complex": lambda: [nn.Parameter(randn(6, 4, kind=torch.complex64))],
    "mixed": lambda: [nn.Parameter(randn(6, 4, kind=kind)) for kind in (torch.float32, torch.bfloat16, torch.float64)],
    "channels last": lambda: [nn.Parameter(randn(2, 3, 5, 4).to(memory_format=torch.channels_last))],
    "every second": lambda: [nn.Parameter(randn(8, 6)[:, ::2])],
    "scalar": lambda: [nn.Parameter(randn())],
    "empty": lambda: [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(randn(2, 2))],
    "large": lambda: [nn.Parameter(randn(300, 150)), nn.Parameter(randn(7))],
}


def targets_of(kind, sign=1):
    """Parameters of a kind, moved along their own values turned around."""
    if kind == "sparse":
        weights = [nn.Parameter(randn(9, 4)), nn.Parameter(randn(9, 4, seed=1))]
        return Targets(Region(0.3, ETA, sign), weights, [sparse([4, 4, 1]), sparse([0])])
    weights = KINDS[kind]()
    directions = [torch.randn_like(w.detach(), memory_format=torch.preserve_format) for w in weights]
    return Targets(Region(0.3, ETA, sign), weights, directions)


def dense(direction):
    return direction.to_dense() if direction.is_sparse else direction


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_displaced_weights_are_the_moved_ones_and_both_agree_with_fp64(kind, geometry, linf):
    torch.manual_seed(0)
    some = targets_of(kind, sign=-1)
    before = copies(some.weights)
    wide = [w.to(torch.complex128 if w.is_complex() else torch.float64) for w in before]
    along = [dense(d).to(w.dtype) for d, w in zip(some.directions, wide, strict=True)]
    t = [
        geometry.scale(w, d, ETA) if geometry.applies_to(w) else torch.ones_like(w.abs())
        for w, d in zip(wide, along, strict=True)
    ]
    norm = sum(float((s * d).abs().square().sum()) for s, d in zip(t, along, strict=True)) ** 0.5
    moves = [-0.3 * (s * torch.sgn(d) if linf else s * s * d / norm) for s, d in zip(t, along, strict=True)]

    perturbation = Perturbation([some], geometry, linf=linf)
    assert float(perturbation.norm) == pytest.approx(norm, rel=1e-6)
    assert float(perturbation.radius()) == pytest.approx(0.3) and perturbation.radius().dim() == 0
    displaced, applied = perturbation.displaced(ScratchPool(), RoundingNoise(0).next())
    assert same(some.weights, before)
    if all(torch.finfo(w.dtype).bits >= 32 for w in before):  # others are measured after rounding
        assert float(applied) == pytest.approx(0.3, rel=1e-6)
    assert list(displaced) == some.weights or kind == "mixed"
    backup = perturbation.backup(ScratchPool())
    assert torch.equal(perturbation.move(RoundingNoise(0).next(), backup), applied)
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-40}
    for weight, was, move in zip(some.weights, wide, moves, strict=True):
        value = displaced[weight]
        assert torch.equal(value, weight.detach()) and not value.requires_grad
        assert not value.numel() or value.data_ptr() != weight.data_ptr()
        assert kind == "every second" or value.stride() == weight.stride()
        close = unit.get(weight.dtype, 2.0**-21)
        close = max(close, 2.0**-21) if kind == "mixed" else close  # the norm is as exact as its least exact part
        torch.testing.assert_close(value.to(was.dtype), was + move, rtol=close, atol=close)
    backup.restore()
    assert same(some.weights, before)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_cannot_be_used_displaces_nothing(kind, geometry, value):
    some = targets_of(kind)
    for direction in some.directions:
        direction.fill_(value)
    before = copies(some.weights)
    perturbation = Perturbation([some], geometry)
    displaced, applied = perturbation.displaced(ScratchPool(), RoundingNoise(0).next())
    assert perturbation.usable is False and float(applied) == 0.0
    assert bool(perturbation.nonfinite_flag.isnan()) == (value != 0)
    assert same([displaced[w] for w in some.weights], before)
    assert float(perturbation.move()) == 0.0
    assert same(some.weights, before)


def test_rows_without_a_gradient_are_copied_to_the_displaced_weight():
    some = targets_of("sparse")
    pool = ScratchPool()
    for weight in some.weights:
        pool.like(weight).fill_(float("nan"))
    displaced, _ = Perturbation([some], Euclidean()).displaced(pool)
    for weight, direction in zip(some.weights, some.directions, strict=True):
        changed = (displaced[weight] != weight.detach()).any(1)
        assert changed.tolist() == direction.to_dense().ne(0).any(1).tolist()


def test_parameters_that_share_memory_are_displaced_apart():
    weights = shared()
    directions = [torch.ones_like(w.detach()) for w in weights]
    before = copies(weights)
    displaced, _ = Perturbation([Targets(Region(0.3, 0.0, 1), weights, directions)], Euclidean()).displaced(
        ScratchPool()
    )
    for weight, was in zip(weights, before, strict=True):
        torch.testing.assert_close(displaced[weight], was + 0.3 / 60**0.5)
    assert same(weights, before)


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("geometry", [Euclidean(), Fisher()], ids=lambda geometry: geometry.name)
def test_parameters_that_share_memory_move_by_the_sum_of_their_moves(geometry, backend):
    memory = randn(4, 6)
    weights, directions = [nn.Parameter(memory), nn.Parameter(memory)], [randn(4, 6, seed=1), randn(4, 6, seed=2)]
    before = memory.double()
    backend = "auto" if geometry.name == "fisher" else backend
    perturbation = Perturbation([Targets(Region(0.3, ETA, 1), weights, directions)], geometry, backend=backend)
    perturbation.move()
    t = [geometry.scale(before, d.double(), ETA) for d in directions]
    norm = float(sum((s * d).square().sum() for s, d in zip(t, directions, strict=True)) ** 0.5)
    move = sum(0.3 * s * s * d.double() / norm for s, d in zip(t, directions, strict=True))
    torch.testing.assert_close(memory.double(), before + move, rtol=1e-6, atol=1e-6)


def test_small_parameters_that_share_memory_move_by_the_sum_of_their_moves_in_an_adaptive_ball():
    memory = randn(4, 6)
    weights, directions = [nn.Parameter(memory), nn.Parameter(memory)], [randn(4, 6, seed=1), randn(4, 6, seed=2)]
    before = memory.double()
    Perturbation([Targets(Region(0.3, ETA, 1), weights, directions)], Adaptive()).move()
    t = before.abs() + ETA
    norm = float(sum((t * d).square().sum() for d in directions) ** 0.5)
    move = 0.3 * t * t * (directions[0].double() + directions[1]) / norm
    torch.testing.assert_close(memory.double(), before + move, rtol=1e-6, atol=1e-6)


def test_the_radius_is_made_of_the_norm_and_the_largest_is_told():
    weights = [nn.Parameter(randn(3)), nn.Parameter(randn(4))]
    directions = [torch.full((3,), 2.0), torch.zeros(4)]
    regions = [Region(lambda norm: norm / 10, 0.0, 1), Region(torch.tensor(0.25), 0.0, 1)]
    some = [Targets(region, [w], [d]) for region, w, d in zip(regions, weights, directions, strict=True)]
    perturbation = Perturbation(some, Euclidean())
    assert float(perturbation.norm) == pytest.approx(12**0.5)
    assert float(perturbation.radius()) == pytest.approx(12**0.5 / 10)
    assert type(perturbation.radius()) is torch.Tensor
    assert float(Perturbation([], Euclidean()).radius()) == 0.0


def test_nothing_to_move():
    perturbation = Perturbation([Targets(Region(0.5, 0.0, 1), [], [])], Euclidean())
    assert perturbation.is_empty and perturbation.usable is False and not perturbation.is_sharded
    backup = perturbation.backup(ScratchPool())
    assert float(perturbation.move(None, backup)) == 0.0
    assert perturbation.displaced(ScratchPool())[0] == {}
    backup.restore()


def test_tensors_without_values_have_norms_and_places():
    weights = [nn.Parameter(torch.empty(3, 4, device="meta")), nn.Parameter(torch.empty(5, device="meta"))]
    some = Targets(Region(0.5, 0.0, 1), weights, [torch.empty_like(w.detach()) for w in weights])
    perturbation, pool = Perturbation([some], Adaptive()), ScratchPool()
    assert perturbation.norm.is_meta and perturbation.usable is None
    displaced, applied = perturbation.displaced(pool)
    assert [displaced[w].shape for w in weights] == [(3, 4), (5,)] and applied.is_meta
    backup = perturbation.backup(pool)
    perturbation.move(None, backup)
    backup.restore()


def test_one_move_of_one_dtype_takes_few_calls():
    root = os.path.dirname(samopt.__file__)
    weights = [nn.Parameter(torch.randn(3, 2)) for _ in range(10)]
    some, pool = Targets(Region(0.5, 0.0, 1), weights, [torch.ones(3, 2) for _ in weights]), ScratchPool()
    Perturbation([some], Euclidean()).backup(pool)
    called = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        perturbation = Perturbation([some], Euclidean())
        backup = perturbation.backup(pool)
        perturbation.move(None, backup)
        backup.restore()
    finally:
        sys.setprofile(None)
    assert len(called) <= 45, called
