"""The memory that Triton's kernels touch, in the interpreter: memcheck's, racecheck's and initcheck's questions.

``tests/kernels/test_triton.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import samopt
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.parts.geometry import Adaptive, Euclidean, Fisher
from tests.helpers.cases import batch, bits, closure_form, same_bits

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/kernels/test_triton.py runs these with the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.helpers.sanitizer import Poison, Sanitizer

GEOMETRIES = {"sam": Euclidean(), "asam": Adaptive(), "fisher": Fisher()}
LOW_PRECISION = {torch.float32: set(), torch.bfloat16: {"join_moves"}}
KINDS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (1, 0, 33, 1024, 1027, 16_384 + 5)
"""Elements: one, none, odd, a whole block, a block's rest, a chunk's rest."""


@triton.jit
def copy_rows(source, target, size, ROW: tl.constexpr, PROMISED: tl.constexpr):
    """Copy a row of ``source`` for each program; right where no more than ``size`` is there, and rows are apart."""
    at = tl.program_id(0) * ROW + tl.arange(0, 16)
    values = tl.load(tl.multiple_of(source + tl.program_id(0) * ROW, PROMISED) + tl.arange(0, 16), mask=at < size)
    tl.store(target + at, values, mask=at < size)


@pytest.mark.parametrize(
    ("size", "row", "promised", "complaint"),
    [
        (32, 16, 16, None),
        (33, 16, 16, "loads 4 bytes at .*, where no tensor is"),
        (32, 15, 4, "programs of copy_rows race"),
        (24, 12, 32, "is said to be a multiple of 32"),
    ],
    ids=["right", "outside", "race", "promise"],
)
def test_the_sanitizer_finds_what_is_planted(size, row, promised, complaint):
    source, target = torch.randn(32), torch.zeros(48)
    with Sanitizer() as sanitizer:
        if complaint is None:
            copy_rows[(2,)](source, target, size, ROW=row, PROMISED=promised)
            assert torch.equal(target[:32], source)
            assert sanitizer.launches == ["copy_rows"] and sanitizer.wide == 2
            return
        with pytest.raises((InterpreterError, MemoryError), match=complaint):
            copy_rows[(3,)](source, target, size, ROW=row, PROMISED=promised)


def views(kind, offset):
    """Matrices with gaps between them in one memory, each ``offset`` elements behind a multiple of 16 bytes."""
    starts, end = [], 16
    for size in SIZES:
        starts.append(end + offset)
        end += (size + 32) // 16 * 16 + 16
    room = torch.randn(end).to(kind)
    return room, [room[start : start + size].view(1, size) for start, size in zip(starts, SIZES, strict=True)]


@pytest.mark.parametrize("offset", [0, 1, 8], ids=["aligned", "unaligned", "by-eight"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kernels_touch_their_own_tensors_only_and_no_program_anothers(geometry, linf, kind, offset):
    torch.manual_seed(0)
    (weights_room, weights), (directions_room, directions) = views(kind, offset), views(kind, 0)
    before = weights_room.clone(), directions_room.clone()
    with Sanitizer(*weights, *directions) as sanitizer:
        targets = Targets(Region(0.5, 0.1, 1), weights, directions)
        perturbation = Perturbation([targets], GEOMETRIES[geometry], linf=linf, backend="triton")
        perturbation.displaced(ScratchPool(), RoundingNoise(0).source())
        backup = perturbation.backup(ScratchPool())
        applied = perturbation.move(RoundingNoise(0).source(), backup)
        assert float(applied) > 0 and not torch.equal(weights_room, before[0])
        backup.restore()
    assert torch.equal(weights_room, before[0]) and torch.equal(directions_room, before[1])
    assert {"sum_chunk", "join_sums", "ascend_chunk", "restore_chunk"} <= set(sanitizer.launches)
    assert (sanitizer.wide > 0) is (offset != 1 or geometry != "asam")  # that geometry's norm reads the weights too


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 1030), nn.Tanh(), nn.Linear(1030, 17), nn.Linear(17, 3)).to(kind)


BASES = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True, eps=1e-3),  # the default vanishes in fp16
}


def trained(base, kind, steps=2):
    model = network(kind)
    optimizer = samopt.ASAM(BASES[base](model.parameters()), rho=0.5, backend="triton")
    for seed in range(steps):
        closure_form(optimizer, model, batch(kind, seed=seed))
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_training_steps_are_clean(base, kind):
    with Sanitizer() as sanitizer:
        model, _ = trained(base, kind)
    launches = {"sum_chunk", "join_sums", "ascend_chunk", "restore_chunk"} | LOW_PRECISION[kind]
    assert set(sanitizer.launches) == launches and sanitizer.wide
    assert same_bits(model, bits(trained(base, kind)[0]))


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_nothing_is_made_of_memory_that_nobody_has_written(base, kind):
    runs = []
    for byte in (0x00, 0xFF):
        with Poison(byte) as poison:
            model, optimizer = trained(base, kind)
            runs.append((bits(model), repr(optimizer.last_step.to_dict())))
        assert poison.filled > 10
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(*pair) for pair in zip(runs[0][0], runs[1][0], strict=True))
