"""Follows the forward calls of the first pass, and averages their distances."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from samopt._replay.call_watch import RAISED, PassFollower
from samopt._replay.unobserved import is_observed
from samopt.distributed import calling_data_parallel_module
from samopt.trust_region.call import ForwardCall, Surroundings
from samopt.trust_region.comparison import Comparison
from samopt.trust_region.protocol import TrustRegion

__all__ = ["FirstPassWatch"]

_Wanted: TypeAlias = Callable[[], "tuple[torch.device, ...] | None"]


class FirstPassWatch(PassFollower):
    """Measures a trust region on every call that builds a graph, outside the second pass.

    Each call is measured as soon as it is over, so that no input or output is kept; with several calls in a pass the
    distances are averaged, weighted by their numbers of examples.

    Args:
        region: What measures.
        comparison: How outputs are compared.
        wanted: Returns the devices of the model while a distance is wanted, else None.
    """

    def __init__(self, region: TrustRegion, comparison: Comparison, wanted: _Wanted) -> None:
        self._region = region
        self._comparison = comparison
        self._wanted = wanted
        self._start: Surroundings | None = None
        self._caller: weakref.ref[nn.Module] | None = None
        self.clear()

    @property
    def caller(self) -> nn.Module | None:
        """The DDP module that called the model in the latest first pass; None where the loop called it itself."""
        return None if self._caller is None else self._caller()

    def total(self) -> tuple[Tensor, Tensor] | None:
        """Return the weighted sum of the distances so far and the sum of the weights, 0-dim; None without a call.

        Calls in evaluation mode count only where there are no others: a loop may evaluate without ``torch.no_grad``.
        """
        return self._totals.get(True, self._totals.get(False))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call's surroundings.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._start = None
        if self.replaying or not torch.is_grad_enabled() or not is_observed():
            return
        devices = self._wanted()
        if devices is None:
            return
        if self._superseded:
            self.clear()
        self._start = Surroundings.capture(module, devices)
        caller = calling_data_parallel_module()
        self._caller = None if caller is None else weakref.ref(caller)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Measure a call.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """
        start, self._start = self._start, None
        if start is None or output is RAISED or output is None:
            return
        call = ForwardCall(module, args, kwargs, output, start, self._comparison, self._calls)
        try:
            start.state.save()  # from here, names are as before the call, for its repetitions
            distance = torch.as_tensor(self._region.measure(call)).detach()
        finally:
            start.state.restore()
        weight = call.weight
        if isinstance(weight, Tensor):
            weight = weight.to(distance)
        else:
            weight = torch.full_like(distance, weight)  # filled on the device: a copy from the host would wait
        before = self._totals.get(module.training, (torch.zeros_like(distance), torch.zeros_like(weight)))
        self._calls += 1
        self._totals[module.training] = (before[0] + distance * weight, before[1] + weight)

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a forward call from now on starts a new first pass."""
        self._superseded = not self.replaying

    def clear(self) -> None:
        """Drop what was measured, ready for the next first pass."""
        self.replaying = False
        self._superseded = False
        self._calls = 0
        self._start = None
        self._totals: dict[bool, tuple[Tensor, Tensor]] = {}
