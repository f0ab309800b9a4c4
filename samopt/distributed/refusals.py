"""Kinds of parallelism in which a second pass would be wrong, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

__all__ = ["refuse_unsupported"]

_FLAT = "_fsdp_flattened", "_is_flat_param"  # marks that FullyShardedDataParallel leaves on parameters
_USE = "use DistributedDataParallel, or torch.distributed.fsdp.fully_shard for sharded parameters"


def refuse_unsupported(models: Sequence[nn.Module], base: Optimizer, *, state_reader: str | None) -> None:
    """Raise if a sharpness-aware step cannot be right with this model and base optimizer.

    Args:
        models: The modules that the passes run.
        base: The optimizer to be wrapped.
        state_reader: What is made of the base's state, for the message; None where nothing is.

    Raises:
        ValueError: If it cannot.
    """
    kinds = {kind for model in models for module in model.modules() for kind in type(module).__mro__}
    parameters = [parameter for group in base.param_groups for parameter in group["params"]]
    if any(_defined_in(kind, "deepspeed.runtime") for kind in kinds | set(type(base).__mro__)) or any(
        hasattr(parameter, "ds_id") for parameter in parameters
    ):
        raise ValueError(
            "a sharpness-aware optimizer cannot be used with DeepSpeed's engine, which owns the gradients: it reduces, "
            f"partitions and steps them inside backward, where no second pass can come between; {_USE}"
        )
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds) or any(
        getattr(parameter, mark, False) for parameter in parameters for mark in _FLAT
    ):
        raise ValueError(
            "a sharpness-aware optimizer cannot be used with FullyShardedDataParallel (FSDP1), whatever "
            "use_orig_params: its parameters are pieces of flat ones, so that every rank would take the norm of its "
            f"own pieces alone, and ASAM would not know a weight from a bias; {_USE}"
        )
    if getattr(base, "_overlap_with_ddp", False):
        raise ValueError(
            f"{type(base).__name__}(overlap_with_ddp=True) updates the weights inside backward, where no second pass "
            "can come between; use overlap_with_ddp=False"
        )
    if state_reader is not None and any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(base).__mro__):
        raise ValueError(
            f"{state_reader} reads the base optimizer's state, but {type(base).__name__} spreads that over the ranks, "
            "so that each would move other weights; use an optimizer that perturbs along the gradient and takes its "
            "geometry from the weights (samopt.SAM, samopt.ASAM), or a base that keeps its whole state on every rank"
        )


def _defined_in(kind: type, package: str) -> bool:
    return kind.__module__ == package or kind.__module__.startswith(package + ".")
