"""Which of a model's weights a measure moves."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["Selection", "refuse_without_values", "select", "trainable_layers", "unwrap"]

Selection = str | Iterable[str] | None
"""Parameter names, module names or patterns such as "layers.*.weight"; None is every trainable parameter."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s and data-parallel wrappers.

    What is inside holds the same parameters, communicates with no other process and can be differentiated twice.

    Args:
        model: The module.

    Raises:
        TypeError: If it is no module, or its parameters are sharded over processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    _refuse_shards(model)
    return model


def select(model: nn.Module, selection: Selection = None, *, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that ``selection`` names, by name; tied ones once.

    Args:
        model: The module.
        selection: A name selects the parameter, or every parameter of the module, that is called so; a pattern, with
            ``*``, ``?`` or ``[...]``, every parameter whose full name it matches.
        frozen: Take parameters that are not trainable, too.

    Raises:
        ValueError: If a name or pattern selects nothing; says what there is. If two parameters share memory.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if frozen or parameter.requires_grad}
    all_names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        all_names.setdefault(id(parameter), []).append(name)  # a tied one is selected by any of its names
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; set requires_grad=True on what the measure should move"
        )
    _refuse_overlaps(trainable)
    if selection is None:
        return trainable
    patterns = [selection] if isinstance(selection, str) else list(selection)
    if not patterns:
        raise ValueError(
            "parameters is empty, so nothing would move; name some, or leave it out for all that are trained"
        )
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {
            name for name, parameter in trainable.items() if any(_matches(n, pattern) for n in all_names[id(parameter)])
        }
        if not hits:
            shown = ", ".join(list(trainable)[:12])
            raise ValueError(
                f"parameters={pattern!r} selects none of the {len(trainable)} trainable parameters of "
                f"{type(model).__name__}; there are {shown}{', ...' if len(trainable) > 12 else ''}"
            )
        chosen |= hits
    return {name: parameter for name, parameter in trainable.items() if name in chosen}


def trainable_layers(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold trainable parameters themselves, in the model's order.

    Those that the model itself holds (a class token, say) are named one by one.

    Args:
        model: The module.
    """
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in select(model)))


def refuse_without_values(model: nn.Module) -> None:
    """Refuse a model whose tensors hold no numbers, or cannot be written into.

    Args:
        model: The module.

    Raises:
        ValueError: If a parameter or buffer is on the meta device or not initialised yet, or a parameter was made in
            inference mode.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            found = "has no shape yet", "run one forward pass first"
        elif tensor.is_meta:
            found = "is on the meta device and holds no numbers", "load the weights before measuring"
        elif isinstance(tensor, nn.Parameter) and tensor.is_inference():
            found = (
                "was made under torch.inference_mode(), so it cannot be moved or differentiated",
                "build the model outside of it, or measure copy.deepcopy(model)",
            )
        else:
            continue
        raise ValueError(f"{name!r} of {type(model).__name__} {found[0]}; {found[1]}")


def _refuse_overlaps(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse two parameters in the same memory: moving both would overwrite one move with the other."""
    places = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in parameters.items()
        if not is_lazy(p) and p.layout is torch.strided and p.is_contiguous() and p.numel() and p.data_ptr()
    )
    for (_, end, one), (start, _, other) in pairwise(places):
        if start < end:
            raise ValueError(
                f"the parameters {one!r} and {other!r} are in the same memory, so they cannot move apart; tie them "
                "as one parameter (b.weight = a.weight), or copy one (b.weight.data = a.weight.data.clone())"
            )


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _refuse_shards(model: nn.Module) -> None:
    sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())  # as DTensors have
    fsdp = sys.modules.get("torch.distributed.fsdp")
    flat = fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())
    if sharded or flat:
        raise TypeError(
            f"the parameters of {type(model).__name__} are sharded over processes (FSDP or tensor parallel), which "
            "the sharpness measures do not support; load the full state dict into a plain copy of the model, and "
            "measure that"
        )
