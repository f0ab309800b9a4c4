"""A base step that finds the weights still perturbed, for backends that restore and step in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from samopt import kernels

if TYPE_CHECKING:
    from samopt._step.two_pass import TwoPass

__all__ = ["fuses", "take_fused_step"]


def fuses(backend: str, base: Optimizer) -> bool:
    """Return whether a backend was asked for that takes the base's step itself.

    Args:
        backend: Its name, or "auto".
        base: The base optimizer.

    Raises:
        RuntimeError: If it was, but cannot take the step of this base.
    """
    fusion = None if backend == "auto" else kernels.BACKENDS[backend].fusion
    if fusion is None:
        return False
    if (reason := fusion.refuses(base)) is not None:
        raise RuntimeError(
            f'backend="{backend}" cannot take the step here: {reason}; use backend="triton", which leaves it to '
            "the base"
        )
    return True


def take_fused_step(base: Optimizer, passes: TwoPass, oracle: Callable[[], Any]) -> None:
    """Call the base's closure, then restore and step in one; step hooks, the base's and the global ones, run as ever.

    Weights are perturbed from the second pass until the step, where no code but ours runs. Where a tensor of this step
    has no fused form, the weights are restored and the base steps itself.

    Args:
        base: The base optimizer.
        passes: The passes that ``oracle`` runs.
        oracle: Leaves the gradients for the step.
    """

    def step(base: Optimizer, closure: Callable[[], Any]) -> Any:
        with passes.left_perturbed():
            with torch.enable_grad():
                loss = closure()
            if not passes.restore_and_step(base):
                type(base).step.__wrapped__(base)  # type: ignore[attr-defined]  # inside of the hooks, which are running
        return loss

    Optimizer.profile_hook_step(step)(base, oracle)
