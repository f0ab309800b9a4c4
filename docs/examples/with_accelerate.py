"""A loop around accelerate, with accumulation, clipping and a schedule: two lines differ from the loop without SAM.

accelerate launch docs/examples/with_accelerate.py
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward


def main():
    """Train on scikit-learn's digits and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, test = TensorDataset(images[:1408], labels[:1408]), (images[1408:], labels[1408:])

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=options.cpu)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = samopt.SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), rho=0.05, model=model)  # samopt
    loader = DataLoader(train, batch_size=32, shuffle=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.epochs * 22)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)  # samopt

    def compute_loss(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for epoch in range(options.epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = backward(compute_loss, batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        predicted = model(test[0].to(accelerator.device)).argmax(1).cpu()
    accelerator.print(f"test accuracy {(predicted == test[1]).double().mean():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
