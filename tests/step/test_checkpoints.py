"""Saving and loading: what comes back goes on exactly as the original would have."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import samopt
from samopt import SharpnessAwareOptimizer
from tests.helpers.cases import (
    BASES,
    DTYPES,
    STATEFUL,
    VARIANTS,
    Variant,
    assert_equal,
    assert_same,
    assert_shared,
    batch,
    bits,
    loss_of,
    mlp,
    parameter_groups,
    sam_epsilon,
    same_bits,
    textbook_step,
    train,
)


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("base", STATEFUL)
def test_a_checkpoint_is_the_bases_with_a_few_counters(base: str) -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.SAM(BASES[base](model.parameters()), model=model)
    train(model, optimizer, range(2))
    ours, plain = optimizer.state_dict(), optimizer.base_optimizer.state_dict()
    assert ours.keys() - plain.keys() == {"samopt"}
    assert ours["samopt"] == {"version": 1, "rounding": 2}
    assert [group.pop("samopt_rounding") for group in ours["param_groups"]] == [2]
    assert [group.pop("samopt_version") for group in ours["param_groups"]] == [1]
    assert_same({key: ours[key] for key in plain}, plain)
    sizes = [len(pickle.dumps(value)) for value in (ours, plain)]
    assert sizes[0] - sizes[1] < 64


@pytest.mark.parametrize("base", STATEFUL)
@pytest.mark.parametrize("target", ["wrapper", "base"])
@pytest.mark.parametrize("source", ["wrapper", "base"])
def test_wrapper_and_base_read_each_others_checkpoints(source: str, target: str, base: str) -> None:
    model = mlp()
    saved = (
        samopt.SAM(BASES[base](model.parameters()), rho=0.1) if source == "wrapper" else BASES[base](model.parameters())
    )
    train(model, saved, range(2))
    other = mlp()
    other.load_state_dict(through_a_file(model.state_dict()))
    loaded = (
        samopt.SAM(BASES[base](other.parameters()), rho=0.3) if target == "wrapper" else BASES[base](other.parameters())
    )
    loaded.load_state_dict(through_a_file(saved.state_dict()))

    assert_same(loaded.state_dict()["state"], saved.state_dict()["state"])
    if target == "wrapper":
        assert_shared(loaded)
        assert loaded.param_groups[0]["rho"] == (0.1 if source == "wrapper" else 0.3)
        assert loaded.param_groups[0]["eta"] == 0.01
        assert loaded.param_groups[0]["perturb"] is True
    # The base's next update from equal gradients is the same update, momenta included.
    for module, optimizer in ((model, saved), (other, loaded)):
        optimizer.zero_grad()
        loss_of(module, batch(seed=9)).backward()
        getattr(optimizer, "base_optimizer", optimizer).step()
    assert same_bits(other, bits(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", STATEFUL)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_resumed_run_equals_an_uninterrupted_one(variant: Variant, base: str, dtype: torch.dtype) -> None:
    def build(seed: int) -> tuple[nn.Module, SharpnessAwareOptimizer]:
        model = mlp(dtype, seed)
        return model, variant.wrap(BASES[base](model.parameters()), rho=variant.rho, seed=5, model=model)

    uninterrupted, optimizer = build(0)
    train(uninterrupted, optimizer, range(6))
    first, optimizer = build(0)
    train(first, optimizer, range(3))
    checkpoint = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, optimizer = build(1)
    train(resumed, optimizer, range(20, 22))  # whatever it did before, loading replaces it
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, optimizer, range(3, 6))
    assert same_bits(resumed, bits(uninterrupted))


def add_a_group(optimizer: SharpnessAwareOptimizer) -> SharpnessAwareOptimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rho": 0.7})
    assert [group["rho"] for group in optimizer.param_groups] == [0.05, 0.7]
    return optimizer


def load_its_own_state(optimizer: SharpnessAwareOptimizer) -> SharpnessAwareOptimizer:
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return optimizer


def load_into_its_base(optimizer: SharpnessAwareOptimizer) -> SharpnessAwareOptimizer:
    optimizer.base_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return optimizer


def add_a_group_to_its_base(optimizer: SharpnessAwareOptimizer) -> SharpnessAwareOptimizer:
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    return load_its_own_state(optimizer)


@pytest.mark.parametrize(
    "act", [add_a_group, load_its_own_state, load_into_its_base, add_a_group_to_its_base, copy.copy, copy.deepcopy]
)
def test_groups_state_and_defaults_stay_the_bases(
    act: Callable[[SharpnessAwareOptimizer], SharpnessAwareOptimizer],
) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["adamw"](model.parameters()))
    train(model, optimizer, range(1))
    optimizer = act(optimizer)
    assert_shared(optimizer)
    assert "param_groups" not in vars(optimizer)
    assert "state" not in vars(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.0
    optimizer.defaults = optimizer.defaults | {"lr": 0.5}
    assert optimizer.base_optimizer.defaults["lr"] == 0.5 and "defaults" not in vars(optimizer)


def with_two_groups(state: dict[str, Any]) -> None:
    state["param_groups"] *= 2


def with_fewer_parameters(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def without_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


@pytest.mark.parametrize("damage", [with_two_groups, with_fewer_parameters, without_groups])
def test_a_failing_load_leaves_everything(damage: Callable[[dict[str, Any]], None]) -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.SAM(BASES["adamw"](model.parameters()), rho=0.2)
    train(model, optimizer, range(2))
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    broken = copy.deepcopy(before)
    broken["samopt"]["rounding"] = 99
    broken["param_groups"][0]["rho"] = 9.0
    damage(broken)
    with pytest.raises((ValueError, KeyError)):
        optimizer.load_state_dict(broken)
    assert_same(optimizer.state_dict(), before)
    assert optimizer.param_groups is groups
    assert_shared(optimizer)


@pytest.mark.parametrize("where", ["wrapper", "base"])
def test_state_dict_hooks_fire_once_and_may_replace_the_state(where: str) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()))
    train(model, optimizer, range(1))
    hooked = optimizer if where == "wrapper" else optimizer.base_optimizer
    seen: list[tuple[str, bool]] = []

    def replaced(name: str) -> Callable[..., dict[str, Any]]:
        def hook(owner: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            seen.append((name, owner is hooked))
            groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
            return {**state, "param_groups": groups}

        return hook

    hooked.register_state_dict_pre_hook(lambda owner: seen.append(("pre", owner is hooked)))
    hooked.register_state_dict_post_hook(replaced("post"))
    hooked.register_load_state_dict_pre_hook(replaced("load pre"))
    hooked.register_load_state_dict_post_hook(lambda owner: seen.append(("load post", owner is hooked)))
    state = optimizer.state_dict()
    assert seen == [("pre", True), ("post", True)]
    assert (state["param_groups"][0]["lr"], optimizer.param_groups[0]["lr"]) == (0.05, 0.1)
    optimizer.load_state_dict(state)
    assert seen[2:] == [("load pre", True), ("load post", True)]
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert state["param_groups"][0]["lr"] == 0.05


@pytest.mark.parametrize("base", STATEFUL)
@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint_round_trip(flat: bool, base: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    optimizer = samopt.SAM(BASES[base](model.parameters()), rho=0.1)
    untouched = bits(model)
    get_optimizer_state_dict(model, optimizer, options=options)  # initialises the state by a step of zero gradients
    assert same_bits(model, untouched)
    train(model, optimizer, range(2))
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    twin = mlp(seed=1)
    twin.load_state_dict(model.state_dict())
    loaded = samopt.SAM(BASES[base](twin.parameters()), rho=0.3)
    set_optimizer_state_dict(twin, loaded, saved, options=options)
    assert same_bits(twin, bits(model))
    assert_shared(loaded)
    train(model, optimizer, range(2, 4))
    train(twin, loaded, range(2, 4))
    assert same_bits(twin, bits(model))
    assert loaded.param_groups[0]["rho"] == 0.1


@pytest.mark.hf
def test_accelerates_round_trip_keeps_the_schedule_alive() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.05)
    stock = BASES["sgd-momentum"](parameter_groups(expected, [0.05]))
    scheduler, stock_scheduler = (torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (optimizer, stock))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_model, prepared, prepared_scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert_shared(optimizer)
    for step in range(3):
        data = batch(torch.float64, seed=step)
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared_model, data))
        with optimizer.perturbed():
            accelerator.backward(loss_of(prepared_model, data))
        prepared.step()
        prepared_scheduler.step()
        textbook_step(expected, stock, data, sam_epsilon)
        stock_scheduler.step()
        assert optimizer.base_optimizer.param_groups[0]["lr"] == stock.param_groups[0]["lr"]
        assert_equal(model, expected)
