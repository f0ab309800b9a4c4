"""ASAM on parameters that FSDP2 shards.

torchrun --standalone --nproc-per-node 2 docs/examples/fsdp2.py
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import samopt
from samopt.distributed import mean_over_ranks


def main():
    """Train on scikit-learn's digits; rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = samopt.ASAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.5, model=model)

    for epoch in range(4):
        order = torch.randperm(1408, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for chosen in order.split(32):
            optimizer.zero_grad()
            optimizer.backward(lambda chosen=chosen: nn.functional.cross_entropy(model(images[chosen]), labels[chosen]))
            optimizer.step()
        measured = mean_over_ranks(optimizer.last_step.to_dict())  # every rank takes part
        if rank == 0:
            print(f"epoch {epoch}: loss {measured['loss']:.3f}, sharpness {measured['sharpness']:.4f}", flush=True)

    with torch.no_grad():  # a forward gathers the shards, so every rank runs it
        accuracy = (model(images[1408:]).argmax(1) == labels[1408:]).double().mean()
    if rank == 0:
        print(f"test accuracy {accuracy:.3f}", flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
