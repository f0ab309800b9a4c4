"""Moves, backups and displaced weights of parameters that are sharded over ranks, against whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import tensor
from torch.distributed.device_mesh import init_device_mesh

from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.parts.geometry import Adaptive, Euclidean, Fisher
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full

GEOMETRIES = {"euclidean": Euclidean(), "adaptive": Adaptive(), "fisher": Fisher()}
SHAPES = [(7, 3), (1,), (4, 4), (5,)]  # two ranks cannot halve three of them, and one rank has nothing of the second
PLACEMENTS = [tensor.Shard(0), tensor.Shard(0), tensor.Shard(1), tensor.Replicate()]


def whole(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def sharded(tensors):
    mesh = init_device_mesh("cpu", (2,))
    return [tensor.distribute_tensor(t, mesh, [place]) for t, place in zip(tensors, PLACEMENTS, strict=True)]


def displace(geometry, dtype, linf):
    weights = [nn.Parameter(t) for t in sharded(whole(0, dtype))]
    before = full(weights)
    some = Targets(Region(0.4, 0.1, 1), weights, sharded(whole(1, dtype)))
    perturbation = Perturbation([some], GEOMETRIES[geometry], linf=linf)
    assert perturbation.is_sharded
    pool = ScratchPool()
    displaced, applied = perturbation.displaced(pool, RoundingNoise(0).next())
    assert all(torch.equal(a, b) for a, b in zip(full(weights), before, strict=True))
    for weight in weights:
        value = displaced[weight]
        assert isinstance(value, tensor.DTensor) and not value.requires_grad
        assert (value.shape, value.placements) == (weight.shape, weight.placements)
        assert value.to_local().stride() == weight.to_local().stride()
        assert value.to_local().data_ptr() == pool.like(weight).data_ptr()
    values = full([displaced[weight] for weight in weights])
    backup = perturbation.backup(ScratchPool())
    moved = perturbation.move(RoundingNoise(0).next(), backup)
    assert torch.equal(moved, applied)
    assert all(torch.equal(a, b) for a, b in zip(full(weights), values, strict=True))
    backup.restore()
    assert all(torch.equal(a, b) for a, b in zip(full(weights), before, strict=True))
    return values, float(perturbation.norm), float(applied)


@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_sharded_weights_are_displaced_as_whole_ones(geometry, dtype, linf):
    t = GEOMETRIES[geometry]
    wide, along = [w.double() for w in whole(0, dtype)], [d.double() for d in whole(1, dtype)]
    scales = [t.scale(w, d, 0.1) if t.applies_to(w) else torch.ones_like(w) for w, d in zip(wide, along, strict=True)]
    norm = sum(float((s * d).square().sum()) for s, d in zip(scales, along, strict=True)) ** 0.5
    close = 1e-12 if dtype is torch.float64 else 2.0**-7
    for values, measured, applied in run_on_ranks(displace, geometry, dtype, linf):
        assert measured == pytest.approx(norm, rel=1e-6)
        size = 0.0
        for got, w, d, s in zip(values, wide, along, scales, strict=True):
            move = 0.4 * (s * d.sign() if linf else s * s * d / norm)
            torch.testing.assert_close(got.double(), w + move, rtol=close, atol=close)
            by = ((got.double() - w) / s).abs()
            size = max(size, float(by.max())) if linf else (size**2 + float(by.square().sum())) ** 0.5
        assert applied == pytest.approx(size, rel=1e-5)
