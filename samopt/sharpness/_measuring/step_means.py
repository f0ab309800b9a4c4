"""An optimizer's own measurements under the names they have in logs: of the last step, or averaged over steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from samopt.step_metrics import StepMetrics

__all__ = ["StepMeans", "log_keys"]

_MEASURED = ("loss", "perturbed_loss", "sharpness", "grad_norm", "perturbed_grad_norm", "radius", "applied_radius") + (
    "distance",
)
_RENAMED = {"sharpness": "sam"}  # "sharpness/sharpness" would say nothing


def log_keys(values: Mapping[str, float]) -> dict[str, float]:
    """Return an optimizer's measurements as ``sharpness/...``; the loss is left out, which every loop logs itself.

    Args:
        values: By their names in ``StepMetrics``.
    """
    return {f"sharpness/{_RENAMED.get(name, name)}": value for name, value in values.items() if name != "loss"}


class StepMeans:
    """Averages an optimizer's measurements over steps, without waiting for the device before they are read."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, step: StepMetrics) -> None:
        """Take one step's measurements.

        Args:
            step: What the optimizer measured.
        """
        for name in _MEASURED:
            value = getattr(step, name)
            if value is not None:
                before = self._totals.get(name)
                self._totals[name] = _wide(value) if before is None else before + _wide(value)
                self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Return the means, and begin again; waits for the device."""
        means = {name: float(total) / self._counts[name] for name, total in self._totals.items()}
        self._totals.clear()
        self._counts.clear()
        return means


def _wide(value: Tensor) -> Tensor:
    return value.detach().float() if value.device.type == "mps" else value.detach().double()  # mps has no fp64
