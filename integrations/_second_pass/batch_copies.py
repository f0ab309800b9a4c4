"""A batch that later changes to the original cannot reach."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["independent_copy"]


def independent_copy(data: Any) -> Any:
    """Return a copy of a batch: containers rebuilt, tensors cloned, everything else shared.

    A training step may pop "labels" or mask its inputs in place; the second pass must see them as the first did.

    Args:
        data: Nested mappings, lists, tuples and dataclasses of tensors, other objects with a ``clone`` method, and any
            other values.
    """
    if callable(getattr(data, "clone", None)):
        return data.clone()
    if isinstance(data, Mapping):
        copied = {key: independent_copy(value) for key, value in data.items()}
        return type(data)(copied)  # type: ignore[call-arg]  # as Trainer does; Mapping itself declares no constructor
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(independent_copy(value) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(independent_copy(value) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        copied_fields = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(copied_fields, field.name, independent_copy(getattr(data, field.name)))
        return copied_fields
    return data
