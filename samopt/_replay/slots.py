"""Attributes that a class keeps in slots."""

from __future__ import annotations

import types
from typing import Any

__all__ = ["slot_names"]


def slot_names(value: Any) -> list[str]:
    """Return the names of an object's slots, set or not, as ``getattr`` takes them; those of Python classes alone.

    Args:
        value: The object whose attributes are wanted.
    """
    found: list[str] = []
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            known = f"_{kind.__name__.lstrip('_')}{name}" if is_private else name
            if isinstance(vars(kind).get(known), types.MemberDescriptorType):
                found.append(known)
    return found
