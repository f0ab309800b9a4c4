"""What perturbing the last layer costs: ResNet-18, 32 images, with the trunk run once and twice in a step.

python docs/examples/head_only.py --rounds 12

It prints the processor time of a step, the median over the rounds, in units of the base's step; the optimizers take
turns in one process.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import samopt


def convolution(inputs, outputs, size, stride=1):
    """Return a convolution with BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3))
        self.shortcut = nn.Identity() if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x):
        """Return the features of the next block."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(classes):
    """Return a ResNet-18 with random weights, the same ones in each call."""
    torch.manual_seed(0)
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    stem = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(*width) for width in [*widths, (512, 512, 1)]]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def stepper(options, x, y, classes):
    """Return a function that takes a training step, of the base where the options are None."""
    model, criterion = resnet18(classes), nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizer = base if options is None else samopt.SAM(base, rho=0.05, model=model, **options)

    def step():
        optimizer.zero_grad()
        if options is None:
            criterion(model(x), y).backward()
        else:
            optimizer.backward(lambda: criterion(model(x), y))
        optimizer.step()

    return step


def main():
    """Time the steps and print the costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="pixels of each side")
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(1)
    x, y = torch.randn(32, 3, options.size, options.size), torch.randint(options.classes, (32,))
    contenders = {
        "base": None,
        "SAM, all parameters": {},
        "SAM, head, two full passes": {"only": "head"},
        "SAM, head, trunk run once": {"only": "head", "reuse_trunk": True},
    }
    steps = {name: stepper(each, x, y, options.classes) for name, each in contenders.items()}
    times = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:  # the first step allocates
                times[name].append(time.process_time() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name}: {1000 * median:.0f} ms, in units of the base's step: {median / medians['base']:.2f}")


if __name__ == "__main__":
    main()
