"""Weights return bit for bit, through their parameters, whatever a forward does to their memory meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import samopt
from samopt._perturb.movable_weights import MovableWeights
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.parts.geometry import Adaptive, Euclidean
from tests.helpers.cases import batch, bits, closure_form, explicit_form, mlp, same_bits, tensors

BACKENDS = ["cpu", "foreach", "reference"]


def assign(weight):
    weight.data = torch.full_like(weight, 7.0)


def assign_other_shape(weight):
    weight.data = torch.full((2, 5), 7.0)


def assign_other_dtype(weight):
    weight.data = weight.data.half()


def assign_view(weight):
    weight.data = weight.data.t()


def assign_vector(weight):
    vector_to_parameters(parameters_to_vector([weight]) * 2, [weight])


def set_elsewhere(weight):
    with torch.no_grad():
        weight.set_(torch.zeros(2, 2))


def resize_smaller(weight):
    weight.data.resize_(2, 2)


def resize_larger(weight):
    weight.data.resize_(50, 50)


def free(weight):
    weight.untyped_storage().resize_(0)


def free_and_fill(weight):
    size = weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    weight.data.fill_(9.0)


def shrink_to_a_row(weight):
    weight.data = weight.data[:1].clone()
    weight.data.add_(1)


def write_in_place(weight):
    with torch.no_grad():
        weight.mul_(3)


CHANGES = [
    assign, assign_other_shape, assign_other_dtype, assign_view, assign_vector, set_elsewhere, resize_smaller,
    resize_larger, free, free_and_fill, shrink_to_a_row, write_in_place,
]  # fmt: skip


def raised(weights, backend="auto", geometry=None, pool=None):
    """Move the weights along ones; return what puts them back."""
    directions = [torch.ones_like(weight.detach()) for weight in weights]
    perturbation = Perturbation(
        [Targets(Region(0.5, 0.1, 1), weights, directions)], geometry or Euclidean(), backend=backend
    )
    backup = perturbation.backup(pool or ScratchPool())
    perturbation.move(None, backup)
    return backup


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_forward_may_change_the_memory_of_a_weight(change, backend):
    changed, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))
    before, address = [changed.detach().clone(), other.detach().clone()], changed.data_ptr()
    layout, storage = (changed.shape, changed.stride()), changed.untyped_storage()._cdata
    backup = raised([changed, other], backend)
    change(changed)
    backup.restore()
    assert (changed.shape, changed.stride()) == layout and changed.dtype is torch.float32
    assert torch.equal(changed, before[0]) and torch.equal(other, before[1])
    assert changed.untyped_storage()._cdata == storage
    assert change in (free, free_and_fill, resize_larger) or changed.data_ptr() == address
    assert changed.requires_grad and changed.is_leaf
    changed.sum().backward()
    assert torch.equal(changed.grad, torch.ones(4, 3))


@pytest.mark.parametrize("change", [assign, set_elsewhere, free], ids=lambda change: change.__name__)
def test_rows_of_a_sparse_gradient_return_to_the_memory_of_the_weight(change):
    weight = nn.Parameter(torch.randn(9, 4))
    before = weight.detach().clone()
    direction = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 4), (9, 4), check_invariants=True)
    perturbation = Perturbation([Targets(Region(0.5, 0.0, 1), [weight], [direction])], Euclidean())
    backup = perturbation.backup(ScratchPool())
    perturbation.move(None, backup)
    assert not torch.equal(weight, before)
    change(weight)
    backup.restore()
    rows = [1, 4] if change is free else list(range(9))  # freed memory keeps nothing that was not saved
    assert torch.equal(weight.detach()[rows], before[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("geometry", [Euclidean(), Adaptive()], ids=lambda geometry: geometry.name)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_that_share_memory_return(backend, geometry, dtype):
    memory = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [nn.Parameter(memory.view(4, 6)), nn.Parameter(memory[3:15]), nn.Parameter(memory.view(6, 4).t())]
    before = memory.clone()
    backup = raised(weights, backend, geometry)
    assert not torch.equal(memory, before)
    weights[1].data = torch.zeros(3, dtype=dtype)
    backup.restore()
    assert torch.equal(memory, before)
    memory.fill_(2.0)
    assert all(bool((weight == 2).all()) for weight in weights)  # they share it still


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [None, assign, set_elsewhere])
@pytest.mark.parametrize("restored", [False, True])
def test_autograd_notices_a_move_and_a_restore(restored, change, backend):
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.ones(3, requires_grad=True)
    graph = None if restored else (weight @ x).sum()
    backup = raised([weight], backend)
    if restored:
        graph = (weight @ x).sum()
        if change is not None:
            change(weight)
        backup.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


def test_a_restore_may_be_repeated_until_it_is_complete_and_then_does_nothing():
    weight = nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    backup = raised([weight])
    blocks = backup.blocks
    for _ in range(2):  # an interrupt hit the end of the first call
        backup.restore()
        assert torch.equal(weight, before)
        backup.blocks = blocks
    backup.restore()
    with torch.no_grad():
        weight.add_(1)  # a step of the base
    backup.restore()
    assert torch.equal(weight, before + 1)


def test_the_next_backup_uses_the_memory_of_the_last_one():
    weights, pool = [nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(3))], ScratchPool()
    addresses = []
    for _ in range(3):
        backup = raised(weights, pool=pool)
        addresses.append([values.data_ptr() for saved in backup.blocks for values in saved.values])
        backup.restore()
    assert addresses[0] == addresses[1] == addresses[2]


def test_movable_weights_return_any_number_of_times():
    weight, low = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5).bfloat16())
    before = [weight.detach().clone(), low.detach().clone()]
    movable = MovableWeights([weight, low])
    for _ in range(2):
        movable.move(0, torch.full((4, 3), 0.5))
        movable.put(1, torch.zeros(5))
        torch.testing.assert_close(weight.detach(), before[0] + 0.5)
        assert bool((low == 0).all())
        assign(weight)
        movable.undo()
        assert torch.equal(weight, before[0]) and torch.equal(low, before[1])


FORMS = {"closure": closure_form, "explicit": explicit_form}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_training_is_that_of_the_reference_and_no_address_changes(backend, wrap, form):
    models = [mlp(torch.float64) for _ in range(2)]
    optimizers = [
        wrap(torch.optim.AdamW(model.parameters(), lr=0.01), backend=name)
        for model, name in zip(models, (backend, "reference"), strict=True)
    ]
    addresses = [p.data_ptr() for p in models[0].parameters()]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            FORMS[form](optimizer, model, batch(torch.float64, seed=step))
        assert [p.data_ptr() for p in models[0].parameters()] == addresses
    for got, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_gradients_that_are_not_used_come_back_unchanged(backend):
    for slope in (0.0, float("inf"), float("nan")):
        (w,) = tensors((4, 3), dtype=torch.float32)
        optimizer = samopt.SAM([w], torch.optim.SGD, lr=0.1, backend=backend)
        w.grad = gradient = torch.full((4, 3), slope)
        with optimizer.perturbed():
            w.grad = torch.ones(4, 3)
        assert w.grad is gradient
        torch.testing.assert_close(gradient, torch.full((4, 3), slope), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_neither_written_to_nor_kept(backend, wrap):
    model = mlp()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), backend=backend)
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    held = [p.grad for p in model.parameters()]
    values, before = [g.clone() for g in held], bits(model)
    with optimizer.perturbed():
        assert not same_bits(model, before)
        assert all(map(torch.equal, held, values))
        nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert same_bits(model, before)


def recurrent():
    torch.manual_seed(0)
    return nn.LSTM(6, 5, num_layers=2)


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def parametrized():
    torch.manual_seed(0)
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))


@pytest.mark.parametrize("build", [recurrent, tied, parametrized])
def test_models_that_look_at_their_weights_in_special_ways(build):
    models = [build().double() for _ in range(2)]
    for model, backend in zip(models, ("cpu", "reference"), strict=True):
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, backend=backend)
        for seed in range(3):
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

            def backward(model=model, x=x):
                out = model(x)
                (out[0] if isinstance(out, tuple) else out).square().mean().backward()

            optimizer.zero_grad()
            backward()
            with optimizer.perturbed():
                backward()
            optimizer.step()
    for got, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
