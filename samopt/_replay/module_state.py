"""State that a model's forward keeps, put back after a pass that must not count."""

from __future__ import annotations

import enum
import functools
import io
import operator
import random
import sys
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from samopt._callers.user_warnings import warn_user
from samopt._replay.class_state import ClassAttributes, generators_of_code, users_classes
from samopt._replay.random_state import is_generator, put_back_later
from samopt._replay.slots import slot_names
from samopt._replay.tensor_values import (
    PLAIN_TENSORS,
    SMALL,
    TensorCopy,
    copies_of,
    is_plain,
    mark_of,
    memory_of,
    put_back_values,
)
from samopt.distributed import is_fully_sharded

__all__ = ["ModuleState", "every_module", "sample"]

_ALWAYS_IGNORED = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_RATES = frozenset({"training", "p", "dropout", "momentum"})  # of torch's own modules; a forward may schedule them
_LARGE = 10_000  # elements of a list; a longer one holds data, and its elements are not looked at
_OBJECTS = 100  # objects inside one another; more of them are a data structure, and are left alone
_LEARNING = 100  # first passes after which a large tensor that none of them wrote into is no longer copied beforehand
_SPARE = 2**24  # elements of large frozen tensors that may be copied beforehand, however few are trained
_SAMPLES = 64  # entries that are compared of a larger tensor whose version counter did not move
_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.")
_CONTAINERS = (list, tuple, dict, set, deque)
_DICTS = (dict, OrderedDict)
# In training, these write their running averages and do not read them.
_AVERAGING = frozenset(
    {
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    }
)
# Of the standard library: values that do not change, references, and loggers, whose handlers count nothing of a pass.
_CONSTANTS = frozenset(
    {"datetime", "decimal", "fractions", "ipaddress", "logging", "pathlib", "re", "typing", "uuid", "weakref"}
)
_ABSENT = object()
# What a weak proxy stands for belongs to others, and may be gone: even isinstance raises then.
_PROXIES = frozenset(weakref.ProxyTypes)
_PLAIN_DATA = frozenset({*_VALUES, *_CONTAINERS, *_PROXIES, frozenset, Tensor, nn.Parameter})


class ModuleState:
    """Buffers, parameters of other owners, submodules, and plain attributes of modules.

    A forward may write into a buffer, replace or resize it, update a momentum encoder or a codebook, keep a hidden
    state, count its calls, append to a list, draw from a generator of its own, or assign a new parameter. After a
    second pass all of this must be as the first pass left it. ``begin`` notes what there is before the first pass;
    ``save`` copies what that pass changed, since the second pass will change the same; ``restore`` puts it back.

    The second pass begins with names (of buffers, too), containers, arrays and generators as they were before the
    first. If it ``rewinds``, so do the values of tensors: otherwise a queue that the first pass wrote its keys into
    would give the second one these keys. So tensors are copied before the first pass: small ones (but not the averages
    of batch norm, which a forward in training does not read), and those that a first pass has been seen to write into;
    in the first 100 first passes also large frozen ones of modules in training, smallest first, up to twice the trained
    elements and ``_SPARE``. If the first pass writes into another tensor, the second pass begins with what it wrote,
    and a warning says so; from the next step on the tensor is copied, too.

    What changed is told by identity, address and version counter. Writes through ``.data`` leave no trace there, so
    tensors of up to 4,096 elements are always copied, and of larger ones 64 entries are compared: on an accelerator,
    that waits for the device once where such tensors exist. Parameters that are moved need none of this.

    Attributes may hold tensors, arrays, random generators, containers, modules that are in no registry (a teacher in a
    list), and objects (a meter or an augmentation, say), also inside one another. Objects that are hooks count, too. An
    iterator, a file, a lock or a connection cannot be put back, so an object that holds one, also through others, is
    left alone as a whole; so is one with more than 100 objects inside.

    Cost: a walk over the modules, and a copy of what changed. A frozen backbone is not copied.

    Args:
        models: The modules.
        others: Objects besides modules whose attributes are kept in the same way.
        ignored: Names of attributes to leave alone.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        others: Sequence[object] = (),
        ignored: Iterable[str] = (),
    ) -> None:
        self._models = models
        self._more_models: tuple[nn.Module, ...] = ()
        self._reached: tuple[nn.Module, ...] = ()
        self._others: list[tuple[object, frozenset[str]]] = [(each, frozenset()) for each in others]
        self._ignored = _ALWAYS_IGNORED.union(ignored)
        self._ignored_of: dict[type, frozenset[str]] = {}
        self._classes: dict[type, ClassAttributes] = {}
        self._known: dict[int, tuple[Tensor, tuple[int, int]]] = {}  # by id; it holds the tensors, so an id is theirs
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._moving: list[Tensor] = []
        self._moved: set[int] = set()  # ids of what the last second pass moved, and the next one will, most likely
        self._now: _Found | None = None
        self._bound: _Found | None = None
        self._at_start: _Found | None = None
        self._at_end: _Found | None = None
        self._to_later_start: Callable[[], None] | None = None
        self._copies: list[TensorCopy] = []
        self._rewinds = False
        self._starts: dict[int, TensorCopy] = {}  # by id of the tensor, from before the first pass
        self._marks_at_end: dict[int, tuple[int, int]] = {}
        self._written: set[int] = set()  # ids of large tensors that a first pass wrote into
        self._first_passes = 0

    def include(self, models: Iterable[nn.Module] = (), objects: Iterable[tuple[object, Collection[str]]] = ()) -> None:
        """Set what else is looked after, in place of what was set before.

        Args:
            models: Further modules.
            objects: Objects whose attributes are kept, each with the names of attributes to leave alone.
        """
        self._more_models = tuple(models)
        self._others = [(each, frozenset(left_alone)) for each, left_alone in objects]

    def reach(self, modules: Iterable[nn.Module]) -> None:
        """Set which modules the present passes may run besides those that it was told of for good.

        Args:
            modules: What a loss function finds outside itself.
        """
        self._reached = tuple(modules)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look after."""
        return not (self._models or self._more_models or self._reached or self._others)

    def begin(self, *, rewinds: bool = False) -> None:
        """Note the tensors there are before the first pass, and what plain attributes are bound to.

        Args:
            rewinds: Whether the second pass is to begin with the values that tensors have now.
        """
        found = self._look()
        self._now = None
        self._known = {}
        self._samples = []
        for tensor in found.tensors:
            if id(tensor) not in self._moved and tensor.numel() > SMALL:  # others are copied in any case, or put back
                self._known[id(tensor)] = (tensor, mark_of(tensor))
                self._samples.append((tensor, sample(tensor)))
        self._at_start = found
        self._at_end = self._to_later_start = None
        self._rewinds = rewinds
        self._starts = {}
        if rewinds:
            self._copy_beforehand(found)

    def leave_as_written(self, tensors: Iterable[Tensor]) -> None:
        """Have the second pass begin with what the first one writes into some tensors.

        Args:
            tensors: Those of a part that the second pass does not run again.
        """
        for tensor in tensors:
            self._starts.pop(id(tensor), None)

    def note_later_start(self) -> None:
        """Note what has changed since ``begin``, because the first pass may only begin now."""
        if self._at_start is not None:
            bind = self._look().changes_since(self._at_start)
            # Small tensors are copied again in any case: nothing tells of writes through ``.data``.
            changed = [
                start for start in self._starts.values() if start.is_small or start.mark != mark_of(start.tensor)
            ]
            later = copies_of([start.tensor for start in changed])

            def change() -> None:
                bind()
                self._put_back_beside_moved(later)

            self._to_later_start = change

    def bind_later_start(self) -> None:
        """Have the second pass begin where ``note_later_start`` was called, if it was."""
        change, self._to_later_start = self._to_later_start, None
        if change is not None:
            change()

    def end_micro_batch(self) -> None:
        """Note what names are bound to after a micro-batch of the first pass that another will follow."""
        self._at_end = self._look()
        self._marks_at_end = {key: mark_of(start.tensor) for key, start in self._starts.items()}

    def changes_between(self) -> Callable[[], None]:
        """Return what binds names as code between two micro-batches did, since ``end_micro_batch``.

        A training loop may set an attribute of the model before each micro-batch. The second pass repeats that; what
        the forward itself keeps from one micro-batch to the next is the second pass's own.
        """
        before, self._at_end = self._at_end, None
        if before is None:
            return lambda: None
        bind = self._look().changes_since(before)
        marks = self._marks_at_end
        tensors = [start.tensor for key, start in self._starts.items() if marks.get(key) != mark_of(start.tensor)]
        copies = copies_of(tensors)

        def repeat() -> None:
            bind()
            self._put_back_beside_moved(copies)

        return repeat

    def rebound(self) -> list[str]:
        """Return what names are bound to other objects than before the first pass, or may be.

        Containers with another content count, as do arrays and random generators: nothing tells whether they changed.
        """
        if self._at_start is None:
            return []
        now, before = self._look(), self._at_start
        earlier = {id(namespace): attributes for namespace, attributes, _ in before.namespaces}
        changed = []
        for namespace, attributes, _ in now.namespaces:
            old = earlier.get(id(namespace), {})
            names = [*attributes, *(old.keys() - attributes.keys())]
            changed += [name for name in names if old.get(name, _ABSENT) is not attributes.get(name, _ABSENT)]
        filled = {id(container): content for container, content in before.containers}
        if any(not _holds(content, filled.get(id(each), ())) for each, content in now.containers):
            changed.append("the content of a list, dict or set in an attribute")
        if now.generators or now.arrays:
            changed.append("a random generator or a NumPy array in an attribute")
        return changed

    def parameters_with_gradients(self) -> list[Tensor]:
        """Return the parameters of the models that have a gradient; ``save`` uses the same look."""
        if self.is_empty:
            return []
        self._now = self._look()
        return [tensor for tensor in self._now.tensors if tensor.grad is not None]

    def save(self, moving: Iterable[Tensor] = ()) -> None:
        """Copy what the first pass changed, and note what every name is bound to.

        Args:
            moving: Parameters that are moved, and put back with the perturbation.
        """
        if self.is_empty:
            return
        self._bound, self._now = self._now or self._look(), None
        changed = self._silently_changed() if self._samples else set()
        self._moving = list(moving)
        moved = self._moved = set(map(id, self._moving))
        written, missing = list[Tensor](), list[Tensor]()
        for tensor in self._bound.tensors:
            if id(tensor) in moved:
                continue
            is_small, known = tensor.numel() <= SMALL, self._known.get(id(tensor))
            if known is not None and known[1] == mark_of(tensor) and not is_small and id(tensor) not in changed:
                continue
            written.append(tensor)
            if self._rewinds and known is not None and not is_small:
                self._written.add(id(tensor))
                if id(tensor) not in self._starts:
                    missing.append(tensor)
        self._copies += copies_of(written)
        if self._at_start is not None:
            self._at_start.bind()
            self._at_start = None
            if self._starts:
                copied = {id(each.tensor) for each in self._copies}
                starts = [start for key, start in self._starts.items() if key not in moved]
                # A large one that is not copied has not changed; one that is in no name any more is bound again.
                bound = set(map(id, self._bound.tensors))
                put_back_values(
                    [start for start in starts if id(start.tensor) in copied or id(start.tensor) not in bound]
                )
        self._starts = {}
        if missing:
            _warn_of_missing_starts(missing)

    def restore(self) -> None:
        """Put everything back; may be called again after an interrupt, and does nothing without ``save``."""
        if self._bound is None:
            return
        self.rewind()
        self._bound, self._at_start, self._at_end, self._copies = None, None, None, []
        self._to_later_start = None
        self._known, self._samples, self._moving = {}, [], []

    def rewind(self) -> None:
        """Put everything back, and keep the copies to do so again; does nothing without ``save``."""
        if self._bound is None:
            return
        self._bound.bind(registries=True)
        put_back_values(self._copies)

    def between(self) -> Callable[[], None]:
        """Return what puts everything back as it is now; call it after ``save``, before one of several repetitions."""
        now = self._look()

        def put_back() -> None:
            now.bind(registries=True)
            put_back_values(self._copies)

        return put_back

    def _put_back_beside_moved(self, copies: list[TensorCopy]) -> None:
        """Put tensors back while weights are moved: not into the memory of these, which may have another name."""
        if copies:
            taken = {memory_of(tensor) for tensor in self._moving}
            put_back_values([copy for copy in copies if memory_of(copy.tensor) not in taken])

    def _copy_beforehand(self, found: _Found) -> None:
        """Copy what the first pass may write into, as far as that is known or affordable."""
        self._first_passes += 1
        needless = self._moved | found.unread
        tensors = [each for each in found.tensors if id(each) not in needless and is_plain(each)]
        chosen = [each for each in tensors if each.numel() <= SMALL or id(each) in self._written]
        if self._first_passes <= _LEARNING:
            affordable = _SPARE + 2 * sum(each.numel() for each in found.tensors if each.requires_grad)
            left_out = self._written | self._parameters_at_rest()
            large = [each for each in tensors if each.numel() > SMALL and not each.requires_grad]
            for tensor in sorted([each for each in large if id(each) not in left_out], key=Tensor.numel):
                affordable -= tensor.numel()
                if affordable >= 0:
                    chosen.append(tensor)
        self._starts = {id(copy.tensor): copy for copy in copies_of(chosen)} if chosen else {}

    def _parameters_at_rest(self) -> set[int]:
        """Return the parameters of modules in eval mode: a frozen teacher, not a momentum encoder."""
        return {id(each) for module in self._modules() if not module.training for each in module._parameters.values()}

    def _modules(self) -> dict[nn.Module, None]:
        """Return every module that is looked after, once."""
        return every_module([*self._models, *self._more_models, *self._reached])

    def _look(self) -> _Found:
        """Return what is bound now, in one walk."""
        found = _Found([], set(), [], [], [], [], [])
        seen: set[int] = set()
        pending: list[Any] = []
        for each, left_alone in self._others:
            _note_attributes(vars(each), self._ignored | left_alone, found, pending)
        modules = self._modules()
        self._look_at_modules(modules, found, pending)
        while pending:
            value = pending.pop()
            if type(value) in _PROXIES:
                continue
            if isinstance(value, Tensor):
                if id(value) in seen or not value.is_leaf:
                    continue
                is_usual = type(value) in PLAIN_TENSORS and not value.is_meta and not value.is_inference()
                # The short way is for most tensors of most models: this runs for each of them, twice a step.
                if (is_usual and value.layout is torch.strided and value.is_contiguous()) or not _cannot_change(value):
                    seen.add(id(value))
                    found.tensors.append(value)
            elif isinstance(value, _VALUES) or id(value) in seen:
                continue
            elif isinstance(value, _CONTAINERS):
                seen.add(id(value))
                if len(value) <= _LARGE:
                    pending.extend(value.values() if isinstance(value, dict) else value)
                if not isinstance(value, tuple):
                    found.containers.append((value, value.copy()))
            elif isinstance(value, nn.Module):
                if value not in modules:  # a teacher in a list, say, so that it is in no registry
                    hidden = [module for module in every_module([value]) if module not in modules]
                    modules.update(dict.fromkeys(hidden))
                    self._look_at_modules(hidden, found, pending)
            else:
                seen.add(id(value))
                _look_into(value, found, pending)
        return found

    def _look_at_modules(self, modules: Iterable[nn.Module], found: _Found, pending: list[Any]) -> None:
        """Note the registries and attributes of modules.

        Args:
            modules: Those whose names are noted.
            found: Gets the names.
            pending: Gets what they are bound to.
        """
        # FSDP registers shards and gathered parameters in turn, and frees the memory of the latter itself.
        is_sharded = is_fully_sharded(modules)
        for kind in users_classes(map(type, modules)):
            shared = self._classes.setdefault(kind, ClassAttributes(kind))
            attributes = shared.present()
            found.namespaces.append((shared, attributes, self._ignored))
            pending.extend(attributes.values())
            pending.extend(generators_of_code(kind))
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                _note_scripted(module, found, pending)
                continue
            parameters, buffers, inside = module._parameters, module._buffers, module._modules
            for registry in (buffers,) if is_sharded else (parameters, buffers):
                if registry:
                    found.registries.append((registry, registry.copy()))
                    pending.extend(registry.values())
            if type(buffers) in _DICTS:  # not those of TorchScript
                found.namespaces.append((buffers, buffers.copy(), frozenset()))
            if inside:
                found.registries.append((inside, inside.copy()))
            kind = type(module)
            if kind in _AVERAGING and module.training:
                found.unread.update(map(id, buffers.values()))
            if kind.__module__.startswith(_WRAPPERS):  # DDP's attributes say whether ranks exchange gradients
                continue
            ignored = self._ignored_of.get(kind)
            if ignored is None:
                ignored = self._ignored_of[kind] = self._ignored | _constants(kind)
            space = vars(module)
            attributes = {}
            for name in space.keys() - ignored:
                attributes[name] = space[name]
            found.namespaces.append((space, attributes, ignored))
            pending.extend(attributes.values())
            if space.get("_forward_hooks") or space.get("_forward_pre_hooks") or space.get("_backward_hooks"):
                pending.extend(_objects_behind_hooks(module))

    def _silently_changed(self) -> set[int]:
        """Return the large tensors that were written into without a trace in their version counters."""
        changed = set()
        for tensor, before in self._samples:
            if self._known[id(tensor)][1] == mark_of(tensor) and not torch.equal(before, sample(tensor)):
                changed.add(id(tensor))
        return changed


@dataclass(frozen=True)
class _Found:
    """What the names in some modules are bound to.

    Attributes:
        tensors: Every tensor that a forward may write into, once.
        unread: Ids of those that it writes into without reading them.
        registries: Of parameters, of buffers and of modules, with their content.
        namespaces: Attributes of modules, of their classes and of other objects, with those to keep and the names of
            those to ignore; registries of buffers.
        containers: Lists, dicts, sets and deques in attributes, with their content.
        generators: Functions that put random generators back to their positions.
        arrays: Functions that put back what no name is bound to: arrays of NumPy and of Python, attributes in slots.
    """

    tensors: list[Tensor]
    unread: set[int]
    registries: list[tuple[Any, Any]]
    namespaces: list[tuple[dict[str, Any] | ClassAttributes, dict[str, Any], frozenset[str]]]
    containers: list[tuple[Any, Any]]
    generators: list[Callable[[], Any]]
    arrays: list[Callable[[], Any]]

    def bind(self, *, registries: bool = False) -> None:
        """Make names, containers and generators hold again what they held.

        Args:
            registries: Whether those of parameters, buffers and modules are included.
        """
        if registries:
            for registry, content in self.registries:
                if not _holds(registry, content):  # some classes forbid to write
                    _refill(registry, content)
        for namespace, attributes, ignored in self.namespaces:
            for name in namespace.keys() - attributes.keys() - ignored:
                del namespace[name]
            namespace.update(attributes)
        for container, content in self.containers:
            if not _holds(container, content):
                _refill(container, content)
        for put_back in (*self.generators, *self.arrays):
            put_back()

    def changes_since(self, before: _Found) -> Callable[[], None]:
        """Return what binds the names and fills the containers that have changed since an earlier look.

        Args:
            before: The earlier look.
        """
        earlier = {id(namespace): attributes for namespace, attributes, _ in before.namespaces}
        changes = []
        for namespace, attributes, _ in self.namespaces:
            old = earlier.get(id(namespace), attributes)
            new = {name: value for name, value in attributes.items() if name not in old or old[name] is not value}
            gone = old.keys() - attributes.keys()
            if new or gone:
                changes.append((namespace, new, gone))
        filled = {id(container): content for container, content in before.containers}
        refills = [(each, now) for each, now in self.containers if not _holds(now, filled.get(id(each), now))]

        def repeat() -> None:
            for namespace, new, gone in changes:
                namespace.update(new)
                for name in gone:
                    namespace.pop(name, None)
            for container, content in refills:
                if not _holds(container, content):
                    _refill(container, content)
            for put_back in self.generators:
                put_back()

        return repeat


def _warn_of_missing_starts(tensors: Sequence[Tensor]) -> None:
    """Say that a second pass begins with what the first one wrote."""
    warn_user(
        f"the first pass wrote into {len(tensors)} tensors of which there was no copy, of shape "
        f"{tuple(tensors[0].shape)} for one. So this step's second pass begins with what the first pass wrote into "
        "them. From the next step on they are copied beforehand, and every second pass begins where the first one began"
    )


def _note_scripted(module: torch.jit.ScriptModule, found: _Found, pending: list[Any]) -> None:
    """Note the tensors of a scripted module, whose registries are no dicts; it has them all in its own memory."""
    names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    tensors = {name: getattr(module, name) for name in names}
    found.arrays.append(functools.partial(_put_back_attributes, module, tensors))
    pending.extend(tensors.values())


def _put_back_attributes(value: Any, attributes: dict[str, Any]) -> None:
    """Bind attributes of an object that has no namespace of its own, where they are bound to something else."""
    for name, content in attributes.items():
        if getattr(value, name) is not content:
            setattr(value, name, content)


def _objects_behind_hooks(module: nn.Module) -> list[Any]:
    """Return the objects that were registered as hooks, or whose methods were; those of torch's own are no state."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    owners = [hook.__self__ if isinstance(hook, types.MethodType) else hook for hook in hooks]
    return [each for each in owners if type(each).__module__.partition(".")[0] not in ("builtins", "torch")]


def _note_attributes(space: dict[str, Any], ignored: frozenset[str], found: _Found, pending: list[Any]) -> None:
    """Note what the attributes of a module, or of another object, are bound to."""
    attributes = {}
    for name in space.keys() - ignored:
        attributes[name] = space[name]
    found.namespaces.append((space, attributes, ignored))
    pending.extend(attributes.values())


def _constants(kind: type) -> frozenset[str]:
    """Return the attributes that torch's own modules of a kind set once, in their constructors."""
    names: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.startswith("torch.nn.modules."):
            annotations = vars(each).get("__annotations__", {})
            # A tensor there is a parameter or a buffer, unless a forward binds the name: weight_norm and pruning do.
            names.update(name for name, kind in annotations.items() if "Tensor" not in str(kind))
            names.update(vars(each).get("__constants__", ()))
    return frozenset(names - _RATES)


def _look_into(value: Any, found: _Found, pending: list[Any]) -> None:
    """Note the state of a random generator, of an array, or of an object that holds nothing that cannot be put back."""
    if is_generator(value):
        found.generators.append(put_back_later(value))
    elif isinstance(value, bytearray | array):
        found.arrays.append(functools.partial(operator.setitem, value, slice(None), value[:]))
    elif _is_of_numpy(value):
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.ndarray) and value.flags.writeable:
            found.arrays.append(functools.partial(_put_back_array, value, value.copy()))
    elif _is_constant(value):
        pending.extend(_bound_to(value))
    elif _can_be_put_back(value):
        attributes = _attributes(value)
        if attributes is not None:
            _note_attributes(attributes, frozenset(), found, pending)
        slots = _slots(value)
        if slots:
            found.arrays.append(functools.partial(_put_back_slots, value, slots))
            pending.extend(slots.values())


def _can_be_put_back(value: Any) -> bool:
    """Return whether an object's attributes are all of its state, and those of the objects in it all of theirs.

    A file, an iterator, a lock or a connection has a position elsewhere. To put back the attributes beside it, and not
    that, would tear both apart.
    """
    pending, seen = [value], set[int]()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if _is_constant(each):
            pending.extend(part for part in _bound_to(each) if type(part) not in _PLAIN_DATA)
            continue
        space, slots = _attributes(each), _slots(each)
        if len(seen) > _OBJECTS or (space is None and not slots) or isinstance(each, io.IOBase):
            return False
        attributes = [*(space or {}).values(), *slots.values()]
        pending.extend([part for part in attributes if not (type(part) in _PLAIN_DATA or _is_state(part))])
    return True


def _is_constant(value: Any) -> bool:
    """Return whether a value is code, or has no state that a forward changes.

    Objects of torch that can be called have their state elsewhere. Modules are looked after as modules.
    """
    kind = type(value)
    origin = kind.__module__.partition(".")[0]
    return (
        isinstance(value, nn.Module | type | types.GenericAlias | types.UnionType | enum.Enum | range | slice)
        or (origin in _CONSTANTS and not isinstance(value, weakref.WeakKeyDictionary | weakref.WeakValueDictionary))
        or (origin in ("builtins", "functools", "torch") and callable(value))
    )


def _bound_to(value: Any) -> list[Any]:
    """Return what a bound method, or a partial, carries besides code."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    owner = None if isinstance(value, type) else getattr(value, "__self__", None)
    return [] if owner is None or isinstance(owner, types.ModuleType) else [owner]


def _is_state(value: Any) -> bool:
    """Return whether a value is a container, a generator or an array, whose state can be put back."""
    return isinstance(value, (*_CONTAINERS, torch.Generator, random.Random, bytearray, array)) or _is_of_numpy(value)


def _is_of_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy"


def _attributes(value: Any) -> dict[str, Any] | None:
    """Return the namespace of an object; None for one that has none, or a read-only one."""
    space = getattr(value, "__dict__", None)
    return space if isinstance(space, dict) else None


def _slots(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that are in slots."""
    return {name: getattr(value, name) for name in slot_names(value) if hasattr(value, name)}


def _put_back_slots(value: Any, slots: dict[str, Any]) -> None:
    """Give an object with slots its former attributes."""
    for name in _slots(value).keys() - slots.keys():
        delattr(value, name)
    for name, content in slots.items():
        object.__setattr__(value, name, content)  # frozen dataclasses refuse setattr


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


def sample(tensor: Tensor) -> Tensor:
    """Return some entries of a tensor, spread over it, in memory of their own; nothing for unusual layouts.

    Args:
        tensor: Any tensor.
    """
    with torch.no_grad():
        values = tensor.detach()
        if type(values) is not Tensor or values.layout is not torch.strided or values.is_quantized:
            return torch.empty(0)
        step = values.numel() // _SAMPLES
        if not values.is_contiguous():  # channels_last, say
            return values.take(torch.arange(0, values.numel(), step + 1 - step % 2, device=values.device))
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


def _put_back_array(array: Any, values: Any) -> None:
    """Give a NumPy array its former shape and values."""
    if array.shape != values.shape:
        array.resize(values.shape, refcheck=False)
    array[...] = values


def _refill(container: Any, content: Any) -> None:
    """Give a container its former content."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


def _holds(container: Any, content: Any) -> bool:
    """Return whether a container holds the very same objects as another, in the same order."""
    if isinstance(container, set):
        return bool(container == content)
    if len(container) != len(content) or not all(map(operator.is_, container, content)):
        return False
    return not isinstance(container, dict) or all(map(operator.is_, container.values(), content.values()))
