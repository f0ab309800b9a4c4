"""``only=`` on several ranks: every rank chooses the same parameters, by the names of the model inside the wrapper."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers.cases import BASES, TOLERANCE, assert_same, batch, bits, closure_form, loss_of, two_pass_step
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full, fully_sharded, own_part, uneven

RHO = 0.5
ONLY = r"^2\."  # of ``uneven``: the second linear layer
CHOSEN = {"2.weight", "2.bias"}


def train_sharded(shard_first):
    model = uneven()
    if shard_first:
        model = fully_sharded(model)
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=RHO, model=model, only=ONLY)
    if not shard_first:  # as accelerate does it, which gives model and optimizer new parameters
        model = fully_sharded(model)
        optimizer.param_groups[0]["params"] = list(model.parameters())
    for step in range(3):
        closure_form(optimizer, model, own_part(step))
    return full(model.parameters()), optimizer.last_step.to_dict(), len(optimizer.perturbed_parameters)


@pytest.mark.parametrize("shard_first", [True, False])
def test_shards_move_the_chosen_ones_as_one_process_does(shard_first):
    model = uneven()
    stock = BASES["sgd-momentum"](model.parameters())
    rhos = [RHO if name in CHOSEN else None for name, _ in model.named_parameters()]
    for step in range(3):
        passes = [lambda step=step: loss_of(model, batch(torch.float64, seed=step))] * 2
        two_pass_step(stock, passes, rhos, None)
    (weights, metrics, count), (_, other_metrics, _) = run_on_ranks(train_sharded, shard_first)
    assert count == len(CHOSEN)
    torch.testing.assert_close(weights, bits(model), **TOLERANCE[torch.float64])
    for name in ("grad_norm", "radius", "applied_radius"):
        assert metrics[name] == other_metrics[name]
    assert metrics["applied_radius"] == pytest.approx(RHO, rel=1e-9)


def train_replicas(synced):
    trained = []
    for only in (ONLY, None):
        model = uneven()
        ddp = DistributedDataParallel(model)
        groups = [
            {"params": [p], "perturb": only is not None or name in CHOSEN} for name, p in model.named_parameters()
        ]
        optimizer = samopt.SAM(BASES["sgd-momentum"](groups), rho=RHO, model=ddp, only=only, sync_perturbation=synced)
        for step in range(3):
            optimizer.zero_grad()
            data = own_part(step)
            optimizer.backward(lambda ddp=ddp, data=data: loss_of(ddp, data))
            optimizer.step()
        trained.append((bits(model), optimizer.last_step.to_dict(), len(optimizer.perturbed_parameters)))
    return trained


@pytest.mark.parametrize("synced", [False, True], ids=["per-rank", "synced"])
def test_replicas_train_as_with_perturb_false_in_the_other_groups(synced):
    ranks = run_on_ranks(train_replicas, synced)
    for (weights, metrics, count), (expected, expected_metrics, expected_count) in ranks:
        assert count == expected_count == len(CHOSEN)
        assert_same(weights, expected)
        assert_same(metrics, expected_metrics)
    assert_same(ranks[0][0][0], ranks[1][0][0])
