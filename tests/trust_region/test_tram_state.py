"""What TRAM keeps between steps: failures, checkpoints, copies, parameters that freeze and thaw."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import samopt
from samopt.trust_region import EMA, TRUST_REGIONS, InputNoise, Pretrained
from tests.helpers.cases import batch, bits, closure_of, mlp, parameter_groups, same_bits


def region(name: str) -> object:
    return EMA(decay=0.7) if name == "ema" else InputNoise(std=0.3) if name == "input_noise" else name


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("name", TRUST_REGIONS)
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_failed_step_leaves_no_trace(name: str, failing_pass: int) -> None:
    model, undisturbed = mlp(), mlp()
    optimizer, expected = (
        samopt.TRAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, trust_region=region(name), scale=20)
        for m in (model, undisturbed)
    )
    for each_optimizer, each_model in ((optimizer, model), (expected, undisturbed)):
        for step in range(2):
            each_optimizer.step(closure_of(each_optimizer, each_model, batch(seed=step)))
    calls: list[int] = []  # names that the closure binds are put back; a list sees both passes

    def failing() -> Tensor:
        calls.append(0)
        loss = closure_of(optimizer, model, batch(seed=9))()
        if len(calls) == failing_pass:
            raise RuntimeError("out of luck")
        return loss

    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step(failing)
    for step in range(2, 4):
        for each_optimizer, each_model in ((optimizer, model), (expected, undisturbed)):
            each_optimizer.step(closure_of(each_optimizer, each_model, batch(seed=step)))
    assert same_bits(model, bits(undisturbed))


@pytest.mark.parametrize("name", TRUST_REGIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_resumed_run_is_the_uninterrupted_one(name: str, dtype: torch.dtype, base: str) -> None:
    def build() -> tuple[nn.Module, samopt.TRAM]:
        model = mlp(dtype)
        groups = parameter_groups(model, [20.0, 5.0])
        made = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if base == "sgd" else torch.optim.AdamW(groups, lr=0.01)
        return model, samopt.TRAM(made, model=model, trust_region=region(name), scale=20)

    model, optimizer = build()
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed_model, resumed = build()
    resumed_model.load_state_dict(saved[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved[1])
    for step in range(3, 6):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
        resumed.step(closure_of(resumed, resumed_model, batch(dtype, seed=step)))
        assert resumed.last_step.distance == optimizer.last_step.distance > 0
    assert same_bits(resumed_model, bits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_a_copy_goes_on_by_itself(name: str, duplicate: Callable) -> None:
    model = mlp()
    optimizer = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region(name), scale=9
    )
    optimizer.step(closure_of(optimizer, model, batch()))
    other_model, other = duplicate((model, optimizer))
    for step in range(1, 3):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
    for step in range(1, 3):
        other.step(closure_of(other, other_model, batch(seed=step)))
    assert other.last_step.distance == optimizer.last_step.distance > 0
    assert same_bits(other_model, bits(model))


@pytest.mark.parametrize("saved_by", ["base", "sam", "other region"])
def test_other_checkpoints_load_with_a_warning_and_a_plain_step(saved_by: str) -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {
        "base": lambda: base,
        "sam": lambda: samopt.SAM(base),
        "other region": lambda: samopt.TRAM(base, model=model, trust_region="ema"),
    }[saved_by]()
    before.step(closure_of(before, model, batch()))
    saved = before.state_dict()

    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, scale=20)
    optimizer.step(closure_of(optimizer, model, batch(seed=5)))
    found = "the trust region EMA" if saved_by == "other region" else "no trust region"
    with pytest.warns(UserWarning, match=f"holds {found}, and this optimizer's is PreviousStep: its reference starts"):
        optimizer.load_state_dict(saved)
    optimizer.step(closure_of(optimizer, model, batch(seed=1)))
    assert optimizer.last_step.distance.item() == optimizer.last_step.radius.item() == 0.0
    optimizer.step(closure_of(optimizer, model, batch(seed=2)))
    assert optimizer.last_step.distance.item() > 0.0


def test_distributed_checkpoints_leave_the_reference_out_and_loading_one_says_so() -> None:
    def built() -> tuple[nn.Module, samopt.TRAM]:
        model = mlp()
        return model, samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, scale=20)

    (model, optimizer), (other_model, other) = built(), built()
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
    weights, state = get_state_dict(model, optimizer)
    with pytest.warns(UserWarning, match="no trust region, and .* is PreviousStep: its reference starts from"):
        set_state_dict(other_model, other, model_state_dict=weights, optim_state_dict=state)
    other.step(closure_of(other, other_model, batch(seed=2)))
    assert other.last_step.distance.item() == 0.0


def test_the_reference_is_all_that_the_state_dict_gains() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.TRAM(base, model=model)
    before = bits(model)
    optimizer.step(closure_of(optimizer, model, batch()))
    state = optimizer.state_dict()
    own = state.pop("samopt")
    assert set(own) == {"version", "rounding", "radius"}
    assert set(own["radius"]) == {"kind", "weights"}
    for (name, held), weight in zip(own["radius"]["weights"].items(), before, strict=True):
        assert dict(model.named_parameters())[name].shape == held.shape
        assert torch.equal(held, weight)
    stock = torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    stock.load_state_dict(optimizer.state_dict())


def test_frozen_parameters_are_not_copied_and_may_thaw() -> None:
    model = mlp(torch.float64)
    model[0].weight.requires_grad_(False)
    start = copy.deepcopy(model)
    optimizer = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.5), model=model, trust_region=Pretrained(), scale=1.0
    )
    assert "0.weight" not in optimizer.state_dict()["samopt"]["radius"]["weights"]
    for step in range(4):
        if step == 2:
            model[0].weight.requires_grad_(True)
        each = batch(torch.float64, seed=step)
        with torch.no_grad():
            expected = kl(start(each[0]).softmax(1), model(each[0]).softmax(1))
        optimizer.step(closure_of(optimizer, model, each))
        assert optimizer.last_step.distance.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert not torch.equal(model[0].weight, start[0].weight)
