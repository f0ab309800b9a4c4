"""How far each adapter layer moves: as the parameter group of its factors says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from samopt._step.adapter_layers import AdapterLayer
from samopt._step.ascent import Ascent

__all__ = ["groups_of_layers"]


def groups_of_layers(ascent: Ascent, layers: Iterable[AdapterLayer]) -> dict[AdapterLayer, dict[str, Any]]:
    """Return the layers that move in this step, each with a parameter group that its factors, or its weight, are in.

    Args:
        ascent: The optimizer's parts and groups.
        layers: The layers.

    Raises:
        ValueError: If an option of a group is out of range, or the factors of one layer are in groups that differ in
            ``rho`` or ``perturb``.
    """
    groups, get = ascent.base.param_groups, ascent.options.get
    ascent.options.check(groups)
    if not ascent.may_move():
        return {}
    group_of = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    found = {}
    for layer in layers:
        trained = [tensor for tensor in layer.trained() if id(tensor) in group_of]
        if not any(tensor.requires_grad for tensor in trained):
            continue  # frozen since
        indices = dict.fromkeys(group_of[id(tensor)] for tensor in trained)
        first, *others = indices
        for name in ("perturb", "rho"):
            values = [get(groups[index], name) for index in indices]
            if any(value is not values[0] and value != values[0] for value in values[1:]):
                raise ValueError(
                    f"the factors of {layer.name} are in the param groups {first} and {others[0]}, whose {name} differ "
                    f"({values[0]} and {values[1]}), but one weight is perturbed by one {name}; give both groups the "
                    "same"
                )
        if get(groups[first], "perturb"):
            found[layer] = groups[first]
    return found
