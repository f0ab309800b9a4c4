"""Two processes: replicas stay the same bits, and equal the loop by hand over both processes' batches."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samopt
from samopt import sharpness
from tests.helpers import cases, lit_ddp

pytestmark = [pytest.mark.lightning, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    repository = Path(__file__).parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={lit_ddp.RANKS}"]
    done = subprocess.run(
        [*command, "-m", "tests.helpers.lit_ddp", str(folder)],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-8000:-2500]
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(lit_ddp.RANKS)]
        for name in lit_ddp.SCENARIOS
    }


def train_both_by_hand(sam, *, synced, accumulate, synced_once=False):
    """Both ranks' passes one after the other in one process; gradients are averaged as DDP does.

    With ``synced_once``, the first step's perturbation is synced.
    """
    module = lit_ddp.Module()
    parameters = list(module.parameters())
    base = module.configure_optimizers()
    optimizer = sam(base)
    module.net.train()
    batches = [lit_ddp.batches_of(rank) for rank in range(lit_ddp.RANKS)]

    def gradients(rank, window):
        for p in parameters:
            p.grad = None
        for index in window:
            lit_ddp.seed(rank, index)
            (lit_ddp.loss_of(module, batches[rank][index]) / accumulate).backward()
        return [p.grad for p in parameters]

    def average(of_ranks):
        return [sum(g / lit_ddp.RANKS for g in of_one) for of_one in zip(*of_ranks, strict=True)]

    for start in range(0, len(batches[0]), accumulate):
        window = range(start, min(start + accumulate, len(batches[0])))
        first = [gradients(rank, window) for rank in range(lit_ddp.RANKS)]
        if synced or (synced_once and start == 0):
            first = [average(first)] * lit_ddp.RANKS
        second = []
        for rank in range(lit_ddp.RANKS):
            for p, g in zip(parameters, first[rank], strict=True):
                p.grad = g.clone()
            with optimizer.perturbed():
                second.append(gradients(rank, window))
        for p, g in zip(parameters, average(second), strict=True):
            p.grad = g
        optimizer.step()
    return module.net


@pytest.mark.parametrize("name", lit_ddp.SCENARIOS)
def test_replicas_are_equal(name, results):
    ours, theirs = results[name]
    cases.assert_same(ours["weights"], theirs["weights"])
    assert ours["logged"] == theirs["logged"]


@pytest.mark.parametrize(
    ("name", "sam"),
    [
        ("per rank", samopt.SAM),
        ("synced", samopt.SAM),
        ("per rank, accumulating", samopt.SAM),
        ("synced, accumulating", samopt.SAM),
        ("asam, bucket views", samopt.ASAM),
        ("static graph", samopt.SAM),
        ("static graph, per rank", samopt.SAM),
        ("unused parameters", samopt.SAM),
        ("manual", samopt.SAM),
        ("manual, with a closure", samopt.SAM),
        ("manual, unused parameters", samopt.SAM),
        ("no radius", functools.partial(samopt.SAM, rho=0.0)),
    ],
)
def test_the_loop_by_hand(name, sam, results):
    scenario = lit_ddp.SCENARIOS[name]
    synced = scenario["options"].get("sync_perturbation", False)
    net = train_both_by_hand(
        sam,
        synced=synced,
        accumulate=scenario.get("accumulate", 1),
        synced_once=name == "static graph, per rank",  # torch cannot leave out a static graph's first exchange
    )
    cases.assert_same(results[name][0]["weights"], dict(net.state_dict()))


@pytest.mark.parametrize(("name", "sam"), [("sharded", samopt.SAM), ("sharded, accumulating", samopt.ASAM)])
def test_sharded_parameters_have_one_perturbation(name, sam, results):
    """Its norm is summed in another order."""
    accumulate = lit_ddp.SCENARIOS[name].get("accumulate", 1)
    expected = train_both_by_hand(sam, synced=True, accumulate=accumulate).state_dict()
    for key, value in results[name][0]["weights"].items():
        torch.testing.assert_close(value, expected[key], **cases.TOLERANCE[torch.float32])


def test_exchanges_of_gradients(results):
    """One a step where each rank goes its own way, two where they go together, one without a second pass."""
    steps = {name: set(result[0]["exchanges"][1:]) for name, result in results.items()}
    assert steps["per rank"] == steps["per rank, accumulating"] == {1}
    assert steps["synced"] == steps["synced, accumulating"] == {2}
    assert steps["no radius"] == {1}


def test_trouble_on_one_rank_does_not_stop_the_others(results):
    for name in ("infinite on one rank", "zero on one rank"):
        weights = results[name][0]["weights"]
        assert all(torch.isfinite(value).all() for value in weights.values())
        assert not torch.equal(weights["0.weight"], results["per rank"][0]["weights"]["0.weight"])


def test_every_rank_logs_the_mean_of_what_all_measured(results):
    """Each measures on its own batches; the run is the unmonitored one."""
    ours = results["monitored"][0]
    cases.assert_same(ours["weights"], results["per rank"][0]["weights"])
    module = lit_ddp.Module()
    module.net.load_state_dict(ours["weights"])
    measured = []
    for rank in range(lit_ddp.RANKS):
        batches = lit_ddp.batches_of(rank)[:2]
        assert sum(len(labels) for _, labels in batches) == lit_ddp.EXAMPLES
        measured.append(
            [
                sharpness.worst_case(
                    module.net, sharpness.cross_entropy, batches, adaptive=True, **lit_ddp.MEASURES["worst_case"]
                ).value,
                *(
                    layer.value
                    for layer in sharpness.per_layer(
                        module.net, sharpness.cross_entropy, batches, adaptive=True, **lit_ddp.MEASURES["per_layer"]
                    ).layers.values()
                ),
            ]
        )
    expected = [sum(values) / lit_ddp.RANKS for values in zip(*measured, strict=True)]
    names = ("worst_case", "per_layer/net.0", "per_layer/net.3")
    for result in results["monitored"]:
        assert list(result["history"]) == [5]
        logged = [result["history"][5][f"sharpness/{name}"] for name in names]
        assert logged == pytest.approx(expected, rel=1e-5)
        assert result["logged"]["sharpness/sam"] == result["history"][5]["sharpness/sam"]
    assert results["monitored"][0]["history"] == results["monitored"][1]["history"]
