"""Random numbers of the first pass, repeated in the second."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samopt._replay.call_watch import RAISED, PassFollower
from samopt._replay.outputs import follow_gradients, tensors_in
from samopt._replay.random_state import RngState
from samopt._replay.unobserved import is_observed

__all__ = ["ForwardCalls"]

_LIMIT = 4096  # records of one pass; beyond it random numbers are not repeated, so that memory stays bounded


class _Record:
    """The random state before one call, and what tells that call from others."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], state: RngState) -> None:
        self.module = id(module)
        self.kind = (module.training, torch.is_grad_enabled())
        self._inputs = [weakref.ref(tensor) for tensor in inputs]
        self.state = state
        self.was_differentiated = False
        self._graph: weakref.ref[_Mark] | None = None

    def was_given(self, inputs: tuple[Tensor, ...]) -> bool:
        """Return whether the call had the very same tensors.

        Args:
            inputs: Tensors among the arguments of another call.
        """
        known = [reference() for reference in self._inputs]
        return len(known) == len(inputs) and all(map(operator.is_, known, inputs))

    def follow(self, output: Any) -> None:
        """Note when the output is differentiated: only then does a call with a graph belong to a pass for sure."""
        mark = _Mark(self)
        if follow_gradients(tensors_in(output), mark):
            self._graph = weakref.ref(mark)
        else:
            self.was_differentiated = True  # nothing can tell, so it counts

    @property
    def is_abandoned(self) -> bool:
        """Whether the call built a graph that is gone and was never differentiated."""
        return self._graph is not None and self._graph() is None and not self.was_differentiated


class _Mark:
    """A gradient hook that lives as long as the graph it is in."""

    def __init__(self, record: _Record) -> None:
        self._record = record

    def __call__(self, gradient: Tensor) -> None:
        self._record.was_differentiated = True


class ForwardCalls(PassFollower):
    """Records the random state before each call of the first pass; in the second, sets it before the same call.

    So dropout draws the same masks in both passes. A call of the second pass is matched with one of the first that has
    the same module, mode and grad mode: the one with the same input tensor if there is one, else the next in order.
    Calls whose graph was never differentiated (logging between two steps) come last. Calls made with gradients off (a
    teacher) count too.

    Args:
        on_first_call: Called before the first call of each first pass.
        on_first_trained: Called before the first one with gradients on, where others come before it: these may be of
            an evaluation between two steps.
        on_second_pass: Called before the first call of a second pass, if that has gradients on.

    Attributes:
        devices: Accelerators whose random streams the model may use.
        replaying: Whether the second pass is running.
        drew_others: Whether a call of the second pass drew numbers, and repeats no call that is known of the first.
    """

    def __init__(
        self,
        on_first_call: Callable[[], None],
        on_first_trained: Callable[[], None] = lambda: None,
        on_second_pass: Callable[[], None] = lambda: None,
    ) -> None:
        self.devices: tuple[torch.device, ...] = ()
        self.replaying = False
        self._on_first_call = on_first_call
        self._on_first_trained = on_first_trained
        self._on_second_pass = on_second_pass
        self._open: _Record | None = None
        self._unmatched: RngState | None = None
        self._records: list[_Record] = []
        self._has_repeated = False
        self.clear()

    @property
    def is_empty(self) -> bool:
        """Whether no call was recorded."""
        return not self._records

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the random state, or set the recorded one.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._open = None
        if not is_observed():
            return
        inputs = tuple([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        if self.replaying:
            if not self._has_repeated and torch.is_grad_enabled():
                self._on_second_pass()
            self._has_repeated = True
            record = self._match(module, inputs)
            if record is not None:
                record.state.restore()
            elif self._records and not self.drew_others:
                self._unmatched = RngState.capture(self.devices)
            return
        if self._superseded:
            self.clear()
        while self._records and self._records[-1].is_abandoned:
            self._records.pop()
        if not self._records:
            self._on_first_call()
        elif torch.is_grad_enabled() and not any([record.kind[1] for record in self._records]):
            self._on_first_trained()
        if len(self._records) < _LIMIT:
            last = self._records[-1].state if self._records else None
            self._open = _Record(module, inputs, RngState.capture(self.devices, like=last))
            self._records.append(self._open)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Follow the graph of the output.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """
        before, self._unmatched = self._unmatched, None
        if before is not None and before.has_moved():
            self.drew_others = True
        record, self._open = self._open, None
        if record is not None and record.kind[1] and output is not RAISED and output is not None:
            record.follow(output)

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a call from now on starts a new first pass.

        Records made before are dropped at that call, not now: a loop may clear gradients between forward and backward.
        """
        self._superseded = not self.replaying

    def clear(self) -> None:
        """Drop all records, ready for the next first pass."""
        self.replaying = False
        self.drew_others = False
        self._unmatched = None
        self._superseded = False
        self._has_repeated = False
        self._records = []
        self._position = 0
        self._open = None

    def _match(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> _Record | None:
        """Return the record of the call that this one repeats, or None."""
        kind = (module.training, torch.is_grad_enabled())
        if self._position < len(self._records):  # most often, calls come in the same order
            record = self._records[self._position]
            is_next = record.module == id(module) and record.kind == kind and record.was_differentiated
            if is_next and record.was_given(inputs):
                self._position += 1
                return record
        alike = [(index, record) for index, record in enumerate(self._records) if record.kind == kind]
        alike = [(i, record) for i, record in alike if record.module == id(module)] or alike
        alike = [(i, record) for i, record in alike if record.was_differentiated] or alike
        ahead = [(i, record) for i, record in alike if i >= self._position]
        given = [found for found in (*ahead, *alike) if found[1].was_given(inputs)] if inputs else []
        same = given or ahead
        if not same:
            return None
        index, record = same[0]
        self._position = index + 1
        return record
