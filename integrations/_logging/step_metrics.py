"""What an optimizer measured in its latest step, under the names it has in logs."""

from __future__ import annotations

from torch import Tensor

from samopt import StepMetrics
from samopt.sharpness._measuring.step_means import log_keys

__all__ = ["free_metrics"]

_SCALED = ("grad_norm", "perturbed_grad_norm")


def free_metrics(step: StepMetrics, gradient_scale: Tensor | None = None) -> dict[str, float]:
    """Return the measurements as ``sharpness/...`` values for logs; waits for the device.

    Args:
        step: The measurements; its first loss is left out, since frameworks log that themselves.
        gradient_scale: What a ``GradScaler`` had multiplied the gradients by, 0-dim.
    """
    values = step.to_dict()
    if gradient_scale is not None:
        scale = float(gradient_scale)
        values |= {name: values[name] / scale for name in _SCALED if name in values}
    return log_keys(values)
