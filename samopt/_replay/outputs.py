"""The tensors in what a model returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from samopt._replay.slots import slot_names

__all__ = ["describe", "floating_tensors", "follow_gradients", "named_logits", "tensors_in"]


def named_logits(output: Any) -> dict[str, Tensor]:
    """Return an output that is a tensor itself, ``output.logits``, or every entry named so, by path.

    Args:
        output: What a model returned.

    Returns:
        Floating-point or complex tensors with a dimension; empty where no name says which tensors are logits.
    """
    if _has_values(output):
        return {"": output}
    logits: Any = getattr(output, "logits", None)
    if _has_values(logits):
        return {".logits": logits}
    if isinstance(output, Mapping):
        return {
            f"[{key!r}]": value for key, value in output.items() if str(key).endswith("logits") and _has_values(value)
        }
    return {}


def floating_tensors(output: Any) -> dict[str, Tensor]:
    """Return every floating-point or complex tensor with a dimension, at any depth, by path.

    Args:
        output: What a model returned: tensors in containers, and in attributes of objects.

    Returns:
        The tensors, each once, in the order of the output.
    """
    return {path: tensor for path, tensor in _walk(output) if _has_values(tensor)}


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Return the tensors in what a model returned: in containers, and in attributes of objects, slots included.

    Args:
        output: What the model returned.
    """
    if isinstance(output, Tensor):  # as of most models
        return iter((output,))
    return (tensor for _, tensor in _walk(output))


def describe(output: Any) -> str:
    """Return what an output is, for a message.

    Args:
        output: What a model returned.
    """
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {list(output)}"
    return f"a {type(output).__name__}"


def follow_gradients(tensors: Iterable[Tensor], hook: Callable[[Tensor], None]) -> bool:
    """Have a hook run when a gradient comes to what some tensors were computed by; it goes with their graph.

    A write into a view (``logits /= 2`` after a linear layer with a bias) gives the view another place in the graph,
    where its hooks are not known. What it is a view of keeps its place, so the hook is there, too.

    Args:
        tensors: Tensors with or without a gradient.
        hook: Given the gradient; may run more than once.

    Returns:
        Whether one of the tensors has a graph. A leaf has none, and would keep the hook.
    """
    found = [tensor for tensor in tensors if tensor.grad_fn is not None]
    for tensor in found:
        for each in (tensor, tensor._base):
            if each is not None and each.grad_fn is not None:
                each.register_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types here
    return bool(found)


def _has_values(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.dim() > 0


def _walk(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in an output once, with the path to it."""
    pending: list[tuple[str, Any]] = [("", output)]
    seen = set[int]()
    while pending:
        path, value = pending.pop()
        if id(value) in seen or value is None or isinstance(value, str | bytes | int | float | nn.Module):
            continue
        seen.add(id(value))
        entries: list[tuple[str, Any]] = []
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping):
            entries = [(f"{path}[{key!r}]", entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            entries = [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]
        elif not isinstance(value, type) and not callable(value):
            entries = [(f"{path}.{name}", entry) for name, entry in _attributes_of(value)]
        pending.extend(reversed(entries))


def _attributes_of(value: object) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object with their names, those in slots included."""
    yield from getattr(value, "__dict__", {}).items()
    for name in slot_names(value):
        if hasattr(value, name):
            yield name, getattr(value, name)
