"""Which of the tensors that move one kernel call can treat alike, and which backend runs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from samopt import kernels
from samopt._numerics.stochastic_rounding import Noise
from samopt._perturb.targets import Region, Targets
from samopt.distributed import Shards, local_part
from samopt.kernels import Backend, Block
from samopt.kernels.memory import IS_CPU, lie_alike
from samopt.parts.geometry import Metric

__all__ = ["Part", "parts_of"]

_DTYPE, _DEVICE, _LAYOUT = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")
_WHOLE = {nn.Parameter, Tensor}  # kinds of tensors of which this rank has everything; others are asked


@dataclass(frozen=True)
class Part:
    """A block of what moves.

    Attributes:
        block: This rank's tensors.
        region: The ball that they move in.
        backend: What runs them.
        shards: Where the other parts of the same tensors are; None if there are none.
    """

    block: Block
    region: Region
    backend: Backend[Any]
    shards: Shards | None

    @classmethod
    def of(cls, block: Block, region: Region, shards: Shards | None, backend: str) -> Part:
        """Return a block with the backend that runs it.

        Args:
            block: The block.
            region: Its ball.
            shards: Where its other parts are, or None.
            backend: Name of a kernel backend, or "auto".

        Raises:
            RuntimeError: If the named backend cannot run the block.
        """
        row = kernels.select(block, backend)
        return cls(block.behind_autograd() if block.quiet and not row.points else block, region, row, shards)

    def noise(self, source: Noise | None) -> Noise | None:
        """Return numbers that are independent among shards, and equal among replicas of one.

        Args:
            source: Numbers for everything that moves, or None.
        """
        return source if source is None or self.shards is None else source.on_stream(self.shards.position)


def parts_of(targets: Iterable[Targets], metric: Metric, *, linf: bool, backend: str, quiet: bool) -> list[Part]:
    """Return what moves, sorted into blocks of one treatment, each with the backend that runs it.

    Args:
        targets: What moves, by region.
        metric: The elementwise metric ``T``.
        linf: True for the l-infinity ball.
        backend: Name of a kernel backend, or "auto".
        quiet: Whether autograd is not to notice.

    Raises:
        RuntimeError: If the named backend cannot run one of them.
    """
    return [Part.of(block, region, shards, backend) for block, region, shards in _group(targets, metric, linf, quiet)]


def _group(
    targets: Iterable[Targets], metric: Metric, linf: bool, quiet: bool
) -> Iterator[tuple[Block, Region, Shards | None]]:
    """Yield blocks that one kernel call can treat alike, region by region, in order of first appearance."""
    euclidean = metric.name == "euclidean"
    for region, weights, directions in targets:
        if _all_alike(weights, directions):
            for some, towards, own in _by_metric(weights, directions, None if euclidean else metric):
                yield Block(some, towards, own, region.eta, linf, quiet), region, None
            continue
        parts: dict[tuple[object, ...], tuple[Block, Region, Shards | None]] = {}
        for weight, direction in zip(weights, directions, strict=True):
            shards = None
            if type(weight) not in _WHOLE:
                shards = Shards.of(weight)
                weight, direction = local_part(weight), local_part(direction, weight)
            own = None if euclidean or not metric.applies_to(weight) else metric
            layout = direction.layout
            alike = (
                type(direction) is Tensor
                and layout is torch.strided
                and ((weight.is_contiguous() and direction.is_contiguous()) or lie_alike(weight, direction))
            )
            key = (own is None, weight.dtype, direction.dtype, layout, alike, weight.device, shards)
            part = parts.get(key)
            if part is None:
                part = parts[key] = (Block([], [], own, region.eta, linf, quiet), region, shards)
            block = part[0]
            block.weights.append(weight)
            block.directions.append(direction)
        yield from parts.values()


def _by_metric(
    weights: list[Tensor], directions: list[Tensor], metric: Metric | None
) -> Iterator[tuple[list[Tensor], list[Tensor], Metric | None]]:
    """Yield the weights that the metric applies to and the others, in order of first appearance."""
    if metric is None:
        yield weights, directions, None
        return
    applies = [metric.applies_to(weight) for weight in weights]
    for does in dict.fromkeys(applies):
        chosen = [each is does for each in applies]
        yield list(compress(weights, chosen)), list(compress(directions, chosen)), metric if does else None


def _all_alike(weights: list[Tensor], directions: list[Tensor]) -> bool:
    """Return whether everything is whole, dense, contiguous, and of one device and two dtypes, as it mostly is."""
    return (
        {Tensor}.issuperset(map(type, directions))
        and {torch.strided} == set(map(_LAYOUT, directions))
        and _alike(directions)
        and (all(map(IS_CPU, weights)) or len(set(map(_DEVICE, weights))) == 1)
        and (weights is directions or (_WHOLE.issuperset(map(type, weights)) and _alike(weights)))
    )


def _alike(tensors: list[Tensor]) -> bool:
    return len(set(map(_DTYPE, tensors))) == 1 and all(map(Tensor.is_contiguous, tensors))
