"""From nothing to a curve of sharpness, in plain PyTorch: one network with and without SAM, measured as it trains.

python docs/examples/sharpness_curve.py --epochs 20
"""

import argparse
import pathlib

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import samopt
from samopt import sharpness


def train(rho, epochs, images, labels):
    """Train one network; return its sharpness after each epoch, on the same four batches and radius."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = samopt.SAM(base, rho=rho, model=model)
    sample = list(zip(images[:256].split(64), labels[:256].split(64), strict=True))
    curve = []
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            optimizer.backward(lambda chosen=chosen: nn.functional.cross_entropy(model(images[chosen]), labels[chosen]))
            optimizer.step()
        model.eval()
        curve.append(sharpness.worst_case(model, sharpness.cross_entropy, sample, rho=0.1, steps=10).value)
    return curve


def main():
    """Train twice, draw both curves, and print where they end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("sharpness_curve.png"))
    options = parser.parse_args()

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    ends = {}
    for label, rho in {"SGD alone": 0.0, "SAM, rho=0.1": 0.1}.items():
        curve = train(rho, options.epochs, images[:1408], labels[:1408])
        axes.plot(range(1, len(curve) + 1), curve, marker="o", markersize=3, label=label)
        ends[label] = curve[-1]
    axes.set(xlabel="epoch", ylabel="rise of the loss within radius 0.1", yscale="log")
    axes.legend()
    figure.savefig(options.output, dpi=120)
    print(", ".join(f"{label}: {value:.4f}" for label, value in ends.items()))
    print(f"sharpness of SAM as a share of SGD's: {ends['SAM, rho=0.1'] / ends['SGD alone']:.2f}")


if __name__ == "__main__":
    main()
