"""What a module keeps in plain attributes, put back after a pass that must not count."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AttributeKeeper"]

_OWN_TO_TORCH = frozenset(vars(nn.Module()))


class AttributeKeeper:
    """Puts back the plain attributes of a module and its submodules: numbers, containers, tensors, torchmetrics states.

    A training step may append to a list, add to a counter or to a tensor, or update a metric; a second pass of the same
    step must find what the first one found, and must not add to it again. Parameters and buffers are left to others,
    objects of any other class are not looked into, and of torch's own modules nothing is saved, for they keep no such
    state.

    Cost: a walk over the attributes, and a copy of those tensors that the first pass wrote into.

    Args:
        model: The module.
        ignored: Names of attributes to leave alone.
    """

    def __init__(self, model: nn.Module, ignored: Iterable[str] = ()) -> None:
        self._model = model
        self._ignored = _OWN_TO_TORCH.union(ignored)
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Take note of the tensors there are before the first pass: those that it leaves alone need no copy."""
        tensors = [value for value in self._reachable() if isinstance(value, Tensor)]
        self._versions = {id(tensor): (tensor, _version(tensor)) for tensor in tensors}

    def save(self) -> Callable[[], None]:
        """Return a function that puts everything back as it is now; it may be called again if it was interrupted."""
        restore_bindings = self.save_bindings()
        written = [value for value in self._reachable() if isinstance(value, Tensor) and self._was_written(value)]
        tensors = [(tensor, tensor.detach().clone()) for tensor in written]
        self._versions = {}

        def restore() -> None:
            restore_bindings()
            with torch.no_grad():
                for tensor, values in tensors:
                    tensor.copy_(values)

        return restore

    def save_bindings(self) -> Callable[[], None]:
        """Return a function that makes names and containers hold again what they hold now, tensors as they are then."""
        namespaces = [(namespace, self._plain(namespace)) for namespace in self._namespaces()]
        containers = [(value, value.copy()) for value in self._reachable() if not isinstance(value, Tensor)]

        def restore() -> None:
            for namespace, attributes in namespaces:
                for name in self._plain(namespace).keys() - attributes.keys():
                    del namespace[name]
                namespace.update(attributes)
            for container, content in containers:
                _refill(container, content)

        return restore

    def _namespaces(self) -> Iterator[dict[str, Any]]:
        return (vars(module) for module in self._model.modules() if not type(module).__module__.startswith("torch."))

    def _reachable(self) -> Iterator[Any]:
        """Yield once every container and every tensor in a plain attribute, or in a container there."""
        seen: set[int] = set()
        pending = [value for namespace in self._namespaces() for value in self._plain(namespace).values()]
        while pending:
            value = pending.pop()
            if not isinstance(value, list | tuple | dict | set | deque | Tensor) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if not value.requires_grad:
                    yield value
                continue
            pending.extend(value.values() if isinstance(value, dict) else value)
            if not isinstance(value, tuple):
                yield value

    def _was_written(self, tensor: Tensor) -> bool:
        _, version = self._versions.get(id(tensor), (tensor, None))
        return version != _version(tensor)

    def _plain(self, namespace: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in namespace.items() if name not in self._ignored}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _refill(container: Any, content: Any) -> None:
    """Give a container its former content, unless it has it: some classes forbid to write."""
    same_length = len(container) == len(content)
    if isinstance(container, dict):
        if not same_length or any(
            a is not b or v is not w for (a, v), (b, w) in zip(container.items(), content.items(), strict=True)
        ):
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif not same_length or any(a is not b for a, b in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)
