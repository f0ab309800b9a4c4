"""The global random streams that a training step may draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samopt._callers.cuda_graphs import device_module, is_capturing

__all__ = ["RngState"]


@dataclass(frozen=True)
class RngState:
    """Every global random stream a training step may draw from: torch CPU, accelerators, ``random``, NumPy."""

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | dict[str, Any] | None

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = (), like: RngState | None = None) -> RngState:
        """Return the present state of the global streams.

        Args:
            devices: Accelerator devices whose streams to include. Devices on which a graph is being captured are left
                out, because their state can be neither read nor set then.
            like: Another state. What is equal to it is shared with it, so that many states take little memory.
        """
        accelerators = tuple(
            (device, device_module(device).get_rng_state(*_argument(device)))
            for device in devices
            if device.type != "cpu" and not is_capturing(device)
        )
        python = random.getstate()
        numpy_random = sys.modules.get("numpy.random")
        numpy = numpy_random.get_state() if numpy_random is not None else None
        if like is not None:
            python = like.python if python == like.python else python
            numpy = like.numpy if _numpy_equal(numpy, like.numpy) else numpy
        return cls(torch.get_rng_state(), accelerators, python, numpy)

    def has_moved(self) -> bool:
        """Return whether torch's streams have been drawn from since."""
        return not torch.equal(torch.get_rng_state(), self.cpu) or any(
            not torch.equal(device_module(device).get_rng_state(*_argument(device)), state)
            for device, state in self.accelerators
        )

    def restore(self, present: RngState | None = None) -> None:
        """Put the global streams back to this state.

        Args:
            present: The state they are in, where that is known. Streams that share it are left alone: those of Python
                and NumPy are slow to set.
        """
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            device_module(device).set_rng_state(state, *_argument(device))
        if present is None or present.python is not self.python:
            random.setstate(self.python)
        if self.numpy is not None and (present is None or present.numpy is not self.numpy):
            sys.modules["numpy.random"].set_state(self.numpy)


def _numpy_equal(state: Any, other: Any) -> bool:
    """Return whether two states of NumPy's usual generator are equal; False for other generators."""
    if not (isinstance(state, tuple) and isinstance(other, tuple)):
        return False
    return state[0] == other[0] and state[2:] == other[2:] and bool(state[1].tobytes() == other[1].tobytes())


def _argument(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that selects a device's random stream; that of ``torch.mps`` is the only one, unnamed."""
    return () if device.type == "mps" else (device,)
