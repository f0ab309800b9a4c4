"""A second pass that sees what the first one saw: random numbers replayed, buffers put back."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from samopt._callers.cuda_graphs import device_module, is_capturing
from samopt._callers.user_warnings import warn_user
from samopt._replay.unobserved import is_observed

__all__ = ["PassObserver", "Replay", "RngState", "SavedBuffers"]


@dataclass(frozen=True)
class RngState:
    """Every global random stream a training step may draw from: torch CPU, accelerators, ``random``, NumPy."""

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | dict[str, Any] | None

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RngState:
        """Return the present state of the global streams.

        Args:
            devices: Accelerator devices whose streams to include; others are ignored, and those on which a graph is
                being captured, since their state can be neither read nor set then.
        """
        accelerators = tuple(
            (device, device_module(device).get_rng_state(*_named(device)))
            for device in devices
            if device.type != "cpu" and not is_capturing(device)
        )
        numpy_random = sys.modules.get("numpy.random")
        return cls(
            torch.get_rng_state(),
            accelerators,
            random.getstate(),
            numpy_random.get_state() if numpy_random is not None else None,
        )

    def has_moved(self) -> bool:
        """Return whether torch's streams have been drawn from since."""
        return not torch.equal(torch.get_rng_state(), self.cpu) or any(
            not torch.equal(device_module(device).get_rng_state(*_named(device)), state)
            for device, state in self.accelerators
        )

    def restore(self, present: RngState | None = None) -> None:
        """Put the global streams back to this state.

        Args:
            present: The state they are in, where that is known: NumPy's, which is slow to set, is left alone if equal.
        """
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            device_module(device).set_rng_state(state, *_named(device))
        random.setstate(self.python)
        if self.numpy is not None and (present is None or not _are_equal(self.numpy, present.numpy)):
            sys.modules["numpy.random"].set_state(self.numpy)


class PassObserver(Protocol):
    """Something that gathers facts about the first pass and drops them with it."""

    replaying: bool
    """Whether the second pass is running, so that its forward calls do not count."""

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a forward call from now on starts a new first pass."""

    def clear(self) -> None:
        """Drop what was gathered, and set ``replaying`` to False."""


class Replay:
    """Watches a model's forward calls in the first pass and repeats their surroundings in the second.

    In the first pass the random state before each call that builds a graph is recorded; in the second, the k-th call
    starts from the k-th record, so dropout draws the same masks. Buffers (normalisation statistics and all others) and
    the random streams end where the first pass left them.

    Args:
        model: The module whose calls to watch, or None to look after the random streams only.
        devices: Accelerators whose random streams the model may use.
        observers: Told when passes begin and end.
    """

    def __init__(
        self, model: nn.Module | None, devices: Iterable[torch.device], observers: Iterable[PassObserver] = ()
    ) -> None:
        self.model = model
        self._calls = _CallRecorder(())
        self._observers: tuple[PassObserver, ...] = (self._calls, *observers)
        self.use_devices(devices)
        self._buffers = _NO_BUFFERS
        self._end: RngState | None = None
        self._is_blind = False
        self._has_warned = False
        if model is not None:
            handle = model.register_forward_pre_hook(self._calls)
            weakref.finalize(self, handle.remove)

    def use_devices(self, devices: Iterable[torch.device]) -> None:
        """Set the devices whose random streams the model may use.

        Args:
            devices: Accelerators; the CPU's stream is always included.
        """
        self._calls.devices = tuple(devices)

    def capture(self) -> RngState:
        """Return the present random state of the streams this model may use."""
        return RngState.capture(self._calls.devices or ())

    def begin(self, start: RngState | None = None) -> None:
        """Enter the second pass.

        Args:
            start: Random state at the start of the first pass, where known.
        """
        self._buffers = _NO_BUFFERS if self.model is None else SavedBuffers(self.model)
        self._end = self.capture()
        self._is_blind = self.model is not None and start is None and self._calls.is_empty
        if not self._has_warned and any(map(is_capturing, self._calls.devices or ())) and _has_dropout(self.model):
            self._has_warned = True
            warn_user(
                "random states cannot be set while a graph is captured, so in its replays the dropout of "
                f"model={type(self.model).__name__} draws other masks in the second pass than in the first. Set its "
                "rate to 0, or take these steps without a graph"
            )
        for observer in self._observers:
            observer.replaying = True
        if start is not None:
            start.restore(present=self._end)

    def end(self) -> None:
        """Leave the second pass: buffers and random streams as the first pass left them; may be called again."""
        self._buffers.restore()
        unseen = self._end is not None and self._is_blind and self._end.has_moved()
        if self._end is not None:
            self._end.restore()
        self.forget()
        if unseen and not self._has_warned:
            self._has_warned = True
            self._warn()

    def _warn(self) -> None:
        warn_user(
            f"the second pass drew random numbers, but no forward call of model={type(self.model).__name__} was seen "
            "in the first, so dropout masks differed between the passes. Give model= the module that your loop calls, "
            "such as the one that torch.compile(model) returned (calls inside a compiled module, and those of one "
            "compiled in place by model.compile(), cannot be seen); or use optimizer.step(closure), which replays them"
        )

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a forward call from now on starts a new first pass.

        Calls recorded before are dropped then, so that an abandoned first pass (an exception in its backward, say)
        is not replayed; a loop that clears the gradients between forward and backward keeps its record.
        """
        for observer in self._observers:
            observer.gradients_cleared()

    def forget(self) -> None:
        """Drop what was recorded, ready for the next first pass."""
        for observer in self._observers:
            observer.clear()
        self._buffers = _NO_BUFFERS
        self._end = None


class _CallRecorder:
    """The forward pre-hook; holds no reference to the optimizer, and copies of a hooked model get an inert one."""

    _LIMIT = 4096  # calls in one pass; beyond it masks are not replayed, so that memory stays bounded

    def __init__(self, devices: tuple[torch.device, ...] | None) -> None:
        self.devices = devices
        self.replaying = False
        self.clear()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self.devices is None or not torch.is_grad_enabled() or not is_observed():
            return
        if not self.replaying:
            if self._superseded:
                self.clear()
            if len(self._states) < self._LIMIT:
                self._states.append((module.training, RngState.capture(self.devices)))
            return
        for training, state in self._states[self._position :]:
            self._position += 1
            if training == module.training:  # steps over an evaluation whose author forgot torch.no_grad
                state.restore()
                return

    @property
    def is_empty(self) -> bool:
        return not self._states

    def gradients_cleared(self) -> None:
        self._superseded = not self.replaying

    def clear(self) -> None:
        self._superseded = False
        self._states: list[tuple[bool, RngState]] = []
        self._position = 0
        self.replaying = False

    def __reduce__(self) -> tuple[type[_CallRecorder], tuple[None]]:
        return _CallRecorder, (None,)


class SavedBuffers:
    """The tensor of every buffer of a model, and its values, to be put back where it was registered.

    Args:
        model: The module; None has no buffers.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = () if model is None else model.modules()
        self._places = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
        self._written = [buffer for _, _, buffer in self._places if buffer is not None and not _is_read_only(buffer)]
        with torch.no_grad():
            self._values = [buffer.clone() for buffer in self._written]

    def restore(self) -> None:
        """Register the same tensors again, where others took their place, and write their values back."""
        for owner, name, buffer in self._places:
            if owner._buffers.get(name) is not buffer:
                owner._buffers[name] = buffer
        if not self._written:
            return
        with torch.no_grad():
            if all([type(buffer) is Tensor for buffer in self._written]):
                torch._foreach_copy_(self._written, self._values)
                return
            for buffer, value in zip(self._written, self._values, strict=True):
                buffer.copy_(value)


_NO_BUFFERS = SavedBuffers(None)


def _are_equal(numpy: Any, other: Any) -> bool:
    """Return whether two states of NumPy's stream are seen to be equal, which those of its usual generator are."""
    if not (isinstance(numpy, tuple) and isinstance(other, tuple)):
        return False
    return numpy[0] == other[0] and numpy[2:] == other[2:] and bool(numpy[1].tobytes() == other[1].tobytes())


def _is_read_only(buffer: Tensor) -> bool:
    """Whether torch refuses to write into the buffer, so that no pass can have changed its values."""
    if buffer.is_inference():
        return True
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that picks a device's random stream; that of ``torch.mps`` is one, and had none before."""
    return () if device.type == "mps" else (device,)


def _has_dropout(model: nn.Module | None) -> bool:
    """Return whether a module of torch's own draws masks, as far as its attributes tell."""
    modules = () if model is None else model.modules()
    rates = [getattr(m, "p" if isinstance(m, _DropoutNd) else "dropout", None) for m in modules if m.training]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
