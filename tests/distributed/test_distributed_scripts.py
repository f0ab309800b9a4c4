"""The training scripts on two processes, as a user starts them; and runs that torchrun restarts or that change size."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.helpers.cases import asam_epsilon, assert_same, bits, sam_epsilon
from tests.helpers.pages import REPOSITORY
from tests.helpers.ranks import needs_fully_shard

SCRIPTS = REPOSITORY / "benchmarks" / "distributed"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]


def start(*arguments):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or a restarted rank may call at the address of its dead neighbour
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def accuracies(output):
    return [float(value) for value in re.findall(r"test accuracy (\S+?),?\s", output + "\n")]


def trained_by_hand(make_base, epsilon, rho, epochs, *, synced, compute=torch.float32):
    """What two ranks should have after ``epochs``, by one process in plain torch, and the accuracy of that.

    Each rank's gradient is of its half of the images, on weights and images in ``compute``; one perturbation for both
    follows the mean of the gradients, or each rank's its own.
    """
    data = load_digits()
    inputs, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    base = make_base(model.parameters())

    def gradient(chosen):
        computing = copy.deepcopy(model).to(compute)
        output = computing(inputs[chosen].to(compute)).float()
        loss = nn.functional.cross_entropy(output, labels[chosen])
        return [g.float() for g in torch.autograd.grad(loss, list(computing.parameters()))]

    def mean(gradients):
        return [(a + b) / 2 for a, b in zip(*gradients, strict=True)]

    for epoch in range(epochs):
        order = torch.randperm(1280, generator=torch.Generator().manual_seed(epoch))
        for halves in zip(order[0::2].split(32), order[1::2].split(32), strict=True):
            weights = bits(model)
            first = [gradient(half) for half in halves]
            second = []
            for half, own in zip(halves, 2 * [mean(first)] if synced else first, strict=True):
                with torch.no_grad():
                    moves = epsilon(weights, own, [rho] * len(weights))
                    for p, w, move in zip(model.parameters(), weights, moves, strict=True):
                        p.copy_(w + move)
                second.append(gradient(half))
            with torch.no_grad():
                for p, w, g in zip(model.parameters(), weights, mean(second), strict=True):
                    p.copy_(w)
                    p.grad = g
            base.step()
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        predicted = model.to(compute)(inputs[1280:].to(compute)).argmax(1)
    return weights, float((predicted == labels[1280:]).double().mean())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_a_replicated_run_that_fails_once_ends_as_the_textbook_in_one_process_does(tmp_path):
    options = ["--epochs", "2", "--checkpoint", tmp_path / "run.pt", "--fail-in", "1"]
    done = start(*TORCHRUN, "--max-restarts", "1", SCRIPTS / "ddp.py", *options)
    assert "fails in a second pass" in done.stderr
    weights, accuracy = trained_by_hand(sgd, sam_epsilon, 0.05, 2, synced=False)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.testing.assert_close(saved["network"], weights, rtol=1e-4, atol=1e-6)
    assert len(accuracies(done.stdout)) == 2
    assert accuracies(done.stdout)[1] == pytest.approx(accuracy, abs=6e-4)


@needs_fully_shard
@pytest.mark.slow
def test_a_sharded_run_trains_as_the_textbook_in_one_process_does():
    printed = accuracies(start(*TORCHRUN, SCRIPTS / "fsdp.py", "--epochs", "1").stdout)
    _, accuracy = trained_by_hand(adamw, asam_epsilon, 0.5, 1, synced=True, compute=torch.bfloat16)
    assert printed == [pytest.approx(accuracy, abs=0.01)]  # a bf16 rounding may fall otherwise here and there


FRAMEWORKS = {
    "accelerate": (*ACCELERATE, SCRIPTS / "with_accelerate.py"),
    "lightning": (SCRIPTS / "with_lightning.py", "--devices", "2"),
}


@pytest.mark.parametrize(
    "name", [pytest.param("accelerate", marks=pytest.mark.hf), pytest.param("lightning", marks=pytest.mark.lightning)]
)
def test_a_framework_trains_on_two_processes_and_one_of_them_prints(name):
    printed = accuracies(start(*FRAMEWORKS[name], "--epochs", "1").stdout)
    assert len(printed) == 1
    assert printed[0] > 0.7


STARTS = {
    "ddp": (*TORCHRUN, SCRIPTS / "ddp.py"),
    "ddp synced": (*TORCHRUN, SCRIPTS / "ddp.py", "--synced"),
    "fsdp": (*TORCHRUN, SCRIPTS / "fsdp.py"),
    **FRAMEWORKS,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "ddp synced",
        pytest.param("fsdp", marks=needs_fully_shard),
        pytest.param("accelerate", marks=pytest.mark.hf),
        pytest.param("lightning", marks=pytest.mark.lightning),
    ],
)
def test_a_script_trains_on_two_processes_and_one_of_them_prints(name):
    printed = accuracies(start(*STARTS[name]).stdout)
    assert len(printed) == (1 if name == "lightning" else 3)
    assert printed[-1] > 0.85


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_ends_with_the_bits_of_one_that_never_failed(tmp_path):
    failing = ["--max-restarts", "1", SCRIPTS / "ddp.py", "--fail-in", "1"]
    restarted = start(*TORCHRUN, *failing, "--checkpoint", tmp_path / "restarted.pt")
    assert "fails in a second pass" in restarted.stderr
    start(*TORCHRUN, SCRIPTS / "ddp.py", "--checkpoint", tmp_path / "plain.pt")
    got, want = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("restarted", "plain"))
    assert want["epoch"] == 3
    assert_same(got, want)


@pytest.mark.slow
@needs_fully_shard
def test_a_sharded_run_goes_on_with_another_number_of_processes(tmp_path):
    first = start(*TORCHRUN, SCRIPTS / "fsdp.py", "--epochs", "2", "--checkpoint", tmp_path / "run")
    alone = [*TORCHRUN[:-1], "1"]
    second = start(*alone, SCRIPTS / "fsdp.py", "--epochs", "3", "--checkpoint", tmp_path / "run")
    assert len(accuracies(first.stdout)) == 2
    assert len(accuracies(second.stdout)) == 1
    assert accuracies(second.stdout)[0] > 0.85
