"""Parameters sharded by FSDP2: one perturbation over all shards, exact, without gathering anything whole."""

import datetime
import time

import pytest
import torch
from torch import nn
from torch.distributed import fsdp, tensor
from torch.distributed.device_mesh import init_device_mesh

import samopt
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    VARIANTS,
    batch,
    bits,
    closure_form,
    explicit_form,
    loss_of,
    parameters_of,
    sam_epsilon,
    same_bits,
    textbook_step,
)
from tests.helpers.collectives import Collectives
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import backward_of, full, fully_sharded, own_part, textbook_sharded_step, uneven

TIMEOUT = 3.0  # seconds
FORMS = {"closure": closure_form, "explicit": explicit_form}
DOUBLE = torch.float64


def named(variant):
    return next(kind for kind in VARIANTS if kind.name == variant)


def train(variant, base, form, steps):
    kind = named(variant)
    model = fully_sharded(uneven())
    optimizer = kind.wrap(BASES[base](model.parameters()), rho=kind.rho, model=model)
    for step in range(steps):
        FORMS[form](optimizer, model, own_part(step))
    metrics = optimizer.last_step
    return full(model.parameters()), metrics.to_dict()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("variant", [variant.name for variant in VARIANTS])
def test_shards_train_as_one_process_does(variant, base, form):
    kind = named(variant)
    model = uneven()
    stock = BASES[base](model.parameters())
    stock.param_groups[0]["rho"] = kind.rho
    for step in range(4):
        textbook_step(model, stock, batch(DOUBLE, seed=step), kind.epsilon)
    (weights, metrics), (_, other_metrics) = run_on_ranks(train, variant, base, form, 4)
    torch.testing.assert_close(weights, bits(model), **TOLERANCE[DOUBLE])
    for name in ("grad_norm", "perturbed_grad_norm", "radius", "applied_radius"):
        assert metrics[name] == other_metrics[name]
    assert metrics["applied_radius"] == pytest.approx(metrics["radius"], rel=1e-9)


def train_beside_the_textbook(change, options, dtype, steps=3):
    """Weights of the wrapper and of the textbook, both on models that ``change`` prepared and FSDP sharded."""
    ours, theirs = (fully_sharded(change(uneven(dtype)), **options) for _ in range(2))
    optimizer = samopt.SAM(BASES["adamw"]([p for p in ours.parameters() if p.requires_grad]), rho=0.5, model=ours)
    stock = BASES["adamw"]([p for p in theirs.parameters() if p.requires_grad])
    for step in range(steps):
        data = own_part(step, dtype)
        closure_form(optimizer, ours, data)
        textbook_sharded_step(stock, backward_of(theirs, data), sam_epsilon, 0.5)
    return full(ours.parameters()), full(theirs.parameters())


def unchanged(model):
    return model


def with_a_frozen_layer(model):
    model[0].requires_grad_(False)
    return model


CASES = {
    "mixed precision": (
        unchanged,
        {"mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ),
    "a frozen layer": (with_a_frozen_layer, {}),
    "CPU offload": (unchanged, {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=False)}),
    "parameters kept whole after forward": (unchanged, {"reshard_after_forward": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_options_of_fsdp_change_nothing(case):
    for ours, theirs in run_on_ranks(train_beside_the_textbook, *CASES[case], torch.float32):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float32])


def train_with_an_ignored_parameter():
    """FSDP leaves an ignored parameter to the user, who averages its gradient."""
    models = [uneven() for _ in range(2)]
    for model in models:
        fully_sharded(model, ignored_params={model[3].weight})

    def averaged(model, data):
        def backward():
            loss = backward_of(model, data)()
            torch.distributed.all_reduce(model[3].weight.grad, op=torch.distributed.ReduceOp.SUM)
            model[3].weight.grad /= 2
            return loss

        return backward

    optimizer = samopt.SAM(BASES["sgd"](models[0].parameters()), rho=0.5, model=models[0])
    stock = BASES["sgd"](models[1].parameters())
    for step in range(3):
        data = own_part(step)
        optimizer.zero_grad()
        averaged(models[0], data)()
        with optimizer.perturbed():
            averaged(models[0], data)()
        optimizer.step()
        textbook_sharded_step(stock, averaged(models[1], data), sam_epsilon, 0.5)
    return full(models[0].parameters()), full(models[1].parameters())


def test_an_ignored_parameter_counts_once_in_the_norm():
    for ours, theirs in run_on_ranks(train_with_an_ignored_parameter):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[DOUBLE])


def accumulate():
    """Two micro-batches a step, gradients exchanged after the second only."""
    model = fully_sharded(uneven())
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.5, model=model)

    def window(step):
        x, y = own_part(step)
        for part in (0, 1):
            model.set_requires_gradient_sync(part == 1)
            (loss_of(model, (x[4 * part : 4 * part + 4], y[4 * part : 4 * part + 4])) / 2).backward()

    for step in range(3):
        optimizer.zero_grad()
        window(step)
        with optimizer.perturbed():
            window(step)
        optimizer.step()
    return full(model.parameters())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = uneven()
    stock = BASES["sgd-momentum"](model.parameters())
    stock.param_groups[0]["rho"] = 0.5
    for step in range(3):
        textbook_step(model, stock, batch(DOUBLE, seed=step), sam_epsilon)
    torch.testing.assert_close(run_on_ranks(accumulate)[0], bits(model), **TOLERANCE[DOUBLE])


def sent(variant, wrap):
    model = fully_sharded(uneven())
    base = BASES["adamw"](model.parameters())
    kind = named(variant)
    optimizer = kind.wrap(base, rho=kind.rho, model=model) if wrap else base
    for step in range(2):
        closure_form(optimizer, model, own_part(step))
    with Collectives() as collectives:
        closure_form(optimizer, model, own_part(2))
    return collectives.calls


@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_beyond_two_passes_of_fsdp_only_single_numbers_are_sent(variant):
    plain = run_on_ranks(sent, variant, False)
    ours = run_on_ranks(sent, variant, True)
    for without, calls in zip(plain, ours, strict=True):
        large = [call for call in calls if call[1] > 1 or call[0] != "allgather_"]
        assert large == 2 * without
        assert len(calls) - len(large) <= 4


def second_losses():
    """The losses at the perturbed weights, without and with an evaluation between the passes."""
    losses = []
    for evaluated in (False, True):
        model = fully_sharded(uneven())
        optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
        data = own_part(0)
        loss_of(model, data).backward()
        if evaluated:
            with torch.no_grad():
                model(data[0])
        with optimizer.perturbed() as second:
            second.loss = loss_of(model, data)
            second.loss.backward()
        losses.append(optimizer.last_step.perturbed_loss)
    return losses


def test_parameters_gathered_before_the_ascent_are_gathered_again():
    for plain, after_evaluation in run_on_ranks(second_losses):
        assert torch.equal(plain, after_evaluation)


def keep_gathered_after_backward():
    model = fully_sharded(uneven())
    model.set_reshard_after_backward(False)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
    data = own_part(0)
    loss_of(model, data).backward()
    with optimizer.perturbed():
        loss_of(model, data).backward()
    with torch.no_grad():
        return loss_of(model, data), loss_of(fully_sharded(uneven()), data)


def test_parameters_gathered_in_the_second_pass_do_not_outlive_it():
    for after, fresh in run_on_ranks(keep_gathered_after_backward):
        assert torch.equal(after, fresh)


def fail_in_the_second_pass(where):
    """Rank 1 raises; returns whether the weights are exact, and the next step's weights beside a fresh model's."""
    models = [fully_sharded(uneven()) for _ in range(2)]
    optimizers = [samopt.SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model) for model in models]
    data = own_part(0)
    before = full(models[0].parameters())
    loss_of(models[0], data).backward()
    with pytest.raises(ZeroDivisionError), optimizers[0].perturbed():
        output = models[0](data[0])
        if where == "backward":
            output.register_hook(lambda gradient: 1 / 0)
            output.sum().backward()
        raise ZeroDivisionError
    exact = all(torch.equal(a, b) for a, b in zip(before, full(models[0].parameters()), strict=True))
    for model, optimizer in zip(models, optimizers, strict=True):
        closure_form(optimizer, model, own_part(1))
    return exact, full(models[0].parameters()), full(models[1].parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_second_pass_leaves_weights_exact_and_fsdp_usable(where):
    for exact, ours, fresh in run_on_ranks(fail_in_the_second_pass, where):
        assert exact
        assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


def fail_on_the_last_rank():
    """A second pass in which rank 1 raises before its backward, in a group that waits three seconds."""
    group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    mesh = torch.distributed.DeviceMesh.from_group(group, "cpu")
    model = fully_sharded(uneven(), mesh=mesh)
    optimizer = samopt.SAM(BASES["adamw"](model.parameters()), rho=0.5, model=model)
    data = own_part(0)
    closure_form(optimizer, model, data)
    before = bits(model)
    loss_of(model, data).backward()
    start, error = time.monotonic(), None
    try:
        with optimizer.perturbed():
            loss = loss_of(model, data)
            if torch.distributed.get_rank() == 1:
                raise ZeroDivisionError
            loss.backward()
    except (ZeroDivisionError, RuntimeError) as raised:
        error = type(raised).__name__
    return error, time.monotonic() - start, same_bits(model, before), optimizer.is_perturbed


def test_a_failing_rank_leaves_all_shards_exact_and_holds_nobody_beyond_the_timeout():
    waiting, failing = run_on_ranks(fail_on_the_last_rank)
    assert failing[0] == "ZeroDivisionError"
    assert waiting[0] == "RuntimeError"  # gloo's, for a rank that did not come
    assert waiting[1] < TIMEOUT + 10
    for _, _, exact, is_perturbed in (waiting, failing):
        assert exact
        assert not is_perturbed


def step_with_nan_on_one_rank(form):
    model = fully_sharded(uneven())
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
    x, y = own_part(0)
    FORMS[form](optimizer, model, (x * torch.nan if torch.distributed.get_rank() else x, y))
    return full(model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_non_finite_gradients_on_one_rank_reach_all_shards_as_they_do_without_sam(form):
    for weights in run_on_ranks(step_with_nan_on_one_rank, form):
        assert all(w.isnan().all() for w in weights)


def stay_at_zero_learning_rate(dtype, steps):
    model = fully_sharded(uneven(dtype))
    optimizer = samopt.ASAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    before = bits(model)
    for step in range(steps):
        closure_form(optimizer, model, own_part(step, dtype))
    return same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_without_a_learning_rate_every_bit_stays(dtype, steps):
    assert run_on_ranks(stay_at_zero_learning_rate, dtype, steps) == [True, True]


def train_along_momentum(steps):
    model = fully_sharded(uneven())
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.5, direction="momentum", model=model)
    evaluated = []
    for step in range(steps):
        data = own_part(step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        with torch.no_grad():
            evaluated.append(loss_of(model, batch(DOUBLE, seed=0)))
        optimizer.step()
    return full(parameters_of(optimizer)), evaluated  # the model still has those that it gathered to evaluate


def test_one_pass_along_the_momentum_of_shards():
    model = uneven()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.5, direction="momentum", model=model)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(DOUBLE, seed=step)).backward()
        with torch.no_grad():
            losses.append(loss_of(model, batch(DOUBLE, seed=0)))
        optimizer.step()
    for weights, evaluated in run_on_ranks(train_along_momentum, 4):
        torch.testing.assert_close(weights, bits(model), **TOLERANCE[DOUBLE])
        torch.testing.assert_close(evaluated, losses, **TOLERANCE[DOUBLE])  # at the exact weights


def round_equal_shards(shape):
    """What a shard of bf16 weights becomes; both shards, and all gradients, hold equal values."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    placements = [tensor.Replicate(), tensor.Shard(0)]
    ones = tensor.distribute_tensor(torch.ones(512, 1, dtype=torch.bfloat16), mesh, placements)
    weight = nn.Parameter(ones.clone())
    weight.grad = ones
    optimizer = samopt.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.05)
    optimizer.ascend()
    part = weight.to_local().detach().clone()
    optimizer.restore()
    return part, optimizer.last_step.applied_radius


def test_replicas_of_a_shard_are_rounded_alike():
    (first, norm), (second, other_norm) = run_on_ranks(round_equal_shards, (2, 1))
    assert torch.equal(first, second)
    assert norm == other_norm


def test_different_shards_are_rounded_independently():
    (first, norm), (second, other_norm) = run_on_ranks(round_equal_shards, (1, 2))
    moved, other_moved = (first != 1).double(), (second != 1).double()
    # A step of 0.05 / sqrt(512) is 0.28 of the distance from 1 to its neighbour: the chance to move.
    assert abs(moved.mean() - 0.28) < 0.1
    assert abs((moved * other_moved).mean() - 0.28**2) < 0.07
    assert norm == other_norm  # measured over both


def scale_with_overflow(overflow):
    """Two steps under a GradScaler on the CPU; in the first, rank 1's loss overflows where asked to."""
    model = fully_sharded(uneven(torch.float32))
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.5, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step in range(2):
        data = own_part(step, torch.float32)
        factor = torch.inf if overflow and step == 0 and torch.distributed.get_rank() == 1 else 1.0
        optimizer.zero_grad()
        scaler.scale(loss_of(model, data) * factor).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, data) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return full(model.parameters()), scales


def test_a_grad_scaler_skips_on_every_rank_or_on_none():
    for weights, scales in run_on_ranks(scale_with_overflow, True):
        assert scales == [512.0, 512.0]
        assert all(w.isfinite().all() for w in weights)


def test_a_grad_scaler_changes_no_update():
    model = uneven(torch.float32)
    stock = BASES["sgd"](model.parameters())
    stock.param_groups[0]["rho"] = 0.5
    for step in range(2):
        textbook_step(model, stock, batch(torch.float32, seed=step), sam_epsilon)
    for weights, scales in run_on_ranks(scale_with_overflow, False):
        assert scales == [1024.0, 1024.0]
        torch.testing.assert_close(weights, bits(model), **TOLERANCE[torch.float32])
