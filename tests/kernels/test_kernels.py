"""Every row of the kernel table, on every kind of tensor, against fp64."""

from __future__ import annotations

import math
import os
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.kernels import BACKENDS, Backend, Block, StepSize, select
from samopt.parts.geometry import Adaptive, Euclidean, Fisher

ETA = 0.1
GEOMETRIES = {"none": None, "adaptive": Adaptive(), "fisher": Fisher()}
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LOW = [torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as tests/kernels/test_triton.py runs this file once more
NAMES = ["triton"] if INTERPRETED else [name for name in BACKENDS if not name.startswith("triton")]


def dense(*shapes):
    return lambda: [torch.randn(shape, dtype=torch.float64) for shape in shapes]


# How the tensors of a block come to be laid out; each builder is called for the weights and for the directions.
LAYOUTS = {
    "scalar": dense(()),
    "empty": dense((0,), (3, 0)),
    "one": dense((1,), (1, 1)),
    "odd": dense((7, 3), (129,), (3, 5, 7)),
    "large": dense((160, 131) if INTERPRETED else (1000, 1003)),  # more than a chunk
    "tiny": dense(*[(1 + i % 3,) for i in range(12 if INTERPRETED else 200)]),
    "unaligned": lambda: [torch.randn(1026, dtype=torch.float64)[1:-1].view(32, 32)],
    "transposed": lambda: [torch.randn(9, 5, dtype=torch.float64).t()],
    "every-second": lambda: [torch.randn(8, 6, dtype=torch.float64)[:, ::2]],
    "channels-last": lambda: [torch.randn(2, 3, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)],
}
# Which of these each backend runs, so that a row that starts refusing work is noticed; add a line for a new row.
RUNS = {
    "reference": lambda layout, geometry, linf, dtype: True,
    "foreach": lambda layout, geometry, linf, dtype: geometry != "fisher" and not linf and dtype not in LOW,
    "cpu": lambda layout, *rest: layout != "every-second" and RUNS["foreach"](layout, *rest),
    "triton": lambda layout, geometry, linf, dtype: dtype is not torch.float64 and layout != "every-second",
}


def cast(tensors, dtype):
    """The same values and strides in ``dtype``, each inside storage with guard values around it."""
    out = []
    for t in tensors:
        room = torch.full((t.untyped_storage().nbytes() // t.element_size(),), 77.0, dtype=dtype)
        view = room.as_strided(t.shape, t.stride(), t.storage_offset())
        view.copy_(t)
        out.append(view)
    return out


def storage_of(tensors):
    return [torch.tensor([], dtype=t.dtype).set_(t.untyped_storage()).clone() for t in tensors]


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(left, right) -> bool:
    return all(torch.equal(raw(a), raw(b)) for a, b in zip(left, right, strict=True))


def chosen(name: str, block: Block) -> Backend:
    """The named backend; where it says why it cannot run the block, the automatic choice."""
    reason = BACKENDS[name].supports(block)
    if reason is None:
        return select(block, name)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        select(block, name)
    return select(block, "auto")


def length_of(geometry: str, weight: Tensor, direction: Tensor) -> Tensor:
    """``T`` in fp64, from its definition."""
    if geometry == "adaptive":
        return weight.abs().double() + ETA
    return (
        (1 + ETA * direction.abs().double() ** 2) ** -0.5 if geometry == "fisher" else torch.ones_like(weight.double())
    )


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding to nearest can change fp64 ``values``."""
    return UNIT[dtype] * values.abs().clamp(min=torch.finfo(dtype).smallest_normal)


def expected(geometry: str, linf: bool, weights, directions, scale: float):
    """``||T d||`` and every move, in fp64."""
    lengths = [length_of(geometry, w, d) for w, d in zip(weights, directions, strict=True)]
    norm = float(sum((t * d.double()).square().sum() for t, d in zip(lengths, directions, strict=True)) ** 0.5)
    if linf:
        return norm, [scale * t * d.double().sign() for t, d in zip(lengths, directions, strict=True)]
    return norm, [scale * t * t * d.double() for t, d in zip(lengths, directions, strict=True)]


def size_of_move(geometry: str, linf: bool, before, now, directions) -> float:
    """``||T^-1 (w' - w)||_2``, or its largest entry, in fp64."""
    parts = [
        ((n.double() - b.double()) / length_of(geometry, b, d)).flatten()
        for n, b, d in zip(now, before, directions, strict=True)
    ]
    whole = torch.cat(parts)
    if linf:
        return float(whole.abs().max()) if len(whole) else 0.0
    return float(whole.square().sum().sqrt())


def step_of(scale: float, linf: bool = False) -> StepSize:
    """The step that has this scale."""
    one = torch.ones((), dtype=torch.float64)
    return StepSize(one, abs(scale), 1 if scale > 0 else -1, linf)


def ascend(name: str, block: Block, scale: float, noise=None, into=None):
    """Run the ascent of a backend; return what it says of the norm of the move."""
    backend = chosen(name, block)
    return backend.ascend(block, step_of(scale, block.linf), backend.norm(block), noise, into=into)


def assert_moved(now, before, moves):
    """Every value is ``before`` plus its move, up to the rounding of the arithmetic and of the dtype."""
    for got, was, move in zip(now, before, moves, strict=True):
        want = was.double() + move
        work = 2.0**-53 if got.dtype is torch.float64 else 2.0**-24
        allowed = half_ulp(want, got.dtype) + work * (want.abs() + 16 * move.abs())
        assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_norm_and_ascent_agree_with_fp64(name, layout, geometry, linf, dtype):
    torch.manual_seed(0)
    weights, directions = cast(LAYOUTS[layout](), dtype), cast(LAYOUTS[layout](), dtype)
    block = Block(weights, directions, GEOMETRIES[geometry], ETA, linf)
    assert (BACKENDS[name].supports(block) is None) == RUNS[name](layout, geometry, linf, dtype)
    backend = chosen(name, block)
    before, strides, storage = [w.clone() for w in weights], [w.stride() for w in weights], storage_of(weights)
    fixed = storage_of(directions)

    for scale in (0.05, -0.05):  # uphill, and uphill of a group that is maximised
        norm, moves = expected(geometry, linf, before, directions, scale)
        measured = backend.norm(block)
        assert measured.dim() == 0 and measured.dtype is torch.float64
        assert float(measured) == pytest.approx(norm, rel=1e-6)
        assert torch.equal(backend.norm(block), measured)

        into = [torch.full_like(w, 55.0) for w in weights]
        applied = ascend(name, block, scale, into=into)
        assert_moved(into, before, moves)
        assert same(storage_of(weights), storage)
        if applied is not None:
            moved = size_of_move(geometry, linf, before, into, directions)
            asked = 0.05 * (norm > 0) if linf else 0.05 * norm
            assert float(applied) == pytest.approx(moved if dtype in LOW else asked, rel=1e-5)
        assert applied is not None or dtype not in LOW

        ascend(name, block, scale)
        assert same(weights, into)
        if layout != "empty":
            assert not same(weights, before)
        for weight, was in zip(weights, before, strict=True):
            weight.copy_(was)
        assert same(storage_of(weights), storage)  # the guard values around a view too
    assert [w.stride() for w in weights] == strides
    assert same(storage_of(directions), fixed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_without_eta_the_adaptive_geometry_is_the_size_of_the_weights(name, layout, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ETA", 0.0)
    torch.manual_seed(0)
    weights, directions = cast(LAYOUTS[layout](), torch.float32), cast(LAYOUTS[layout](), torch.float32)
    block = Block(weights, directions, GEOMETRIES["adaptive"], 0.0, False)
    before, fixed = [w.clone() for w in weights], storage_of(directions)
    norm, moves = expected("adaptive", False, before, directions, 0.5)
    assert float(chosen(name, block).norm(block)) == pytest.approx(norm, rel=1e-6)
    assert same(weights, before)
    ascend(name, block, 0.5)
    assert_moved(weights, before, moves)
    assert same(storage_of(directions), fixed)


class Everywhere(Adaptive):
    """ASAM's geometry for vectors, too."""

    def applies_to(self, weight):
        return True


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("geometry", [Euclidean(), Everywhere(), Fisher()], ids=["none", "adaptive", "fisher"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_backup_brings_every_bit_back_and_leaves_the_memory_around_alone(name, layout, geometry, dtype):
    torch.manual_seed(0)
    weights, directions = cast(LAYOUTS[layout](), dtype), cast(LAYOUTS[layout](), dtype)
    fields = Block(weights, directions, None if geometry.name == "euclidean" else geometry, ETA, False)
    backend = chosen(name, fields).name
    storage, fixed, pool = storage_of(weights), storage_of(directions), ScratchPool()
    for radius in (0.5, 0.25):
        perturbation = Perturbation([Targets(Region(radius, ETA, 1), weights, directions)], geometry, backend=backend)
        displaced, applied = perturbation.displaced(ScratchPool())
        backup = perturbation.backup(pool)
        assert same(storage_of(weights), storage)
        assert torch.equal(perturbation.move(None, backup), applied)
        assert same(weights, [displaced[w] for w in weights])
        if layout != "empty":
            assert dtype in LOW or float(applied) == pytest.approx(radius, rel=1e-6)
            assert not same(storage_of(weights), storage)
        backup.restore()
        assert same(storage_of(weights), storage)
    assert same(storage_of(directions), fixed)


@pytest.mark.parametrize("direction", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_may_have_another_dtype_and_layout_than_its_weight(name, geometry, dtype, direction):
    torch.manual_seed(1)
    weights = cast(dense((6, 4))(), dtype)
    directions = cast([torch.randn(4, 6, dtype=torch.float64).t()], direction)
    block = Block(weights, directions, GEOMETRIES[geometry], ETA, False)
    backend = chosen(name, block)
    norm, (move,) = expected(geometry, False, weights, directions, 0.5)
    assert float(backend.norm(block)) == pytest.approx(norm, rel=1e-6)
    want = weights[0].double() + move
    ascend(name, block, 0.5)
    assert weights[0].dtype is dtype
    allowed = half_ulp(want, dtype) + 2.0**-24 * (want.abs() + 16 * move.abs())
    assert bool(((weights[0].double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-42])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_huge_and_tiny_gradients_keep_their_norm_and_direction(name, geometry, size):
    torch.manual_seed(2)
    weights, directions = [torch.randn(40, 25)], [torch.randn(40, 25) * size]
    block = Block(weights, directions, GEOMETRIES[geometry], ETA, False)
    backend = chosen(name, block)
    norm, (uphill,) = expected(geometry, False, weights, directions, 1.0)
    one_denormal_each = 2.0**-149 * 1000**0.5
    assert float(backend.norm(block)) == pytest.approx(norm, rel=1e-6, abs=one_denormal_each)
    before = weights[0].clone()
    scale = min(1.0 / float(uphill.abs().max()), torch.finfo(torch.float32).max)
    ascend(name, block, scale)
    moved, want = weights[0].double() - before, uphill * scale
    assert bool(((moved - want).abs() <= 2.0**-23 * (before.abs() + want.abs() * 8) + scale * 2.0**-149).all())
    if size > 1e-42:
        assert float(torch.cosine_similarity(moved.flatten(), want.flatten(), dim=0)) > 1 - 1e-9


@pytest.mark.parametrize("size", [1e200, 1e-200])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_norms_of_fp64_gradients_whose_squares_leave_fp64(name, geometry, size):
    torch.manual_seed(7)
    weights = [torch.randn(40, 25, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    directions = [torch.randn_like(w) * size for w in weights]
    block = Block(weights, directions, GEOMETRIES[geometry], ETA, False)
    scaled = {
        "none": lambda w, d: d,
        "adaptive": lambda w, d: (abs(w) + ETA) * d,
        "fisher": lambda w, d: d / math.hypot(1.0, ETA**0.5 * d),
    }[geometry]
    pairs = zip(torch.cat([w.flatten() for w in weights]), torch.cat([d.flatten() for d in directions]), strict=True)
    want = math.hypot(*[scaled(float(w), float(d)) for w, d in pairs])
    assert float(chosen(name, block).norm(block)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_gradient_shows_in_the_norm_and_moves_nothing(name, geometry, value, dtype):
    torch.manual_seed(3)
    weights, directions = cast(dense((5, 4))(), dtype), cast(dense((5, 4))(), dtype)
    directions[0][2, 1] = value
    for linf in (False, True):
        block = Block(weights, directions, GEOMETRIES[geometry], ETA, linf)
        backend = chosen(name, block)
        assert not bool(torch.isfinite(backend.norm(block)))
        before = [w.clone() for w in weights]
        into = [torch.full_like(w, 55.0) for w in weights]
        norm = backend.norm(block)  # which says that nothing moves, whatever the radius
        for place in (into, None):
            applied = backend.ascend(block, StepSize(norm, 0.5, 1, linf), norm, RoundingNoise(0).next(), into=place)
            assert applied is None or float(applied) == 0.0
        assert same(weights, before) and same(into, before)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_have_norm_zero_and_move_nothing(name, geometry):
    weights = cast(dense((5, 4), (0,))(), torch.float32)
    for linf in (False, True):
        block = Block(weights, [torch.zeros_like(w) for w in weights], GEOMETRIES[geometry], ETA, linf)
        backend = chosen(name, block)
        before = [w.clone() for w in weights]
        assert float(backend.norm(block)) == 0.0
        backend.ascend(block, StepSize(backend.norm(block), 3.0, 1, linf), backend.norm(block), None, into=None)
        assert same(weights, before)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_restore_brings_back_signed_zeros_denormals_and_nan_payloads(name, dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny / 4, -info.tiny / 4, info.max, -info.max, float("inf"), float("nan"), 1.0]
    weights = [torch.tensor(values, dtype=dtype), torch.tensor([-float("nan"), -0.0], dtype=dtype)]
    directions = [torch.ones_like(w) for w in weights]
    backend = chosen(name, Block(weights, directions, None, ETA, False)).name
    before = [w.clone() for w in weights]
    perturbation = Perturbation([Targets(Region(0.5, ETA, 1), weights, directions)], Euclidean(), backend=backend)
    backup = perturbation.backup(ScratchPool())
    perturbation.move(RoundingNoise(0).next(), backup)
    assert not same(weights, before)
    blocks = backup.blocks
    for _ in range(2):  # a restore that was interrupted is run again
        backup.restore()
        assert same(weights, before)
        backup.blocks = blocks


def rounded(name: str, values: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``values`` stochastically rounded to ``dtype`` by a backend: the move of weights at 0 by a gradient of them."""
    weight = torch.zeros(values.shape, dtype=dtype)
    block = Block([weight], [values], None, 0.0, False)
    ascend(name, block, 1.0, RoundingNoise(seed).next())
    return weight


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The closest values of ``dtype`` at or below, and at or above, from their bit patterns."""
    kind, exact = np.float16, values.numpy()
    if dtype is torch.float16:
        near = exact.astype(kind)
        with np.errstate(over="ignore"):
            lower, higher = np.nextafter(near, kind(-np.inf)), np.nextafter(near, kind(np.inf))
        below = np.where(near.astype(np.float32) > exact, lower, near)
        above = np.where(near.astype(np.float32) < exact, higher, near)
        return torch.from_numpy(below.astype(np.float32)), torch.from_numpy(above.astype(np.float32))
    pattern = exact.view(np.uint32)
    toward_zero = (pattern & np.uint32(0xFFFF0000)).view(np.float32)
    away = np.where(toward_zero == exact, pattern, (pattern & np.uint32(0xFFFF0000)) + np.uint32(0x10000))
    away = away.astype(np.uint32).view(np.float32)
    return torch.from_numpy(np.minimum(toward_zero, away)), torch.from_numpy(np.maximum(toward_zero, away))


def every_finite(dtype: torch.dtype) -> Tensor:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return patterns[torch.isfinite(patterns)].float()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_picks_a_neighbour_and_leaves_representable_values(name, dtype):
    grid = every_finite(dtype)
    assert torch.equal(rounded(name, grid, dtype).float(), grid)

    torch.manual_seed(4)
    between = torch.lerp(grid, grid.roll(1), torch.rand(grid.shape))
    for values in (between, grid * (1 + 1e-4 * torch.randn(grid.shape))):
        values = values[values.abs() <= torch.finfo(dtype).max]
        below, above = neighbours(values, dtype)
        got = rounded(name, values, dtype).float()
        assert bool(((got == below) | (got == above)).all())
        inside = (below < values) & (values < above) & (values.abs() > 1e-30)
        up = (got == above)[inside].float().mean()
        assert 0.4 < float(up) < 0.6  # both happen


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_is_unbiased(name, dtype):
    n = 40_000
    smallest = 2.0**-24 if dtype is torch.float16 else 2.0**-100
    for value in (1.0013, -1.0002, 0.333333, -3e4 / 7, 12.3 * smallest, -0.3 * smallest, 60_001.0):
        exact = torch.full((n,), value)
        below, above = (float(bound[0]) for bound in neighbours(exact, dtype))
        up = (float(exact[0]) - below) / (above - below)
        assert 0 < up < 1
        spread = (above - below) * (up * (1 - up) / n) ** 0.5
        mean = float(rounded(name, exact, dtype, seed=5).double().mean())
        assert abs(mean - float(exact[0])) < 5 * spread


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stochastic_rounding_never_overflows(name, dtype):
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest, largest * 1.0001, largest * 1.001, 3.4028e38]).repeat(500)
    for sign in (1, -1):
        assert torch.equal(rounded(name, sign * beyond, dtype), torch.full((2000,), sign * largest, dtype=dtype))


@pytest.mark.parametrize("name", NAMES)
def test_rounding_repeats_by_seed_and_leaves_the_global_streams(name):
    values = torch.rand(5000, generator=torch.Generator().manual_seed(6)) + 1
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    results = [rounded(name, values, torch.bfloat16, seed) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])


@pytest.mark.parametrize("name", NAMES)
def test_rounding_differs_between_steps_and_between_tensors(name):
    values, stream = torch.full((5000,), 1 + 2.0**-8), RoundingNoise(0)  # halfway between two bf16 numbers
    seen = []
    for _ in range(2):
        weights = [torch.zeros(5000, dtype=torch.bfloat16) for _ in range(2)]
        block = Block(weights, [values, values], None, 0.0, False)
        ascend(name, block, 1.0, stream.next())
        seen += weights
    ups = [(w.float() > values).float() - 0.5 for w in seen]
    for i, left in enumerate(ups):
        for right in ups[:i]:  # independent coins agree half of the time: 5 sigma of 5,000
            assert abs(float((left == right).float().mean()) - 0.5) < 5 * 0.5 / 5000**0.5


@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", [Euclidean(), Adaptive(), Fisher()], ids=lambda geometry: geometry.name)
def test_one_perturbation_spans_dtypes_layouts_and_groups(geometry, linf):
    torch.manual_seed(7)
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.float64]
    shapes = [(6, 4), (3, 5), (2, 2, 3), (4, 4), (7,), ()]
    weights = [torch.randn(shape, dtype=torch.float64).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    directions = [torch.randn(shape, dtype=torch.float64).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    regions = [Region(0.5, ETA, 1), Region(0.25, ETA, -1)]
    targets = [Targets(region, weights[i::2], directions[i::2]) for i, region in enumerate(regions)]
    names = [geometry.name if geometry.applies_to(w) else "none" for w in weights]
    pairs = list(zip(names, weights, directions, strict=True))
    total = sum(float((length_of(n, w, d) * d.double()).square().sum()) for n, w, d in pairs) ** 0.5
    moves = []
    for i, (n, w, d) in enumerate(pairs):
        radius, t = (0.5, -0.25)[i % 2], length_of(n, w, d)
        moves.append(radius * t * d.double().sign() if linf else radius * t * t * d.double() / total)

    before = [w.clone() for w in weights]
    perturbation = Perturbation(targets, geometry, linf=linf)
    assert float(perturbation.norm) == pytest.approx(total, rel=1e-6)
    plain = sum(float(d.double().square().sum()) for d in directions) ** 0.5
    assert float(perturbation.gradient_norm()) == pytest.approx(plain, rel=1e-6)
    backup = perturbation.backup(ScratchPool())
    perturbation.move(None, backup)
    for w, was, move in zip(weights, before, moves, strict=True):
        want = was.double() + move
        work = 2.0**-53 if w.dtype is torch.float64 else 2.0**-24
        allowed = half_ulp(want, w.dtype) + work * want.abs() + 16 * 2.0**-24 * move.abs()  # the norm is an fp32 one
        assert bool(((w.double() - want).abs() <= allowed).all())
    backup.restore()
    assert same(weights, before)
