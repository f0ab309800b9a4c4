"""Show a docstring's ``Example:`` section as code; griffe knows ``Examples:`` only and takes the other for a remark."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["ExampleSections"]


class ExampleSections(griffe.Extension):
    """Rename the section while the docstring is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change the text that is parsed; the source stays as it is.

        Args:
            obj: A module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
