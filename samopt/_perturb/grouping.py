"""Sort the tensors that move into blocks that one kernel call can treat in one way, each with its backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from samopt import kernels
from samopt._numerics.stochastic_rounding import Noise
from samopt._perturb.targets import Region, Targets
from samopt.distributed import Shards, local_part
from samopt.kernels import Backend, Block
from samopt.kernels.memory import same_memory_layout
from samopt.parts.geometry import Geometry

__all__ = ["MovingBlock", "moving_blocks"]

_KIND, _DEVICE = attrgetter("layout", "dtype", "is_cpu"), attrgetter("device")
_WHOLE = {nn.Parameter, Tensor}  # kinds of tensors of which this rank has everything; others are asked
_DENSE = {Tensor}


class MovingBlock(NamedTuple):
    """A block of tensors that move together.

    Attributes:
        block: The tensors of this rank.
        parameters: The parameters that they are, or are the local parts of.
        region: The ball that they move in.
        backend: What runs them.
        shards: Where the other parts of the same tensors are; None if there are none.
    """

    block: Block
    parameters: list[Tensor]
    region: Region
    backend: Backend
    shards: Shards | None

    def noise(self, source: Noise | None) -> Noise | None:
        """Return numbers that are independent among shards, and equal among replicas of one."""
        return source if source is None or self.shards is None else source.on_stream(self.shards.position)


def moving_blocks(targets: Iterable[Targets], geometry: Geometry, *, linf: bool, backend: str) -> list[MovingBlock]:
    """Return blocks, region by region, in order of first appearance.

    Args:
        targets: What moves, by region.
        geometry: ``T``.
        linf: True for the l-infinity ball.
        backend: Name of a kernel backend, or "auto".

    Raises:
        RuntimeError: If the named backend cannot run one of them.
    """
    own = None if geometry.name == "euclidean" else geometry
    return [
        MovingBlock(block, parameters, some.region, kernels.select(block, backend), shards)
        for some in targets
        for block, parameters, shards in (
            _split_by_geometry(some.region, some.weights, some.directions, own, linf)
            if some.scales is None and _is_uniform(some.weights, some.directions)
            else _split_by_kind(some, own, linf)
        )
    ]


def _split_by_geometry(
    region: Region, weights: list[Tensor], directions: list[Tensor], geometry: Geometry | None, linf: bool
) -> list[tuple[Block, list[Tensor], Shards | None]]:
    """Return uniform tensors that the geometry applies to and the others."""
    if geometry is None:
        return [(Block(weights, directions, None, region.eta, linf), weights, None)]
    applies = list(map(geometry.applies_to, weights))
    found: list[tuple[Block, list[Tensor], Shards | None]] = []
    for does in dict.fromkeys(applies):
        chosen = [each is does for each in applies]
        some, along = list(compress(weights, chosen)), list(compress(directions, chosen))
        found.append((Block(some, along, geometry if does else None, region.eta, linf), some, None))
    return found


def _split_by_kind(
    some: Targets, geometry: Geometry | None, linf: bool
) -> list[tuple[Block, list[Tensor], Shards | None]]:
    """Return tensors of one dtype, device, layout, geometry and placement at a time."""
    found: dict[tuple[Any, ...], tuple[Block, list[Tensor], Shards | None]] = {}
    for index, (parameter, direction) in enumerate(zip(some.weights, some.directions, strict=True)):
        weight, shards = parameter, None
        if type(parameter) not in _WHOLE:
            shards = Shards.of(parameter)
            weight, direction = local_part(parameter), local_part(direction, parameter)
        own = None if geometry is None or not geometry.applies_to(weight) else geometry
        is_dense = type(direction) is Tensor and direction.layout is torch.strided
        is_aligned = is_dense and same_memory_layout(weight, direction)
        key = (own is None, weight.dtype, direction.dtype, direction.layout, is_aligned, weight.device, shards)
        if key not in found:
            scales: list[Callable[[], Tensor]] | None = None if own is None or some.scales is None else []
            found[key] = Block([], [], own, some.region.eta, linf, scales), [], shards
        block, parameters, _ = found[key]
        block.weights.append(weight)
        block.directions.append(direction)
        if block.scales is not None and some.scales is not None:
            block.scales.append(some.scales[index])
        parameters.append(parameter)
    return list(found.values())


def _is_uniform(weights: list[Tensor], directions: list[Tensor]) -> bool:
    """Return whether everything is whole, dense, contiguous, of one device and two dtypes, as it is in most models.

    It is asked in every step, so it takes a few calls per list of tensors and none per tensor.
    """
    for tensors, types in ((weights, _WHOLE), (directions, _DENSE)):
        if not types.issuperset(map(type, tensors)):
            return False
        kinds = set(map(_KIND, tensors))
        if len(kinds) != 1 or not all(map(Tensor.is_contiguous, tensors)):
            return False
        layout, _, is_cpu = kinds.pop()
        if layout is not torch.strided or not (is_cpu or len(set(map(_DEVICE, tensors))) == 1):
            return False
    return True
