"""State that a model's forward keeps, put back after a pass that must not count."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModuleState", "every_module", "sample"]

_OWN_TO_TORCH = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_SMALL = 4096  # elements; a copy of fewer is cheaper than to find out whether they changed
_SAMPLES = 64  # entries that are compared of a larger tensor whose version counter did not move


class ModuleState:
    """Buffers, parameters of other owners, and plain attributes of modules.

    A forward may write into a buffer, replace or resize it, update a momentum encoder or a codebook, keep a hidden
    state, count its calls, append to a list, or assign a new parameter. After a second pass all of this must be as the
    first pass left it. ``begin`` notes what there is before the first pass; ``save`` copies what that pass changed,
    since the second pass will change the same; ``restore`` puts it back.

    What changed is told by identity, address and version counter. Writes through ``.data`` leave no trace there, so
    tensors of up to 4,096 elements are always copied, and of larger ones 64 entries are compared: on an accelerator,
    that waits for the device once where such tensors exist. Of parameters that the optimizer trains, only the address
    and the version counter are compared.

    Cost: a walk over the modules, and a copy of what changed. A frozen backbone is not copied.

    Args:
        models: The modules.
        owned: The parameters of the optimizer.
        others: Objects besides modules whose attributes are kept in the same way.
        ignored: Names of attributes to leave alone.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        owned: Iterable[Tensor] = (),
        *,
        others: Sequence[object] = (),
        ignored: Iterable[str] = (),
    ) -> None:
        self._models = models
        self._owned = set(owned)
        self._others = others
        self._ignored = _OWN_TO_TORCH.union(ignored)
        self._known: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._bindings: Callable[[], None] | None = None
        self._at_start: Callable[[], None] | None = None
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self) -> None:
        """Note the tensors there are before the first pass."""
        self._known = {}
        large: list[Tensor] = []
        for tensor in self._tensors():
            self._known[id(tensor)] = (tensor, _mark(tensor))
            if tensor.numel() > _SMALL and not self._is_trained(tensor):
                large.append(tensor)
        self._samples = [(tensor, sample(tensor)) for tensor in large]
        self._at_start = self.bindings(registries=False)

    def save(self, moving: Iterable[Tensor] = ()) -> None:
        """Copy what the first pass changed, and note what every name is bound to.

        Args:
            moving: Parameters that are moved, and put back with the perturbation.
        """
        if not self._models and not self._others:
            return
        self._bindings = self.bindings()
        changed = self._silently_changed()
        copies = []
        with torch.no_grad():
            left_out = set(moving)
            for tensor in self._tensors():
                if tensor in left_out:
                    continue
                known = self._known.get(id(tensor))
                is_small = tensor.numel() <= _SMALL and not self._is_trained(tensor)
                if is_small or known is None or known[1] != _mark(tensor) or id(tensor) in changed:
                    copies.append((tensor, tensor.data, tensor.detach().clone()))
        self._copies = copies
        if self._at_start is not None:
            self._at_start()  # a hidden state that the first pass began with is what the second begins with
            self._at_start = None

    def restore(self) -> None:
        """Put everything back; may be called again after an interrupt, and does nothing without ``save``."""
        if self._bindings is not None:
            self._bindings()
        if self._copies:
            with torch.no_grad():
                for tensor, memory, values in self._copies:
                    _put_back(tensor, memory, values)
        self._bindings, self._copies = None, []
        self._known, self._samples, self._at_start = {}, [], None

    def bindings(self, *, registries: bool = True) -> Callable[[], None]:
        """Return a function that makes names and containers hold again what they hold now.

        Args:
            registries: Whether those of parameters and buffers are included.
        """
        registered = [
            (registry, registry.copy())
            for module in (self._modules() if registries else ())
            for registry in (module._parameters, module._buffers)
            if registry
        ]
        namespaces = [(namespace, self._plain(namespace)) for namespace in self._namespaces()]
        containers = [(value, value.copy()) for value in self._reachable() if not isinstance(value, Tensor)]

        def restore() -> None:
            for registry, content in registered:
                _refill(registry, content)
            for namespace, attributes in namespaces:
                for name in self._plain(namespace).keys() - attributes.keys():
                    del namespace[name]
                namespace.update(attributes)
            for container, content in containers:
                _refill(container, content)

        return restore

    def _is_trained(self, tensor: Tensor) -> bool:
        """Return whether the optimizer trains a tensor: a forward rarely writes into those."""
        return tensor.requires_grad and tensor in self._owned

    def _modules(self) -> Iterator[nn.Module]:
        yield from every_module(self._models)

    def _namespaces(self) -> Iterator[dict[str, Any]]:
        """Yield the attributes of modules that users wrote (torch's own keep no state there) and of other objects."""
        for module in self._modules():
            if not type(module).__module__.startswith("torch."):
                yield vars(module)
        for each in self._others:
            yield vars(each)

    def _plain(self, namespace: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in namespace.items() if name not in self._ignored}

    def _tensors(self) -> Iterator[Tensor]:
        """Yield once every tensor that a forward may write into."""
        seen: set[int] = set()
        for tensor in self._every_tensor():
            if id(tensor) not in seen and not _cannot_change(tensor):
                seen.add(id(tensor))
                yield tensor

    def _every_tensor(self) -> Iterator[Tensor]:
        for module in self._modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield parameter
            for buffer in module._buffers.values():
                if buffer is not None:
                    yield buffer
        for value in self._reachable():
            if isinstance(value, Tensor):
                yield value

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
                if value.is_leaf:
                    yield value
                continue
            pending.extend(value.values() if isinstance(value, dict) else value)
            if not isinstance(value, tuple):
                yield value

    def _silently_changed(self) -> set[int]:
        """Return the large tensors that were written into without a trace in their version counters."""
        same = [(tensor, before, sample(tensor)) for tensor, before in self._samples if _is_known(tensor, self._known)]
        if not same:
            return set()
        equal = [torch.equal(before, now) for _, before, now in same]
        return {id(tensor) for (tensor, _, _), is_equal in zip(same, equal, strict=True) if not is_equal}


def every_module(models: Iterable[nn.Module]) -> dict[nn.Module, None]:
    """Return every module in some models once, in an order that does not change.

    Args:
        models: The models.
    """
    found: dict[nn.Module, None] = {}
    pending = list(models)
    while pending:  # torch's own iterator is recursive, and several times as slow
        module = pending.pop()
        if module not in found:
            found[module] = None
            pending.extend([child for child in module._modules.values() if child is not None])
    return found


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written into, or gets other memory."""
    plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
    return (tensor.data_ptr() if plain else 0, tensor._version)


def _is_known(tensor: Tensor, known: dict[int, tuple[Tensor, tuple[int, int]]]) -> bool:
    return id(tensor) in known and known[id(tensor)][1] == _mark(tensor)


def sample(tensor: Tensor) -> Tensor:
    """Return some entries of a tensor, spread over it, in memory of their own; nothing for unusual layouts.

    Args:
        tensor: Any tensor.
    """
    with torch.no_grad():
        values = tensor.detach()
        if type(values) is not Tensor or values.layout is not torch.strided or not values.is_contiguous():
            return torch.empty(0)
        step = values.numel() // _SAMPLES
        return values.view(-1)[:: step + 1 - step % 2].clone()  # an odd stride meets every column of a matrix


def _cannot_change(tensor: Tensor) -> bool:
    """Return whether torch refuses to write into a tensor, so that no pass can have changed its values."""
    if is_lazy(tensor) or tensor.is_inference() or tensor.is_meta:
        return True
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _put_back(tensor: Tensor, memory: Tensor, values: Tensor) -> None:
    """Give a tensor its former memory and values, whatever a forward did to them."""
    if tensor.layout is not torch.strided:
        tensor.data = values
    elif tensor.shape == values.shape and tensor.dtype is values.dtype and _mark(tensor)[0] == _mark(memory)[0]:
        tensor.copy_(values)
    elif memory.shape == values.shape and memory.dtype is values.dtype:
        memory.copy_(values)
        tensor.data = memory
    else:
        tensor.data = values


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
