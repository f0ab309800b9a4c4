"""SAM on parameters that FSDP2 shards, started by torchrun, with checkpoints for any number of ranks.

torchrun --standalone --nproc-per-node 2 benchmarks/distributed/fsdp.py --checkpoint run
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
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
    if on_gpu:
        torch.cuda.set_device(device)
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(data.target, device=device)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model[0], model[2]):
        fully_shard(layer, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    optimizer = samopt.ASAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.5, model=model)

    for epoch in range(load(options.checkpoint, model, optimizer), options.epochs):
        order = torch.randperm(1280, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for chosen in order.split(BATCH):
            x, y = inputs[chosen], labels[chosen]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        with torch.no_grad():
            accuracy = (model(inputs[1280:]).argmax(1) == labels[1280:]).double().mean()
        measured = mean_over_ranks(optimizer.last_step.to_dict())  # every rank takes part in it
        if rank == 0:
            print(f"epoch {epoch}: test accuracy {accuracy:.3f}, sharpness {measured['sharpness']:.4f}", flush=True)
        save(options.checkpoint, model, optimizer, epoch + 1)
    time.sleep(0.2)  # gloo's threads need Python to let go of what was sent last, and abort where it is gone
    distributed.destroy_process_group()


def save(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write every rank's shards; nothing is gathered."""
    if path is not None:
        weights, state = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": state, "epoch": epoch}, checkpoint_id=path)


def load(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read the checkpoint, if there is one, written by any number of ranks; return the epoch to go on with."""
    if path is None or not (path / ".metadata").exists():
        return 0
    weights, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": state, "epoch": 0}
    checkpoint.load(saved, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return int(saved["epoch"])


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="folder to write after each epoch, and to go on from")
    return parser.parse_args()


if __name__ == "__main__":
    main()
