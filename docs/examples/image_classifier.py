"""An image classifier in plain PyTorch: SAM with autocast, accumulation, clipping, a schedule and averaged weights.

python docs/examples/image_classifier.py --epochs 10 --label-noise 0.4
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import samopt

MICRO_BATCH, ACCUMULATE = 32, 2


def data(label_noise):
    """Return training images, training labels, test images and test labels; some training labels are random."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:1408], order[1408:]
    given = labels[train].clone()
    wrong = torch.rand(len(train), generator=generator) < label_noise
    given[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return images[train], given, images[test], labels[test]


def main():
    """Train, and print the accuracy of the weights and of their average."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--label-noise", type=float, default=0.0)
    parser.add_argument("--variant", default="sam", choices=samopt.available())
    parser.add_argument("--rho", type=float, default=0.05)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in data(options.label_noise))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(256, 10),
    ).to(device)  # fmt: skip

    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer = samopt.create(options.variant, base, model=model, rho=options.rho)
    steps = options.epochs * len(images) // (MICRO_BATCH * ACCUMULATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def compute_loss(x, y):
        with torch.autocast(device, dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(x), y) / ACCUMULATE

    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for i, chosen in enumerate(torch.randperm(len(images), device=device).split(MICRO_BATCH)):
            last = i % ACCUMULATE == ACCUMULATE - 1
            if i % ACCUMULATE == 0:
                optimizer.zero_grad()
            loss = optimizer.backward(lambda chosen=chosen: compute_loss(images[chosen], labels[chosen]), last=last)
            total += loss.item()
            if last:
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                scheduler.step()
                average.update_parameters(model)
        print(f"epoch {epoch}: loss {total / (i + 1) * ACCUMULATE:.3f}, sharpness {sharpness(optimizer)}")

    print(f"test accuracy {accuracy(model, test_images, test_labels):.3f}")
    print(f"test accuracy of the average {accuracy(average, test_images, test_labels):.3f}")


def sharpness(optimizer):
    """Return the latest step's rise of the loss as text; one pass does not measure it."""
    measured = optimizer.last_step.sharpness
    return "not measured" if measured is None else f"{float(measured):.4f}"


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the share of images whose label is predicted."""
    model.eval()
    return float((model(images).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()
