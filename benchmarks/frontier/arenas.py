"""Where the methods meet: a task, the base optimizer that suits its model, and how long to train."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARENAS", "Arena"]


@dataclass(frozen=True)
class Arena:
    """One task of the comparison.

    Attributes:
        task: Name of a registered task.
        base: Name of the registered optimizer that every method wraps.
        learning_rates: What the base's learning rate is chosen from, smallest first.
        epochs: Passes over the training data.
        train_size: Training examples; None for all.
        radii: Centre of every grid of radii, relative to the method's own: a transformer takes smaller ones.
    """

    task: str
    base: str
    learning_rates: tuple[float, float, float]
    epochs: int
    train_size: int | None
    radii: float = 1.0


_SGD = (0.01, 0.03, 0.1)
_ADAMW = (1e-3, 3e-3, 1e-2)

# Sized so that the whole comparison takes about an hour of one core.
ARENAS = {
    arena.task: arena
    for arena in (
        Arena("digits", "sgd", _SGD, epochs=20, train_size=None),
        Arena("digits_vit", "adamw", _ADAMW, epochs=15, train_size=None, radii=0.3),
        Arena("fashion_small", "sgd", _SGD, epochs=10, train_size=1000),
    )
}
"""By name of the task."""
