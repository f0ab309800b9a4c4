"""The models that are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VisionTransformer", "conv_net"]


def conv_net(image_size: int, classes: int, width: int = 8, stride: int = 1) -> nn.Sequential:
    """Return three 3x3 convolutions with BatchNorm and ReLU, two halvings of the image, and a linear layer.

    Args:
        image_size: Height and width of the one-channel input, divisible by ``stride``.
        classes: Number of outputs.
        width: Channels of the first convolution; the others have twice and four times as many.
        stride: Of the first convolution: 2 quarters the work.
    """
    return nn.Sequential(
        *_block(1, width, stride),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * (image_size // stride // 4) ** 2, classes),
    )


def _block(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class VisionTransformer(nn.Module):
    """A small vision transformer: a linear embedding of patches, pre-norm encoder layers, the mean of the tokens.

    Args:
        image_size: Height and width of the one-channel input, divisible by ``patch``.
        classes: Number of outputs.
        patch: Height and width of a patch.
        width: Features of a token.
        depth: Number of layers.
        heads: Attention heads; they divide ``width``.
    """

    def __init__(
        self, image_size: int, classes: int, patch: int = 4, width: int = 32, depth: int = 2, heads: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(n, classes)``, of images, shape ``(n, 1, image_size, image_size)``."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits
