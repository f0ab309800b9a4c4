"""Kinds of parallelism under accelerate in which no second pass can be run, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]  # accelerate ships no types

__all__ = ["refuse_unsupported_parallelism"]

_REASONS = {
    "DEEPSPEED": "its engine owns the gradients, which it reduces, partitions and steps inside backward",
    "MEGATRON_LM": "its engine runs forward, backward and step in one call",
}
_FSDP_REASON = (
    "its flat parameters hide each weight's gradient, and every process would take the norm of its own shard alone"
)


def refuse_unsupported_parallelism(accelerator: Accelerator, name: str) -> None:
    """Raise if a second pass cannot be run in the accelerator's kind of parallelism.

    Args:
        accelerator: The accelerator.
        name: Who asks, for the message.

    Raises:
        ValueError: If it cannot.
    """
    kind = accelerator.distributed_type.value
    reason = _REASONS.get(kind)
    if kind == "FSDP" and not accelerator.is_fsdp2:
        kind, reason = "FSDP1", _FSDP_REASON
    if reason is not None:
        raise ValueError(
            f"{name} cannot run a second pass under {kind}: {reason}; use distributed data parallel instead"
        )
