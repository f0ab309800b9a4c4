"""The move to ``w + epsilon`` with the exact way back; besides the base optimizer, the only writer of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt import kernels
from samopt._numerics.low_precision import is_low_precision
from samopt._numerics.stochastic_rounding import Noise
from samopt._perturb.grouping import Part, parts_of
from samopt._perturb.targets import Region, Targets
from samopt.distributed import Shards, local_part
from samopt.kernels import Backend, Backup, Block, Lengths, Saved, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare
from samopt.kernels.reference import vector_norm
from samopt.parts.geometry import Euclidean, Metric
from samopt.step_metrics import Known

__all__ = ["Perturbation", "Placement", "descend", "gradient_norm"]


class Perturbation:
    """One ascent, ``epsilon = r T^2 d / ||T d||_2`` (l2) or ``r T sign(d)`` (l-infinity), over all targets at once.

    Nothing is written before ``apply``; ``undo`` puts every saved bit back and may be called any number of times,
    whatever ``apply`` had done when it was interrupted.

    Args:
        targets: What moves, by region. The norm is global over all of them.
        metric: The elementwise metric ``T``; tensors it does not apply to use ``T = 1``.
        linf: True for the l-infinity ball.
        backend: Name of a kernel backend, or "auto".
        quiet: Whether autograd is not to notice, so that a graph may be used again in a later move to the same place.

    Raises:
        RuntimeError: If the named backend cannot run one of the targets.
    """

    def __init__(
        self,
        targets: Iterable[Targets],
        metric: Metric,
        *,
        linf: bool = False,
        backend: str = "auto",
        quiet: bool = False,
    ) -> None:
        self._parts = parts_of(targets, metric, linf=linf, backend=backend, quiet=quiet)
        self._saved: list[tuple[Backend[Any], Saved]] = []
        self.is_sharded = any([part.shards is not None for part in self._parts])
        """Whether a part of something that moves is on another rank."""
        self._linf = linf
        self._on_host = all([part.backend.on_host for part in self._parts])
        with torch.no_grad():
            self._lengths = self._measured()
        self.norm = self._lengths.norm
        """``||T d||_2`` over every target, shards on other ranks included: 0-dim, on the first target's device."""
        self._radii = [part.region.radius_at(self.norm) for part in self._parts]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to move."""
        return not self._parts

    @property
    def usable(self) -> bool | None:
        """Whether the norm is finite and positive; None where telling would wait for an accelerator."""
        if self.norm.device.type != "cpu":
            return None
        norm = float(self.norm)
        return 0.0 < norm < float("inf")

    @property
    def zero(self) -> Tensor:
        """``norm`` times 0: nan where it is not finite."""
        return self.norm * 0 if self._lengths.zero is None else self._lengths.zero

    def radius(self) -> Callable[[], Tensor]:
        """Return what gives the largest radius among the regions of what moves, 0-dim; 0 where nothing does."""
        numbers = [float(radius) for radius in self._radii if not isinstance(radius, Tensor)]
        tensors = [radius for radius in self._radii if isinstance(radius, Tensor)]
        largest = max(numbers, default=0.0)
        if not tensors:
            return partial(torch.tensor, largest, dtype=torch.float64)
        # Filled on the device, and read from the host without waiting for it.
        like = torch.full((), largest, dtype=self.norm.dtype, device=self.norm.device)
        return Known(torch.stack([like, *[radius.to(like, non_blocking=True) for radius in tensors]]).amax())

    def gradient_norm(self) -> Tensor:
        """Return ``||d||_2`` over every target, without the metric: 0-dim, on the device of ``norm``.

        Costs one more read of the directions where the metric is not the identity.
        """
        if self._lengths.plain is not None:
            return self._lengths.plain
        with torch.no_grad():
            plain = [
                length if part.block.metric is None else part.backend.norm(part.block.without_metric())
                for part, length in zip(self._parts, self._lengths.blocks, strict=True)
            ]
            return self._combine(plain)

    def apply(
        self, noise: Noise | None = None, *, consume: bool = False, spare: Spare = NEW_MEMORY
    ) -> Callable[[], Tensor]:
        """Save every weight, then move all of them uphill.

        A norm that is zero, infinite or nan moves nothing.

        Args:
            noise: Uniform [0, 1) numbers for the stochastic rounding of bf16 and fp16 weights; None rounds to nearest.
            consume: Whether the directions are of no further use, so that their memory may take the saved weights
                where nobody else can reach it.
            spare: Other memory that may take them.

        Returns:
            Gives the norm of what was really applied, ``||T^-1 (w' - w)||`` (l2) or its largest entry (l-infinity),
            0-dim: measured after rounding for low-precision weights, the radius asked for the others.
        """
        with torch.no_grad():
            everything = [(part.backend, part.backend.save(part.block, consume, spare)) for part in self._parts]
            self._saved = everything
            applied: list[Callable[[], Tensor]] = []
            for part, length, radius, (backend, saved) in zip(
                self._parts, self._lengths.blocks, self._radii, everything, strict=True
            ):
                block = part.block
                stride = self._stride(part, radius)
                if backend.climb is not None:
                    applied.append(backend.climb(block, length, stride, part.noise(noise), saved))
                    continue
                scale = stride.scale(length.device)
                backend.ascend(block, scale, part.noise(noise), saved)
                if is_low_precision(block.weights[0]):
                    applied.append(Known(_measure(block, saved.backups, self._linf)))
                else:
                    far = length > 0 if self._linf else length.nan_to_num(0, 0, 0)
                    applied.append(Known(scale.abs() * far))
            return self._joined_later(applied)

    def move(self, noise: Noise | None = None) -> None:
        """Do what ``apply`` does in place and without a way back, for those who have one.

        Args:
            noise: As for ``apply``.
        """
        with torch.no_grad():
            for part, length, radius in zip(self._parts, self._lengths.blocks, self._radii, strict=True):
                scale = self._stride(part, radius).scale(length.device)
                part.backend.ascend(part.block, scale, part.noise(noise))

    def release_directions(self) -> None:
        """Forget the directions, which ``apply`` no longer needs, so that their memory can be reused."""
        self._parts = []

    def undo(self) -> None:
        """Write every saved weight back, bit for bit."""
        if self._saved:
            with torch.no_grad():
                for backend, saved in reversed(self._saved):  # weights that share memory may have been saved in turn
                    backend.restore(saved)
            self._saved = []

    def restore_and_step(self, base: Optimizer) -> bool:
        """Do ``undo`` and the base's step in one pass over memory, where the backend of everything that moved can.

        Args:
            base: The base optimizer.

        Returns:
            Whether it was done; if not, nothing was.
        """
        fusions = {backend.name: backend.fusion for backend, _ in self._saved}
        if len(fusions) != 1 or self.is_sharded or (fusion := fusions.popitem()[1]) is None:
            return False
        with torch.no_grad():
            done = fusion.restore_and_step(base, [saved for _, saved in self._saved])
        if done:
            self._saved = []
        return done

    def _stride(self, part: Part, radius: float | Tensor) -> Stride:
        return Stride(self.norm, radius, part.region.sign, self._linf)

    def _measured(self) -> Lengths:
        """Return the norms: all at once where one backend can, else part by part."""
        measure = self._parts[0].backend.measure if self._parts else None
        if measure is not None and not self.is_sharded:
            if len({(part.backend.name, part.block.weights[0].device) for part in self._parts}) == 1:
                return measure([part.block for part in self._parts])
        blocks = [part.backend.norm(part.block) for part in self._parts]
        return Lengths(self._combine(blocks), None, None, blocks)

    def _combine(self, lengths: Sequence[Tensor]) -> Tensor:
        return _combined(lengths, [part.shards for part in self._parts], on_host=self._on_host)

    def _joined_later(self, applied: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        """Return what gives the length of the whole move; where others have a share in it, that is known at once."""
        if len(applied) == 1 and not self.is_sharded:
            return applied[0]
        places = [part.shards for part in self._parts]
        largest, on_host = self._linf, self._on_host

        def joined() -> Tensor:
            return _combined([length() for length in applied], places, largest=largest, on_host=on_host)

        return Known(joined()) if self.is_sharded else joined


class Placement:
    """Weights anywhere for a while: saved once, placed as often as needed, put back bit for bit.

    Memory: one copy of the weights.

    Args:
        weights: Leaf tensors; what is written is written into them.

    Attributes:
        origin: The saved values, one tensor for each weight.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._saved = Saved([Backup(weight, None, weight.detach().clone()) for weight in weights])
        self.origin = [backup.values for backup in self._saved.backups]

    def put(self, index: int, values: Tensor) -> None:
        """Write ``values`` into a weight.

        Args:
            index: Which weight.
            values: Of its shape.
        """
        with torch.no_grad():
            self._saved.backups[index].weight.copy_(values)

    def move(self, index: int, offset: Tensor, noise: Noise | None = None) -> None:
        """Write ``origin + offset`` into a weight, computed in at least fp32.

        Args:
            index: Which weight.
            offset: Of its shape.
            noise: As for ``Perturbation.apply``.
        """
        weight = self._saved.backups[index].weight
        block = Block([weight], [offset], None, 0.0, False)
        self.put(index, self.origin[index])
        with torch.no_grad():
            backend = kernels.select(block, "auto")
            backend.ascend(block, torch.ones((), device=weight.device), noise)

    def undo(self) -> None:
        """Write every saved weight back, bit for bit; may be called any number of times."""
        with torch.no_grad():
            kernels.BACKENDS["reference"].restore(self._saved)


def descend(parameters: Sequence[Tensor], directions: Sequence[Tensor], rate: float | Tensor, factor: Tensor) -> None:
    """Write ``w - rate factor d`` for good: a part of an update.

    Args:
        parameters: Parameters.
        directions: One for each; this rank's part of it, where the parameter is sharded.
        rate: A learning rate, a number or 0-dim.
        factor: 0-dim; 0 moves nothing, whatever the directions hold.
    """
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            size = (factor * rate).to(direction, non_blocking=True)
            local_part(parameter).sub_(torch.where(size != 0, direction * size, torch.zeros_like(size)))


def gradient_norm(parameters: Iterable[Tensor], backend: str = "auto") -> Tensor:
    """Return ``||g||_2`` over the gradients that ``parameters`` have: 0-dim, on the first one's device.

    Args:
        parameters: Parameters; those without a gradient do not count.
        backend: Name of a kernel backend, or "auto".
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    gradients: list[Any] = [parameter.grad for parameter in owners]
    # A gradient that every rank has a part of is told from its parameter what it waits for; any other is whole.
    weights = gradients if {Tensor}.issuperset(map(type, gradients)) else owners
    return Perturbation([Targets(Region(0.0, 0.0, 1), weights, gradients)], Euclidean(), backend=backend).norm


def _measure(block: Block, backups: list[Backup], linf: bool) -> Tensor:
    """Return ``||T^-1 (w' - w)||`` of a low-precision block from its saved and present weights."""
    lengths = []
    for weight, direction, backup in zip(block.weights, block.directions, backups, strict=True):
        values = direction.coalesce().values() if direction.is_sparse else direction
        now = weight.detach() if backup.rows is None else weight.detach()[backup.rows]
        before = backup.values.float()
        moved = now.float() - before
        if block.metric is not None:
            moved /= block.metric.scale(before, values.float(), block.eta)
        lengths.append(moved.abs().amax() if linf and moved.numel() else vector_norm(moved))
    stacked = torch.stack(lengths)
    return stacked.amax() if linf else vector_norm(stacked)


def _combined(
    lengths: Sequence[Tensor], places: Sequence[Shards | None], *, largest: bool = False, on_host: bool = False
) -> Tensor:
    """Return the length of everything from the length of each part."""
    if not lengths:
        return torch.zeros(())
    if len(lengths) == 1 and places[0] is None:
        return lengths[0]
    # How parts are cut may differ between ranks; where their shards are may not, so that all ranks join in.
    by_place: dict[Shards | None, list[Tensor]] = {}
    for place, length in zip(places, lengths, strict=True):
        by_place.setdefault(place, []).append(length.to(lengths[0].device, non_blocking=True))
    join = _longest if largest else _joint_length_on_host if on_host else _joint_length
    whole = []
    for place, some in by_place.items():
        whole.append(join(some) if place is None else place.combine(join(some), largest=largest))
    return whole[0] if len(whole) == 1 else join(whole)


def _longest(lengths: list[Tensor]) -> Tensor:
    if len(lengths) == 1:
        return lengths[0]
    return torch.stack(lengths).amax()


def _joint_length_on_host(lengths: list[Tensor]) -> Tensor:
    """Return the same where numbers are at hand: torch takes a dozen operations for it."""
    return torch.tensor(math.hypot(*[float(length) for length in lengths]), dtype=torch.float64)


def _joint_length(lengths: list[Tensor]) -> Tensor:
    if len(lengths) == 1:
        return lengths[0]
    return vector_norm(torch.stack(lengths))
