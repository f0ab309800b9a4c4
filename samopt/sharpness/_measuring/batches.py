"""What a measure measures on: batches, read once and cut to the size asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, IterableDataset

from samopt.sharpness._measuring.optimizer_parts import RngState

__all__ = ["LABEL_KEYS", "batch_size", "fresh", "label_key", "map_tensors", "read_batches", "refuse_no_batches"]

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Where a batch that is a mapping may have its labels."""


def read_batches(
    batches: Iterable[Any], m: int | None = None, *, keep_rest: bool = False, at_most: int | None = None
) -> list[Any]:
    """Return every batch, or every whole piece of ``m`` examples of each batch.

    The global random streams are put back, and so are generators that a ``DataLoader`` or its samplers hold.

    Args:
        batches: Batches; read once, to the end or to ``at_most``.
        m: Examples a piece; None leaves the batches as they are. What is left of a batch after its last whole piece is
            not used.
        keep_rest: Keep it after all, as a smaller piece.
        at_most: How many batches to read; None for all.

    Raises:
        TypeError: If ``batches`` is one batch or a data set rather than several batches, or a batch cannot be cut.
        ValueError: If there are no batches, or ``m`` is out of range.
    """
    refuse_no_batches(batches)
    before = RngState.capture()
    own = [(generator, generator.get_state()) for generator in _generators(batches)]
    try:
        # A list holds all of its batches at once. Anything else may give the same memory again, with the next batch.
        own_memory = _usable_in_a_graph if isinstance(batches, list | tuple) else _copied
        read = [map_tensors(batch, own_memory) for batch in itertools.islice(batches, at_most)]
    finally:
        before.restore()  # a DataLoader draws its workers' seed, and perhaps its order
        for generator, state in own:
            generator.set_state(state)
    if m is not None:
        if m < 1:
            raise ValueError(f"m must be at least 1, got {m}; leave it out to use the batches as they are")
        read = [piece for batch in read for piece in _pieces(batch, m, keep_rest)]
    if not read:
        raise ValueError(
            "there are no batches to measure on"
            + ("" if m is None else f" that hold m={m} examples")
            + "; an iterator can be read only once, so give a list or a DataLoader"
        )
    return read


def refuse_no_batches(batches: Any) -> None:
    """Refuse a single batch, and a data set, whose entries are examples.

    Args:
        batches: What should be an iterable of batches.

    Raises:
        TypeError: If it is one of these.
    """
    if isinstance(batches, Tensor | Mapping) or (
        isinstance(batches, tuple) and batches and all(isinstance(part, Tensor) for part in batches)
    ):
        kind = "tensors" if isinstance(batches, tuple) else type(batches).__name__
        raise TypeError(
            f"batches must be an iterable of batches, got a single batch ({kind}); put it into a list: [batch]"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"batches must be an iterable of batches, got the data set {type(batches).__name__}, whose entries are "
            "single examples; put it into a loader: DataLoader(dataset, batch_size=64), or batch_size=None if its "
            "entries are batches"
        )


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with ``change`` applied to every tensor in its lists, tuples and mappings.

    Args:
        batch: Anything; what is none of these stays as it is.
        change: From a tensor to a tensor.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def fresh(batch: Any) -> Any:
    """Return a copy of a batch, for one evaluation.

    A loss function may normalise its inputs in place, or take entries out of a dict. In a training loop it gets every
    batch once; here it gets the same one again and again.

    Args:
        batch: Anything; containers and the tensors in them are copied, what else there is stays as it is.
    """
    return map_tensors(batch, _copied)


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        copied = tensor.clone()
    # Under no_grad the copy lost that; a loss may differentiate in its inputs all the same, as those of PDEs do.
    return copied.requires_grad_() if tensor.requires_grad and not copied.requires_grad else copied


def label_key(batch: Mapping[Any, Any]) -> str | None:
    """Return the key of a mapping's labels, or None where it has none.

    Args:
        batch: The mapping.
    """
    return next((key for key in LABEL_KEYS if key in batch), None)


def batch_size(batch: Any) -> int:
    """Return the number of examples of a batch: the length of its labels, else of its first tensor or array; else 1.

    Args:
        batch: Any batch.
    """
    labels: Any = None
    if isinstance(batch, list) and len(batch) > 2 and all(isinstance(each, Mapping) for each in batch):
        return len(batch)  # one mapping for each example; two may be inputs and labels
    if isinstance(batch, Mapping):
        key = label_key(batch)
        labels = None if key is None else batch[key]
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[1]
    for part in (labels, batch):
        if _is_list_of_examples(part):
            return len(part)
        sizes = _sizes(part)
        if sizes:
            return sizes[0]
    for part in (labels, *(batch.values() if isinstance(batch, Mapping) else ())):
        if isinstance(part, list) and part:
            return len(part)
    graphs = getattr(batch, "num_graphs", None)  # as torch_geometric counts its examples
    return graphs if isinstance(graphs, int) and graphs > 0 else 1


def _is_list_of_examples(part: Any) -> bool:
    """Return whether a list has one entry for each example: mappings (the boxes of images), or unequal tensors."""
    if not isinstance(part, list | tuple) or not part:
        return False
    if all(isinstance(each, Mapping) for each in part):
        return True
    return all(isinstance(each, Tensor) for each in part) and len({each.shape[:1] for each in part}) > 1


def _sizes(part: Any) -> list[int]:
    """Return the length of each tensor that has one."""
    sizes: list[int] = []

    def note(array: Any) -> None:
        if len(array.shape) > 0 and array.shape[0] > 0:
            sizes.append(array.shape[0])

    _visit(part, note)
    return sizes


def _visit(part: Any, note: Callable[[Any], None]) -> None:
    """Call a function with every tensor and every NumPy array in lists, tuples, mappings and dataclasses."""
    if isinstance(part, Tensor) or type(part).__module__ == "numpy" and hasattr(part, "shape"):
        note(part)
    elif isinstance(part, Mapping):
        for each in part.values():
            _visit(each, note)
    elif isinstance(part, list | tuple):
        for each in part:
            _visit(each, note)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            _visit(getattr(part, field.name), note)


def _generators(batches: Any) -> Iterator[Generator]:
    """Yield the generators that a ``DataLoader`` draws its order and its workers' seed from."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    for owner in (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, Generator):
            yield generator


def _usable_in_a_graph(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _has_uncut_parts(batch: Any) -> bool:
    """Return whether a batch holds more than tensors, numbers and None, which a piece would hold as a whole."""
    if isinstance(batch, Mapping):
        return any(_has_uncut_parts(part) for part in batch.values())
    if (
        isinstance(batch, list)
        and batch
        and not any(isinstance(part, Tensor | Mapping | tuple | list) for part in batch)
    ):
        return True
    if isinstance(batch, tuple | list):
        return any(_has_uncut_parts(part) for part in batch)
    return not isinstance(batch, Tensor | int | float | str | None)


def _pieces(batch: Any, m: int, keep_rest: bool) -> list[Any]:
    sizes = set(_sizes(batch))
    if _has_uncut_parts(batch):
        raise TypeError(
            f"m={m} asks for pieces of each batch, but it holds more than tensors (a list of texts, an array), which "
            "cannot be cut; give batches of m examples instead"
        )
    if len(sizes) != 1:
        raise TypeError(
            f"m={m} asks for pieces of each batch, but the first dimensions of its tensors are {sorted(sizes)}, not "
            "one number of examples; give batches of m examples instead"
        )
    (size,) = sizes

    def cut(start: int) -> Any:
        return map_tensors(batch, lambda tensor: tensor[start : start + m] if tensor.dim() > 0 else tensor)

    return [cut(start) for start in range(0, size if keep_rest else size - m + 1, m)]
