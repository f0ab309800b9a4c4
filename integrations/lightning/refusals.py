"""Runs in which the callback could not run a second pass, found before training starts."""

from __future__ import annotations

import inspect

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.optim import Optimizer

from samopt import SharpnessAwareOptimizer

__all__ = [
    "refuse_missing_optimizer",
    "refuse_scaled_geometry",
    "refuse_sharded_measurement",
    "refuse_unsupported_optimizer",
    "refuse_unsupported_run",
]

_MANUAL = """\
SharpnessAwareTraining runs the second pass where Lightning calls the optimizer, but {module} has \
automatic_optimization=False and calls it itself; leave the callback out, return samopt.SAM(optimizer, rho=0.05, \
model=self) from configure_optimizers, and write in training_step:
    optimizer = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(self.loss(batch))
    with optimizer.perturbed():
        self.manual_backward(self.loss(batch))
    optimizer.step()"""

_STRATEGIES = {
    "DeepSpeedStrategy": "its engine owns the gradients, which it reduces, partitions and steps inside backward",
    "FSDPStrategy": "its flat parameters hide each weight's gradient, and every process would take the norm of its own "
    "shard alone",
    "XLAStrategy": "samopt was never run on XLA devices",
}


def refuse_unsupported_run(trainer: Trainer, module: LightningModule) -> None:
    """Raise if a second pass cannot be run with this trainer and module.

    Args:
        trainer: The trainer.
        module: The module that it is about to fit.

    Raises:
        TypeError: If the module's training step cannot be repeated.
        ValueError: If the strategy has no place for a second pass.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise TypeError(_MANUAL.format(module=name))
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(
            f"SharpnessAwareTraining runs each batch twice, but {name}.training_step(dataloader_iter) takes batches "
            "from the iterator itself; write training_step(batch, batch_idx) instead"
        )
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _STRATEGIES:
            raise ValueError(
                f"SharpnessAwareTraining cannot run a second pass under {type(trainer.strategy).__name__}: "
                f'{_STRATEGIES[kind.__name__]}; use Trainer(strategy="ddp") instead'
            )


def refuse_missing_optimizer(trainer: Trainer, module: LightningModule) -> None:
    """Raise if ``configure_optimizers`` returned no optimizer.

    Args:
        trainer: The trainer.
        module: The module that it is about to fit.

    Raises:
        ValueError: If there is none.
    """
    optimizers = trainer.optimizers
    # Lightning trains on with a stand-in of this name, which steps nothing.
    if not optimizers or type(optimizers[0]).__name__ == "_MockOptimizer":
        raise ValueError(
            f"SharpnessAwareTraining needs an optimizer to put a second pass before, but "
            f"{type(module).__name__}.configure_optimizers returned None; return one, such as "
            "torch.optim.SGD(self.parameters(), lr=0.1), or leave the callback out"
        )


def refuse_unsupported_optimizer(optimizer: Optimizer) -> None:
    """Raise if the callback cannot drive the optimizer that ``configure_optimizers`` returned.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If it cannot.
    """
    if isinstance(optimizer, SharpnessAwareOptimizer) and optimizer.is_one_pass and optimizer.model is None:
        name = type(optimizer).__name__
        raise ValueError(
            f"SharpnessAwareTraining was given {name} in one pass, without model=, so that no forward would run at the "
            f'perturbed weights; write samopt.{name}(optimizer, direction="momentum", model=self) in '
            "configure_optimizers, or name the variant, as in "
            'SharpnessAwareTraining("sam", direction="momentum")'
        )
    base = optimizer.base_optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else optimizer
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError(
            "SharpnessAwareTraining cannot drive LBFGS, which runs the training step several times in one step and "
            "compares losses at w that Lightning returns with gradients at w + epsilon; choose another optimizer"
        )


def refuse_scaled_geometry(trainer: Trainer, optimizer: SharpnessAwareOptimizer) -> None:
    """Raise if the geometry is made of gradients that a ``GradScaler`` has multiplied.

    Args:
        trainer: The trainer.
        optimizer: The optimizer around the trainer's.

    Raises:
        ValueError: If it is.
    """
    base = optimizer.base_optimizer
    unscales = getattr(base, "_step_supports_amp_scaling", False)
    if (
        optimizer.geometry.name == "fisher"
        and unscales
        and getattr(trainer.precision_plugin, "scaler", None) is not None
    ):
        raise ValueError(
            f"the Fisher geometry depends on the size of the gradients, which the GradScaler multiplies and a fused "
            f'{type(base).__name__} divides only in its step; use fused=False, or Trainer(precision="bf16-mixed")'
        )


def refuse_sharded_measurement(trainer: Trainer) -> None:
    """Raise if no process can measure the model, because none holds all of it.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If the model is sharded.
    """
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if kinds & {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}:
        raise ValueError(
            f"SharpnessCallback needs the whole model in each process, but {type(trainer.strategy).__name__} shards it "
            'over several; leave the monitor out, or use Trainer(strategy="ddp")'
        )
