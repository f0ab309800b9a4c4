"""A batch that later changes to the original cannot reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["independent_copy"]


def independent_copy(data: Any) -> Any:
    """Return a copy of a batch: containers rebuilt, tensors cloned, everything else shared.

    A ``compute_loss`` may pop "labels" or mask its inputs in place; the second pass must see them as the first did.

    Args:
        data: Nested mappings, lists and tuples of tensors and other values.
    """
    if isinstance(data, Tensor):
        return data.clone()
    if isinstance(data, Mapping):
        copied = {key: independent_copy(value) for key, value in data.items()}
        return type(data)(copied)  # type: ignore[call-arg]  # as Trainer does; Mapping itself declares no constructor
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(independent_copy(value) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(independent_copy(value) for value in data)
    return data
