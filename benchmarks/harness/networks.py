"""Parameters to update and models to step: networks of well-known shapes with random weights, and ways to grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.harness.tasks import conv_net

_ADAMW = partial(torch.optim.AdamW, lr=1e-4, fused=True)
_SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Case:
    """Parameters, and perhaps a batch to take their gradient on.

    Attributes:
        name: Its name at the command line and in rows.
        build: Makes the module that holds the parameters.
        batch: Makes inputs, a number of times as many as the smallest batch; None where only the update is measured.
        base: Makes the base optimizer.
        times: Sizes of the batches of whole steps, in smallest ones.
        rounds: Turns of each whole step; None for the command line's.
        needs_gpu: Whether it is left out on a CPU.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Tensor] | None = None
    base: Callable[[Iterable[Tensor]], Optimizer] = _ADAMW
    times: tuple[int, ...] = (1, 4)
    rounds: int | None = None
    needs_gpu: bool = False


def loss_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a loss whose gradient reaches every parameter."""
    outputs = module(inputs)
    return functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long, device=outputs.device))


class ResNet18(nn.Sequential):
    """ResNet-18 for 1,000 classes: 62 tensors, 11.7 million parameters (He et al. 2016)."""

    def __init__(self) -> None:
        stem = (*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
        super().__init__(*stem, *(Residual(*width) for width in widths), *head)


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        second = _convolution(outputs, outputs, 3)
        self.body = nn.Sequential(*_convolution(inputs, outputs, 3, stride), nn.ReLU(), *second)
        changes = inputs != outputs
        self.shortcut = nn.Sequential(*_convolution(inputs, outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return the features of the next block."""
        return functional.relu(self.body(features) + self.shortcut(features))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def small_resnet(width: int, blocks: Sequence[tuple[int, int, int]], stride: int = 1) -> nn.Sequential:
    """Return a convolution of one-channel images, residual blocks, the mean over places, and a linear layer.

    Args:
        width: Channels of the first convolution.
        blocks: Channels in, channels out and stride of each block.
        stride: Of the first convolution.
    """
    stem = (*_convolution(1, width, 3, stride), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(blocks[-1][1], 10))
    return nn.Sequential(*stem, *(Residual(*block) for block in blocks), *head)


class Mixer(nn.Module):
    """A small MLP-Mixer: patches, layers that mix tokens and then features, the mean of the tokens.

    Args:
        width: Features of a token.
        depth: Number of layers.
        patch: Height and width of a patch of the one-channel images of 28 x 28.
    """

    def __init__(self, width: int = 64, depth: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.layers = nn.Sequential(*(_Mixing((28 // patch) ** 2, width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(n, 10)``, of images, shape ``(n, 1, 28, 28)``."""
        logits: Tensor = self.head(self.layers(self.embed(images).flatten(2).transpose(1, 2)).mean(1))
        return logits


class _Mixing(nn.Module):
    """A layer of the Mixer: one perceptron across the tokens, one within each token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.across(self.norms[0](tokens).transpose(1, 2)).transpose(1, 2)
        result: Tensor = tokens + self.within(self.norms[1](tokens))
        return result


class Transformer(nn.Module):
    """An encoder without dropout: embedding, positions, layers, and a linear head on the first token.

    Args:
        embedding: From the input to tokens, shape ``(n, tokens, width)``.
        width: Features of a token.
        heads: Attention heads of each layer.
        tokens: Largest number of tokens.
        outputs: Number of outputs.
    """

    def __init__(self, embedding: nn.Module, width: int, heads: int, tokens: int, outputs: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = nn.Parameter(torch.zeros(tokens, width))
        self.norm = nn.LayerNorm(width)
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.Sequential(*(layer(width, heads, 4 * width) for _ in range(12)))
        self.head = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, shape ``(n, outputs)``."""
        tokens = self.embedding(inputs)
        tokens = self.norm(tokens + self.position[: tokens.shape[1]])
        outputs: Tensor = self.head(self.layers(tokens)[:, 0])
        return outputs


class _Patches(nn.Conv2d):
    """Tokens of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


class _Parameters(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.empty(shape).normal_(std=0.02)) for shape in shapes)


class _DecoderLayer(nn.Module):
    """Causal attention and a gated feed-forward part, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(width, 4 * width), linear(width, 4 * width), linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norms[0](tokens)
        split = (
            each(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(*split, is_causal=True)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norms[1](tokens)
        result: Tensor = tokens + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return result


class Decoder(nn.Module):
    """A language model without positions: tied embedding, 16 layers; by default 1.2 billion parameters.

    Args:
        vocabulary: Number of tokens that it knows.
        width: Features of a token.
        heads: Attention heads of each layer.
        layers: Number of layers.
    """

    def __init__(self, vocabulary: int = 50304, width: int = 2048, heads: int = 16, layers: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(_DecoderLayer(width, heads) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token that follows the last one, shape ``(n, vocabulary)``."""
        last = self.norm(self.layers(self.embedding(tokens)))[:, -1]
        return functional.linear(last, self.embedding.weight)


def _bert() -> nn.Module:
    return Transformer(nn.Embedding(30522, 768), 768, heads=12, tokens=512, outputs=768)


def _vit() -> nn.Module:
    return Transformer(_Patches(3, 384, 16, stride=16), 384, heads=6, tokens=197, outputs=1000)


CASES = {
    case.name: case
    for case in (
        Case("digits", lambda: conv_net(8, 10), lambda n: torch.rand(64 * n, 1, 8, 8), _SGD, times=(1,), rounds=300),
        Case("resnet18", ResNet18, lambda n: torch.randn(8 * n, 3, 64, 64)),
        Case("bert_base", _bert, lambda n: torch.randint(30522, (2 * n, 32))),
        Case("vit_s", _vit, lambda n: torch.randn(4 * n, 3, 64, 64)),
        Case("tiny500", lambda: _Parameters([(1000,)] * 500)),
        Case("decoder_1b", Decoder, needs_gpu=True),
    )
}
"""By name: the ConvNet on 64 digits; ResNet-18 on 8 and 32 images; BERT-base on 64 and 256 tokens; ViT-S on 4 and 16
images; 500 tensors of 1,000 elements; a decoder of 1.2 billion parameters."""


def growth(quick: bool) -> dict[str, list[Case]]:
    """Return cases that grow in one thing: "parameters" in 64 tensors, or "tensors" of 4 million parameters."""
    sizes, counts, shared = [1_000, 10_000, 100_000, 400_000], [1, 16, 256, 4096], 2**16 if quick else 2**22
    shapes = {
        "parameters": [[(size,)] * 64 for size in sizes[: 2 if quick else 4]],
        "tensors": [[(shared // count,)] * count for count in counts[: 2 if quick else 4]],
    }
    return {
        kind: [Case(f"{len(each)}x{each[0][0]}", partial(_Parameters, each)) for each in members]
        for kind, members in shapes.items()
    }
