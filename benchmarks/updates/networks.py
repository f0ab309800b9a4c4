"""Networks of well-known shapes, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ResNet18", "Transformer"]


class ResNet18(nn.Module):
    """ResNet-18 for 1,000 classes: 62 tensors, 11.7 million parameters (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*(_Residual(*width) for width in widths))
        self.head = nn.Linear(512, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(n, 1000)``, of images, shape ``(n, 3, height, width)``."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(self.body(features) + self.shortcut(features))


class Transformer(nn.Module):
    """An encoder whose layers have separate projections for queries, keys and values, as BERT's do.

    Args:
        embedding: From the input to tokens, shape ``(n, tokens, width)``.
        width: Features of a token.
        depth: Number of layers.
        heads: Attention heads.
        tokens: Largest number of tokens.
        outputs: Number of outputs, taken from the first token.
    """

    def __init__(self, embedding: nn.Module, width: int, depth: int, heads: int, tokens: int, outputs: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = nn.Parameter(torch.zeros(tokens, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, shape ``(n, outputs)``."""
        tokens = self.embedding(inputs)
        tokens = self.norm(tokens + self.position[: tokens.shape[1]])
        outputs: Tensor = self.head(self.layers(tokens)[:, 0])
        return outputs


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for projection in self.projections
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = self.attention_norm(tokens + self.output(mixed))
        normed: Tensor = self.norm(tokens + self.narrow(functional.gelu(self.wide(tokens))))
        return normed
