"""The dispatch table: which backend runs the four weight operations for a block of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from samopt.kernels import cpu, foreach, reference, swap, triton
from samopt.kernels.block import Backup, Block, Lengths, NoiseSource, Saved, Stride
from samopt.kernels.memory import NEW_MEMORY, Spare

__all__ = [
    "BACKENDS",
    "Ascend",
    "Backend",
    "Backup",
    "Block",
    "Climb",
    "Fusion",
    "Lengths",
    "NoiseSource",
    "Save",
    "Saved",
    "Spare",
    "Stride",
    "check",
    "select",
]

_S = TypeVar("_S", bound=Saved)
_S_co = TypeVar("_S_co", bound=Saved, covariant=True)
_S_contra = TypeVar("_S_contra", bound=Saved, contravariant=True)


class Save(Protocol[_S_co]):
    """Makes what puts a block back; writes nothing."""

    def __call__(self, block: Block, consume: bool = False, spare: Spare = NEW_MEMORY) -> _S_co:
        """Return it; with ``consume``, directions that nobody else can reach may be overwritten; ``spare`` may, too."""


class Ascend(Protocol[_S_contra]):
    """Writes the perturbed weights."""

    def __call__(self, block: Block, scale: Tensor, noise: NoiseSource | None, saved: _S_contra | None = None) -> None:
        """Write them; an interrupt at any moment leaves ``saved`` able to put the weights back."""


class Climb(Protocol[_S_contra]):
    """Writes the perturbed weights with the arithmetic of the radius on the device."""

    def __call__(
        self, block: Block, length: Tensor, stride: Stride, noise: NoiseSource | None, saved: _S_contra
    ) -> Callable[[], Tensor]:
        """Write them, as ``Ascend`` does; return what gives the move's norm. ``length`` is the norm of the block."""


@dataclass(frozen=True)
class Fusion(Generic[_S_contra]):
    """Restore and base step as one.

    Attributes:
        refuses: Returns None where the step of an optimizer can be taken, else the reason why not.
        restore_and_step: Puts everything back and takes the step; returns whether it did, nothing being done if not.
    """

    refuses: Callable[[Optimizer], str | None]
    restore_and_step: Callable[[Optimizer, Sequence[_S_contra]], bool]


@dataclass(frozen=True)
class Backend(Generic[_S]):
    """One row of the table.

    Attributes:
        supports: Returns None where the backend can run a block, else the reason why not.
        norm: ``||T d||_2`` over the block, 0-dim fp64, on its device.
        save: What puts the block back.
        ascend: Writes the perturbed weights.
        restore: Puts the weights back, bit for bit; may run again.
        measure: The norms of several blocks of one device at once, for backends where each launch counts.
        climb: The ascent with all of its arithmetic in it, likewise.
        fusion: The restore as a part of the base's step, where a closure leaves nothing in between.
        on_host: Whether it reads numbers on the host, so that others may, too.
        points: Whether weights are pointed to other memory, so that they have to be the parameters themselves.
        missing: Returns what the machine lacks, whatever the tensors, or None.
    """

    name: str
    supports: Callable[[Block], str | None]
    norm: Callable[[Block], Tensor]
    save: Save[_S]
    ascend: Ascend[_S]
    restore: Callable[[_S], None]
    measure: Callable[[Sequence[Block]], Lengths] | None = None
    climb: Climb[_S] | None = None
    fusion: Fusion[_S] | None = None
    on_host: bool = False
    points: bool = False
    missing: Callable[[], str | None] | None = None


_TRITON: Backend[Any] = Backend(
    "triton",
    triton.supports,
    triton.norm,
    triton.save,
    triton.ascend,
    triton.restore,
    triton.measure,
    triton.climb,
    missing=triton.missing,
)

BACKENDS: dict[str, Backend[Any]] = {
    "reference": Backend(
        "reference", reference.supports, reference.norm, reference.save, reference.ascend, reference.restore
    ),
    "foreach": Backend("foreach", foreach.supports, foreach.norm, foreach.save, foreach.ascend, foreach.restore),
    "cpu": Backend("cpu", cpu.supports, cpu.norm, cpu.save, cpu.ascend, cpu.restore, climb=cpu.climb, on_host=True),
    "swap": Backend(
        "swap",
        cpu.supports,
        cpu.norm,
        swap.save,
        swap.ascend,
        swap.restore,
        climb=swap.climb,
        on_host=True,
        points=True,
    ),
    "triton": _TRITON,
    "triton-fused": replace(_TRITON, name="triton-fused", fusion=Fusion(triton.refuses, triton.restore_and_step)),
    "triton-swap": replace(
        _TRITON,
        name="triton-swap",
        save=triton.swap_save,
        ascend=triton.swap_ascend,
        restore=triton.swap_restore,
        climb=triton.swap_climb,
        points=True,
    ),
}
# For those who ask: the swaps change addresses, and "triton-fused" takes the step in the base's place.
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


def select(block: Block, backend: str) -> Backend[Any]:
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
        names = _PREFERENCE.get(block.weights[0].device.type, _ELSEWHERE)
        return next(BACKENDS[name] for name in names if BACKENDS[name].supports(block) is None)
    if (reason := BACKENDS[backend].supports(block)) is not None:
        raise RuntimeError(_cannot_run(backend, reason))
    return BACKENDS[backend]


def _cannot_run(backend: str, reason: str) -> str:
    return f'backend="{backend}" cannot run here: {reason}; use backend="auto" to fall back'
