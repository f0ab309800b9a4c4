"""One forward call of the first pass, which can be repeated with other parameters or inputs."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from samopt._callers.cached_weights import clear_cached_parametrizations
from samopt._replay.module_state import ModuleState
from samopt._replay.random_state import RngState
from samopt._replay.unwrap import compiled_prefix, original
from samopt.trust_region.arguments import named_arguments, without_labels
from samopt.trust_region.comparison import Comparison

__all__ = ["ForwardCall", "Surroundings"]


@dataclass(frozen=True)
class Surroundings:
    """What a forward call depends on besides its inputs and parameters, as it was when the call began.

    Attributes:
        random: The random streams.
        buffers: Copies of the module's buffers, by name.
        devices: Devices whose random streams the module may use.
        state: Other state of the module, which the call and each repetition of it may change. It is saved when the call
            is over, and restored when its distance is measured.
    """

    random: RngState
    buffers: dict[str, Tensor]
    devices: tuple[torch.device, ...]
    state: ModuleState

    @classmethod
    def capture(cls, module: nn.Module, devices: Iterable[torch.device]) -> Surroundings:
        """Return the present surroundings of ``module``.

        Args:
            module: What is about to be called.
            devices: Devices of its parameters.
        """
        devices = tuple(devices)
        buffers = {name: b.detach().clone() for name, b in original(module).named_buffers() if not is_lazy(b)}
        state = ModuleState([original(module)])
        state.begin()
        return cls(RngState.capture(devices), buffers, devices, state)


class ForwardCall:
    """A forward call of the first pass, with what it received and returned.

    Args:
        module: What was called: inside DDP, outside ``torch.compile``.
        args: Positional arguments it was given.
        kwargs: Keyword arguments it was given.
        output: What it returned.
        start: Its surroundings when it began.
        comparison: How outputs are compared.
        index: Its position among the calls of this first pass, from 0.

    Attributes:
        module: As above, without ``torch.compile`` around it.
        args: As above.
        kwargs: As above.
        output: As above; part of the training graph, so detach what you keep.
        index: As above.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        start: Surroundings,
        comparison: Comparison,
        index: int,
    ) -> None:
        self._called = module
        self._start = start
        self._comparison = comparison
        self.module = original(module)
        self.args = args
        self.kwargs = kwargs
        self.output = output
        self.index = index

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by the names that ``forward`` gives them."""
        return named_arguments(self.module, self.args, self.kwargs)

    @cached_property
    def logits(self) -> list[Tensor]:
        """The compared outputs, detached: one tensor, or several for a model with several heads."""
        return self._comparison.logits_of(self.output)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each of ``logits``, which positions count, without the class dimension; None where all do."""
        return self._comparison.masks_of(self)

    @cached_property
    def weight(self) -> int | Tensor:
        """How many examples count: a number, or a 0-dim tensor where a mask decides."""
        return self._comparison.examples(self.logits[0], self.masks[0])

    def rerun(
        self,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        eager: bool = False,
    ) -> Any:
        """Repeat the call without a graph, with its dropout masks and the buffers it began with.

        Names and random generators begin as the call's own did. Parameters, buffers, random streams, attributes and
        training mode of every module are afterwards as before, also when the repetition raises. ``labels`` from which a
        Hugging Face model would compute nothing but a loss are left out.

        Cost: one forward pass without a graph, and a copy of the buffers.

        Args:
            parameters: Replacements by parameter name; the others stay. Shapes, dtypes and devices as the originals'.
            args: Positional arguments instead of the call's own.
            kwargs: Keyword arguments instead of the call's own.
            eager: Go around ``torch.compile``, whose graph would not see a hook.

        Returns:
            What the module returns.
        """
        prefix = compiled_prefix(self._called)
        target, prefix = (self.module, "") if eager or prefix is None else (self._called, prefix)
        buffers = {name: buffer.clone() for name, buffer in self._start.buffers.items()}
        replaced = {prefix + name: tensor for name, tensor in {**(parameters or {}), **buffers}.items()}
        with torch.no_grad(), _undisturbed(self._start):
            return functional_call(
                target,
                replaced,
                self.args if args is None else args,
                without_labels(self.module, self.kwargs if kwargs is None else kwargs),
            )

    def distance_to(self, output: Any) -> Tensor:
        """Return the divergence between a reference's output and this call's own.

        Args:
            output: What ``rerun`` returned.

        Returns:
            Its mean over the examples that count, 0-dim, in at least fp32.
        """
        return self._comparison.distance(self, output)


@contextmanager
def _undisturbed(start: Surroundings) -> Generator[None]:
    """Begin at the surroundings of a call; put streams, state and autocast's cache setting back afterwards."""
    end = RngState.capture(start.devices)
    put_back_state = start.state.between()
    caching = torch.is_autocast_cache_enabled()

    def put_back() -> None:
        torch.set_autocast_cache_enabled(caching)
        clear_cached_parametrizations()
        end.restore()
        put_back_state()

    try:
        try:
            torch.set_autocast_cache_enabled(False)  # a cast made without a graph must not serve the training passes
            clear_cached_parametrizations()
            start.random.restore()
            yield
        finally:
            put_back()
    finally:
        put_back()  # changes nothing unless an interrupt hit the first one
