"""The models that are trained."""

from __future__ import annotations

from torch import nn

__all__ = ["conv_net"]


def conv_net(image_size: int, classes: int, width: int = 8) -> nn.Sequential:
    """Return three 3x3 convolutions with BatchNorm and ReLU, two halvings of the image, and a linear layer.

    Args:
        image_size: Height and width of the one-channel input, divisible by 4.
        classes: Number of outputs.
        width: Channels of the first convolution; the others have twice and four times as many.
    """
    return nn.Sequential(
        *_block(1, width),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * (image_size // 4) ** 2, classes),
    )


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
