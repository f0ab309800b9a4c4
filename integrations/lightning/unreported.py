"""A training step that leaves no trace in reports: not logged, not profiled, not printed."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.profilers import PassThroughProfiler

__all__ = ["REPORTS", "unreported"]

REPORTS = ("log", "log_dict", "print")
"""Methods of a module that report something."""


@contextmanager
def unreported(trainer: Trainer, module: LightningModule) -> Generator[None]:
    """Discard what the module and its parents log, print and profile inside this context.

    Args:
        trainer: The trainer; its loggers, its profiler and what is logged so far are exchanged meanwhile.
        module: The module; ``log``, ``log_dict`` and ``print`` do nothing meanwhile.
    """
    mutable: Any = trainer  # its connectors give it attributes that its class does not declare
    loggers, profiler = mutable.loggers, mutable.profiler
    attributes = vars(module)
    loops: list[Any] = [trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]
    results = [loop._results for loop in loops]
    own = {name: attributes[name] for name in REPORTS if name in attributes}
    try:
        mutable.loggers = [DummyLogger() for _ in loggers]
        mutable.profiler = PassThroughProfiler()
        attributes.update(dict.fromkeys(REPORTS, _ignore))
        for loop, present in zip(loops, results, strict=True):  # super().log() gets past the module's attributes
            loop._results = copy.copy(present)
            loop._results.clear()
        yield
    finally:
        for name in REPORTS:
            attributes.pop(name, None)
        attributes.update(own)
        for loop, present in zip(loops, results, strict=True):
            loop._results = present
        mutable.loggers, mutable.profiler = loggers, profiler


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that reports something; one and the same object, so that compiled steps stay compiled."""
