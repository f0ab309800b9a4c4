"""What Lightning's Trainer is about to do with an optimizer, told from its calls: Lightning itself is not imported."""

from __future__ import annotations

import sys
from types import FrameType, FunctionType
from typing import Any

from torch import nn

__all__ = ["is_trainer_closure", "refuse_without_callback", "runs_step_as_forward"]

_PACKAGES = ("pytorch_lightning.", "lightning.pytorch.")
_FRAMES = 4  # between the method that has the strategy at hand and ours: a constructor, the making of a class
_TUNERS = ("LearningRateFinder", "BatchSizeFinder")


def is_trainer_closure(closure: Any) -> bool:
    """Return whether a closure given to ``step`` is the Trainer's own.

    Unlike torch's contract, it is to be called once: it clears gradients only where an accumulation window begins, and
    runs hooks and clipping. With manual optimization, the Trainer wraps a closure of the user's, which keeps that
    contract; or one of its own that does nothing, where the user gave none.

    Args:
        closure: The closure.
    """
    if not _is_of_lightning(getattr(closure, "func", None)):
        return False
    module, *_, inside = (None, *closure.args) if len(closure.args) < 2 else closure.args
    is_manual = getattr(module, "automatic_optimization", True) is False
    return not is_manual or _is_of_lightning(inside)


def runs_step_as_forward(module: nn.Module) -> bool:
    """Return whether a call of a module that begins now is its ``training_step``, as under Lightning's DDP.

    The Trainer sends the call of a step through the wrapper around a module by replacing the module's ``forward`` for
    a moment. Such a call may hold both passes; the forward calls are those inside it.

    Args:
        module: What is called.
    """
    forward = vars(module).get("forward")
    if not isinstance(forward, FunctionType) or not _is_of_lightning(forward):
        return False
    return "_ForwardRedirection." in forward.__qualname__


def refuse_without_callback(kind: type) -> None:
    """Raise if the Trainer wraps an optimizer that needs a second pass, and has no callback that runs it.

    The Trainer makes a class for each optimizer it wraps, at the start of a fit.

    Args:
        kind: A new subclass of the optimizer's class.

    Raises:
        RuntimeError: If the callback is missing, or others would push it aside.
    """
    if not any(parent.__name__ == "LightningOptimizer" for parent in kind.__mro__):
        return
    strategy, optimizer = _wrapping_strategy()
    module = getattr(strategy, "lightning_module", None)
    trainer = getattr(module, "_trainer", None)
    if module is None or trainer is None or not module.automatic_optimization:
        return
    if optimizer.is_one_pass:
        return  # it is one pass
    name, base = type(optimizer).__name__, type(optimizer.base_optimizer).__name__
    callbacks = trainer.callbacks
    if not any(getattr(callback, "runs_second_pass", False) for callback in callbacks):
        raise RuntimeError(
            f"configure_optimizers returned {name}, but automatic optimization has no place for its second pass; give "
            "the Trainer callbacks=[samopt.integrations.lightning.SharpnessAwareTraining()], or set "
            "automatic_optimization=False and use 'with optimizer.perturbed():' in training_step"
        )
    tuners = [parent.__name__ for callback in callbacks for parent in type(callback).__mro__]
    for tuner in _TUNERS:
        if tuner in tuners:
            raise RuntimeError(
                f"configure_optimizers returned {name}, but {tuner} takes all other callbacks away while it searches, "
                f"so that nobody runs the second pass; return the {base} alone, and give SharpnessAwareTraining the "
                "options"
            )


def _is_of_lightning(function: Any) -> bool:
    origin = getattr(function, "__module__", None)
    return isinstance(origin, str) and origin.startswith(_PACKAGES)


def _wrapping_strategy() -> tuple[Any, Any]:
    """Return the strategy that is wrapping an optimizer, and the optimizer; None for both where there is none."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "_to_lightning_optimizer":
            return frame.f_locals.get("strategy"), frame.f_locals.get("optimizer")
        frame = frame.f_back
    return None, None
