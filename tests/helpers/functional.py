"""The recipe of functional SAM in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.helpers.cases import Epsilon, sam_epsilon

Call = Callable[[nn.Module], tuple[Tensor, Sequence[Tensor]]]
"""Runs a forward pass and returns the loss, and the outputs that it is computed from."""


def recipe(
    model: nn.Module,
    calls: Sequence[Call],
    rho: float,
    epsilon: Epsilon = sam_epsilon,
    extra: Callable[[nn.Module], Tensor] | None = None,
) -> list[Tensor]:
    """The gradient of functional SAM over a window: two lines around a move of the weights, with every stream replayed.

    ``extra`` is a loss of the weights alone, whose gradient is taken at ``w + epsilon``.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in weights]
    gradients = [torch.zeros_like(p) for p in weights]
    derivatives = []
    stream = torch.get_rng_state()
    buffers = copy.deepcopy(list(model.buffers()))
    for call in calls:
        loss, outputs = call(model)
        derivatives.append(torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True))
        total = loss if extra is None else loss + extra(model)
        for gradient, entry in zip(gradients, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
            gradient += 0 if entry is None else entry
    ended, left = torch.get_rng_state(), copy.deepcopy(list(model.buffers()))
    with torch.no_grad():
        for p, move in zip(weights, epsilon(saved, gradients, [rho] * len(saved)), strict=True):
            p.add_(move)
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    torch.set_rng_state(stream)
    result = [torch.zeros_like(p) for p in weights]
    for call, derivative in zip(calls, derivatives, strict=True):
        _, outputs = call(model)
        used = [(z, v) for z, v in zip(outputs, derivative, strict=True) if v is not None]
        parts = torch.autograd.grad([z for z, _ in used], weights, [v for _, v in used], allow_unused=True)
        for gradient, entry in zip(result, parts, strict=True):
            gradient += 0 if entry is None else entry
        if extra is not None:
            for gradient, entry in zip(result, torch.autograd.grad(extra(model), weights), strict=True):
                gradient += entry
    with torch.no_grad():
        for p, value in zip(weights, saved, strict=True):
            p.copy_(value)
        for buffer, value in zip(model.buffers(), left, strict=True):
            buffer.copy_(value)
    torch.set_rng_state(ended)
    return result
