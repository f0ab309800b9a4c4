"""The Triton backend in Triton's interpreter, on the CPU: whole steps, what it refuses, when its tables change.

The interpreter must be chosen before triton is imported, so ``tests/kernels/test_triton.py`` runs this file in its own
process.
"""

from __future__ import annotations

import os

import pytest
import torch

import samopt
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.kernels import BACKENDS, Block, StepSize, select
from samopt.parts.geometry import Adaptive, Euclidean, Fisher
from tests.helpers.cases import (
    VARIANTS,
    batch,
    bits,
    closure_form,
    explicit_form,
    mlp,
    same_bits,
    tensors,
    textbook_step,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="tests/kernels/test_triton.py runs these with the interpreter"
)
GEOMETRIES = {"sam": Euclidean(), "asam": Adaptive(), "fisher": Fisher()}
ETA = 0.1


def copies(weights):
    return [w.detach().clone() for w in weights]


def weights_of(some):
    return [weight for targets in some for weight in targets.weights]


def directions_of(some):
    return [direction for targets in some for direction in targets.directions]


def targets(kinds, radii=(0.5, 0.25), seed=0):
    """Weights of several dtypes and shapes in two groups, the second one maximised, with directions of their own."""
    torch.manual_seed(seed)
    made = [Targets(Region(radii[0], ETA, 1), [], []), Targets(Region(radii[1], ETA, -1), [], [])]
    for i, kind in enumerate(kinds):
        for shape in ((6, 4), (33,)):
            made[i % 2].weights.append(torch.randn(shape).to(kind))
            made[i % 2].directions.append(torch.randn(shape).to(kind))
    return made


def test_auto_leaves_the_cpu_to_its_own_backend():
    block = Block([torch.zeros(3)], [torch.ones(3)], None, 0.0, False)
    assert select(block, "auto").name == "cpu"
    assert select(block, "triton").name == "triton"


@pytest.mark.parametrize("linf", [False, True], ids=["l2", "linf"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_groups_and_dtypes_share_one_norm_and_move_as_the_reference_moves_them(geometry, linf):
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    ours, theirs = targets(kinds), targets(kinds)
    before = copies(weights_of(ours))
    perturbations = [
        Perturbation(some, GEOMETRIES[geometry], linf=linf, backend=name)
        for some, name in ((ours, "triton"), (theirs, "reference"))
    ]
    assert float(perturbations[0].norm) == pytest.approx(float(perturbations[1].norm), rel=1e-7)
    plain = [float(p.gradient_norm()) for p in perturbations]
    assert plain[0] == pytest.approx(plain[1], rel=1e-7)
    backups = [p.backup(ScratchPool()) for p in perturbations]
    applied = [float(p.move(None, backup)) for p, backup in zip(perturbations, backups, strict=True)]
    assert applied[0] == pytest.approx(applied[1], rel=1e-5)
    for mine, other in zip(weights_of(ours), weights_of(theirs), strict=True):
        unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[mine.dtype]
        torch.testing.assert_close(mine.float(), other.float(), rtol=unit, atol=1e-7)
    backups[0].restore()
    assert all(torch.equal(w, b) for w, b in zip(weights_of(ours), before, strict=True))


@pytest.mark.parametrize("radius", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_the_radius_is_a_number_or_a_tensor_of_any_dtype(radius):
    some = targets([torch.float32], radii=(radius, 0.0))
    before = copies(weights_of(some))
    perturbation = Perturbation(some, Euclidean(), backend="triton")
    perturbation.move()
    norm = sum(float(d.double().square().sum()) for d in directions_of(some)) ** 0.5
    for weight, direction, was in zip(weights_of(some), directions_of(some), before, strict=True):
        want = was.double() + 0.3 * direction.double() / norm
        torch.testing.assert_close(weight.double(), want, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_norm_that_cannot_be_used_moves_nothing(value):
    some = targets([torch.float32, torch.bfloat16])
    for direction in directions_of(some):
        direction.fill_(value)
    before = copies(weights_of(some))
    perturbation = Perturbation(some, Adaptive(), backend="triton")
    assert float(perturbation.move(RoundingNoise(0).next())) == 0.0
    assert all(torch.equal(w, b) for w, b in zip(weights_of(some), before, strict=True))


def test_a_backup_is_restored_only_once_the_kernel_has_filled_it():
    (some,) = targets([torch.float32], radii=(0.5, 0.0))[:1]
    before, pool = copies(some.weights), ScratchPool()
    for weight in some.weights:
        pool.like(weight).fill_(float("nan"))
    perturbation = Perturbation([some], Euclidean(), backend="triton")
    perturbation.backup(pool).restore()  # as after an interrupt between backup and move
    assert all(torch.equal(w, b) for w, b in zip(some.weights, before, strict=True))
    backup = perturbation.backup(pool)
    perturbation.move(None, backup)
    assert all(torch.equal(pool.like(w), b) for w, b in zip(some.weights, before, strict=True))
    backup.restore()
    assert all(torch.equal(w, b) for w, b in zip(some.weights, before, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_displaced_weights_are_the_moved_ones(geometry, kind):
    some = targets([kind, kind])
    before = copies(weights_of(some))
    perturbation = Perturbation(some, GEOMETRIES[geometry], backend="triton")
    displaced, applied = perturbation.displaced(ScratchPool(), RoundingNoise(0).next())
    assert all(torch.equal(w, b) for w, b in zip(weights_of(some), before, strict=True))
    assert torch.equal(perturbation.move(RoundingNoise(0).next()), applied)
    assert all(torch.equal(w, displaced[w]) for w in weights_of(some))


@pytest.mark.parametrize("resize", [False, True], ids=["assigned", "freed"])
def test_a_forward_may_give_a_weight_other_memory_while_it_is_moved(resize):
    (some,) = targets([torch.float32], radii=(0.5, 0.0))[:1]
    before = copies(some.weights)
    perturbation = Perturbation([some], Euclidean(), backend="triton")
    backup = perturbation.backup(ScratchPool())
    perturbation.move(None, backup)
    weight, address = some.weights[0], some.weights[0].data_ptr()
    if resize:
        weight.untyped_storage().resize_(0)
    else:
        weight.data = torch.zeros(3)
    backup.restore()
    assert all(torch.equal(w, b) for w, b in zip(some.weights, before, strict=True))
    assert resize or weight.data_ptr() == address


def test_a_table_is_reused_until_an_address_changes():
    from samopt.kernels.triton.tables import addresses_of, pointer_table

    weights = [torch.randn(5), torch.randn(40_000)]

    def table():
        sizes = tuple(w.numel() for w in weights)
        return pointer_table((addresses_of(weights),), (4 * 16384,), sizes, torch.device("cpu"))

    first = table()
    assert table() is first
    start = weights[1].data_ptr()
    want = [[weights[0].data_ptr(), start, start + 4 * 16384, start + 8 * 16384], [5, 16384, 16384, 7232]]
    assert first.data.tolist() == want
    weights[0] = torch.randn(5)
    assert table() is not first and table().data[0, 0] == weights[0].data_ptr()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("form", [closure_form, explicit_form], ids=["closure", "explicit"])
def test_training_agrees_with_the_textbook(variant, form):
    model, twin = mlp(), mlp()
    optimizer = variant.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=variant.rho, backend="triton"
    )
    base = torch.optim.SGD([{"params": list(twin.parameters()), "rho": variant.rho}], lr=0.1, momentum=0.9)
    for seed in range(3):
        form(optimizer, model, batch(seed=seed))
        textbook_step(twin, base, batch(seed=seed), variant.epsilon)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_exact_after_an_exception_in_the_second_pass(kind):
    model = mlp(kind)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, backend="triton")
    before = bits(model)
    model(batch(kind)[0]).float().square().sum().backward()
    with pytest.raises(RuntimeError, match="in between"), optimizer.perturbed():
        assert not same_bits(model, before)
        raise RuntimeError("in between")
    assert same_bits(model, before)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_the_noise_is_the_references_where_the_numbers_are_the_same(kind):
    from samopt.kernels import reference

    class Ours:
        """The kernel's numbers, made a second time with Python integers."""

        def key(self):
            return 0x0123456789ABCDEF

        def __call__(self, like):
            return torch.tensor([uniform(i, self.key()) for i in range(like.numel())]).view(like.shape)

    def mixed(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def uniform(index, key):
        return (mixed(mixed(index ^ key & 0xFFFFFFFF) ^ key >> 32) >> 8) / 2**24

    torch.manual_seed(0)
    weight, direction = torch.randn(1500).to(kind), torch.randn(1500).to(kind)
    moved = []
    for run in (BACKENDS["triton"].ascend, reference.ascend):
        block = Block([weight.clone()], [direction], None, 0.0, False)
        one = torch.ones((), dtype=torch.float64)
        run(block, StepSize(one, 0.01, 1, False), one, Ours())
        moved.append(block.weights[0])
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], (weight.float() + 0.01 * direction.float()).to(kind))


def test_replicas_and_resumed_runs_round_alike():
    def train(steps, state=None, start=0):
        model = mlp(torch.bfloat16)
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), rho=0.5, backend="triton")
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in range(start, steps):
            closure_form(optimizer, model, batch(torch.bfloat16, seed=step))
        return model.state_dict(), optimizer.state_dict()

    whole, again = train(4), train(4)
    resumed = train(4, train(2), start=2)
    for name, value in whole[0].items():
        assert torch.equal(value, again[0][name]) and torch.equal(value, resumed[0][name])


def test_the_one_pass_form_ascends_through_the_kernels():
    model, twin = mlp(), mlp()
    runs = []
    for net, backend in ((model, "triton"), (twin, "reference")):
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = samopt.ASAM(base, rho=0.5, direction="momentum", model=net, backend=backend)
        for seed in range(3):
            closure_form(optimizer, net, batch(seed=seed))
        runs.append(optimizer.last_step.to_dict())
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_what_has_no_triton_form_is_refused_by_name_and_left_to_others_by_auto():
    weights = tensors((4, 3), (3,), dtype=torch.float64)
    optimizer = samopt.SAM(weights, torch.optim.SGD, lr=0.1, backend="triton")
    sum((w**2).sum() for w in weights).backward()
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: a parameter has dtype torch.float64'):
        optimizer.ascend()


def test_parameters_that_share_memory_are_left_to_others():
    room = torch.zeros(10)
    block = Block([room[:6], room[4:]], [torch.ones(6), torch.ones(6)], None, 0.0, False)
    with pytest.raises(RuntimeError, match="two parameters share memory"):
        select(block, "triton")
    apart = Block([room[:5], room[5:]], [torch.ones(5), torch.ones(5)], None, 0.0, False)
    assert select(apart, "triton").name == "triton"
