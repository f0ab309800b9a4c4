"""The dispatch table: which backend runs the four weight operations for a block of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from samopt.kernels import foreach, reference
from samopt.kernels.block import Backup, Block, NoiseSource

__all__ = ["BACKENDS", "Backend", "Backup", "Block", "NoiseSource", "select"]


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        supports: Returns None where the backend can run a block, else the reason why not.
        norm: ``||T d||_2`` over the block, 0-dim fp64, on its device.
        save: Copies of everything ``ascend`` will write.
        ascend: Writes the perturbed weights.
        restore: Writes the saved weights back.
    """

    name: str
    supports: Callable[[Block], str | None]
    norm: Callable[[Block], Tensor]
    save: Callable[[Block], list[Backup]]
    ascend: Callable[[Block, Tensor, NoiseSource | None], None]
    restore: Callable[[list[Backup]], None]


BACKENDS = {
    "reference": Backend(
        "reference", reference.supports, reference.norm, reference.save, reference.ascend, reference.restore
    ),
    "foreach": Backend("foreach", foreach.supports, foreach.norm, foreach.save, foreach.ascend, foreach.restore),
}
_PREFERENCE = ("foreach", "reference")


def select(block: Block, backend: str) -> Backend:
    """Return the backend that runs ``block``.

    Args:
        block: Tensors of one treatment.
        backend: A name in ``BACKENDS``, or "auto" for the fastest that supports the block.

    Returns:
        A row of the table.

    Raises:
        RuntimeError: If the named backend cannot run the block.
    """
    if backend == "auto":
        return next(BACKENDS[name] for name in _PREFERENCE if BACKENDS[name].supports(block) is None)
    if (reason := BACKENDS[backend].supports(block)) is not None:
        raise RuntimeError(f'backend="{backend}" cannot run here: {reason}; use backend="auto" to fall back')
    return BACKENDS[backend]
