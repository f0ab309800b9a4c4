"""State that a model's forward keeps, put back after a pass that must not count."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from samopt.distributed import is_fully_sharded

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
        self._bound: _Found | None = None
        self._at_start: _Found | None = None
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self) -> None:
        """Note the tensors there are before the first pass, and what plain attributes are bound to."""
        found = self._look()
        self._known = {}
        self._samples = []
        for tensor in found.tensors:
            self._known[id(tensor)] = (tensor, _mark(tensor))
            if tensor.numel() > _SMALL and not (tensor.requires_grad and tensor in self._owned):
                self._samples.append((tensor, sample(tensor)))
        self._at_start = found

    def save(self, moving: Iterable[Tensor] = ()) -> None:
        """Copy what the first pass changed, and note what every name is bound to.

        Plain attributes are then bound as before the first pass: the second begins with the same hidden state.

        Args:
            moving: Parameters that are moved, and put back with the perturbation.
        """
        if not self._models and not self._others:
            return
        self._bound = found = self._look()
        changed = self._silently_changed()
        left_out = set(moving)
        with torch.no_grad():
            for tensor in found.tensors:
                if tensor in left_out:
                    continue
                known = self._known.get(id(tensor))
                is_small = tensor.numel() <= _SMALL and not (tensor.requires_grad and tensor in self._owned)
                if is_small or known is None or known[1] != _mark(tensor) or id(tensor) in changed:
                    self._copies.append((tensor, tensor.data, tensor.detach().clone()))
        if self._at_start is not None:
            self._at_start.bind(self._ignored)
            self._at_start = None

    def restore(self) -> None:
        """Put everything back; may be called again after an interrupt, and does nothing without ``save``."""
        if self._bound is None:
            return
        self._bound.bind(self._ignored, registries=True)
        with torch.no_grad():
            for tensor, memory, values in self._copies:
                _put_back(tensor, memory, values)
        self._bound, self._at_start, self._copies = None, None, []
        self._known, self._samples = {}, []

    def _look(self) -> _Found:
        """Return what is bound now, in one walk."""
        found = _Found([], [], [], [])
        seen: set[int] = set()
        pending: list[Any] = []
        namespaces = [vars(each) for each in self._others]
        modules = every_module(self._models)
        # FSDP registers shards and gathered parameters in turn, and frees the memory of the latter itself.
        is_sharded = is_fully_sharded(modules)
        for module in modules:
            for registry in (module._buffers,) if is_sharded else (module._parameters, module._buffers):
                if registry:
                    found.registries.append((registry, registry.copy()))
                    pending.extend(registry.values())
            if not type(module).__module__.startswith("torch."):  # torch's own modules keep no state in attributes
                namespaces.append(vars(module))
        for namespace in namespaces:
            attributes = {}
            for name, value in namespace.items():
                if name not in self._ignored:
                    attributes[name] = value
            found.namespaces.append((namespace, attributes))
            pending.extend(attributes.values())
        while pending:
            value = pending.pop()
            if isinstance(value, Tensor):
                if id(value) not in seen and value.is_leaf and not _cannot_change(value):
                    seen.add(id(value))
                    found.tensors.append(value)
            elif isinstance(value, list | tuple | dict | set | deque) and id(value) not in seen:
                seen.add(id(value))
                pending.extend(value.values() if isinstance(value, dict) else value)
                if not isinstance(value, tuple):
                    found.containers.append((value, value.copy()))
        return found

    def _silently_changed(self) -> set[int]:
        """Return the large tensors that were written into without a trace in their version counters."""
        changed = set()
        for tensor, before in self._samples:
            if self._known[id(tensor)][1] == _mark(tensor) and not torch.equal(before, sample(tensor)):
                changed.add(id(tensor))
        return changed


@dataclass(frozen=True)
class _Found:
    """What the names in some modules are bound to.

    Attributes:
        tensors: Every tensor that a forward may write into, once.
        registries: Of parameters and of buffers, with their content.
        namespaces: Attributes of modules that users wrote, and of other objects, with their plain content.
        containers: Lists, dicts, sets and deques in attributes, with their content.
    """

    tensors: list[Tensor]
    registries: list[tuple[Any, Any]]
    namespaces: list[tuple[dict[str, Any], dict[str, Any]]]
    containers: list[tuple[Any, Any]]

    def bind(self, ignored: frozenset[str], *, registries: bool = False) -> None:
        """Make names and containers hold again what they held.

        Args:
            ignored: Names to leave alone.
            registries: Whether those of parameters and buffers are included.
        """
        if registries:
            for registry, content in self.registries:
                _refill(registry, content)
        for namespace, attributes in self.namespaces:
            for name in namespace.keys() - attributes.keys() - ignored:
                del namespace[name]
            namespace.update(attributes)
        for container, content in self.containers:
            _refill(container, content)


def every_module(models: Iterable[nn.Module]) -> dict[nn.Module, None]:
    """Return every module in some models once, in an order that does not change.

    Args:
        models: The models.
    """
    found: dict[nn.Module, None] = {}
    pending: list[nn.Module | None] = list(models)
    while pending:  # torch's own iterator is recursive, and several times as slow
        module = pending.pop()
        if module is not None and module not in found:
            found[module] = None
            pending.extend(module._modules.values())
    return found


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written into, or gets other memory."""
    plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
    return (tensor.data_ptr() if plain else 0, tensor._version)


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
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride == 0 and size > 1:
            return True
    return False


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
    if isinstance(container, dict):
        if list(map(id, container)) != list(map(id, content)) or list(map(id, container.values())) != list(
            map(id, content.values())
        ):
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif list(map(id, container)) != list(map(id, content)):
        container.clear()
        container.extend(content)
