"""The move to ``w + epsilon``; besides the base optimizer, the only writer of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from samopt._numerics.devices import to_device
from samopt._numerics.stochastic_rounding import Noise
from samopt._numerics.vector_norm import vector_norm
from samopt._perturb.grouping import MovingBlock, moving_blocks
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt._perturb.weight_backup import SavedWeights, WeightBackup
from samopt.distributed import Shards, local_part
from samopt.kernels import Norms, StepSize
from samopt.kernels.reference import split_sparse
from samopt.parts.geometry import Euclidean, Geometry

__all__ = ["Perturbation", "descend", "gradient_norm"]

_GRADIENT = attrgetter("grad")


class Perturbation:
    """One ascent, ``epsilon = r T^2 d / ||T d||_2`` (l2) or ``r T sign(d)`` (l-infinity), over all targets at once.

    Making one measures the norms and writes nothing. ``backup`` and ``move`` go to ``w + epsilon`` in place, with the
    way back in the backup; ``displaced`` writes ``w + epsilon`` elsewhere and leaves the weights alone. A norm that is
    zero, infinite or nan moves nothing.

    Args:
        targets: What moves, by region. The norm is global over all of them.
        geometry: ``T``; tensors it does not apply to use ``T = 1``.
        linf: True for the l-infinity ball.
        backend: Name of a kernel backend, or "auto".

    Attributes:
        norm: ``||T d||_2`` over every target, shards on other ranks included: 0-dim, on the first target's device.
        is_empty: Whether there is nothing to move.
        is_sharded: Whether a part of something that moves is on another rank.

    Raises:
        RuntimeError: If the named backend cannot run one of the targets.
    """

    def __init__(
        self, targets: Iterable[Targets], geometry: Geometry, *, linf: bool = False, backend: str = "auto"
    ) -> None:
        blocks = moving_blocks(targets, geometry, linf=linf, backend=backend)
        self._blocks = blocks
        self._linf = linf
        self.is_empty = not blocks
        self.is_sharded, self._on_host, self._is_euclidean = False, True, True
        for some in blocks:
            self.is_sharded = self.is_sharded or some.shards is not None
            self._on_host = self._on_host and some.backend.on_host
            self._is_euclidean = self._is_euclidean and some.block.geometry is None
        with torch.no_grad():
            self._norms = self._measure()
            self.norm = self._norms.norm
            self._radii = [some.region.radius_at(self.norm) for some in blocks]

    @property
    def usable(self) -> bool | None:
        """Whether the norm is finite and positive; None where telling would wait for an accelerator."""
        if self.norm.device.type != "cpu":
            return None
        return 0.0 < float(self.norm) < math.inf

    @property
    def nonfinite_flag(self) -> Tensor:
        """0, or nan where the norm is not finite: 0-dim, on the device of ``norm``."""
        return self.norm * 0 if self._norms.nonfinite_flag is None else self._norms.nonfinite_flag

    def radius(self) -> Tensor:
        """Return the largest radius that was asked for among the targets, 0-dim; 0 without targets."""
        tensors = [radius for radius in self._radii if isinstance(radius, Tensor)]
        largest = max([float(radius) for radius in self._radii if not isinstance(radius, Tensor)], default=0.0)
        if not tensors:
            return torch.tensor(largest, dtype=torch.float64)
        # Filled on the device of the norm, so that nothing waits for the device of a radius.
        like = torch.full((), largest, dtype=self.norm.dtype, device=self.norm.device)
        return torch.stack([like, *[to_device(radius.detach(), like.device, like.dtype) for radius in tensors]]).amax()

    def gradient_norm(self) -> Tensor:
        """Return ``||d||_2`` over every target: 0-dim, on the device of ``norm``; call it before ``move``.

        Costs one more read of the directions where ``T`` is not the identity.
        """
        if self._norms.plain is not None:
            return self._norms.plain
        with torch.no_grad():
            plain = [
                length if some.block.geometry is None else some.backend.norm(some.block.without_geometry())
                for some, length in zip(self._blocks, self._norms.blocks, strict=True)
            ]
            return self._combine(plain)

    def backup(self, memory: ScratchPool) -> WeightBackup:
        """Save every value that ``move`` will write; no weight is written.

        Args:
            memory: Where the values are saved.

        Returns:
            What puts the weights back. Give it to ``move``: some backends fill it while they move the weights.
        """
        with torch.no_grad():
            return WeightBackup([_save(some, memory) for some in self._blocks])

    def move(self, noise: Noise | None = None, backup: WeightBackup | None = None) -> Tensor:
        """Write ``w + epsilon`` into the weights.

        Args:
            noise: Uniform [0, 1) numbers for the stochastic rounding of bf16 and fp16 weights; None rounds to nearest.
            backup: From ``backup``; None for a move without a way back.

        Returns:
            The norm of the move, ``||T^-1 (w' - w)||`` (l2) or its largest entry (l-infinity), 0-dim: measured after
            rounding for low-precision weights, the radius asked for the others.
        """
        with torch.no_grad():
            return self._ascend(noise, None if backup is None else backup.blocks)

    def displaced(
        self, memory: ScratchPool, noise: Noise | None = None, *, may_link: bool = False
    ) -> tuple[dict[Tensor, Tensor], Tensor]:
        """Write ``w + epsilon`` into other memory; no weight is written.

        Args:
            memory: Where to. The next call with the same pool overwrites the values.
            noise: As for ``move``.
            may_link: Whether autograd may link the values to their parameters: small ones are then new tensors.

        Returns:
            For each parameter a tensor that holds ``w + epsilon``, a ``DTensor`` where the parameter is one; and the
            norm of the move, as ``move`` returns it.
        """
        found: dict[Tensor, Tensor] = {}
        moves = []
        with torch.no_grad():
            for some, length, step in self._steps():
                applied: Tensor | None
                link = some.backend.linked if may_link else None
                linked = None if link is None else link(some.block, step, length)
                if linked is not None:
                    values, applied = linked
                else:
                    values = memory.like_all(some.parameters, some.block.weights)
                    applied = some.backend.ascend(some.block, step, length, some.noise(noise), into=values)
                if some.parameters is not some.block.weights:
                    values = list(map(_as_parameter, some.parameters, values))
                found.update(zip(some.parameters, values, strict=True))
                moves.append(step.asked(length) if applied is None else applied)
            return found, self._combine(moves, largest=self._linf)

    def release_directions(self) -> None:
        """Drop the references to the directions, so that their memory can be reused; call it after the move."""
        self._blocks = []

    def _ascend(self, noise: Noise | None, backups: Sequence[SavedWeights] | None) -> Tensor:
        """Run the ascent of every block; return the norm of the move."""
        moves = []
        for index, (some, length, step) in enumerate(self._steps()):
            saved = None if backups is None else backups[index]
            given = {} if saved is None or saved.kernel is None else {"backup": saved.kernel_backup}
            applied = some.backend.ascend(some.block, step, length, some.noise(noise), **given)
            moves.append(step.asked(length) if applied is None else applied)
        return self._combine(moves, largest=self._linf)

    def _steps(self) -> Iterator[tuple[MovingBlock, Tensor, StepSize]]:
        """Yield each block with its norm and the size of its step."""
        for some, length, radius in zip(self._blocks, self._norms.blocks, self._radii, strict=True):
            yield some, length, StepSize(self.norm, radius, some.region.sign, self._linf)

    def _measure(self) -> Norms:
        """Return the norms: all at once where one backend can, else block by block."""
        blocks = self._blocks
        measure = blocks[0].backend.measure if blocks else None
        if measure is not None and not self.is_sharded:
            if len({(some.backend.name, some.block.weights[0].device) for some in blocks}) == 1:
                return measure([some.block for some in blocks])
        lengths = [some.backend.norm(some.block) for some in blocks]
        norm = self._combine(lengths)
        return Norms(norm, norm if self._is_euclidean else None, None, lengths)

    def _combine(self, lengths: list[Tensor], *, largest: bool = False) -> Tensor:
        """Return the norm of everything from the norm of each block."""
        if len(lengths) == 1 and not self.is_sharded:
            return lengths[0]
        if not self.is_sharded:
            return _joint(lengths, largest=largest, on_host=self._on_host)
        # The cut into blocks may differ between ranks, but not the placements, so every rank joins in every exchange.
        by_place: dict[Shards | None, list[Tensor]] = {}
        for some, length in zip(self._blocks, lengths, strict=True):
            by_place.setdefault(some.shards, []).append(to_device(length, lengths[0].device))
        whole = []
        for place, parts in by_place.items():
            length = _joint(parts, largest=largest)
            whole.append(length if place is None else place.combine(length, largest=largest))
        return _joint(whole, largest=largest)


def descend(parameters: Sequence[Tensor], directions: Sequence[Tensor], rate: float | Tensor, factor: Tensor) -> None:
    """Write ``w - rate factor d`` for good: a part of an update.

    Args:
        parameters: Parameters.
        directions: One for each; this rank's part of it, where the parameter is sharded.
        rate: A learning rate, a number or 0-dim.
        factor: 0-dim; 0 moves nothing, even where a direction is not finite.
    """
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            size = to_device(factor * rate, direction.device, direction.dtype)
            local_part(parameter).sub_(torch.where(size != 0, direction * size, torch.zeros_like(size)))


def gradient_norm(parameters: Sequence[Tensor], backend: str = "auto") -> Tensor | None:
    """Return ``||g||_2`` over the gradients that ``parameters`` have: 0-dim, on the first one's device.

    Args:
        parameters: Parameters; those without a gradient do not count.
        backend: Name of a kernel backend, or "auto".

    Returns:
        The norm; None without any gradient.
    """
    gradients: list[Any] = list(map(_GRADIENT, parameters))
    known = list(map(is_not, gradients, repeat(None)))
    owners, gradients = list(compress(parameters, known)), list(compress(gradients, known))
    if not owners:
        return None
    # The placement of a sharded gradient may differ from its parameter's, so the parameter has to be there.
    weights = gradients if {Tensor}.issuperset(map(type, gradients)) else owners
    return Perturbation([Targets(Region(0.0, 0.0, 1), weights, gradients)], Euclidean(), backend=backend).norm


def _save(some: MovingBlock, memory: ScratchPool) -> SavedWeights:
    """Return the backup of one block."""
    weights, directions = some.block.weights, some.block.directions
    make = some.backend.backup
    if make is None and directions[0].is_sparse:  # all are, or none
        return SavedWeights.save_rows(weights, [split_sparse(direction)[0] for direction in directions])
    values = memory.like_all(some.parameters, weights)
    saved = SavedWeights.of(weights, values)
    if make is None:
        torch._foreach_copy_(values, weights)
    else:
        saved.kernel, saved.kernel_backup = some.backend, make(some.block, values)
    return saved


def _as_parameter(parameter: Any, local: Tensor) -> Tensor:
    """Return the local part of a value as the kind of tensor that the parameter is."""
    if getattr(parameter, "placements", None) is None:
        return local
    whole: Tensor = type(parameter).from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
    return whole


def _joint(lengths: list[Tensor], *, largest: bool = False, on_host: bool = False) -> Tensor:
    """Return the norm of a vector from the norms of its parts."""
    if len(lengths) < 2:
        return lengths[0] if lengths else torch.zeros(())
    if on_host and not largest:  # torch takes a dozen operations for it
        return torch.tensor(math.hypot(*[float(length) for length in lengths]), dtype=torch.float64)
    stacked = torch.stack([to_device(length, lengths[0].device) for length in lengths])
    return stacked.amax() if largest else vector_norm(stacked)
