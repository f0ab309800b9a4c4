"""The sharpness-aware part of a run's arguments, as fields of a ``TrainingArguments`` dataclass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

import samopt
from samopt import SharpnessAwareOptimizer

__all__ = ["SAMArguments", "SAMTrainingArguments"]

_OPTIMIZERS: dict[str, Callable[..., SharpnessAwareOptimizer]] = {"sam": samopt.SAM, "asam": samopt.ASAM}
_SCHEDULES = ("constant", "linear_warmup", "cosine", "proportional_to_lr")


@dataclass
class SAMArguments:
    """The fields that ``SAMTrainingArguments`` adds, to add to arguments of any other kind.

    ``@dataclass class MyArguments(SAMArguments, Seq2SeqTrainingArguments): pass`` is all it takes. ``HfArgumentParser``
    reads the fields from the command line, JSON and YAML.

    Args:
        sam: The optimizer around the one that ``optim`` names; "none" trains as without samopt.
        sam_rho: Radius of the perturbation, >= 0; None for the optimizer's own default.
        sam_eta: Stabiliser of the metric, >= 0; None for the optimizer's own default. SAM has none.
        sam_norm: "l2", or "linf" for the l-infinity ball.
        sam_rho_schedule: How ``sam_rho`` varies over the run: "linear_warmup" from 0 over ``sam_rho_warmup_steps``,
            "cosine" to 0 at the last step, "proportional_to_lr" from ``learning_rate``, or "constant".
        sam_rho_warmup_steps: Optimizer steps of "linear_warmup", >= 1 there.
        sam_every: Perturb every so many optimizer steps, >= 1; the others cost one pass.
        sam_sync_perturbation: With several processes: perturb along the averaged gradient, as one process with the
            whole batch would, for one more exchange of gradients. By default each perturbs along its own.
        sam_stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically.

    Raises:
        ValueError: If an option is unknown, out of range or has no effect beside the others.
    """

    sam: Literal["none", "sam", "asam"] = field(
        default="none", metadata={"help": "Sharpness-aware optimizer around the one that --optim names."}
    )
    sam_rho: float | None = field(
        default=None, metadata={"help": "Radius of the perturbation; by default the optimizer's own."}
    )
    sam_eta: float | None = field(
        default=None, metadata={"help": "Stabiliser of the metric; by default the optimizer's own."}
    )
    sam_norm: Literal["l2", "linf"] = field(default="l2", metadata={"help": "Norm of the ball."})
    sam_rho_schedule: Literal["constant", "linear_warmup", "cosine", "proportional_to_lr"] = field(
        default="constant", metadata={"help": "How sam_rho varies over the run."}
    )
    sam_rho_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which linear_warmup raises sam_rho from 0."}
    )
    sam_every: int = field(
        default=1, metadata={"help": "Perturb every so many optimizer steps; the others cost one pass."}
    )
    sam_sync_perturbation: bool = field(
        default=False,
        metadata={"help": "Perturb along the gradient averaged over processes instead of each process's own."},
    )
    sam_stochastic_rounding: bool = field(
        default=True, metadata={"help": "Round perturbed bf16 and fp16 weights stochastically."}
    )

    def __post_init__(self) -> None:
        _check_choice("sam", self.sam, ("none", *_OPTIMIZERS))
        _check_choice("sam_norm", self.sam_norm, ("l2", "linf"))
        _check_choice("sam_rho_schedule", self.sam_rho_schedule, _SCHEDULES)
        for name in ("sam_rho", "sam_eta"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}; leave it out for the default")
        if self.sam_eta is not None and self.sam in ("none", "sam"):
            raise ValueError(f'sam_eta={self.sam_eta} has no effect with sam="{self.sam}"; leave it out, or use "asam"')
        if self.sam_every < 1:
            raise ValueError(f"sam_every must be at least 1, got {self.sam_every}; 1 perturbs every step")
        if (self.sam_rho_schedule == "linear_warmup") != (self.sam_rho_warmup_steps > 0):
            raise ValueError(
                f'sam_rho_warmup_steps={self.sam_rho_warmup_steps} does not go with sam_rho_schedule="'
                f'{self.sam_rho_schedule}"; "linear_warmup" needs at least 1, and the others need it left out'
            )
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]  # TrainingArguments has it, where it comes next

    def build_optimizer(self, base: Optimizer, model: nn.Module, seed: int) -> SharpnessAwareOptimizer:
        """Return the sharpness-aware optimizer around ``base``.

        Args:
            base: The optimizer to wrap.
            model: The module that the loop calls.
            seed: Seed of the stochastic rounding.

        Raises:
            ValueError: If ``sam`` is "none".
        """
        if self.sam == "none":
            raise ValueError(f'sam is "none"; choose one of {sorted(_OPTIMIZERS)} to build an optimizer')
        chosen: dict[str, Any] = {"rho": self.sam_rho, "eta": self.sam_eta}
        return _OPTIMIZERS[self.sam](
            base,
            model=model,
            norm=self.sam_norm,
            stochastic_rounding=self.sam_stochastic_rounding,
            seed=seed,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def build_schedule(
        self, optimizer: SharpnessAwareOptimizer, max_steps: int, learning_rate: float
    ) -> samopt.RhoScheduler | None:
        """Return what drives ``rho``, or None where it stays as it is.

        Args:
            optimizer: The optimizer to drive, at its first step.
            max_steps: How many optimizer steps the run has.
            learning_rate: The run's largest learning rate.
        """
        match self.sam_rho_schedule:
            case "linear_warmup":
                return samopt.RhoScheduler.linear_warmup(optimizer, self.sam_rho_warmup_steps)
            case "cosine":
                return samopt.RhoScheduler.cosine(optimizer, max_steps)
            case "proportional_to_lr":
                return samopt.RhoScheduler.proportional_to_lr(optimizer, max_lr=learning_rate)
        return samopt.RhoScheduler(optimizer, lambda step: 1.0) if self.sam_every > 1 else None


@dataclass
class SAMTrainingArguments(SAMArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of ``SAMArguments``.

    Args:
        sam: See ``SAMArguments``.
        sam_rho: See there.
        sam_eta: See there.
        sam_norm: See there.
        sam_rho_schedule: See there.
        sam_rho_warmup_steps: See there.
        sam_every: See there.
        sam_sync_perturbation: See there.
        sam_stochastic_rounding: See there.
    """


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
