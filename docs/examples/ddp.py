"""SAM under DistributedDataParallel.

torchrun --standalone --nproc-per-node 2 docs/examples/ddp.py
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import samopt
from samopt.distributed import mean_over_ranks


def main():
    """Train on scikit-learn's digits; rank 0 prints."""
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(network)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.SAM(base, rho=0.05, model=model)  # each rank perturbs along its own gradient

    for epoch in range(4):
        order = torch.randperm(1408, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for chosen in order.split(32):
            optimizer.zero_grad()
            optimizer.backward(lambda chosen=chosen: nn.functional.cross_entropy(model(images[chosen]), labels[chosen]))
            optimizer.step()
        measured = mean_over_ranks(optimizer.last_step.to_dict())  # every rank takes part
        if rank == 0:
            print(f"epoch {epoch}: loss {measured['loss']:.3f}, sharpness {measured['sharpness']:.4f}", flush=True)

    if rank == 0:
        with torch.no_grad():
            accuracy = (network(images[1408:]).argmax(1) == labels[1408:]).double().mean()
        print(f"test accuracy {accuracy:.3f}", flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
