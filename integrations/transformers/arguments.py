"""The sharpness-aware part of a run's arguments, as fields of a ``TrainingArguments`` dataclass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

import samopt
from samopt import SharpnessAwareOptimizer
from samopt.trust_region import EMA, InputNoise

__all__ = ["SAMArguments", "SAMTrainingArguments"]

_OPTIMIZERS: dict[str, Callable[..., SharpnessAwareOptimizer]] = {
    "sam": samopt.SAM,
    "asam": samopt.ASAM,
    "fisher": samopt.FisherSAM,
    "tram": samopt.TRAM,
}
# Which optimizers know an option that is handed on to them, and under which name.
_HANDED_ON = {
    "sam_rho": ("rho", ("sam", "asam", "fisher")),
    "sam_eta": ("eta", ("asam", "fisher", "tram")),
    "sam_scale": ("scale", ("tram",)),
    "sam_max_radius": ("max_radius", ("tram",)),
    "sam_metric": ("geometry", ("tram",)),
    "sam_trust_region": ("trust_region", ("tram",)),
    "sam_divergence": ("divergence", ("tram",)),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SAMArguments:
    """The fields that ``SAMTrainingArguments`` adds, to add to arguments of any other kind.

    ``@dataclass class MyArguments(SAMArguments, Seq2SeqTrainingArguments): pass`` is all it takes. ``HfArgumentParser``
    reads the fields from the command line, JSON and YAML.

    Args:
        sam: The optimizer around the one that ``optim`` names; "none" trains as without samopt.
        sam_rho: Radius of the perturbation, >= 0; None for the optimizer's own default. TRAM has ``sam_scale`` instead.
        sam_eta: Stabiliser of the metric, >= 0; None for the optimizer's own default. SAM has none.
        sam_norm: "l2", or "linf" for the l-infinity ball.
        sam_direction: "gradient", which takes a pass of its own; or "momentum", the base optimizer's, which is known
            before the batch, so that a step costs one pass; or "momentum-ahead", the other way along it. TRAM needs
            "gradient".
        sam_rho_schedule: How the radius (TRAM's scale) varies over the run: "linear_warmup" from 0 over
            ``sam_rho_warmup_steps``, "cosine" to 0 at the last step, "proportional_to_lr" from ``learning_rate``, or
            "constant".
        sam_rho_warmup_steps: Optimizer steps of "linear_warmup", >= 1 there.
        sam_every: Perturb every so many optimizer steps, >= 1; the others cost one pass.
        sam_sync_perturbation: With several processes: perturb along the averaged gradient, as one process with the
            whole batch would, for one more exchange of gradients. By default each perturbs along its own.
        sam_stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically.
        sam_trust_region: TRAM's: what the model's outputs are compared with.
        sam_divergence: TRAM's: how they are compared.
        sam_scale: TRAM's: factor from distance to radius, >= 0.
        sam_max_radius: TRAM's: largest radius, > 0.
        sam_metric: TRAM's: "adaptive", "euclidean" or "fisher".
        sam_ema_decay: Of the trust region "ema", in (0, 1).
        sam_noise_std: Of the trust region "input_noise", > 0, in units of the input embeddings.

    Raises:
        ValueError: If an option is unknown, out of range or has no effect beside the others.
    """

    sam: Literal["none", "sam", "asam", "fisher", "tram"] = _option(
        "none", "Sharpness-aware optimizer around the one that --optim names."
    )
    sam_rho: float | None = _option(None, "Radius of the perturbation; by default the optimizer's own.")
    sam_eta: float | None = _option(None, "Stabiliser of the metric; by default the optimizer's own.")
    sam_norm: Literal["l2", "linf"] = _option("l2", "Norm of the ball.")
    sam_direction: Literal["gradient", "momentum", "momentum-uphill"] = _option(
        "gradient", "Along the batch's gradient (two passes a step), or the base's momentum, or ahead of it (one)."
    )
    sam_rho_schedule: Literal["constant", "linear_warmup", "cosine", "proportional_to_lr"] = _option(
        "constant", "How the radius varies over the run."
    )
    sam_rho_warmup_steps: int = _option(0, "Optimizer steps over which linear_warmup raises the radius from 0.")
    sam_every: int = _option(1, "Perturb every so many optimizer steps; the others cost one pass.")
    sam_sync_perturbation: bool = _option(
        False, "Perturb along the gradient averaged over processes instead of each process's own."
    )
    sam_stochastic_rounding: bool = _option(True, "Round perturbed bf16 and fp16 weights stochastically.")
    sam_trust_region: Literal["previous", "ema", "pretrained", "input_noise"] | None = _option(
        None, "TRAM: what the model's outputs are compared with; by default the previous step."
    )
    sam_divergence: Literal["kl", "reverse_kl", "symmetric_kl", "l2", "mmd"] | None = _option(
        None, "TRAM: how outputs are compared; by default KL."
    )
    sam_scale: float | None = _option(None, "TRAM: factor from distance to radius; by default 1.")
    sam_max_radius: float | None = _option(None, "TRAM: largest radius; by default none.")
    sam_metric: Literal["adaptive", "euclidean", "fisher"] | None = _option(
        None, "TRAM: metric of the perturbation; by default adaptive."
    )
    sam_ema_decay: float | None = _option(None, "TRAM: decay of the trust region ema.")
    sam_noise_std: float | None = _option(None, "TRAM: standard deviation of the trust region input_noise.")

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("sam_rho", "sam_eta", "sam_scale"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}; leave it out for the default")
        if self.sam_every < 1:
            raise ValueError(f"sam_every must be at least 1, got {self.sam_every}; 1 perturbs every step")
        if (self.sam_rho_schedule == "linear_warmup") != (self.sam_rho_warmup_steps > 0):
            raise ValueError(
                f'sam_rho_warmup_steps={self.sam_rho_warmup_steps} does not go with sam_rho_schedule="'
                f'{self.sam_rho_schedule}"; "linear_warmup" needs at least 1, and the others need it left out'
            )
        if self.sam_max_radius is not None and not self.sam_max_radius > 0:
            raise ValueError(f"sam_max_radius must be > 0, got {self.sam_max_radius}; leave it out for no bound")
        self._trust_region(0)
        self._check_effects()
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]  # TrainingArguments has it, where it comes next

    def build_optimizer(self, base: Optimizer, model: nn.Module, seed: int) -> SharpnessAwareOptimizer:
        """Return the sharpness-aware optimizer around ``base``.

        Args:
            base: The optimizer to wrap.
            model: The module that the loop calls.
            seed: Seed of the stochastic rounding and of TRAM's input noise.

        Raises:
            ValueError: If ``sam`` is "none", or an option is out of range.
        """
        if self.sam == "none":
            raise ValueError(f'sam is "none"; choose one of {", ".join(_OPTIMIZERS)} to build an optimizer')
        options = {name: getattr(self, own) for own, (name, _) in _HANDED_ON.items() if getattr(self, own) is not None}
        region = self._trust_region(seed)
        if region is not None:
            options["trust_region"] = region
        return _OPTIMIZERS[self.sam](
            base,
            model=model,
            norm=self.sam_norm,
            direction=self.sam_direction,
            stochastic_rounding=self.sam_stochastic_rounding,
            seed=seed,
            **options,
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

    def _trust_region(self, seed: int) -> EMA | InputNoise | None:
        """Return a trust region that a name does not say all of."""
        if self.sam_ema_decay is not None:
            return EMA(self.sam_ema_decay)
        if self.sam_trust_region != "input_noise":
            return None
        return InputNoise(seed=seed) if self.sam_noise_std is None else InputNoise(self.sam_noise_std, seed=seed)

    def _check_choices(self) -> None:
        hints = get_type_hints(SAMArguments)
        for name in (own.name for own in fields(SAMArguments)):
            kinds = [hints[name], *get_args(hints[name])]
            known = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
            value = getattr(self, name)
            if known is not None and value not in known and not (value is None and type(None) in kinds):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def _check_effects(self) -> None:
        """Raise if an option would be ignored; a run with "none" may carry those of its sharpness-aware siblings."""
        if self.sam == "none":
            return
        for name, (_, users) in _HANDED_ON.items():
            if getattr(self, name) is not None and self.sam not in users:
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with sam="{self.sam}"; leave it out, or use '
                    f"{' or '.join(users)}"
                )
        if self.sam == "tram" and self.sam_direction != "gradient":
            raise ValueError(
                f'sam_direction="{self.sam_direction}" takes one pass, and sam="tram" measures its radius in a first '
                'of two; use sam_direction="gradient", or another optimizer'
            )
        for name, region in (("sam_ema_decay", "ema"), ("sam_noise_std", "input_noise")):
            if getattr(self, name) is not None and self.sam_trust_region != region:
                raise ValueError(
                    f'{name}={getattr(self, name)} has no effect without sam="tram" and sam_trust_region="{region}"'
                )


@dataclass
class SAMTrainingArguments(SAMArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of ``SAMArguments``, which documents them."""
