"""Models with low-rank adapters, and the loop by hand that perturbs their whole weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DOUBLE = torch.float64
VOCABULARY = 40


class Whole(NamedTuple):
    """A weight that moves as a whole: ``W``, what returns ``W + s B A``, and the dimensions that a row spans."""

    weight: Tensor
    merged: Callable[[], Tensor]
    dims: tuple[int, ...]


class OwnWeight(nn.Linear):
    """A layer with a frozen weight of its own and factors that are parameters."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, scaling: float = 1.5) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) * 0.5)
        self.lora_B = nn.Parameter(torch.randn(outputs, rank) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


class ReadsWeight(nn.Module):
    """A layer that reads the weight of a frozen child without calling it; its factors are modules."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, scaling: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        whole = self.linear.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight
        return nn.functional.linear(x, whole, self.linear.bias)


def own(kind: type[nn.Module] = OwnWeight, dtype: torch.dtype = DOUBLE, dropout: float = 0.0) -> nn.Sequential:
    """A classifier of six inputs and three classes with adapters in both layers."""
    torch.manual_seed(0)
    return nn.Sequential(kind(6, 12), nn.Tanh(), nn.Dropout(dropout), kind(12, 3)).to(dtype)


def own_layers(model: nn.Module) -> list[Whole]:
    """The whole weights of ``own``, in the order of the modules."""
    found = []
    for layer in model.modules():
        if isinstance(layer, OwnWeight):
            found.append(Whole(layer.weight, lambda m=layer: m.weight + m.scaling * m.lora_B @ m.lora_A, (1,)))
        elif isinstance(layer, ReadsWeight):
            found.append(
                Whole(
                    layer.linear.weight,
                    lambda m=layer: m.linear.weight + m.scaling * m.lora_B.weight @ m.lora_A.weight,
                    (1,),
                )
            )
    return found


def plain_layers(model: nn.Module) -> list[Whole]:
    """The trained matrices and kernels of a model without adapters."""
    weights = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    return [Whole(p, lambda p=p: p, tuple(range(1, p.dim()))) for p in weights]


def peft_layers(model: nn.Module) -> list[Whole]:
    """The whole weights under peft's adapters, as peft itself would merge them."""
    from peft.tuners.lora import Linear, LoraLayer

    found = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight

            def merged(layer: Any = layer, weight: Tensor = weight) -> Tensor:
                active = [name for name in layer.active_adapters if name in layer.scaling]
                return weight + sum(layer.get_delta_weight(name) for name in active)

            is_transposed = isinstance(layer, Linear) and layer.fan_in_fan_out
            dims = (0,) if is_transposed else tuple(range(1, weight.dim()))
            found.append(Whole(weight, merged, dims))
    return found


def normal(like: Tensor, seed: int, step: int, index: int) -> Tensor:
    """The numbers of one layer in one step, drawn by stock torch."""
    key = (seed * 0x9E3779B97F4A7C15 + step + index * 0xD1B54A32D192ED03) % 2**63
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(key), dtype=wide)


def noise(layers: Sequence[Whole], rhos: Sequence[float], seed: int, step: int) -> list[Tensor]:
    """``rho ||row|| / sqrt(n)`` times normal numbers (Li et al. 2025, section 3.3)."""
    moves = []
    for index, ((weight, merged, dims), rho) in enumerate(zip(layers, rhos, strict=True)):
        whole = merged().detach()
        entries = 1
        for dim in dims:
            entries *= whole.shape[dim]
        deviation = rho * whole.square().sum(dim=dims, keepdim=True).sqrt() / entries**0.5
        moves.append(deviation * normal(weight, seed, step, index))
    return moves


def uphill(layers: Sequence[Whole], rhos: Sequence[float], backward: Callable[[], Any]) -> list[Tensor]:
    """``rho G / ||G||`` with the gradient of each whole weight, the norm over all that move."""
    weights = [weight for weight, _, _ in layers]
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    backward()
    gradients = [weight.grad for weight in weights]
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
        weight.grad = None
    norm = sum(float(g.square().sum()) for g, rho in zip(gradients, rhos, strict=True) if rho) ** 0.5
    return [g * (rho / norm if rho else 0.0) for g, rho in zip(gradients, rhos, strict=True)]


def backward_at(layers: Sequence[Whole], moves: Sequence[Tensor], backward: Callable[[], Any]) -> Any:
    """Run ``backward`` with the weights moved in place, and copy them back."""
    kept = [weight.detach().clone() for weight, _, _ in layers]
    with torch.no_grad():
        for (weight, _, _), move in zip(layers, moves, strict=True):
            weight.add_(move)
    result = backward()
    with torch.no_grad():
        for (weight, _, _), values in zip(layers, kept, strict=True):
            weight.copy_(values)
    return result


def hand_step(
    base: torch.optim.Optimizer,
    layers: Sequence[Whole],
    backward: Callable[[], Any],
    *,
    perturbation: str = "noise",
    rho: float | Sequence[float] = 0.1,
    seed: int = 0,
    step: int = 0,
) -> Any:
    """One step of a stock optimizer with the gradient at ``W + s B A + epsilon``; returns what ``backward`` does."""
    rhos = [rho] * len(layers) if isinstance(rho, float) else rho
    if perturbation == "noise":
        moves = noise(layers, rhos, seed, step)
    else:
        base.zero_grad()
        moves = uphill(layers, rhos, backward)
    base.zero_grad()
    result = backward_at(layers, moves, backward)
    base.step()
    return result


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that no optimizer gets."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def differing(model: nn.Module, before: dict[str, Tensor]) -> int:
    """How many frozen values have changed."""
    return sum(int((model.get_parameter(name) != values).sum()) for name, values in before.items())
