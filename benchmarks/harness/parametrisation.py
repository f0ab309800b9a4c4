"""Networks of any width whose learning rate transfers, or does not: the NTK parametrisation and muP, for plain SGD.

In both, weights start from N(0, 1) and the forward divides by the square root of the fan-in, so that activations are of
one size at every width:

    h = W x / sqrt(fan_in)

The NTK parametrisation (Jacot et al. 2018) trains that network with one learning rate. The wider it is, the less its
features move. muP (Yang & Hu 2021) keeps them moving by the same amount: with ``m = width / base_width``

    outputs = NTK network's outputs / sqrt(m)          learning rate = lr * m

At the base width the two are the same network. With stock layers, whose weights are ``W / sqrt(fan_in)``, this is muP's
usual table for SGD: the learning rate of the first layer grows with m, that of hidden layers stays, that of the last
one falls with 1 / m. The last layer starts at 0 in both, so that no width begins with outputs of another size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEAD = 8  # features of an attention head: wider models have more heads, so 1 / sqrt(features) is the same for all


@dataclass(frozen=True)
class Parametrisation:
    """How a width changes the size of the outputs and the learning rate.

    Attributes:
        name: "mup" or "ntk".
        width: The network's.
        base_width: Where both are the same, and where the learning rate is chosen.
    """

    name: str
    width: int
    base_width: int

    @property
    def multiplier(self) -> float:
        """What the outputs are multiplied by."""
        return math.sqrt(self.base_width / self.width) if self.name == "mup" else 1.0

    def learning_rate(self, lr: float) -> float:
        """Return what SGD is given where ``lr`` is the learning rate at the base width."""
        return lr * self.width / self.base_width if self.name == "mup" else lr


class Linear(nn.Module):
    """``gain * W x / sqrt(inputs)``, W from N(0, 1) or 0; the gain is sqrt(2) after a ReLU."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs) if zero else torch.randn(outputs, inputs))
        self._factor = gain / math.sqrt(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, shape ``(..., outputs)``."""
        return self._factor * functional.linear(inputs, self.weight)


class Perceptron(nn.Sequential):
    """Two hidden layers with ReLU, from 64 pixels to 10 outputs."""

    def __init__(self, parametrisation: Parametrisation) -> None:
        width, after_relu = parametrisation.width, math.sqrt(2)
        super().__init__(
            nn.Flatten(),
            Linear(64, width),
            nn.ReLU(),
            Linear(width, width, after_relu),
            nn.ReLU(),
            Linear(width, 10, after_relu * parametrisation.multiplier, zero=True),
        )


class Transformer(nn.Module):
    """A vision transformer of two pre-norm layers on the four 4 x 4 patches of an 8 x 8 image."""

    def __init__(self, parametrisation: Parametrisation) -> None:
        super().__init__()
        width = parametrisation.width
        self.embed = Linear(16, width)
        self.position = nn.Parameter(torch.randn(4, width))
        self.layers = nn.Sequential(_Layer(width), _Layer(width))
        self.head = Linear(width, 10, parametrisation.multiplier, zero=True)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs, shape ``(n, 10)``, of images, shape ``(n, 1, 8, 8)``."""
        patches = functional.unfold(images, 4, stride=4).transpose(1, 2)
        tokens = self.layers(self.embed(patches) + self.position)
        outputs: Tensor = self.head(_norm(tokens).mean(1))
        return outputs


class _Layer(nn.Module):
    """Attention and a perceptron, each after a norm and beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 2 * width), Linear(2 * width, width, math.sqrt(2))

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.attend(_norm(tokens)).unflatten(-1, (-1, 3 * _HEAD)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        weights = (query @ key.transpose(2, 3) / math.sqrt(_HEAD)).softmax(-1)
        tokens = tokens + self.out((weights @ value).transpose(1, 2).flatten(2))
        result: Tensor = tokens + self.down(functional.relu(self.up(_norm(tokens))))
        return result


def _norm(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:])
