"""The sharpness-aware part of a run's arguments, as fields of a ``TrainingArguments`` dataclass."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

import samopt
from samopt import SharpnessAwareOptimizer
from samopt._callers.user_warnings import warn_user
from samopt._step.late_phase import first_late_step, share_of
from samopt.trust_region import EMA, InputNoise
from samopt.variants import option_names

from .._second_pass.variant_options import try_options

__all__ = ["SAMArguments", "SAMTrainingArguments"]

# The optimizer's option that a field sets, where it is not left at its default.
_OPTIONS = {
    "sam_rho": "rho",
    "sam_eta": "eta",
    "sam_norm": "norm",
    "sam_direction": "direction",
    "sam_only": "only",
    "sam_scale": "scale",
    "sam_max_radius": "max_radius",
    "sam_geometry": "geometry",
    "sam_trust_region": "trust_region",
    "sam_divergence": "divergence",
}
_NUMBERS = ("sam_rho", "sam_eta", "sam_scale", "sam_max_radius", "sam_ema_decay", "sam_noise_std")
_RESERVED = ("model", "seed", "stochastic_rounding", "sync_perturbation")
"""Options of every optimizer that are set from elsewhere, and so may not be among ``sam_options``."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SAMArguments:
    """The fields that ``SAMTrainingArguments`` adds, to add to arguments of any other kind.

    ``@dataclass class MyArguments(SAMArguments, Seq2SeqTrainingArguments): pass`` is all it takes. ``HfArgumentParser``
    reads the fields from the command line, JSON and YAML.

    Args:
        sam: The optimizer around the one that ``optim`` names, one of ``samopt.available()``; "none", the default,
            trains as without samopt.
        sam_rho: Radius of the perturbation, >= 0; None for the optimizer's own default. TRAM has ``sam_scale`` instead,
            and LE-SAM a ``budget`` among ``sam_options``.
        sam_eta: Stabiliser of the geometry, >= 0; None for the optimizer's own default. SAM has none.
        sam_norm: "l2", or "linf" for the l-infinity ball.
        sam_direction: "gradient", which takes a pass of its own; or "momentum": ahead along the base optimizer's, which
            is known before the batch, so that a step costs one pass; or "momentum-uphill", the other way along it. TRAM
            and the optimizers that combine two gradients need "gradient".
        sam_only: Which parameters move: "norm", "bias" or "head"; or a regular expression that is found in their names,
            as ``model.named_parameters()`` gives them. None is all of them. It is looked up at the first step, when the
            model is known.
        sam_rho_schedule: How the radius (TRAM's scale) varies over the run: "linear_warmup" from 0 over
            ``sam_rho_warmup_steps``, "cosine" to 0 at the last step, "proportional_to_lr" from ``learning_rate``, or
            "constant".
        sam_rho_warmup_steps: Optimizer steps of "linear_warmup", >= 1 there.
        sam_every: Perturb every so many optimizer steps, >= 1; the others cost one pass.
        sam_late: Perturb in the last share of the run's optimizer steps only: "last 25 %", or 0.25. The steps before
            cost one pass. None is the whole run.
        sam_sync_perturbation: With several processes: perturb along the averaged gradient, as one process with the
            whole batch would, for one more exchange of gradients. By default each perturbs along its own.
        sam_stochastic_rounding: Round perturbed bf16 and fp16 weights stochastically.
        sam_trust_region: TRAM's: what the model's outputs are compared with.
        sam_divergence: TRAM's: how they are compared.
        sam_scale: TRAM's: factor from distance to radius, >= 0.
        sam_max_radius: TRAM's and LE-SAM's: largest radius, > 0.
        sam_geometry: TRAM's: "adaptive", "euclidean", "fisher" or "preconditioned".
        sam_ema_decay: Of the trust region "ema", in (0, 1).
        sam_noise_std: Of the trust region "input_noise", > 0, in units of the input embeddings.
        sam_options: Further options of the optimizer, as a dict or its JSON: ``{"alpha": 0.2}`` for GSAM, say.

    Raises:
        ValueError: If an option is unknown, out of range or has no effect beside the others.
    """

    sam: (
        Literal[
            "none",
            "sam",
            "asam",
            "fisher-sam",
            "preconditioned-sam",
            "momentum-sam",
            "friendly-sam",
            "looksam",
            "gsam",
            "wsam",
            "le-sam",
            "functional-sam",
            "tram",
            "flat-lora",
        ]
        | None
    ) = _option(None, "Sharpness-aware optimizer around the one that --optim names; by default none.")
    sam_rho: float | None = _option(None, "Radius of the perturbation; by default the optimizer's own.")
    sam_eta: float | None = _option(None, "Stabiliser of the geometry; by default the optimizer's own.")
    sam_norm: Literal["l2", "linf"] = _option("l2", "Norm of the ball.")
    sam_direction: Literal["gradient", "momentum", "momentum-uphill"] = _option(
        "gradient", "Along the batch's gradient (two passes a step), or ahead along the base's momentum (one)."
    )
    sam_only: str | None = _option(
        None, "Which parameters move: norm, bias, head, or a regular expression for names; by default all."
    )
    sam_rho_schedule: Literal["constant", "linear_warmup", "cosine", "proportional_to_lr"] = _option(
        "constant", "How the radius varies over the run."
    )
    sam_rho_warmup_steps: int = _option(0, "Optimizer steps over which linear_warmup raises the radius from 0.")
    sam_every: int = _option(1, "Perturb every so many optimizer steps; the others cost one pass.")
    sam_late: float | str | None = _option(
        None, 'Perturb in the last share of the steps only, as "last 25 %%" or 0.25; the others cost one pass.'
    )
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
    sam_max_radius: float | None = _option(None, "TRAM and LE-SAM: largest radius.")
    sam_geometry: Literal["adaptive", "euclidean", "fisher", "preconditioned"] | None = _option(
        None, "TRAM: geometry of the perturbation; by default adaptive."
    )
    sam_ema_decay: float | None = _option(None, "TRAM: decay of the trust region ema.")
    sam_noise_std: float | None = _option(None, "TRAM: standard deviation of the trust region input_noise.")
    sam_options: dict[str, Any] | str | None = _option(
        None, """Further options of the optimizer, as JSON: '{"alpha": 0.2}' for gsam."""
    )

    def __post_init__(self) -> None:
        self._has_looked = False
        self.sam_is_given = self.sam is not None
        """Whether an optimizer, or "none", was chosen, and not left to the default."""
        self.sam = self.sam or "none"
        self._check_choices()
        for name in _NUMBERS:
            setattr(self, name, _number(name, getattr(self, name)))
        self.sam_options = _parsed(self.sam_options)
        for name in ("sam_rho", "sam_eta", "sam_scale"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}; leave it out for the default")
        if self.sam_every < 1:
            raise ValueError(f"sam_every must be at least 1, got {self.sam_every}; 1 perturbs every step")
        if self.sam_late is not None:
            share_of("sam_late", self.sam_late)
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

    @property
    def n_gpu(self) -> int:
        """As in ``TrainingArguments``. A training step reads it, which tells a Trainer that ignores these fields."""
        if not self._has_looked and self.sam != "none":
            self._look_at_trainer(sys._getframe(1))
        number: int = super().n_gpu  # type: ignore[misc]  # TrainingArguments has it, which comes next
        return number

    def build_optimizer(
        self, base: Optimizer, model: nn.Module | Sequence[nn.Module], seed: int
    ) -> SharpnessAwareOptimizer:
        """Return the sharpness-aware optimizer around ``base``.

        Args:
            base: The optimizer to wrap.
            model: The module that the loop calls, or a list of modules.
            seed: Seed of the stochastic rounding and of TRAM's input noise.

        Raises:
            ValueError: If ``sam`` is "none", or an option is out of range.
        """
        if self.sam == "none":
            raise ValueError(f'sam is "none"; choose one of {", ".join(samopt.available())} to build an optimizer')
        assert self.sam is not None
        return samopt.create(self.sam, base, model=model, **self._options(seed))

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

    def first_perturbed_step(self, max_steps: int) -> int:
        """Return the first optimizer step that is perturbed.

        Args:
            max_steps: How many optimizer steps the run has.

        Raises:
            ValueError: If ``sam_late`` is a share of a run of unknown length.
        """
        if self.sam_late is None:
            return 0
        if max_steps < 1:
            raise ValueError(
                f"sam_late={self.sam_late!r} is a share of the run, whose number of steps is not known: max_steps is "
                f"{max_steps}; set max_steps="
            )
        return first_late_step(share_of("sam_late", self.sam_late), max_steps)

    def _look_at_trainer(self, frame: FrameType) -> None:
        """Warn if the training step of a Trainer runs that is not sharpness-aware."""
        if frame.f_code.co_name != "training_step":
            return
        self._has_looked = True
        trainer = type(frame.f_locals.get("self"))
        if not hasattr(trainer, "sam_arguments"):
            warn_user(
                f'{trainer.__name__} ignores sam="{self.sam}" in its arguments, and trains without SAM; use '
                f"SAMTrainer, class MyTrainer(SAMTrainerMixin, {trainer.__name__}), or make_sharpness_aware(trainer)"
            )

    def _options(self, seed: int) -> dict[str, Any]:
        """Return the options of the optimizer, except its model."""
        options = {option: getattr(self, name) for name, option in _OPTIONS.items() if self._is_set(name)}
        region = self._trust_region(seed)
        if region is not None:
            options["trust_region"] = region
        assert isinstance(self.sam_options, Mapping)
        return options | self.sam_options | {"stochastic_rounding": self.sam_stochastic_rounding, "seed": seed}

    def _is_set(self, name: str) -> bool:
        """Return whether a field is not at its default."""
        default = next(own.default for own in fields(SAMArguments) if own.name == name)
        return bool(getattr(self, name) != default)

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
        assert self.sam is not None and isinstance(self.sam_options, Mapping)
        known = option_names(self.sam)
        for name, option in _OPTIONS.items():
            if self._is_set(name) and option not in known:
                users = [each for each in samopt.available() if option in option_names(each)]
                raise ValueError(
                    f'{name}={getattr(self, name)!r} has no effect with sam="{self.sam}"; leave it out, or use '
                    f"{' or '.join(users)}"
                )
            if self._is_set(name) and option in self.sam_options:
                raise ValueError(f"sam_options has {option}, and {name} sets it too; leave one of them out")
        for option in self.sam_options:
            if option in _RESERVED:
                raise ValueError(f"sam_options cannot set {option}, which the Trainer and its other arguments set")
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
        try:
            try_options(self.sam, self._options(0))
        except TypeError as error:
            raise ValueError(str(error)) from error


def _number(name: str, value: Any) -> Any:
    """Return a number that YAML gave as text: 5e-2 without a point is text for it."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {value!r}; leave it out for the default") from None


def _parsed(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return options that may be written as JSON."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"""sam_options must be a dict or its JSON, as in '{{"alpha": 0.2}}'; got {options!r}"""
            ) from error
    if not isinstance(options, dict | None):
        raise ValueError(f"sam_options must be a dict or its JSON, got {options!r}")
    return options or {}


@dataclass
class SAMTrainingArguments(SAMArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with the fields of ``SAMArguments``, which documents them."""
