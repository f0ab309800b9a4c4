"""A captured step on Triton's kernels, in the interpreter: replays are the steps that would have been taken.

``tests/kernels/test_triton.py`` runs this file in a process of its own; on a GPU, ``test_triton_gpu.py`` captures.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.optim import SGD, AdamW

import samopt
from samopt._perturb.perturbation import Perturbation
from tests.helpers.cases import batch, bits, closure_of, mlp, same_bits

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/kernels/test_triton.py runs these with the interpreter", allow_module_level=True)

from tests.helpers.graph import Graph

BASES = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, fused=True),
}
WRAPPERS = {
    "sam": lambda base, model, **o: samopt.SAM(base, rho=0.5, **o),
    "asam": lambda base, model, **o: samopt.ASAM(base, rho=0.5, **o),
    "fisher": lambda base, model, **o: samopt.FisherSAM(base, rho=0.5, **o),
    "tram": lambda base, model, **o: samopt.TRAM(base, model=model, **o),
    "one-pass": lambda base, model, **o: samopt.SAM(base, rho=0.5, model=model, direction="momentum", **o),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The host does not read the norm there."""
    monkeypatch.setattr(Perturbation, "usable", None)


def started(wrapper, base, **options):
    """A network after three steps, the memory of its batch, and its next step."""
    model, data = mlp(), batch()
    optimizer = WRAPPERS[wrapper](BASES[base](model.parameters()), model, backend="triton", **options)
    closure = closure_of(optimizer, model, data)
    for _ in range(3):
        optimizer.step(closure)
    return model, optimizer, data, lambda: optimizer.step(closure)


def fill(data, seed):
    for memory_of_batch, values in zip(data, batch(seed=seed), strict=True):
        memory_of_batch.copy_(values)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_replays_are_the_steps_that_would_have_been_taken(wrapper, base):
    model, optimizer, data, step = started(wrapper, base)
    twin, other, same_data, live = started(wrapper, base)
    graph = Graph()
    with graph:
        step()
    live()
    for seed in range(1, 4):
        fill(data, seed)
        fill(same_data, seed)
        graph.replay()
        live()
        assert same_bits(model, bits(twin))
    restores = set() if optimizer.is_one_pass else {"restore_chunk"}  # in one pass no weight moves
    assert set(graph.launches) == {"sum_chunk", "join_sums", "ascend_chunk"} | restores
    assert optimizer.last_step.to_dict() == other.last_step.to_dict()


def test_a_radius_in_a_tensor_is_read_at_each_replay():
    radius, same_radius = torch.tensor(0.5), torch.tensor(0.5)
    model, optimizer, _, step = started("sam", "sgd")
    twin, other, _, live = started("sam", "sgd")
    optimizer.param_groups[0]["rho"], other.param_groups[0]["rho"] = radius, same_radius
    graph = Graph()
    with graph:
        step()
    live()
    for value in (0.1, 0.0, 2.0):
        for tensor in (radius, same_radius):
            tensor.fill_(value)
        graph.replay()
        live()
        assert same_bits(model, bits(twin))
        assert float(optimizer.last_step.radius) == pytest.approx(value)


def test_a_gradient_that_is_not_finite_meets_the_base_at_its_replay():
    model, _, data, step = started("sam", "sgd")
    twin, _, same_data, live = started("sam", "sgd")
    graph = Graph()
    with graph:
        step()
    live()
    for x, _ in (data, same_data):
        x[0, 0] = float("inf")
    graph.replay()
    live()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert any(p.isnan().any() for p in model.parameters())


def test_what_waits_for_the_device_is_no_part_of_a_graph():
    with Graph(), pytest.raises(RuntimeError, match="_local_scalar_dense.default waits for the device"):
        float(torch.ones(()) * 2)
