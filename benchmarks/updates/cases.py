"""Whose parameters are updated: well-known networks, many tiny tensors, and two ways to grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.updates.networks import ResNet18, Transformer

__all__ = ["CASES", "Case", "growth"]

_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """Parameters, and perhaps a batch to take their gradient on.

    Attributes:
        name: What a person types.
        summary: One line for the help.
        build: Makes the module that holds the parameters.
        batch: Makes inputs of its forward, so many times the examples of a small batch; None where only the update is
            measured.
        needs_gpu: Whether it is left out on a CPU.
    """

    name: str
    summary: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Tensor] | None = None
    needs_gpu: bool = False

    def loss(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return a loss whose gradient reaches every parameter.

        Args:
            module: What ``build`` made.
            inputs: What ``batch`` made.
        """
        outputs = module(inputs)
        labels = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
        return functional.cross_entropy(outputs, labels)


class _Parameters(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.empty(shape).normal_(std=0.02)) for shape in shapes)


def _bert() -> nn.Module:
    return Transformer(nn.Embedding(30522, 768), width=768, depth=12, heads=12, tokens=512, outputs=768)


def _vit() -> nn.Module:
    embedding = nn.Sequential(nn.Conv2d(3, 384, 16, stride=16), nn.Flatten(2), _Transpose())
    return Transformer(embedding, width=384, depth=12, heads=6, tokens=197, outputs=1000)


class _Transpose(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2)


def _decoder() -> nn.Module:
    width, layer = 2048, [(2048, 2048)] * 4 + [(8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return _Parameters([(50304, width), *layer * 16, (width,)])


CASES = {
    case.name: case
    for case in (
        Case("resnet18", "ResNet-18, batch of 8 images of 64 x 64", ResNet18, lambda n: torch.randn(8 * n, 3, 64, 64)),
        Case(
            "bert_base",
            f"BERT-base, batch of 2 x {_TOKENS} tokens",
            _bert,
            lambda n: torch.randint(30522, (2 * n, _TOKENS)),
        ),
        Case("vit_s", "ViT-S/16, batch of 4 images of 64 x 64", _vit, lambda n: torch.randn(4 * n, 3, 64, 64)),
        Case("tiny500", "500 tensors of 1,000 elements", lambda: _Parameters([(1000,)] * 500)),
        Case("decoder_1b", "a decoder of 1.2 billion parameters", _decoder, needs_gpu=True),
    )
}
"""By name."""


def growth(quick: bool) -> dict[str, list[Case]]:
    """Return cases that grow in one thing: "parameters" in 64 tensors, or "tensors" of 4 million parameters.

    Args:
        quick: Whether to return two of each only, the tensors of 65,536 parameters.
    """
    sizes = [1_000, 10_000, 100_000, 400_000]
    counts = [1, 16, 256, 4096]
    kept = 2 if quick else len(sizes)
    shared = 2**16 if quick else 2**22
    return {
        "parameters": [_growing([(size,)] * 64) for size in sizes[:kept]],
        "tensors": [_growing([(shared // count,)] * count) for count in counts[:kept]],
    }


def _growing(shapes: list[tuple[int, ...]]) -> Case:
    return Case(f"{len(shapes)}x{shapes[0][0]}", "for growth", lambda: _Parameters(shapes))
