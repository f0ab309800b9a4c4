"""The gradient's memory as the backup, and weights that move: only where nobody else can see it, and back exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import samopt
from samopt.kernels import BACKENDS, Block, cpu, select
from samopt.kernels.memory import Spare, flat, lie_alike, owns_its_memory
from samopt.parts.geometry import Adaptive
from tests.helpers.cases import assert_equal, batch, bits, closure_form, explicit_form, mlp, same_bits, tensors

IN_MEMORY = ["cpu", "swap"]  # the backends that use the gradient's memory
METRICS = {"sam": None, "asam": Adaptive()}


def test_a_tensor_owns_its_memory_until_somebody_else_can_reach_it():
    tensor = torch.randn(6, 4)
    assert owns_its_memory(tensor)
    alias = tensor.detach()
    assert not owns_its_memory(tensor) and not owns_its_memory(alias)
    del alias
    view = tensor[1:]
    assert not owns_its_memory(view) and not owns_its_memory(tensor)
    del view
    assert owns_its_memory(tensor)
    assert tensor.numpy() is not None  # an array lets resize nothing, from then on
    assert not owns_its_memory(tensor)
    assert not owns_its_memory(torch.from_numpy(np.zeros(3)))
    assert not owns_its_memory(torch.zeros(3).share_memory_())
    assert not owns_its_memory(torch.zeros(8).split(4)[0])


def test_memory_of_an_accelerator_is_not_taken_for_another_processs(monkeypatch):
    elsewhere, here = torch.empty(3, device="meta"), torch.empty(3)  # which is all that can be had without one
    monkeypatch.setattr(torch.UntypedStorage, "is_shared", lambda storage: True)  # as torch says of any accelerator's
    assert owns_its_memory(elsewhere) and not owns_its_memory(here)
    alias = elsewhere.detach()
    assert not owns_its_memory(elsewhere) and alias.is_meta


@pytest.mark.parametrize(
    ("weight", "direction", "alike"),
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
def test_tensors_lie_alike_if_one_pass_over_both_memories_meets_equal_indices(weight, direction, alike):
    assert lie_alike(weight, direction) == alike


def test_flat_runs_through_the_memory_itself():
    for tensor in (torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        vector = flat(tensor)
        assert vector.data_ptr() == tensor.data_ptr() and vector.shape == (tensor.numel(),)
        assert vector.sort().values.equal(tensor.flatten().sort().values)


def test_spare_memory_is_handed_out_once_and_only_if_nobody_else_can_reach_it():
    size = 200 * 100
    own, held, low, short = (
        torch.zeros(size),
        torch.zeros(size),
        torch.zeros(size, dtype=torch.bfloat16),
        torch.zeros(9),
    )
    addresses = [t.data_ptr() for t in (own, held, low)]
    spare, memory = Spare([own, held, low, short, held[1:].view(-1)]), StorageWeakRef(short.untyped_storage())
    del own, low, short
    assert memory.expired()  # too short to be worth keeping
    turned = torch.zeros(100, 200).t()
    taken = [spare.like(turned), spare.like(turned), spare.like(turned.bfloat16())]
    assert [t.data_ptr() == a for t, a in zip(taken, [addresses[0], addresses[0], addresses[2]], strict=True)] == [
        True,
        False,  # the other one of that size is still held
        True,
    ]
    assert all(t.shape == (200, 100) and lie_alike(t, turned) for t in taken)
    assert taken[2].dtype is torch.bfloat16 and taken[1].data_ptr() not in addresses


def test_spare_memory_is_not_stretched_over_gaps():
    spare = Spare([torch.zeros(200 * 100)])
    gaps = torch.zeros(200, 200)[:, ::2]
    assert spare.like(gaps).data_ptr() != spare.like(torch.zeros(200, 100)).data_ptr()


def block_of(metric, *shapes):
    weights, directions = (
        [p.detach().clone() for p in tensors(*shapes, seed=seed, dtype=torch.float32)] for seed in (0, 1)
    )
    return Block(weights, directions, METRICS[metric], 0.1, False)


@pytest.fixture(autouse=True)
def no_small_weights(monkeypatch):
    """All weights are treated as large ones, whatever their size and number."""
    monkeypatch.setattr(cpu, "_SMALL", 0)
    monkeypatch.setattr(cpu, "_FEW", 0)


@pytest.fixture
def small_pieces(monkeypatch):
    """Large tensors in many pieces, several small ones in one: as for a real model, at test size."""
    monkeypatch.setattr(cpu, "_PIECE", 64)
    monkeypatch.setattr(cpu, "_SMALL", 6)
    monkeypatch.setattr(cpu, "_PIECE_PER_THREAD", 1)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", IN_MEMORY)
def test_directions_are_overwritten_only_if_they_may_be(name, metric, consume, small_pieces):
    block = block_of(metric, (9, 31), (5,), (0,), (7, 3))
    held = block.directions[1]
    kept = block.directions[2:]
    view = block.directions[3][1:]  # somebody else can see this one
    assert view.numel() and len(kept) == 2
    addresses, before = [w.data_ptr() for w in block.weights], [w.clone() for w in block.weights]
    directions = [d.clone() for d in block.directions]
    backend = select(block, name)
    saved = backend.save(block, consume)
    backend.ascend(block, torch.tensor(0.5, dtype=torch.float64), None, saved)
    reference = BACKENDS["reference"]
    twin = Block([w.clone() for w in before], directions, block.metric, block.eta, False)
    reference.ascend(twin, torch.tensor(0.5, dtype=torch.float64), None)
    for moved, want in zip(block.weights, twin.weights, strict=True):
        torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-7)
    overwritten = [not torch.equal(a, b) for a, b in zip(block.directions, directions, strict=True)]
    assert overwritten == [consume, False, False, False]  # a small weight is saved elsewhere
    assert held is block.directions[1]
    backend.restore(saved)
    assert all(torch.equal(w, b) for w, b in zip(block.weights, before, strict=True))
    assert [w.data_ptr() for w in block.weights] == addresses


@pytest.mark.parametrize("metric", METRICS)
def test_a_restore_after_any_number_of_pieces_is_exact(metric, small_pieces):
    block = block_of(metric, (9, 31), (5,), (7, 3), (64,), (65,), (2, 2))
    before, directions = [w.clone() for w in block.weights], [d.clone() for d in block.directions]
    for pieces in range(11):
        for d, was in zip(block.directions, directions, strict=True):
            d.copy_(was)
        saved = cpu.save(block, consume=True)
        cpu.ascend(block, torch.tensor(0.5, dtype=torch.float64), None, saved)
        assert len(saved.record) == 10
        later = [some._replace(values=some.values.clone()) for some in saved.record[pieces:]]
        cpu.restore(cpu.Exchange([], record=later))  # an interrupt came before these were written
        for some in saved.record[pieces:]:
            some.values.fill_(float("nan"))
        del saved.record[pieces:]
        cpu.restore(saved)
        assert all(torch.equal(w, b) for w, b in zip(block.weights, before, strict=True))


@pytest.mark.parametrize("value", [0.3712, 1e-3, 7.77, 12345.678])
@pytest.mark.parametrize("metric", METRICS)
def test_a_long_sum_of_equal_terms_keeps_its_digits(metric, value):
    weight, direction = torch.full((1000, 1000), 0.25), torch.full((1000, 1000), value)
    block = Block([weight], [direction], METRICS[metric], 0.1, False)
    term = float(direction[0, 0]) * (1.0 if metric == "sam" else float(weight[0, 0].double() + 0.1))
    assert float(cpu.norm(block)) == pytest.approx(term * 1000, rel=1e-6)


@pytest.mark.parametrize("others", [0, 3])
def test_one_overflowing_or_vanishing_tensor_does_not_spoil_the_norm_of_the_others(others):
    for size in (1e30, 1e-30, 0.0):
        weights = [torch.zeros(300, 7) for _ in range(others + 1)]
        directions = [torch.randn(300, 7) for _ in range(others)] + [torch.randn(300, 7) * size]
        want = sum(float(d.double().square().sum()) for d in directions) ** 0.5
        assert float(cpu.norm(Block(weights, directions, None, 0.0, False))) == pytest.approx(want, rel=1e-6)


FORMS = {"closure": closure_form, "explicit": explicit_form}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("name", IN_MEMORY)
def test_training_is_that_of_the_reference(name, wrap, form):
    models = [mlp(torch.float64) for _ in range(2)]
    optimizers = [
        wrap(torch.optim.AdamW(model.parameters(), lr=0.01), backend=backend)
        for model, backend in zip(models, (name, "reference"), strict=True)
    ]
    addresses = [p.data_ptr() for p in models[0].parameters()]
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            FORMS[form](optimizer, model, batch(torch.float64, seed=step))
        assert [p.data_ptr() for p in models[0].parameters()] == addresses
    assert_equal(models[0], models[1])


@pytest.mark.parametrize("name", IN_MEMORY)
def test_first_gradients_that_are_not_used_come_back_unchanged(name):
    for slope in (0.0, float("inf"), float("nan")):
        (w,) = tensors((4, 3), dtype=torch.float32)
        optimizer = samopt.SAM([w], torch.optim.SGD, lr=0.1, backend=name)
        w.grad = gradient = torch.full((4, 3), slope)
        with optimizer.perturbed():
            w.grad = torch.ones(4, 3)
        assert w.grad is gradient
        torch.testing.assert_close(gradient, torch.full((4, 3), slope), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("name", IN_MEMORY)
def test_gradients_that_the_user_holds_stay_as_they_are(name, wrap):
    model = mlp()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), backend=name)
    explicit = torch.nn.functional.cross_entropy(model(batch()[0]), batch()[1])
    explicit.backward()
    parameters = list(model.parameters())
    held = [parameters[0].grad, parameters[1].grad.view(-1), parameters[2].grad.numpy(), parameters[3].grad.detach()]
    values = [np.asarray(h).copy() for h in held]
    before = bits(model)
    with optimizer.perturbed():
        assert not same_bits(model, before)
        torch.nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert same_bits(model, before)
    for now, was in zip(held, values, strict=True):
        assert np.array_equal(np.asarray(now), was)


class NewMemory(TorchDispatchMode):
    """Adds up the bytes of the largest allocation and of all tensors made."""

    def __init__(self, *known):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr(): 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage.data_ptr(), storage.nbytes())
        return result

    @property
    def largest(self):
        return max(self.storages.values())


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("name", [*IN_MEMORY, "foreach"])
def test_no_copy_of_the_weights_is_made_where_the_gradients_can_hold_them(name, wrap, monkeypatch):
    monkeypatch.setattr(cpu, "_PIECE", 1 << 12)
    monkeypatch.setattr(cpu, "_PIECE_PER_THREAD", 1)
    parameters = tensors((700, 80), (300,), (64, 32, 3, 3), dtype=torch.float32)
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1), backend=name, measure_grad_norms=False)
    for p in parameters:
        p.grad = torch.randn_like(p)
    with NewMemory(*parameters, *[p.grad for p in parameters]) as memory:
        optimizer.ascend()
        optimizer.restore()
    smallest_large_weight = 4 * 64 * 32 * 9
    assert (memory.largest < smallest_large_weight) == (name != "foreach")


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("name", [*IN_MEMORY, "foreach", "reference"])
def test_gradients_that_hold_no_weights_are_freed_while_perturbed(name, wrap, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", 40)
    small, large, bucketed = tensors((5, 8), (30, 20), (10, 9), dtype=torch.float32)
    small.grad, large.grad = torch.ones(5, 8), torch.ones(30, 20)
    bucketed.grad = torch.ones(91)[1:].view(10, 9)
    memories = [StorageWeakRef(p.grad.untyped_storage()) for p in (small, large, bucketed)]
    optimizer = wrap(torch.optim.SGD([small, large, bucketed], lr=0.1), backend=name, measure_grad_norms=False)
    optimizer.ascend()
    assert [memory.expired() for memory in memories] == [True, name not in IN_MEMORY, True]
    optimizer.restore()


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("small", [0, 9])
@pytest.mark.parametrize("name", IN_MEMORY)
@pytest.mark.parametrize("moves", ["never", "up", "up and down"])
def test_autograd_notices_that_the_weights_of_a_saved_graph_moved(moves, name, small, wrap, monkeypatch):
    monkeypatch.setattr(cpu, "_SMALL", small)
    w, x = nn.Parameter(torch.randn(3, 3)), torch.ones(3, requires_grad=True)
    optimizer = wrap([w], torch.optim.SGD, lr=0.1, backend=name)
    (w @ x).square().sum().backward(retain_graph=True)
    graph = (w @ x).sum()
    if moves == "never":
        graph.backward()
        return
    optimizer.ascend()
    if moves == "up and down":
        optimizer.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


SHARED = {
    "a view": lambda w: w.detach()[1:],
    "an alias": lambda w: w.detach(),
    "numpy": lambda w: w.detach().numpy(),
    "another parameter": lambda w: nn.Parameter(w.detach().view(-1)),
}


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("how", SHARED)
def test_swap_leaves_weights_where_others_see_them(how, wrap):
    alone, shared = (p.requires_grad_() for p in tensors((4, 3), (5, 2), dtype=torch.float32))
    optimizer = wrap([alone, shared], torch.optim.SGD, lr=0.1, backend="swap")
    seen = SHARED[how](shared)
    before, addresses = [alone.detach().clone(), shared.detach().clone()], [alone.data_ptr(), shared.data_ptr()]
    (alone.sum() + shared.sum()).backward()
    was = np.asarray(seen.detach() if isinstance(seen, torch.Tensor) else seen).copy()
    with optimizer.perturbed():
        assert [alone.data_ptr() != addresses[0], shared.data_ptr() == addresses[1]] == [True, True]
        assert not torch.equal(alone, before[0]) and not torch.equal(shared, before[1])
        now = np.asarray(seen.detach() if isinstance(seen, torch.Tensor) else seen)
        assert not np.array_equal(now, was)
    assert torch.equal(alone, before[0]) and torch.equal(shared, before[1])
    assert [alone.data_ptr(), shared.data_ptr()] == addresses


def values_of(seen):
    return np.asarray(seen.detach() if isinstance(seen, torch.Tensor) else seen)


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
@pytest.mark.parametrize("how", SHARED)
def test_a_name_taken_while_perturbed_follows_its_weight_ever_after(how, wrap):
    named, other = (p.requires_grad_() for p in tensors((5, 2), (4, 3), dtype=torch.float32))
    optimizer = wrap([named, other], torch.optim.SGD, lr=0.1, backend="swap")
    before, address = [named.detach().clone(), other.detach().clone()], other.data_ptr()
    (named.sum() + other.sum()).backward()
    with optimizer.perturbed():
        seen = SHARED[how](named)
        assert not torch.equal(named, before[0])
        (named.sum() + other.sum()).backward()
    assert torch.equal(named, before[0]) and torch.equal(other, before[1])
    assert other.data_ptr() == address  # nobody took a name of this one
    assert np.array_equal(values_of(seen), values_of(SHARED[how](named)))
    optimizer.step()
    assert torch.equal(named, before[0] - 0.1)
    assert np.array_equal(values_of(seen), values_of(SHARED[how](named)))


def test_a_name_that_a_model_takes_in_its_one_forward_follows_the_weight():
    class Remembering(nn.Linear):
        def forward(self, x):
            self.seen = self.weight.detach().t()
            return super().forward(x)

    torch.manual_seed(0)
    model = Remembering(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.SAM(base, rho=0.5, direction="momentum", model=model, backend="swap")
    for step in range(4):
        kept = model.seen if step else None
        loss = model(torch.randn(5, 4)).square().mean()
        if step > 1:
            assert torch.equal(kept, model.weight.t())  # and so it does at w + epsilon
        loss.backward()
        assert torch.equal(model.seen, model.weight.t())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.seen, model.weight.t())


@pytest.mark.parametrize("backend, moves", [("auto", False), ("cpu", False), ("swap", True)])
def test_only_swap_changes_addresses_and_not_of_memory_between_processes(backend, moves):
    shared, alone = nn.Parameter(torch.randn(4, 3).share_memory_()), nn.Parameter(torch.randn(4, 3))
    optimizer = samopt.SAM([shared, alone], torch.optim.SGD, lr=0.1, backend=backend)
    addresses = shared.data_ptr(), alone.data_ptr()
    for p in (shared, alone):
        p.grad = torch.ones(4, 3)
    with optimizer.perturbed():
        assert shared.data_ptr() == addresses[0] and (alone.data_ptr() != addresses[1]) == moves
    assert (shared.data_ptr(), alone.data_ptr()) == addresses


@pytest.mark.parametrize("wrap", [samopt.SAM, samopt.ASAM])
def test_swap_moves_weights_while_perturbed_and_back(wrap):
    model = mlp()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), backend="swap")
    addresses = [p.data_ptr() for p in model.parameters()]
    torch.nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    gradients = {p.grad.data_ptr() for p in model.parameters()}
    with optimizer.perturbed():
        assert {p.data_ptr() for p in model.parameters()} == gradients
    assert [p.data_ptr() for p in model.parameters()] == addresses


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
def test_swap_trains_models_that_look_at_their_weights_in_special_ways(build):
    def loss_of(model, seed):
        out = model(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)))
        return (out[0] if isinstance(out, tuple) else out).square().mean()

    models = [build().double() for _ in range(2)]
    torch.set_default_dtype(torch.float64)
    try:
        for model, backend in zip(models, ("swap", "reference"), strict=True):
            optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, backend=backend)
            for seed in range(3):
                optimizer.zero_grad()
                loss_of(model, seed).backward()
                with optimizer.perturbed():
                    loss_of(model, seed).backward()
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(models[0], models[1])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_swap_does_not_recompile_a_compiled_model(compiler):
    torch._dynamo.reset()
    model = mlp()
    twin = mlp()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), backend="swap")
    other = samopt.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), backend="reference")
    explicit_form(optimizer, compiled, batch(seed=0))
    explicit_form(other, twin, batch(seed=0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            explicit_form(optimizer, compiled, batch(seed=seed))
            explicit_form(other, twin, batch(seed=seed))
    assert_equal_fp32(model, twin)
    torch._dynamo.reset()


def assert_equal_fp32(model, twin):
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-7)


def one_pass_steps(model, backend, passes):
    """Step along the momentum, with gradients from ``passes``; say whether weights left their memory, and came back.

    They stay where a graph that is kept has views of them.
    """
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = samopt.SAM(base, rho=0.3, direction="momentum", model=model, backend=backend)
    places, away, back = [], [], []

    def look():
        places.append([p.data_ptr() for p in model.parameters()])

    for step in range(4):
        optimizer.zero_grad()
        places.clear()
        look()
        passes(model, step, look)
        look()
        away.append(any(where != places[0] for where in places[1:-1]))
        back.append(places[-1] == places[0])
        optimizer.step()
    return any(away), all(back)


def micro_batches(model, step, look):
    for part in (0, 1):
        x, y = batch(torch.float64, seed=2 * step + part)
        loss = nn.functional.cross_entropy(model(x), y)
        look()
        loss.backward()


def two_backwards(model, step, look):
    x, y = batch(torch.float64, seed=step)
    logits = model(x)
    logits[:, 0].pow(2).mean().backward(retain_graph=True)
    loss = nn.functional.cross_entropy(logits, y)
    look()
    loss.backward()


def checkpointed(model, step, look):
    x, y = batch(torch.float64, seed=step)
    logits = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
    look()
    nn.functional.cross_entropy(logits, y).backward()


@pytest.mark.parametrize("passes", [micro_batches, two_backwards, checkpointed])
def test_swap_moves_weights_in_one_pass_too(passes):
    swapped, reference = mlp(torch.float64), mlp(torch.float64)
    assert one_pass_steps(swapped, "swap", passes) == (True, passes is not two_backwards)
    assert one_pass_steps(reference, "reference", passes) == (False, True)
    assert_equal(swapped, reference)
