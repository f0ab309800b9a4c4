"""The CPU backend with small pieces, and the layouts that one pass over two memories can take."""

from __future__ import annotations

import pytest
import torch

from samopt.kernels import BACKENDS, Block, StepSize, cpu
from samopt.kernels.memory import flat, same_memory_layout
from samopt.parts.geometry import Adaptive
from tests.helpers.cases import tensors

GEOMETRIES = {"sam": None, "asam": Adaptive()}
ONE = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "direction", "same"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), True),
        (torch.zeros(3, 2).t(), torch.zeros(3, 2).t(), True),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), False),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), False),
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4, 6)[:, ::2], False),
        (torch.zeros(3, 1).expand(3, 4), torch.zeros(3, 4), False),
        (torch.zeros(()), torch.zeros(()), True),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
    ],
    ids=["rows", "columns", "weight turned", "gradient turned", "gaps", "repeated", "scalar", "empty"],
)
def test_layouts_are_the_same_if_one_pass_over_both_memories_meets_equal_indices(weight, direction, same):
    assert same_memory_layout(weight, direction) == same


def test_flat_runs_through_the_memory_itself():
    for tensor in (torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        vector = flat(tensor)
        assert vector.data_ptr() == tensor.data_ptr() and vector.shape == (tensor.numel(),)
        assert vector.sort().values.equal(tensor.flatten().sort().values)


def block_of(geometry, *shapes):
    weights, directions = (
        [p.detach().clone() for p in tensors(*shapes, seed=seed, dtype=torch.float32)] for seed in (0, 1)
    )
    weights[0], directions[0] = weights[0].t(), directions[0].t()  # dense, but not contiguous
    return Block(weights, directions, GEOMETRIES[geometry], 0.1, False)


@pytest.fixture
def small_pieces(monkeypatch):
    """Large tensors in many pieces, small ones joined in several groups: as in a real model, at test size."""
    monkeypatch.setattr(cpu, "_PIECE", 64)
    monkeypatch.setattr(cpu, "_PIECE_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "_SMALL", 40)
    monkeypatch.setattr(cpu, "_FEW", 0)
    monkeypatch.setattr(cpu, "_ROW", 8)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pieces_and_groups_are_the_whole(geometry, elsewhere, small_pieces):
    shapes = (9, 31), (5,), (0,), (7, 3), (64,), (65,), (2, 2), (6, 6), (30,)
    ours, theirs = block_of(geometry, *shapes), block_of(geometry, *shapes)
    norms = [BACKENDS[name].norm(block) for name, block in (("cpu", ours), ("reference", theirs))]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    into = [torch.full_like(w, 55.0) for w in ours.weights] if elsewhere else None
    applied = cpu.ascend(ours, StepSize(ONE, 0.5, -1, False), norms[0], None, into=into)
    BACKENDS["reference"].ascend(theirs, StepSize(ONE, 0.5, -1, False), norms[1], None)
    torch.testing.assert_close(applied, 0.5 * norms[1], rtol=1e-6, atol=0)
    for moved, want in zip(into or ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-7)
        assert moved.stride() == want.stride()
    if elsewhere:
        assert all(map(torch.equal, ours.weights, block_of(geometry, *shapes).weights))
    assert all(map(torch.equal, ours.directions, theirs.directions))


@pytest.mark.parametrize("value", [0.3712, 1e-3, 7.77, 12345.678])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_long_sum_of_equal_terms_keeps_its_digits(geometry, value):
    weight, direction = torch.full((1000, 1000), 0.25), torch.full((1000, 1000), value)
    block = Block([weight], [direction], GEOMETRIES[geometry], 0.1, False)
    term = float(direction[0, 0]) * (1.0 if geometry == "sam" else float(weight[0, 0].double() + 0.1))
    assert float(cpu.norm(block)) == pytest.approx(term * 1000, rel=1e-6)


@pytest.mark.parametrize("few", [0, 1 << 17])
@pytest.mark.parametrize("others", [0, 3])
def test_one_overflowing_or_vanishing_tensor_does_not_spoil_the_norm_of_the_others(others, few, monkeypatch):
    monkeypatch.setattr(cpu, "_FEW", few)
    for size in (1e30, 1e-30, 0.0):
        weights = [torch.zeros(300, 7) for _ in range(others + 1)]
        directions = [torch.randn(300, 7) for _ in range(others)] + [torch.randn(300, 7) * size]
        want = sum(float(d.double().square().sum()) for d in directions) ** 0.5
        assert float(cpu.norm(Block(weights, directions, None, 0.0, False))) == pytest.approx(want, rel=1e-6)
