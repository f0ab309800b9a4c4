"""Flat-LoRA when several ranks train: one noise for all, a gradient for each or a shared one, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers import adapters
from tests.helpers.adapters import DOUBLE, OwnWeight, differing, frozen, hand_step, own, own_layers, trained
from tests.helpers.cases import TOLERANCE, batch, bits
from tests.helpers.ranks import needs_fully_shard, run_on_ranks

STEPS, RHO = 4, 0.2


def half(step, rank):
    x, y = batch(DOUBLE, seed=step)
    return x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]


def loss_of(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


def adamw(model):
    return torch.optim.AdamW(trained(model), lr=0.01)


def train(perturbation, sync, accumulate):
    model = DistributedDataParallel(own())
    optimizer = samopt.FlatLoRA(
        adamw(model), model=model, rho=RHO, perturbation=perturbation, sync_perturbation=sync, seed=4
    )
    before = frozen(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            data = half(10 * step + part, torch.distributed.get_rank())
            optimizer.backward(lambda data=data: loss_of(model, data) / accumulate, last=part == accumulate - 1)
        optimizer.step()
    return bits(model), differing(model, before)


def by_hand(perturbation, sync, accumulate):
    """One process with the whole batch; each half along its own gradient where ranks do not share it."""
    model = own()
    base, layers = adamw(model), own_layers(model)
    for step in range(STEPS):

        def backward(rank, step=step):
            for part in range(accumulate):
                (loss_of(model, half(10 * step + part, rank)) / accumulate / 2).backward()

        if perturbation == "noise" or sync:
            options = {"perturbation": perturbation, "rho": RHO, "seed": 4, "step": step}
            hand_step(base, layers, lambda backward=backward: (backward(0), backward(1)), **options)
            continue
        base.zero_grad()
        moves = [adapters.uphill(layers, [RHO] * 2, lambda rank=rank: backward(rank)) for rank in range(2)]
        base.zero_grad()
        for rank in range(2):
            adapters.backward_at(layers, moves[rank], lambda rank=rank: backward(rank))
        base.step()
    return bits(model)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("perturbation", "sync"),
    [("noise", False), ("gradient", False), ("gradient", True)],
    ids=["noise", "own", "synced"],
)
def test_ranks_train_as_the_loop_by_hand(perturbation, sync, accumulate):
    (first, changed), (second, others) = run_on_ranks(train, perturbation, sync, accumulate)
    expected = by_hand(perturbation, sync, accumulate)
    torch.testing.assert_close(first, expected, **TOLERANCE[DOUBLE])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert changed == others == 0


def train_with_ddp_outside():
    """As frameworks do it: the optimizer has the model, and DDP is put around it later."""
    model = own()
    optimizer = samopt.FlatLoRA(adamw(model), model=model, rho=RHO, perturbation="gradient")
    optimizer.two_passes.share_perturbation()
    replica = DistributedDataParallel(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(lambda step=step: loss_of(replica, half(10 * step, torch.distributed.get_rank())))
        optimizer.step()
    return bits(model)


def test_a_loop_with_ddp_around_the_model_can_share_the_gradient():
    first, second = run_on_ranks(train_with_ddp_outside)
    torch.testing.assert_close(first, by_hand("gradient", True, 1), **TOLERANCE[DOUBLE])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Branches(nn.Module):
    """One of two layers, as the rank says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([OwnWeight(6, 3), OwnWeight(6, 3)]).double()

    def forward(self, x):
        return self.layers[torch.distributed.get_rank()](x)


def train_branches():
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = samopt.FlatLoRA(
        torch.optim.SGD(trained(model), lr=0.1), model=model, rho=RHO, perturbation="gradient", sync_perturbation=True
    )
    optimizer.backward(lambda: loss_of(model, half(0, torch.distributed.get_rank())))
    optimizer.step()
    return bits(model), float(optimizer.last_step.grad_norm)


def test_a_layer_that_ran_on_one_rank_only_takes_part_in_the_shared_gradient():
    (first, norm), (second, other) = run_on_ranks(train_branches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(0)
    layers = nn.ModuleList([OwnWeight(6, 3), OwnWeight(6, 3)]).double()
    gradients = []
    for rank, layer in enumerate(layers):
        layer.weight.requires_grad_(True)
        gradients.append(torch.autograd.grad(loss_of(layer, half(0, rank)) / 2, layer.weight)[0])
    expected = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert norm == other == pytest.approx(expected, rel=1e-12)


def refused_on_shards():
    model = own()
    for layer in model:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
    with pytest.raises(ValueError, match="fully_shard keeps a part of each on every rank"):
        samopt.FlatLoRA(adamw(model), model=model)


@needs_fully_shard
def test_sharded_weights_are_refused():
    run_on_ranks(refused_on_shards)
