"""The one sharpness measure that every optimizer's model is compared by."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import samopt

__all__ = ["one_step_sharpness"]


def one_step_sharpness(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rho: float) -> float:
    """Return the mean over batches of ``L(w + rho g / ||g||_2) - L(w)``: how much one ascent step raises the loss.

    ``L`` is the batch's cross-entropy in evaluation mode (BatchNorm uses its running statistics) and g its gradient.
    The weights come back bit for bit; the gradients are cleared; the model keeps its mode. Cost: one gradient and one
    forward pass a batch.

    Args:
        model: The model.
        batches: Inputs and labels, the same ones for every model to be compared.
        rho: Radius, in units of the weights' l2 norm.
    """
    was_training = model.training
    model.eval()
    probe = samopt.SAM(
        torch.optim.SGD(model.parameters(), lr=0.0), rho=rho, measure_grad_norms=False, warn_on_stall=False
    )
    rises = []
    for inputs, labels in batches:
        probe.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        with probe.perturbed(), torch.no_grad():
            perturbed_loss = functional.cross_entropy(model(inputs), labels)
        rises.append(float(perturbed_loss) - float(loss.detach()))
    probe.zero_grad()
    model.train(was_training)
    return statistics.fmean(rises)
