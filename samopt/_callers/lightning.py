"""What Lightning's Trainer is about to do with an optimizer, told from its calls: Lightning itself is not imported."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

__all__ = ["is_trainer_closure", "refuse_without_callback"]

_PACKAGES = ("pytorch_lightning.", "lightning.pytorch.")
_FRAMES = 4  # between the method that has the strategy at hand and ours: a constructor, the making of a class
_TUNERS = ("LearningRateFinder", "BatchSizeFinder")


def is_trainer_closure(closure: Any) -> bool:
    """Return whether a closure given to ``step`` is the Trainer's own.

    Unlike torch's contract, it is to be called once: it clears gradients only where an accumulation window begins, and
    runs hooks and clipping.

    Args:
        closure: The closure.
    """
    origin = getattr(getattr(closure, "func", None), "__module__", None)
    return isinstance(origin, str) and origin.startswith(_PACKAGES)


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
