"""How long something takes on a device, how fast that device copies, and how many bytes are alive at once."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = Literal["wall", "cpu"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass; or that this process computes, for a machine that is busy with other work."""

_COPY_BYTES = 2**28


def seconds(device: torch.device, clock: Clock, action: Callable[[], object]) -> float:
    """Return how long an action takes: on a GPU between two CUDA events, elsewhere by a clock."""
    if device.type != "cuda":
        start = CLOCKS[clock]()
        action()
        return CLOCKS[clock]() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


@functools.lru_cache(maxsize=1)
class Copy:
    """A copy of 256 MiB, whose rate is the device's bandwidth; made once, since its memory takes a while to get.

    Args:
        device: The device whose bandwidth is measured.
        clock: What it is timed by.
    """

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self._source = torch.ones(_COPY_BYTES // 4, device=device)
        self._target = torch.zeros_like(self._source)

    def rate(self) -> float:
        """Copy once, and return bytes read and written per second."""
        return 2 * _COPY_BYTES / seconds(self._device, self._clock, lambda: self._target.copy_(self._source))


def in_turns(
    names: Sequence[str], rounds: int, time_one: Callable[[str], float], copy: Copy | None = None
) -> tuple[dict[str, list[float]], list[float]]:
    """Return the milliseconds of each, and the rate of a copy, round by round; the first of a round takes turns.

    Args:
        names: What to time.
        rounds: Turns that are counted; one before them warms up.
        time_one: Returns the seconds of one of ``names``.
        copy: Made once a round; None for none.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for turn in range(rounds + 1):
        first = turn % len(names)
        rates += [copy.rate()] if copy else []
        for name in (*names[first:], *names[:first]):
            times[name].append(1000 * time_one(name))
    return {name: values[1:] for name, values in times.items()}, rates[1:]


class Memory(TorchDispatchMode):
    """Follows the storages that operations return, on any device; a context manager.

    Args:
        known: Tensors that are there before, which do not count.

    Attributes:
        peak: Most bytes alive at once, after any operation.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and look at what it returns."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Return the bytes that are alive now."""
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        return sum(size for _, size in self._alive.values())


def peak_bytes(device: torch.device, action: Callable[[], object], known: Sequence[Tensor]) -> tuple[int, int]:
    """Return the most bytes of tensors alive at once during an action, and those still alive after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        after = torch.cuda.memory_allocated(device) - before
        return torch.cuda.max_memory_allocated(device) - before, after
    with Memory(known) as memory:
        action()
        gc.collect(1)  # what the action left in circles
        return memory.peak, memory.alive()
