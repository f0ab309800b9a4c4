"""Options of an optimizer, checked where they are written, before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import samopt
from samopt._step.selection import check_only
from samopt.variants import option_names

__all__ = ["try_options"]


def try_options(variant: str, options: Mapping[str, Any]) -> None:
    """Raise what making the optimizer would raise, on a linear layer of one weight.

    Args:
        variant: A name in ``samopt.available()``.
        options: Options of that optimizer.

    Raises:
        TypeError: If the optimizer does not take an option.
        ValueError: If an option is out of range, or does not go with another or with a trainer.
    """
    known = option_names(variant)
    unknown = [name for name in options if name not in known]
    if options.get("reuse_trunk"):
        raise ValueError(
            "reuse_trunk=True works in a loop that calls optimizer.backward(compute_loss), and a trainer runs the two "
            "passes itself; leave it out"
        )
    tried = dict(options)
    if (only := tried.pop("only", None)) is not None:
        check_only(only)  # whether it finds anything, only the model that is trained can tell
    with torch.random.fork_rng(devices=[]):  # the layer's first values are random numbers
        model = nn.Linear(1, 1, bias=False)
    try:
        samopt.create(variant, torch.optim.Adam(model.parameters()), model=model, **tried).detach()
    except TypeError as error:
        if not unknown:
            raise
        taken = [name for name in known if name != "model"]
        users = [each for each in samopt.available() if unknown[0] in option_names(each)]
        advice = f"; {', '.join(users)} would" if users else ""
        reason = f" ({error})" if " itself, but got " in str(error) else ""
        raise TypeError(
            f'variant "{variant}" takes no {unknown[0]}{reason}: its options are {", ".join(taken)}{advice}'
        ) from error
