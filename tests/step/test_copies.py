"""Copying and pickling: a copy goes on as the original would have, and apart from it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import samopt
from samopt import SharpnessAwareOptimizer
from tests.helpers.cases import (
    BASES,
    STATEFUL,
    VARIANTS,
    Variant,
    assert_same,
    assert_shared,
    batch,
    bits,
    loss_of,
    mlp,
    same_bits,
    train,
)

Pair = tuple[nn.Module, SharpnessAwareOptimizer]


def noisy_model(seed: int = 0) -> nn.Sequential:
    """A model whose second pass goes wrong unless masks are replayed and statistics are put back."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3))


def pickled(pair: Pair) -> Pair:
    result: Pair = pickle.loads(pickle.dumps(pair))
    return result


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("base", STATEFUL)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_copy_goes_on_in_lockstep_and_apart(variant: Variant, base: str, duplicate: Callable[[Pair], Pair]) -> None:
    model = noisy_model()
    optimizer = variant.wrap(BASES[base](model.parameters()), rho=variant.rho, model=model)
    train(model, optimizer, range(2))
    twin, twin_optimizer = duplicate((model, optimizer))
    before = bits(twin)
    assert_shared(optimizer)
    assert_shared(twin_optimizer)
    assert twin_optimizer.param_groups is not optimizer.param_groups
    train(model, optimizer, range(2, 5))
    assert same_bits(twin, before)
    train(twin, twin_optimizer, range(2, 5))
    assert_same(twin.state_dict(), model.state_dict())
    assert_same(twin_optimizer.state_dict(), optimizer.state_dict())


def test_a_bf16_copy_draws_the_same_roundings() -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), seed=7)
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert same_bits(twin, bits(model))


def test_a_copied_model_does_not_drag_its_optimizer_along() -> None:
    model = noisy_model()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), model=model)
    gc.collect()
    count = sum(issubclass(type(thing), SharpnessAwareOptimizer) for thing in gc.get_objects())
    average = torch.optim.swa_utils.AveragedModel(model)
    assert sum(issubclass(type(thing), SharpnessAwareOptimizer) for thing in gc.get_objects()) == count
    assert b"SAM" not in pickle.dumps(average)

    # Nor does running the copy between the passes disturb the original's replay.
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for module, wrapped, meddle in ((model, optimizer, True), (twin, twin_optimizer, False)):
        torch.manual_seed(0)
        loss_of(module, batch()).backward()
        if meddle:
            with torch.random.fork_rng(devices=[]):
                average(batch()[0])
        with wrapped.perturbed():
            loss_of(module, batch()).backward()
        wrapped.step()
    assert same_bits(twin, bits(model))

    # And the model outlives its optimizer without keeping it, or its hook.
    gone = weakref.ref(optimizer)
    del optimizer, wrapped, module
    gc.collect()
    assert gone() is None
    assert not model._forward_pre_hooks
