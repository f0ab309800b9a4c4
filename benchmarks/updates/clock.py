"""How long something takes on a device, and how fast that device copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["CLOCKS", "Copy", "seconds"]

_COPY_BYTES = 2**28


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass; or that this process computes, whatever else runs on the machine."""


def seconds(device: torch.device, clock: str, action: Callable[[], object]) -> float:
    """Return how long an action takes: on a GPU between two CUDA events, elsewhere by a clock.

    Args:
        device: Where the action works.
        clock: A name in ``CLOCKS``.
        action: What to time.
    """
    if device.type != "cuda":
        now = CLOCKS[clock]
        start = now()
        action()
        return now() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


class Copy:
    """A copy of 256 MiB, whose rate is the device's bandwidth.

    Args:
        device: Where.
        clock: A name in ``CLOCKS``.
    """

    def __init__(self, device: torch.device, clock: str) -> None:
        self._device = device
        self._clock = clock
        self._source = torch.ones(_COPY_BYTES // 4, device=device)
        self._target = torch.zeros_like(self._source)

    def rate(self) -> float:
        """Copy once, and return bytes read and written per second."""
        return 2 * _COPY_BYTES / seconds(self._device, self._clock, lambda: self._target.copy_(self._source))
