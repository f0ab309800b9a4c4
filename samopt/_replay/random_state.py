"""The global random streams that a training step may draw from."""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samopt._callers.cuda_graphs import device_module, is_capturing

__all__ = ["RngState", "is_generator", "put_back_later"]


@dataclass(frozen=True)
class RngState:
    """Every global random stream a training step may draw from: torch CPU, accelerators, ``random``, NumPy.

    Generators that a loss function reads are kept with them.
    """

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]
    python: tuple[Any, ...]
    numpy: dict[str, Any] | None
    own: tuple[tuple[Any, Callable[[], Any]], ...] = ()

    @classmethod
    def capture(
        cls, devices: Iterable[torch.device] = (), like: RngState | None = None, generators: Iterable[Any] = ()
    ) -> RngState:
        """Return the present state of the global streams.

        Args:
            devices: Accelerator devices whose streams to include. Devices on which a graph is being captured are left
                out, because their state can be neither read nor set then.
            like: Another state. Python's is shared with it where it is equal, so that many states take little memory.
            generators: Random generators whose state to include.
        """
        accelerators = []
        for device in devices:
            if device.type != "cpu" and not is_capturing(device):
                accelerators.append((device, device_module(device).get_rng_state(*_argument(device))))
        python = random.getstate()
        if like is not None and python == like.python:
            python = like.python
        own = tuple([(generator, put_back_later(generator)) for generator in generators]) if generators else ()
        return cls(torch.get_rng_state(), tuple(accelerators), python, _numpy.get(), own)

    @property
    def generators(self) -> list[Any]:
        """The random generators whose state this includes."""
        return [generator for generator, _ in self.own]

    def has_moved(self) -> bool:
        """Return whether torch's streams have been drawn from since."""
        return not torch.equal(torch.get_rng_state(), self.cpu) or any(
            not torch.equal(device_module(device).get_rng_state(*_argument(device)), state)
            for device, state in self.accelerators
        )

    def restore(self) -> None:
        """Put the global streams back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            device_module(device).set_rng_state(state, *_argument(device))
        random.setstate(self.python)
        _numpy.set(self.numpy)
        for _, put_back in self.own:
            put_back()


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator of torch, Python or NumPy.

    Args:
        value: An object that a function or a module refers to.
    """
    if isinstance(value, torch.Generator | random.Random):
        return True
    numpy_random = sys.modules.get("numpy.random")
    return numpy_random is not None and isinstance(value, numpy_random.Generator | numpy_random.RandomState)


def put_back_later(generator: Any) -> Callable[[], Any]:
    """Return what puts a random generator back to its present position.

    Args:
        generator: For which ``is_generator`` is True.
    """
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    bits = getattr(generator, "bit_generator", None)
    if bits is not None:
        return functools.partial(setattr, bits, "state", bits.state)
    return functools.partial(generator.set_state, generator.get_state())


class _NumpyStream:
    """NumPy's global stream, read and set only where it was drawn from since.

    NumPy takes 60 microseconds for either, and a step does so four times. A look at the words of its generator tells in
    one whether they moved.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._words: bytes | None = None

    def get(self) -> dict[str, Any] | None:
        """Return the present state; the same object as before where nothing was drawn. None without NumPy."""
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is None:
            return None
        words = _words(numpy_random)
        if words is None or words != self._words:
            self._note(words, numpy_random.get_state(legacy=False))
        return self._state

    def set(self, state: dict[str, Any] | None) -> None:
        """Put the stream back.

        Args:
            state: What ``get`` returned; None leaves the stream alone.
        """
        if state is not None and self.get() is not state:
            numpy_random = sys.modules["numpy.random"]
            numpy_random.set_state(state)
            self._note(_words(numpy_random), state)

    def _note(self, words: bytes | None, state: dict[str, Any]) -> None:
        # The generator's words do not hold the second normal number of a pair, which NumPy keeps for the next call.
        has_normal = words is not None and state["has_gauss"]
        self._state, self._words = state, None if has_normal else words


_numpy = _NumpyStream()


def _words(numpy_random: Any) -> bytes | None:
    """Return what moves whenever NumPy's usual generator is drawn from: 624 words and a position; None for others."""
    get_generator = getattr(numpy_random, "get_bit_generator", None)  # since NumPy 1.24
    generator: Any = None if get_generator is None else get_generator()
    if type(generator) is not numpy_random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * (624 + 1))


def _argument(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that selects a device's random stream; that of ``torch.mps`` is the only one, unnamed."""
    return () if device.type == "mps" else (device,)
