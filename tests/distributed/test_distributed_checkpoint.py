"""Checkpoints of sharded runs by torch.distributed.checkpoint, given the wrapper itself: resumed bit for bit."""

import copy

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as helpers

import samopt
from tests.helpers.cases import BASES, STATEFUL, TOLERANCE, assert_same, batch, bits, closure_form, parameters_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full, fully_sharded, own_part, uneven

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)


def made(base, dtype, shard=True):
    model = uneven(dtype)
    if shard:
        fully_sharded(model)
    return model, samopt.SAM(BASES[base](model.parameters()), rho=0.5, model=model, seed=3)


def train(model, optimizer, steps, dtype):
    for step in steps:
        closure_form(optimizer, model, own_part(step, dtype))


def save(model, optimizer, folder, **options):
    state = helpers.get_optimizer_state_dict(model, optimizer, options=helpers.StateDictOptions(**options))
    checkpoint.save({"model": helpers.get_model_state_dict(model), "optimizer": state}, checkpoint_id=folder)


def load(model, optimizer, folder, **options):
    options = helpers.StateDictOptions(**options)
    state = {
        "model": helpers.get_model_state_dict(model),
        "optimizer": helpers.get_optimizer_state_dict(model, optimizer, options=options),
    }
    checkpoint.load(state, checkpoint_id=folder)
    helpers.set_model_state_dict(model, state["model"])
    helpers.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def continued_and_resumed(base, dtype, folder, options):
    model, optimizer = made(base, dtype)
    train(model, optimizer, range(3), dtype)
    save(model, optimizer, folder, **options)
    train(model, optimizer, range(3, 6), dtype)

    other, resumed = made(base, dtype)
    load(other, resumed, folder, **options)
    train(other, resumed, range(3, 6), dtype)
    return [
        (
            full(parameters_of(each)),
            [group | {"params": None} for group in each.param_groups],
            each.state_dict()["samopt"],
        )
        for each in (optimizer, resumed)
    ]


@DTYPES
@pytest.mark.parametrize("base", STATEFUL)
def test_a_resumed_run_is_the_uninterrupted_one(base, dtype, tmp_path):
    for uninterrupted, resumed in run_on_ranks(continued_and_resumed, base, dtype, tmp_path, {}):
        assert_same(resumed, uninterrupted)


def test_a_checkpoint_with_flattened_groups_resumes(tmp_path):
    options = {"flatten_optimizer_state_dict": True}
    for uninterrupted, resumed in run_on_ranks(continued_and_resumed, "adamw", torch.float64, tmp_path, options):
        assert_same(resumed[:2], uninterrupted[:2])


def save_and_go_on(base, folder):
    model, optimizer = made(base, torch.float64)
    train(model, optimizer, range(3), torch.float64)
    save(model, optimizer, folder)
    saved = full(parameters_of(optimizer))
    train(model, optimizer, range(3, 6), torch.float64)
    return saved, full(parameters_of(optimizer)), optimizer.state_dict()["samopt"]


@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_another_world_size_goes_on_from_the_same_bits(base, tmp_path):
    saved, end, own = run_on_ranks(save_and_go_on, base, tmp_path)[0]
    model, optimizer = made(base, torch.float64, shard=False)
    load(model, optimizer, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), saved, strict=True))
    for step in range(3, 6):
        closure_form(optimizer, model, batch(torch.float64, seed=step))
    torch.testing.assert_close(bits(model), end, **TOLERANCE[torch.float64])
    assert optimizer.state_dict()["samopt"] == own


def load_what_one_process_saved(base, folder):
    model, optimizer = made(base, torch.float64)
    load(model, optimizer, folder)
    train(model, optimizer, range(3, 6), torch.float64)
    return full(parameters_of(optimizer))


def test_a_run_on_one_process_goes_on_sharded(tmp_path):
    model, optimizer = made("adamw", torch.float64, shard=False)
    for step in range(3):
        closure_form(optimizer, model, batch(torch.float64, seed=step))
    save(model, optimizer, tmp_path)
    for step in range(3, 6):
        closure_form(optimizer, model, batch(torch.float64, seed=step))
    for weights in run_on_ranks(load_what_one_process_saved, "adamw", tmp_path):
        torch.testing.assert_close(weights, bits(model), **TOLERANCE[torch.float64])


def test_trams_reference_is_missed_loudly_where_the_helpers_drop_it():
    def tram():
        model = uneven()
        return model, samopt.TRAM(BASES["adamw"](model.parameters()), model=model, trust_region="pretrained", scale=5.0)

    model, optimizer = tram()
    for step in range(2):
        closure_form(optimizer, model, batch(torch.float64, seed=step))
    weights, state = helpers.get_state_dict(model, optimizer)
    other, resumed = tram()
    with pytest.warns(UserWarning, match="holds no trust region.*its reference starts from the current weights"):
        helpers.set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its own state dict has everything
    for each_model, each in ((model, optimizer), (other, resumed)):
        closure_form(each, each_model, batch(torch.float64, seed=2))
    assert_same(bits(other), bits(model))
    assert resumed.last_step.distance == optimizer.last_step.distance > 0
