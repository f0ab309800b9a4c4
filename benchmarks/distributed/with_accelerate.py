"""SAM in an accelerate loop, with accumulation and clipping, on as many processes as ``accelerate launch`` starts.

accelerate launch --cpu --num_processes 2 benchmarks/distributed/with_accelerate.py
"""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import samopt
from samopt.distributed import mean_over_ranks
from samopt.integrations.accelerate import SharpnessAwareBackward


def main() -> None:
    """Train a small network on the digits that ship with scikit-learn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--synced", action="store_true", help="perturb along the averaged gradient")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = load_digits()
    inputs, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
    loader = DataLoader(TensorDataset(inputs[:1280], labels[:1280]), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    backward = SharpnessAwareBackward(accelerator, model, optimizer, sync_perturbation=options.synced)

    def compute_loss(batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for epoch in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                backward(compute_loss, batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            predicted = model(inputs[1280:].to(accelerator.device)).argmax(1).cpu()
        measured = mean_over_ranks(backward.optimizer.last_step.to_dict())  # every process takes part in it
        accuracy = (predicted == labels[1280:]).double().mean()
        accelerator.print(f"epoch {epoch}: test accuracy {accuracy:.3f}, sharpness {measured['sharpness']:.4f}")
    time.sleep(0.2)  # gloo's threads need Python to let go of what was sent last, and abort where it is gone
    accelerator.end_training()


if __name__ == "__main__":
    main()
