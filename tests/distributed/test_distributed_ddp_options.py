"""DistributedDataParallel's own options, and what people put beside it, around a sharpness-aware step."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers.cases import (
    BASES,
    batch,
    bits,
    closure_form,
    loss_of,
    mlp,
    parameters_of,
    sam_epsilon,
    second_gradient,
)
from tests.helpers.collectives import Collectives
from tests.helpers.ranks import run_on_ranks

MODES = pytest.mark.parametrize("sync", [False, True], ids=["per-rank", "synced"])
RHO = 0.5


class Branching(nn.Module):
    """A model with a layer that every second batch leaves out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.extra, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        # Both passes of a step, and both models that a test compares, see the same sign.
        return self.head(self.extra(hidden) if x[0, 0] > 0 else hidden)


def half(step):
    """A rank's half of a step's batch, whose first number is positive on both ranks or on none."""
    x, y = batch(seed=step)
    x = x.clone()
    x[::8, 0] = 1.0 if step % 2 else -1.0
    part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
    return x[part], y[part]


def textbook_step(model, base, data, sync):
    """A step in plain torch on a DDP model: the first pass on the module inside, or through DDP."""
    called = iter([model if sync else model.module, model])

    def backward():
        loss = loss_of(next(called), data)
        loss.backward()
        return loss

    second_gradient(parameters_of(base), backward, sam_epsilon, RHO)
    base.step()


def train_beside_the_textbook(kind, options, sync, hook=None, steps=4):
    """The weights that the wrapper's closure form and the textbook reach under the same options of DDP."""
    ours, theirs = (DistributedDataParallel(kind(), **options) for _ in range(2))
    if hook is not None:
        for model in (ours, theirs):
            model.register_comm_hook(None, getattr(default_hooks, hook))
    optimizer = samopt.SAM(BASES["sgd-momentum"](ours.parameters()), rho=RHO, model=ours, sync_perturbation=sync)
    stock = BASES["sgd-momentum"](theirs.parameters())
    for step in range(steps):
        data = half(step)

        def closure(data=data):
            optimizer.zero_grad()
            loss = loss_of(ours, data)
            loss.backward()
            return loss

        optimizer.step(closure)
        learns_graph = step == 0 and options.get("static_graph", False)  # from an exchange, whatever the mode
        textbook_step(theirs, stock, data, sync or learns_graph)
    return bits(ours), bits(theirs)


OPTIONS = {
    "gradient_as_bucket_view": (mlp, {"gradient_as_bucket_view": True}),
    "static_graph": (mlp, {"static_graph": True}),
    "static_graph and bucket views": (mlp, {"static_graph": True, "gradient_as_bucket_view": True}),
    "find_unused_parameters": (Branching, {"find_unused_parameters": True}),
    "find_unused_parameters and bucket views": (
        Branching,
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ),
    "small buckets": (mlp, {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
}


@MODES
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_ddp_change_nothing(option, sync):
    (ours, theirs), (other, _) = run_on_ranks(train_beside_the_textbook, *OPTIONS[option], sync)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


@MODES
@pytest.mark.parametrize("hook", ["allreduce_hook", "fp16_compress_hook"])
def test_a_communication_hook_sees_what_the_textbook_sends(hook, sync):
    (ours, theirs), (other, _) = run_on_ranks(train_beside_the_textbook, mlp, {}, sync, hook)
    torch.testing.assert_close(ours, theirs, rtol=2e-3 if "16" in hook else 2e-6, atol=1e-4 if "16" in hook else 2e-7)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def accumulate(sync, form):
    """Two micro-batches a step; gradients are exchanged at the end of a pass that exchanges them."""
    model = DistributedDataParallel(mlp(torch.float64))
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=model, sync_perturbation=sync)

    def window(x, y):
        with model.no_sync():
            (loss_of(model, (x[:4], y[:4])) / 2).backward()
        loss = loss_of(model, (x[4:], y[4:])) / 2
        loss.backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return window(*data)

    with Collectives() as collectives:
        for step in range(3):
            part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
            x, y = batch(torch.float64, seed=step)
            data = x[part], y[part]
            if form == "closure":
                optimizer.step(closure)
                continue
            optimizer.zero_grad()
            with optimizer.first_pass():
                window(*data)
            with optimizer.perturbed():
                window(*data)
            optimizer.step()
    return bits(model), sum(name == "allreduce_" for name, _ in collectives.calls)


def whole_batches(sync):
    """The same steps without micro-batches."""
    model = DistributedDataParallel(mlp(torch.float64))
    stock = BASES["sgd"](model.parameters())
    for step in range(3):
        part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
        x, y = batch(torch.float64, seed=step)
        textbook_step(model, stock, (x[part], y[part]), sync)
    return bits(model)


@MODES
@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_a_window_of_micro_batches_is_exchanged_once_a_pass(form, sync):
    want = run_on_ranks(whole_batches, sync)[0]
    for weights, exchanges in run_on_ranks(accumulate, sync, form):
        torch.testing.assert_close(weights, want, rtol=1e-12, atol=1e-12)
        assert exchanges == 3 * (2 if sync else 1)


def accumulate_with_a_static_graph():
    """Two micro-batches a step in ``backward``; returns the weights and whether each first pass was exchanged."""
    model = DistributedDataParallel(mlp(torch.float64), static_graph=True)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=model)
    for step in range(3):
        part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
        x, y = batch(torch.float64, seed=step)
        x, y = x[part], y[part]
        optimizer.zero_grad()
        optimizer.backward(lambda x=x, y=y: loss_of(model, (x[:4], y[:4])) / 2, last=False)
        optimizer.backward(lambda x=x, y=y: loss_of(model, (x[4:], y[4:])) / 2)
        optimizer.step()
    return bits(model)


def whole_batches_with_a_synced_start():
    model = DistributedDataParallel(mlp(torch.float64))
    stock = BASES["sgd"](model.parameters())
    for step in range(3):
        part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
        x, y = batch(torch.float64, seed=step)
        textbook_step(model, stock, (x[part], y[part]), sync=step == 0)
    return bits(model)


def test_the_window_in_which_a_static_graph_is_learnt_has_one_perturbation():
    """Not the average of the first micro-batch with this rank's second one."""
    want = run_on_ranks(whole_batches_with_a_synced_start)[0]
    for weights in run_on_ranks(accumulate_with_a_static_graph):
        torch.testing.assert_close(weights, want, rtol=1e-12, atol=1e-12)


class Halves(nn.Module):
    """Two DDP modules in a row."""

    def __init__(self, wrap):
        super().__init__()
        whole = mlp(torch.float64)
        self.body, self.head = wrap(nn.Sequential(*whole[:2])), wrap(whole[2])

    def forward(self, x):
        return self.head(self.body(x))


def train_halves(given):
    """One optimizer over both, told of both DDP modules or of one."""
    model = Halves(DistributedDataParallel)
    models = {"both": [model.body, model.head], "one": model.body}[given]
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=models)
    for step in range(3):
        part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
        x, y = batch(torch.float64, seed=step)
        closure_form(optimizer, model, (x[part], y[part]))
    return bits(model)


@pytest.mark.parametrize("given", ["both", "one"])
def test_a_perturbation_is_of_one_mode_alone(given):
    """Each rank's own where both modules can leave out the exchange, and the averaged one where one cannot."""
    want = run_on_ranks(whole_batches, given == "one")[0]
    for weights in run_on_ranks(train_halves, given):
        torch.testing.assert_close(weights, want, rtol=1e-12, atol=1e-12)


def powersgd(sync):
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    model = DistributedDataParallel(mlp())
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=model, sync_perturbation=sync)
    for step in range(6):
        optimizer.zero_grad()
        with optimizer.first_pass():
            loss_of(model, half(step)).backward()
        with optimizer.perturbed():
            loss_of(model, half(step)).backward()
        optimizer.step()
    return bits(model), state.iter


@MODES
def test_a_hook_with_a_memory_is_called_once_an_exchange(sync):
    (first, calls), (second, _) = run_on_ranks(powersgd, sync)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert calls == 6 * (2 if sync else 1)


def sharded_state(zero, sync):
    model = DistributedDataParallel(mlp())
    if zero:
        base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    else:
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = samopt.ASAM(base, rho=RHO, model=model, sync_perturbation=sync)
    for step in range(4):
        closure_form(optimizer, model, half(step))
    if not zero:
        return bits(model), optimizer.state_dict(), 0
    held = sum(tensor.numel() for state in base.optim.state.values() for tensor in state.values() if tensor.dim())
    optimizer.consolidate_state_dict(to=0)  # reaches the base
    return bits(model), optimizer.state_dict() if torch.distributed.get_rank() == 0 else None, held


@MODES
def test_a_base_that_shards_its_state_takes_the_steps_of_one_that_does_not(sync):
    (ours, state, held), (other, _, other_held) = run_on_ranks(sharded_state, True, sync)
    plain, plain_state, _ = run_on_ranks(sharded_state, False, sync)[0]
    torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-7)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    assert held + other_held == 2 * sum(p.numel() for p in mlp().parameters())
    assert min(held, other_held) > 0
    assert state["state"].keys() == plain_state["state"].keys()
    torch.testing.assert_close(state["state"][0]["exp_avg"], plain_state["state"][0]["exp_avg"], rtol=2e-6, atol=2e-7)


def unequal_inputs(wrap, sync):
    """Rank 0 has five batches and rank 1 three."""
    model = DistributedDataParallel(mlp())
    base = BASES["sgd"](model.parameters())
    optimizer = samopt.SAM(base, rho=RHO, model=model, sync_perturbation=sync) if wrap else None
    with Join([model]):
        for step in range(5 if torch.distributed.get_rank() == 0 else 3):
            data = half(step)
            if optimizer is None:
                textbook_step(model, base, data, sync)
                continue

            def closure(data=data):
                optimizer.zero_grad()
                loss = loss_of(model, data)
                loss.backward()
                return loss

            optimizer.step(closure)
    return bits(model)


@MODES
def test_ranks_with_fewer_batches_join_the_others(sync):
    ours, other = run_on_ranks(unequal_inputs, True, sync)
    theirs = run_on_ranks(unequal_inputs, False, sync)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def scaled(sync, overflow):
    model = DistributedDataParallel(mlp())
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=model, sync_perturbation=sync)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(3):
        data = half(step)
        factor = torch.inf if overflow and step == 1 and torch.distributed.get_rank() == 1 else 1.0
        optimizer.zero_grad()
        with optimizer.first_pass():
            scaler.scale(loss_of(model, data) * factor).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, data) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return bits(model), scales


@MODES
def test_an_overflow_on_one_rank_skips_the_step_on_all(sync):
    (first, scales), (second, other_scales) = run_on_ranks(scaled, sync, True)
    assert scales == other_scales == [1024.0, 512.0, 512.0]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


@MODES
def test_a_scaler_changes_no_update(sync):
    weights, scales = run_on_ranks(scaled, sync, False)[0]
    _, theirs = run_on_ranks(train_beside_the_textbook_with_sgd, sync)[0]
    assert scales == [1024.0] * 3
    torch.testing.assert_close(weights, theirs, rtol=2e-6, atol=2e-7)


def train_beside_the_textbook_with_sgd(sync):
    model = DistributedDataParallel(mlp())
    stock = BASES["sgd"](model.parameters())
    for step in range(3):
        textbook_step(model, stock, half(step), sync)
    return None, bits(model)


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def statistics(wrap, sync):
    """Running statistics after steps that move no weight."""
    model = DistributedDataParallel(normalised())
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = samopt.SAM(base, rho=RHO, model=model, sync_perturbation=sync) if wrap else base
    for step in range(4):
        closure_form(optimizer, model, half(step))
    return [buffer.clone() for buffer in model.buffers()]


@MODES
def test_norm_statistics_are_those_that_ddp_keeps_without_sam(sync):
    for ours, plain in zip(run_on_ranks(statistics, True, sync), run_on_ranks(statistics, False, sync), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def compiled(sync):
    model = torch.compile(DistributedDataParallel(mlp()), backend="eager")
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=RHO, model=model, sync_perturbation=sync)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    for step in range(3):
        data = half(step)
        optimizer.step(closure)
    with Collectives() as collectives:
        optimizer.step(closure)
    return len(collectives.calls), bits(model)


@MODES
def test_ddp_is_found_inside_a_compiled_module(sync):
    for exchanges, weights in run_on_ranks(compiled, sync):
        assert exchanges == (2 if sync else 1)
        assert all(w.isfinite().all() for w in weights)


def one_pass(dtype):
    model = DistributedDataParallel(mlp(dtype))
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=RHO, direction="momentum", model=model)
    for step in range(3):
        x, y = half(step)
        optimizer.zero_grad()
        loss_of(model, (x.to(dtype), y)).backward()
        optimizer.step()
    x, y = half(3)
    with Collectives() as collectives:
        optimizer.zero_grad()
        loss_of(model, (x.to(dtype), y)).backward()
        optimizer.step()
    return bits(model), collectives.calls, parameters_of(optimizer)[0].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_keeps_replicas_equal_and_sends_what_ddp_sends(dtype):
    (first, calls, got), (second, _, _) = run_on_ranks(one_pass, dtype)
    assert got is dtype
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert calls == [("allreduce_", sum(p.numel() for p in mlp().parameters()))]
