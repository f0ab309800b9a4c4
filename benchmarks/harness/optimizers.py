"""What is compared: a torch optimizer, alone or inside what ``samopt.create`` or a user's module makes of it."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import samopt
from benchmarks.harness.errors import BenchmarkError, suggestion
from samopt._step.selection import check_only

BASES: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "adam": {"lr": 1e-3},
}
"""The bases with their defaults.

Momentum and weight decay of SGD are the SAM and ASAM papers', AdamW's settings torch's. On held-out digits with clean
labels SGD does equally well with learning rates from 0.01 to 0.1; 0.02 is used because at 0.1, the papers' value, ASAM
sometimes stays near its start. With random labels a smaller rate helps every optimizer, SGD most: see
docs/results/README.md before reading anything into a gain.
"""

SCHEDULE = ("rho_warmup", "rho_from", "rho_every", "ascent_part")
"""Settings of a run, not of an optimizer: rho rises during that fraction of the steps; is 0 before that fraction; is 0
except at every so many steps; the first pass is of that fraction of each batch."""


@dataclass(frozen=True)
class Choice:
    """An optimizer with its settings.

    Attributes:
        label: Its name in rows and tables, as in "sam:rho=0.2".
        base: Name of the base.
        base_settings: The base's settings.
        variant: A name for ``samopt.create``, or "module:Class"; None for the base alone.
        options: Of the variant; a function is called for each optimizer and returns the option (parts with state).
        schedule: See ``SCHEDULE``; "compute" is the multiple of the epochs that a study gives this choice.
        defaults: Settings that the variant took because no other was given.
    """

    label: str
    base: str
    base_settings: Mapping[str, float]
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, as a row keeps them."""
        plain = {name: value for name, value in self.options.items() if isinstance(value, (int, float, str))}
        return {**self.base_settings, **self.defaults, **plain, **self.schedule}

    @property
    def compute(self) -> float:
        """How many times the study's epochs it trains."""
        return self.schedule.get("compute", 1.0)

    def build(self, model: nn.Module) -> Optimizer:
        """Make the optimizer for a model."""
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[self.base]
        try:
            base: Optimizer = kind(model.parameters(), **self.base_settings)
            if self.variant is None:
                return base
            options = {name: value() if callable(value) else value for name, value in self.options.items()}
            if ":" in self.variant:
                made: Optimizer = _users_class(self.variant)(base, model=model, **options)
                return made
            return samopt.create(self.variant, base, model=model, **options)
        except (TypeError, ValueError) as error:
            raise BenchmarkError(f"optimizer {self.label!r} cannot be made: {error}") from error

    def schedulers(self, optimizer: Optimizer, steps: int) -> list[LRScheduler | samopt.RhoScheduler]:
        """Return the learning rate's half cosine to 0, and the schedule of rho if there is one."""
        schedulers: list[LRScheduler | samopt.RhoScheduler] = [CosineAnnealingLR(optimizer, max(steps, 1))]
        warmup, first = (round(self.schedule.get(name, 0.0) * steps) for name in ("rho_warmup", "rho_from"))
        every = int(self.schedule.get("rho_every", 1))
        if isinstance(optimizer, samopt.SharpnessAwareOptimizer):
            if warmup > 0:
                schedulers.append(samopt.RhoScheduler.linear_warmup(optimizer, steps=warmup))
            elif first > 0:
                schedulers.append(samopt.RhoScheduler.late(optimizer, start=first))
            elif every > 1:
                schedulers.append(samopt.RhoScheduler.every(optimizer, every))
        return schedulers


def parse_choices(texts: list[str]) -> list[Choice]:
    """Return the choice of each text; see ``parse_choice``."""
    return [parse_choice(text) for text in texts]


def parse_choice(text: str) -> Choice:
    """Return the choice that ``[BASE+]NAME[:SETTING=VALUE...]`` or ``[BASE+]MODULE:CLASS[:...]`` describes.

    The optimizer is made once for a small model, so that a mistake shows before anything trains, and its default
    radius is kept among the settings.
    """
    head, *parts = text.split(":")
    base, plus, name = head.rpartition("+")
    base = base if plus else name if name in BASES else "sgd"
    if base not in BASES:
        raise BenchmarkError(f"unknown base {base!r} in {text!r}; {suggestion(base, BASES)}Known: {', '.join(BASES)}")
    if name in BASES:
        variant = None
    elif parts and "=" not in parts[0]:
        variant = f"{name}:{parts.pop(0)}"
    else:
        variant = name.replace("_", "-")
        known = [*BASES, *samopt.available()]
        if variant not in known:
            raise BenchmarkError(
                f"unknown optimizer {name!r}; {suggestion(variant, known)}Known: {', '.join(known)}, each as "
                "adamw+sam too, or a class of yours as my_module:MySAM"
            )
    base_settings, options, schedule = dict(BASES[base]), {}, {}
    for part in parts:
        key, equals, written = part.partition("=")
        value = _value(written)
        if key in base_settings or key in SCHEDULE:
            if not isinstance(value, float) or not math.isfinite(value):
                raise BenchmarkError(
                    f"setting {key} of {name} must be a number, got {written!r}; write {name}:{key}=0.1"
                )
            (base_settings if key in base_settings else schedule)[key] = value
        elif not equals or variant is None:
            known = [*base_settings, *(SCHEDULE if variant else ())]
            raise BenchmarkError(
                f"unknown setting of {name} {key!r}; {suggestion(key, known)}Known: {', '.join(known)}, and the "
                "options of its class; write NAME:SETTING=VALUE"
            )
        else:
            options[key] = value
    choice = Choice(text, base, base_settings, variant, options, schedule)
    tried = choice
    if variant in samopt.available() and "only" in options:  # the small model has other parameters than the task's
        try:
            check_only(options["only"])
        except (TypeError, ValueError) as error:
            raise BenchmarkError(f"optimizer {text!r} cannot be made: {error}") from error
        others = {key: value for key, value in options.items() if key not in ("only", "reuse_trunk")}
        tried = replace(choice, options=others)
    with torch.random.fork_rng(devices=[]):
        group = tried.build(nn.Linear(2, 2)).param_groups[0]
    defaults = {key: group[key] for key in ("rho", "eta") if isinstance(group.get(key), float)}
    return replace(choice, defaults=defaults)


def _value(text: str) -> float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _users_class(name: str) -> Any:
    """Import a user's class, also from the folder that the command runs in."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BenchmarkError(
            f"{name} cannot be imported: {error}; give module:Class, with the module in this folder or installed"
        ) from error
