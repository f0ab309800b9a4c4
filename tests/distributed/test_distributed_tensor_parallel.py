"""Weights that tensor parallelism shards, alone and on a mesh that FSDP2 shards too."""

import pytest
import torch
from torch import nn
from torch.distributed import fsdp, tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import samopt
from tests.helpers.cases import TOLERANCE, VARIANTS, batch, bits, closure_form, parameters_of
from tests.helpers.published import PRESETS
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full

DOUBLE = torch.float64
KINDS = [*VARIANTS, *[preset for preset in PRESETS if preset.name == "functional"]]


class Network(nn.Module):
    """Two layers, which a plan cuts by columns and by rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def named(variant):
    return next(kind for kind in KINDS if kind.name == variant)


def train(variant, data_ranks, tensor_ranks, steps):
    """Steps on a mesh of ``data_ranks`` x ``tensor_ranks``; each data rank has its part of the batch."""
    mesh = init_device_mesh("cpu", (data_ranks, tensor_ranks), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(Network(), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if data_ranks > 1:
        for layer in (model.up, model.down):
            fsdp.fully_shard(layer, mesh=mesh["data"])
        fsdp.fully_shard(model, mesh=mesh["data"])
    kind = named(variant)
    optimizer = kind.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), rho=kind.rho, model=model)
    part = mesh["data"].get_local_rank()
    for step in range(steps):
        x, y = batch(DOUBLE, seed=step)
        closure_form(optimizer, model, (x.tensor_split(data_ranks)[part], y.tensor_split(data_ranks)[part]))
    metrics = optimizer.last_step
    return full(parameters_of(optimizer)), [metrics.grad_norm, metrics.perturbed_grad_norm, metrics.applied_radius]


def expected(variant, steps):
    kind = named(variant)
    model = Network()
    stock = torch.optim.AdamW(model.parameters(), lr=0.01)
    stock.param_groups[0]["rho"] = kind.rho
    by_hand = kind.textbook()
    for step in range(steps):
        by_hand(model, stock, batch(DOUBLE, seed=step))
    return bits(model)


@pytest.mark.parametrize("variant", [kind.name for kind in KINDS])
@pytest.mark.parametrize("mesh", [(1, 2), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
def test_ranks_train_as_one_process_does(mesh, variant):
    results = run_on_ranks(train, variant, *mesh, 4, ranks=mesh[0] * mesh[1])
    for weights, norms in results:
        torch.testing.assert_close(weights, expected(variant, 4), **TOLERANCE[DOUBLE])
        assert norms == results[0][1]


def ascend_with_a_gradient_still_to_be_summed():
    """Where a replicated weight goes whose gradient each rank has a summand of."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(tensor.distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [tensor.Replicate()]))
    summand = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0])][mesh.get_local_rank()]
    weight.grad = tensor.DTensor.from_local(summand, mesh, [tensor.Partial()])
    optimizer = samopt.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.5)
    with optimizer.perturbed():
        there = weight.to_local().detach().clone()
    return there, weight.to_local().detach().clone(), float(optimizer.last_step.grad_norm)


def test_a_gradient_that_waits_for_its_sum_is_summed_before_the_norm():
    for there, back, norm in run_on_ranks(ascend_with_a_gradient_still_to_be_summed):
        torch.testing.assert_close(there, torch.tensor([3.3, 4.4]))
        assert norm == 5.0
        assert back.tolist() == [3.0, 4.0]
