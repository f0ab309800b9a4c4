"""Every kind of parameter: tied, aliased, frozen, sparse, complex, empty, strided, of mixed dtypes, grouped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import curved, general_epsilon, linear, tensors, two_pass_step, wrapped_step

FORMS = ["closure", "explicit"]
VARIANTS = {"sam": (samopt.SAM, 0.3, None), "asam": (samopt.ASAM, 0.3, 0.01)}
variants = pytest.mark.parametrize("variant", VARIANTS)
forms = pytest.mark.parametrize("form", FORMS)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@forms
@variants
def test_tied_weights_move_and_count_once(variant, form):
    wrap, rho, eta = VARIANTS[variant]
    (ours, theirs) = tensors((5, 5)), tensors((5, 5))
    optimizer, base = wrap(torch.optim.SGD(ours, lr=0.1), rho=rho), torch.optim.SGD(theirs, lr=0.1)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for _ in range(3):
        wrapped_step(optimizer, [lambda: (ours[0].t() @ (ours[0] @ x).tanh()).square().sum()] * 2, form)
        two_pass_step(base, [lambda: (theirs[0].t() @ (theirs[0] @ x).tanh()).square().sum()] * 2, [rho], eta)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_parameters_sharing_storage_are_restored_bit_for_bit(variant, dtype):
    wrap, rho, _ = VARIANTS[variant]
    memory = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(dtype)
    shared = [nn.Parameter(memory.view(4, 6)), nn.Parameter(memory[3:15]), nn.Parameter(memory.view(6, 4).t())]
    assert shared[0].data_ptr() == shared[2].data_ptr()
    optimizer, before = wrap(torch.optim.SGD(shared, lr=0.0), rho=rho), memory.clone()
    for _ in range(3):
        linear(shared, *shared)().backward()
        with optimizer.perturbed():
            assert not torch.equal(memory, before)
            linear(shared, *shared)().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(memory, before)


@variants
def test_frozen_parameters_and_their_stale_gradients_are_left_alone(variant):
    wrap, rho, eta = VARIANTS[variant]
    ours, theirs = tensors((3, 2), (4, 2)), tensors((3, 2), (4, 2))
    optimizer, base = wrap(torch.optim.SGD(ours, lr=0.1), rho=rho), torch.optim.SGD(theirs, lr=0.1)
    for frozen in (False, True, False):
        for p in (ours[1], theirs[1]):
            p.requires_grad_(not frozen)
            p.grad = torch.full((4, 2), 7.0, dtype=torch.float64) if frozen else None
        ours[0].grad = theirs[0].grad = None
        stale, value = ours[1].grad, ours[1].detach().clone()
        curved(ours, (1, 1))().backward()
        with optimizer.perturbed():
            if frozen:
                assert ours[1].grad is stale and bool((stale == 7).all()) and torch.equal(ours[1], value)
            curved(ours, (1, 1))().backward()
        optimizer.step()
        # The same by hand: the frozen one has neither a say nor a move, and the base does with its .grad what it does.
        curved(theirs, (1, 1))().backward()
        steps = general_epsilon(theirs[: 1 if frozen else 2], [rho] * (1 if frozen else 2), eta)
        saved = [p.detach().clone() for p in theirs]
        with torch.no_grad():
            for p, step in zip(theirs, steps, strict=False):
                p += step
                p.grad = None
        curved(theirs, (1, 1))().backward()
        with torch.no_grad():
            for p, was in zip(theirs, saved, strict=True):
                p.copy_(was)
        base.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def sparse_pair(kind):
    """An embedding-like parameter and a loss of it with a sparse gradient of some kind."""
    weight = nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    if kind == "hybrid":  # an nn.Embedding's: one sparse and one dense dimension
        rows = torch.tensor([1, 4, 7])
    elif kind == "duplicates":  # the same row several times, uncoalesced
        rows = torch.tensor([4, 4, 1, 4])
    else:  # "untouched": no row at all
        rows = torch.tensor([], dtype=torch.long)

    def loss():
        picked = nn.functional.embedding(rows, weight, sparse=True)
        return (picked * torch.linspace(1, 2, 4, dtype=torch.float64)).tanh().sum()

    return weight, loss


SPARSE_BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sparse-adam": lambda params: torch.optim.SparseAdam(params, lr=0.1),
}


@forms
@variants
@pytest.mark.parametrize("base", SPARSE_BASES)
@pytest.mark.parametrize("kind", ["hybrid", "duplicates", "untouched"])
def test_sparse_gradients(kind, base, variant, form):
    wrap, rho, eta = VARIANTS[variant]
    (ours, our_loss), (theirs, their_loss) = sparse_pair(kind), sparse_pair(kind)
    optimizer, stock = wrap(SPARSE_BASES[base]([ours]), rho=rho), SPARSE_BASES[base]([theirs])
    untouched = ours.detach().clone()
    for _ in range(3):
        wrapped_step(optimizer, [our_loss] * 2, form)
        assert ours.grad.is_sparse
        two_pass_step(stock, [their_loss] * 2, [rho], eta)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    rest = [0, 2, 3, 5, 6, 8]
    assert torch.equal(ours[rest], untouched[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_fully_sparse_gradients_move_their_entries_and_are_restored(variant, dtype):
    wrap, rho, eta = VARIANTS[variant]
    dense, sparse = (tensors((5, 4), (3,), dtype=dtype) for _ in range(2))
    places, values = torch.tensor([[0, 0, 3], [1, 1, 2]]), torch.tensor([1.0, 2.0, -4.0], dtype=dtype)
    gradient = torch.sparse_coo_tensor(places, values, (5, 4), check_invariants=True)
    assert not gradient.is_coalesced()
    optimizers = [wrap(torch.optim.SGD(p, lr=0.0), rho=rho, stochastic_rounding=False) for p in (dense, sparse)]
    before = [p.detach().clone() for p in sparse]
    dense[0].grad, sparse[0].grad = gradient.to_dense(), gradient
    dense[1].grad, sparse[1].grad = (torch.ones(3, dtype=dtype) for _ in range(2))
    with optimizers[0].perturbed(), optimizers[1].perturbed():
        assert not torch.equal(sparse[0], before[0])
        for a, b in zip(dense, sparse, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if dtype is torch.float32 else 0.0, atol=0.0)
    assert all(torch.equal(p, b) for p, b in zip(sparse, before, strict=True))
    applied = [float(o.last_step.applied_radius) for o in optimizers]
    assert applied[0] == pytest.approx(applied[1], rel=1e-6)


@forms
@variants
def test_complex_parameters_use_the_modulus(variant, form):
    wrap, rho, eta = VARIANTS[variant]

    def pair():
        real, imaginary = tensors((3, 4), (3, 4), seed=1)
        return [nn.Parameter(torch.complex(real.detach(), imaginary.detach())), *tensors((3,), seed=2)]

    def loss_of(parameters):
        x = torch.linspace(-1, 1, 4, dtype=torch.float64) + 0.5j
        return ((parameters[0] @ x).abs() * parameters[1]).square().sum()

    ours, theirs = pair(), pair()
    optimizer, stock = wrap(torch.optim.SGD(ours, lr=0.01), rho=rho), torch.optim.SGD(theirs, lr=0.01)
    for _ in range(3):
        wrapped_step(optimizer, [lambda: loss_of(ours)] * 2, form)
        two_pass_step(stock, [lambda: loss_of(theirs)] * 2, [rho] * 2, eta)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert float(optimizer.last_step.applied_radius) == pytest.approx(rho, rel=1e-12)


LAYOUTS = {
    "empty": lambda: [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(0))],
    "channels-last": lambda: [nn.Parameter(tensors((4, 3, 3, 2))[0].detach().to(memory_format=torch.channels_last))],
    "transposed": lambda: [nn.Parameter(tensors((4, 6))[0].detach().t())],
    "every-second": lambda: [nn.Parameter(tensors((4, 6))[0].detach()[:, ::2])],
    "scalar": lambda: [nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), *tensors((1, 1))],
}


@forms
@variants
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_strides(layout, variant, form):
    wrap, rho, eta = VARIANTS[variant]
    ours, theirs = ([nn.Parameter(p.detach().double()) for p in LAYOUTS[layout]()] for _ in range(2))
    strides = [p.stride() for p in LAYOUTS[layout]()]
    addresses, seen = [p.data_ptr() for p in ours], []
    optimizer, stock = wrap(torch.optim.SGD(ours, lr=0.1), rho=rho), torch.optim.SGD(theirs, lr=0.1)

    def loss():
        seen.append([p.stride() for p in ours])
        return curved(ours, [1] * len(ours))()

    for _ in range(2):
        wrapped_step(optimizer, [loss] * 2, form)
        two_pass_step(stock, [curved(theirs, [1] * len(theirs))] * 2, [rho] * len(theirs), eta)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert seen == [strides] * 4
    assert [p.data_ptr() for p in ours] == addresses


def test_a_model_of_empty_parameters_only_takes_a_plain_step():
    w = nn.Parameter(torch.zeros(0, 3))
    optimizer = samopt.SAM(torch.optim.SGD([w], lr=0.1), rho=0.3)
    assert wrapped_step(optimizer, [lambda: w.sum()] * 2, "closure") == 1
    assert w.shape == (0, 3) and float(optimizer.last_step.applied_radius) == 0.0


@variants
def test_one_norm_spans_every_dtype(variant):
    wrap, rho, eta = VARIANTS[variant]
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    shapes = [(4, 3), (5, 2), (3,), (2, 2, 2)]
    parameters = [tensors(s, seed=i, dtype=k)[0] for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))]
    slopes = [p.detach() for p in (tensors(s, seed=9, dtype=k)[0] for s, k in zip(shapes, kinds, strict=True))]
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.0), rho=rho, stochastic_rounding=False)
    before = [p.detach().clone() for p in parameters]
    linear(parameters, *slopes)().backward()
    want = general_epsilon(parameters, [rho] * 4, eta)
    half_ulp = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    with optimizer.perturbed():
        for p, was, move in zip(parameters, before, want, strict=True):
            target = was.double() + move
            allowed = half_ulp[p.dtype] * target.abs() + 2.0**-24 * 16 * move.abs()  # the norm has fp32 terms
            assert bool(((p.detach().double() - target).abs() <= allowed + 2.0**-24 * target.abs()).all())
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))


RHOS = {
    "two radii": (0.3, 0.7),
    "one at zero": (0.3, 0.0),
    "a tensor": (torch.tensor(0.3), 0.7),
    "one left out": (0.3, None),
}


@forms
@variants
@pytest.mark.parametrize("case", RHOS)
def test_groups_share_the_norm_and_have_their_own_radius(case, variant, form):
    wrap, _, eta = VARIANTS[variant]
    rhos = RHOS[case]
    ours, theirs = tensors((3, 2), (4,)), tensors((3, 2), (4,))
    groups = [{"params": [p], "perturb": rho is not None, "rho": rho or 0.0} for p, rho in zip(ours, rhos, strict=True)]
    groups[0]["rho"] = rhos[0]
    if rhos[1] is None:
        groups[1]["rho"] = 0.9  # has no say: neither moved nor counted
    optimizer = wrap(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    stock = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    exact = [None if rho is None else float(rho) for rho in rhos]
    left_out = []

    def loss():
        left_out.append(ours[1].detach().clone())
        return curved(ours, (1, 1))()

    for _ in range(3):
        wrapped_step(optimizer, [loss] * 2, form)
        two_pass_step(stock, [curved(theirs, (1, 1))] * 2, exact, eta)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        moved = not torch.equal(left_out[-1], left_out[-2])
        assert moved == bool(rhos[1])


@variants
def test_a_caller_without_grad_mode_gets_the_same_step(variant):
    wrap, rho, _ = VARIANTS[variant]
    ours, theirs = tensors((3, 2), (4,)), tensors((3, 2), (4,))
    inside, outside = (wrap(torch.optim.AdamW(p, lr=0.1), rho=rho) for p in (ours, theirs))
    for _ in range(2):
        with torch.no_grad():
            wrapped_step(inside, [curved(ours, (1, 1))] * 2, "closure")
            assert not torch.is_grad_enabled()
        wrapped_step(outside, [curved(theirs, (1, 1))] * 2, "closure")
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@forms
@variants
def test_gradients_that_carry_a_graph_give_the_same_step(variant, form):
    wrap, rho, eta = VARIANTS[variant]
    ours, theirs = tensors((3, 2), (4,)), tensors((3, 2), (4,))
    optimizer, stock = wrap(torch.optim.SGD(ours, lr=0.1), rho=rho), torch.optim.SGD(theirs, lr=0.1)

    def penalised(parameters):
        """The loss plus the squared norm of its gradient: a double backward in each pass."""
        loss = curved(parameters, (1, 1))()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in gradients)

    class Graphed:
        """A loss whose backward leaves ``.grad`` tensors that require grad."""

        def backward(self):
            gradients = torch.autograd.grad(penalised(ours), ours, create_graph=True)
            for p, g in zip(ours, gradients, strict=True):
                p.grad = g
                assert p.grad.requires_grad

    for _ in range(2):
        wrapped_step(optimizer, [Graphed] * 2, form)
        two_pass_step(stock, [lambda: penalised(theirs)] * 2, [rho] * 2, eta)
        torch.testing.assert_close(ours, theirs, **CLOSE)
