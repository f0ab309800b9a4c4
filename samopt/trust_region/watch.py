"""Watches the forward calls of the first pass, and averages their distances."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from samopt.trust_region.call import ForwardCall, Surroundings
from samopt.trust_region.comparison import Comparison
from samopt.trust_region.protocol import TrustRegion
from samopt.trust_region.unwrap import outside_compile

if TYPE_CHECKING:
    from samopt.optimizer import SharpnessAwareOptimizer

__all__ = ["FirstPassWatch"]

_Wanted: TypeAlias = Callable[[], "tuple[torch.device, ...] | None"]
_Begun: TypeAlias = tuple[Surroundings, tuple[Any, ...], dict[str, Any]]


class FirstPassWatch:
    """Forward hooks that measure a trust region on every call that builds a graph, outside the second pass.

    Each call is measured as soon as it is over, so that no input or output is kept; with several calls in a pass the
    distances are averaged, weighted by their numbers of examples. Copies of a hooked model get inert hooks.

    Args:
        region: What measures.
        comparison: How outputs are compared.
    """

    def __init__(self, region: TrustRegion | None, comparison: Comparison | None) -> None:
        self._region = region
        self._comparison = comparison
        self._wanted: _Wanted | None = None
        self._begun: list[_Begun | None] = []
        self._totals: dict[bool, tuple[Tensor, Tensor]] = {}
        self.clear()

    def attach(self, model: nn.Module, owner: SharpnessAwareOptimizer, wanted: _Wanted) -> None:
        """Start watching.

        Args:
            model: The module that the training loop calls.
            owner: The hooks go when it does.
            wanted: Returns the devices of the model while a distance is wanted, else None; held weakly.
        """
        module = outside_compile(model)
        reference = weakref.WeakMethod(wanted)
        self._wanted = lambda: method() if (method := reference()) is not None else None
        for handle in (
            module.register_forward_pre_hook(self.before_call, prepend=True, with_kwargs=True),
            module.register_forward_hook(self.after_call, with_kwargs=True, always_call=True),
        ):
            weakref.finalize(owner, handle.remove)

    def total(self) -> tuple[Tensor, Tensor] | None:
        """Return the weighted sum of the distances so far and the sum of the weights, 0-dim; None without a call.

        Calls in evaluation mode count only where there are no others: a loop may evaluate without ``torch.no_grad``.
        """
        return self._totals.get(True, self._totals.get(False))

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call's inputs and surroundings.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        devices = None if self.replaying or self._wanted is None else self._wanted()
        if devices is None:
            self._begun.append(None)
            return
        if self._superseded:
            self.clear()
        self._begun.append((Surroundings.capture(module, devices), args, kwargs))

    def after_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Measure a call.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; None where it raised.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._begun:
            return
        begun = self._begun.pop()
        if begun is None or output is None or self._region is None or self._comparison is None:
            return
        start, given_args, given_kwargs = begun
        call = ForwardCall(module, given_args, given_kwargs, output, start, self._comparison, self._calls)
        distance = torch.as_tensor(self._region.measure(call)).detach()
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
        self._begun = []
        self._totals = {}

    def __reduce__(self) -> tuple[type[FirstPassWatch], tuple[None, None]]:
        return FirstPassWatch, (None, None)
