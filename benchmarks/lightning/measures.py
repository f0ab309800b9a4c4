"""What the monitor measures in every run."""

from __future__ import annotations

from typing import Any

__all__ = ["MEASURES"]

MEASURES: dict[str, dict[str, Any]] = {
    "worst_case": {"rho": 0.5, "steps": 5},
    "average_case": {"rho": 0.05, "samples": 5},
    "per_layer": {"rho": 0.5, "steps": 1},
}
"""Adaptive sharpness, on four training batches."""
