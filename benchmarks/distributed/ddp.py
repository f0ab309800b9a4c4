"""SAM under DistributedDataParallel, started by torchrun, with checkpoints that a restart goes on from.

torchrun --standalone --nproc-per-node 2 --max-restarts 1 benchmarks/distributed/ddp.py --checkpoint run.pt

With restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or a new rank may call at the address of one that is gone.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import samopt
from samopt.distributed import mean_over_ranks

BATCH = 32  # examples a rank and step


def main() -> None:
    """Train a small network on the digits that ship with scikit-learn."""
    options = read_options()
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    inputs, labels = (tensor.to(device) for tensor in digits())

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(network)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.SAM(base, rho=0.05, model=model, sync_perturbation=options.synced)

    for epoch in range(load(options.checkpoint, network, optimizer), options.epochs):
        order = torch.randperm(1280, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for chosen in order.split(BATCH):
            x, y = inputs[chosen], labels[chosen]
            fails = epoch == options.fail_in and is_first_attempt() and rank == ranks - 1

            def closure(x: Tensor = x, y: Tensor = y, fails: bool = fails) -> Tensor:
                if fails and optimizer.is_perturbed:
                    raise RuntimeError("this rank fails in a second pass, as it was asked to")
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        with torch.no_grad():
            accuracy = (network(inputs[1280:]).argmax(1) == labels[1280:]).double().mean()
        measured = mean_over_ranks(optimizer.last_step.to_dict())  # every rank takes part in it
        if rank == 0:
            print(f"epoch {epoch}: test accuracy {accuracy:.3f}, sharpness {measured['sharpness']:.4f}", flush=True)
            save(options.checkpoint, network, optimizer, epoch + 1)
    time.sleep(0.2)  # gloo's threads need Python to let go of what was sent last, and abort where it is gone
    distributed.destroy_process_group()


def save(path: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Replace the checkpoint in one move, so that a failure leaves the old one or the new one."""
    if path is not None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, f"{path}.new")
        os.replace(f"{path}.new", path)


def load(path: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the checkpoint, where there is one, on every rank; return the epoch to go on with."""
    if path is None or not path.exists():
        return 0
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    network.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["epoch"])


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 images of 8 x 8 pixels in [0, 1], and their digits."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def is_first_attempt() -> bool:
    """Return whether torchrun has not restarted this process yet."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--synced", action="store_true", help="perturb along the averaged gradient")
    parser.add_argument("--checkpoint", type=Path, help="file to write after each epoch, and to go on from")
    parser.add_argument("--fail-in", type=int, help="epoch in which the last rank fails once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
