"""Kinds of parallelism that are refused, with the reason, before anything is changed."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import samopt
from tests.helpers.cases import batch, bits, mlp
from tests.helpers.ranks import run_on_ranks


def refusals_of_fsdp1(use_orig_params):
    """The messages for a model in FSDP1, with ``model=`` and without."""
    messages = []
    model = FullyShardedDataParallel(mlp(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    for given in (model, None):
        with pytest.raises(ValueError) as refused:
            samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=given)
        messages.append(str(refused.value))
    return messages


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(use_orig_params):
    for messages in run_on_ranks(refusals_of_fsdp1, use_orig_params):
        for message in messages:
            assert "FSDP1" in message
            assert "fully_shard" in message


class DeepSpeedEngine(nn.Module):
    """A module like DeepSpeed's engine: of a class of that package, around the model."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, inner):
        super().__init__()
        self.module = inner


def test_deepspeeds_engine_is_refused():
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"DeepSpeed's engine, which owns the gradients.*use DistributedDataParallel"):
        samopt.SAM(base, model=DeepSpeedEngine(model))
    assert "rho" not in base.param_groups[0]


def test_parameters_that_deepspeed_partitioned_are_refused():
    model = mlp()
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed's engine"):
        samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1))


READERS = {
    'direction="momentum"': lambda base, model: samopt.SAM(base, direction="momentum"),
    "the preconditioned geometry": lambda base, model: samopt.PreconditionedSAM(base),
    "the preconditioned geometry, of tram": lambda base, model: samopt.TRAM(
        base, model=model, geometry="preconditioned"
    ),
}


def refusal_in_shards(reader):
    model = mlp()
    base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    with pytest.raises(ValueError) as refused:
        READERS[reader](base, model)
    assert "rho" not in base.param_groups[0]
    return str(refused.value)


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_the_state_of_a_base_that_shards_it_is_refused(reader):
    for message in run_on_ranks(refusal_in_shards, reader):
        assert f"{reader.partition(', ')[0]} reads the base optimizer's state" in message
        assert "use an optimizer that perturbs along the gradient" in message


class StepInside(nn.Module):
    """A forward that runs the training step, as Lightning's DDP has it with manual optimization."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.optimizer = samopt.SAM(torch.optim.SGD(self.net.parameters(), lr=0.1), model=self.net)

    def forward(self, x, y):
        self.optimizer.backward(lambda: nn.functional.cross_entropy(self.net(x), y))
        self.optimizer.step()


def refusal_of_a_step_inside_of_ddp():
    model = DistributedDataParallel(StepInside())
    before = bits(model)
    with pytest.raises(RuntimeError) as refused:
        model(*batch())
    assert all(p.grad is None and p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    return str(refused.value)


def test_gradients_that_ddp_would_not_exchange_are_refused():
    for message in run_on_ranks(refusal_of_a_step_inside_of_ddp):
        assert "inside the forward of DistributedDataParallel, which would not exchange these gradients" in message
        assert "self.manual_backward(loss)" in message


def refusal_of_updates_inside_backward():
    base = ZeroRedundancyOptimizer(mlp().parameters(), torch.optim.AdamW, lr=0.01, overlap_with_ddp=True)
    with pytest.raises(ValueError) as refused:
        samopt.SAM(base)
    return str(refused.value)


def test_updates_inside_backward_are_refused():
    for message in run_on_ranks(refusal_of_updates_inside_backward):
        assert "overlap_with_ddp=False" in message
