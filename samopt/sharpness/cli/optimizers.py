"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samopt.sharpness.cli.errors import CommandError, first_line
from samopt.sharpness.cli.names import named_object
from samopt.sharpness.cli.weights import read_file

__all__ = ["optimizer_maker"]


def optimizer_maker(
    name: str | None, arguments: Mapping[str, Any], state: str | None
) -> Callable[[nn.Module], Any] | None:
    """Return what makes an optimizer for a model, or None where none is named.

    Args:
        name: Its name in ``torch.optim``, or ``module:Class``.
        arguments: Its keyword arguments.
        state: A file that holds its state dict, perhaps among other things.

    Raises:
        CommandError: If there is no such optimizer.
    """
    if name is None:
        return None
    kind = named_object("--optimizer", name) if ":" in name else getattr(torch.optim, name, None)
    if not callable(kind):
        raise CommandError(f"--optimizer {name!r} is none of torch.optim's; write SGD, AdamW or module:Class")

    def make(model: nn.Module) -> Any:
        try:
            optimizer = kind([weight for weight in model.parameters() if weight.requires_grad], **arguments)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--optimizer {name} cannot be made: {first_line(error)}") from error
        if state is not None:
            found = list(_optimizer_states(read_file(Path(state))))
            if len(found) != 1:
                raise CommandError(
                    f"{state!r} holds {len(found) or 'no'} state dict{'s' if found else ''} of an optimizer; save the "
                    "one that is meant alone: torch.save(optimizer.state_dict(), FILE)"
                )
            try:
                optimizer.load_state_dict(found[0])
            except (ValueError, KeyError) as error:
                raise CommandError(f"{state!r} does not fit {name}: {first_line(error)}") from error
        return optimizer

    return make


def _optimizer_states(content: Any, depth: int = 4) -> Iterator[dict[str, Any]]:
    if depth == 0:
        return
    if isinstance(content, Mapping):
        if "state" in content and "param_groups" in content:
            yield dict(content)
            return
        content = list(content.values())
    for entry in content if isinstance(content, list) else ():
        yield from _optimizer_states(entry, depth - 1)
