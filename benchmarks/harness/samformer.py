"""SAMformer (Ilbert et al. 2024) and the ETTh1 series: hourly transformer temperatures, seven channels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.errors import BenchmarkError

INPUT_HOURS = 512
_MONTH = 30 * 24
_PARTS = {"train": (0, 12), "validation": (12, 16), "test": (16, 20)}  # months, as in the field's benchmarks
_HOW_TO_GET = (
    "get ETTh1.csv from https://github.com/zhouhaoyi/ETDataset (folder ETT-small; licence CC BY-ND 4.0) and pass "
    "--data PATH/ETTh1.csv"
)


class Samformer(nn.Module):
    """One attention layer over channels between reversible normalisations, and a linear layer to the future.

    Args:
        horizon: Hours to forecast.
        channels: Number of series.
        width: Size of keys and queries.
    """

    def __init__(self, horizon: int, channels: int = 7, width: int = 16) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1))
        self.query, self.key = nn.Linear(INPUT_HOURS, width), nn.Linear(INPUT_HOURS, width)
        self.value = nn.Linear(INPUT_HOURS, INPUT_HOURS)
        self.forecast = nn.Linear(INPUT_HOURS, horizon)

    def forward(self, past: Tensor) -> Tensor:
        """Return the future, shape ``(n, channels, horizon)``, of the past, shape ``(n, channels, INPUT_HOURS)``."""
        mean = past.mean(2, keepdim=True)
        deviation = (past.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        normal = (past - mean) / deviation * self.scale + self.shift
        scores = self.query(normal) @ self.key(normal).transpose(1, 2)
        mixed = normal + (scores / math.sqrt(self.query.out_features)).softmax(2) @ self.value(normal)
        return (self.forecast(mixed) - self.shift) / (self.scale + 1e-10) * deviation + mean


def read_series(path: Path | None) -> dict[str, Tensor]:
    """Return the three parts of the series, shape ``(7, hours)`` each, standardised by the training part.

    Validation and test begin with the last hours of the part before them, the first windows' past.
    """
    if path is None or not path.is_file():
        raise BenchmarkError(f"samformer needs the series ETTh1, and --data is {path}; {_HOW_TO_GET}")
    try:
        values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is not ETTh1.csv: {error}; {_HOW_TO_GET}") from error
    if len(values) < 20 * _MONTH:
        raise BenchmarkError(f"{path} has {len(values)} hours, and ETTh1.csv 17,420; {_HOW_TO_GET}")
    train = values[: 12 * _MONTH]
    series = torch.from_numpy((values - train.mean(0)) / train.std(0)).float().T
    return {
        name: series[:, max(0, first * _MONTH - INPUT_HOURS) : last * _MONTH] for name, (first, last) in _PARTS.items()
    }


def windows(series: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Return every past and its future, shapes ``(n, 7, INPUT_HOURS)`` and ``(n, 7, horizon)``; views."""
    found = series.unfold(1, INPUT_HOURS + horizon, 1).transpose(0, 1)
    return found[..., :INPUT_HOURS], found[..., INPUT_HOURS:]
