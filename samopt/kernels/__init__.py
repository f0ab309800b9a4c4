"""The dispatch table: which backend measures and moves a block of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from samopt.kernels import cpu, foreach, reference, triton
from samopt.kernels.block import Block, NoiseSource, Norms, StepSize

__all__ = ["BACKENDS", "Backend", "Block", "NoiseSource", "Norms", "StepSize", "check", "select"]


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        supports: Returns None where the backend can run a block, else the reason why not.
        norm: ``||T d||_2`` over the block, 0-dim fp64, on its device.
        ascend: Writes the perturbed weights into the weights or into other memory, as ``reference.ascend`` does.
            Returns the norm of the move if the backend knows it, else None.
        linked: Returns the perturbed weights as new tensors that autograd links to the weights, and the norm of the
            move; None where ``ascend`` into other memory is faster.
        measure: The norms of several blocks of one device at once, for backends where each launch counts.
        backup: Makes a backup that ``ascend(..., backup=)`` fills while it moves the weights, for backends that save a
            pass over memory by it; None where the caller copies the weights.
        restore: Puts such a backup back, bit for bit; may run again.
        on_host: Whether the backend reads numbers on the host, so that its callers may, too.
        missing: Returns what the machine lacks, or None.
    """

    name: str
    supports: Callable[[Block], str | None]
    norm: Callable[[Block], Tensor]
    ascend: Callable[..., Tensor | None]
    linked: Callable[[Block, StepSize, Tensor], tuple[list[Tensor], Tensor] | None] | None = None
    measure: Callable[[Sequence[Block]], Norms] | None = None
    backup: Callable[[Block, list[Tensor]], Any] | None = None
    restore: Callable[[Any], None] | None = None
    on_host: bool = False
    missing: Callable[[], str | None] | None = None


BACKENDS = {
    "reference": Backend("reference", reference.supports, reference.norm, reference.ascend),
    "foreach": Backend("foreach", foreach.supports, foreach.norm, foreach.ascend),
    "cpu": Backend("cpu", cpu.supports, cpu.norm, cpu.ascend, linked=cpu.linked, on_host=True),
    "triton": Backend(
        "triton",
        triton.supports,
        triton.norm,
        triton.ascend,
        measure=triton.measure,
        backup=triton.backup,
        restore=triton.restore,
        missing=triton.missing,
    ),
}
_PREFERENCE = {"cpu": ("cpu", "foreach", "reference"), "cuda": ("triton", "foreach", "reference")}
_ELSEWHERE = ("foreach", "reference")


def check(backend: str) -> None:
    """Raise if a backend cannot run on this machine, wherever the tensors will be.

    Args:
        backend: A name in ``BACKENDS``, or "auto".

    Raises:
        RuntimeError: With what is missing.
        ValueError: If the name is unknown.
    """
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {sorted(BACKENDS)}, got {backend!r}')
    missing = BACKENDS[backend].missing
    if missing is not None and (lack := missing()) is not None:
        raise RuntimeError(_cannot_run(backend, lack))


def select(block: Block, backend: str) -> Backend:
    """Return the backend that runs ``block``.

    Args:
        block: Tensors of one treatment.
        backend: A name in ``BACKENDS``, or "auto" for the fastest that supports the block.

    Raises:
        RuntimeError: If the named backend cannot run the block.
    """
    if backend == "auto":
        for name in _PREFERENCE.get(block.weights[0].device.type, _ELSEWHERE):
            if BACKENDS[name].supports(block) is None:
                return BACKENDS[name]
    elif (reason := BACKENDS[backend].supports(block)) is not None:
        raise RuntimeError(_cannot_run(backend, reason))
    return BACKENDS["reference" if backend == "auto" else backend]


def _cannot_run(backend: str, reason: str) -> str:
    """Return the text of the error."""
    return f'backend="{backend}" cannot run here: {reason}; use backend="auto" to fall back'
