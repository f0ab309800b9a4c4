"""The one sharpness measure that every optimizer's model is compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from samopt import sharpness

__all__ = ["one_step_sharpness"]


def one_step_sharpness(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], rho: float) -> float:
    """Return the mean over batches of ``L(w + rho g / ||g||_2) - L(w)``: how much one ascent step raises the loss.

    ``L`` is the batch's cross-entropy in evaluation mode (BatchNorm uses its running statistics) and g its gradient.
    The model comes back bit for bit. Where the step lowers a loss, that batch counts 0. Cost: one gradient and one
    forward pass a batch.

    Args:
        model: The model.
        batches: Inputs and labels, the same ones for every model to be compared.
        rho: Radius, in units of the weights' l2 norm, > 0.

    Returns:
        The mean rise; nan where the loss is not finite to begin with.
    """
    try:
        return sharpness.worst_case(model, sharpness.cross_entropy, batches, rho=rho, steps=1, progress=False).value
    except ValueError:
        return math.nan
