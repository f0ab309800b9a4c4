"""Shards that are moved for one pass: modules that ``fully_shard`` has sharded gather copies of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt._replay.call_watch import CallWatcher
from samopt._replay.outputs import follow_gradients, tensors_in
from samopt._replay.unobserved import is_observed

__all__ = ["MovedShards"]


class MovedShards(CallWatcher):
    """Moves weights from the beginning of a training forward to the end of its backward pass.

    Between two steps the direction does not change, so moving them again (for the next micro-batch, or for a second
    backward through the same graph) reproduces every bit. Any other forward, and reading or loading a state dict, finds
    the exact weights.

    Args:
        models: The modules.
        enter: Moves the weights where a training forward begins.
        enter_again: Moves them where its backward pass begins, if they have been put back meanwhile.
        leave: Puts them back.
        be_exact: Puts them back and drops copies that were gathered from them, before any other forward.

    Attributes:
        exact_depth: How many contexts hold the weights exact.
        has_stale_copies: Whether copies were gathered from shards that have been put back since.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        enter: Callable[[], None],
        enter_again: Callable[[], None],
        leave: Callable[[], None],
        be_exact: Callable[[], None],
    ) -> None:
        self._enter = enter
        self._enter_again = enter_again
        self._leave = leave
        self._be_exact = be_exact
        self.exact_depth = 0
        self.has_stale_copies = False
        self._after_forward: Any = None
        self._has_graph = False
        self._handles: list[Any] = []
        for model in models:
            # torch 2.4 has the second of these under a private name only.
            before_loading: Any = getattr(model, "register_load_state_dict_pre_hook", None)
            before_loading = before_loading or model._register_load_state_dict_pre_hook
            self._handles.append(model.register_state_dict_pre_hook(self._before_look))  # type: ignore[no-untyped-call]
            self._handles.append(before_loading(self._before_look))

    def detach(self) -> None:
        """Remove the hooks for state dicts."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Move the weights for a training forward; put them back for any other.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if not self._trains(module):
            self._be_exact()
            return
        self._enter()
        self._has_graph = False
        # In front of FSDP's own hook: shards must have moved before it gathers them for the backward pass.
        self._after_forward = module.register_forward_hook(self._follow_backward, prepend=True)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Follow the backward pass of a training forward.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """
        after_forward, self._after_forward = self._after_forward, None
        if after_forward is None:
            return
        after_forward.remove()
        if not self._has_graph and torch._C._current_graph_task_id() == -1:  # a checkpoint may stop the forward early
            self._leave()  # the forward raised, or nothing can be differentiated

    def _follow_backward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if follow_gradients(tensors_in(output), self._before_backward):
            self._has_graph = True

    def _before_backward(self, gradient: Tensor) -> None:
        self._enter_again()
        if torch.is_grad_enabled():
            return  # create_graph=True: a backward through this one will read the weights again, so they stay
        # The engine has no public way to say "when this backward is over"; DDP and FSDP use the same call.
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    def _before_look(self, *args: Any) -> None:
        self._leave()

    def _trains(self, module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled() and is_observed() and not self.exact_depth
