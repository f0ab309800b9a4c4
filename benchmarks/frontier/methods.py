"""The compared methods: each with the one setting that is chosen on validation data, from three values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

import samopt
from benchmarks.choice import Choice
from benchmarks.frontier.arenas import Arena
from benchmarks.registry import OPTIMIZERS, OptimizerCase
from samopt.parts.direction import ReusedGradient

__all__ = ["BASE", "METHODS", "Method", "name_of"]

_RELATIVE = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: What a person types.
        summary: What it does, in a few words.
        values: What its setting is chosen from, where the arena does not scale it; see ``values_in``.
        wrap: Makes the optimizer from the base, ``model=`` and the setting by its name.
        setting: The setting that is chosen.
        schedule: Further settings of a run, see ``benchmarks.training.Run``.
        bases: The bases that it can wrap.
    """

    name: str
    summary: str
    values: tuple[float, ...]
    wrap: Callable[..., Optimizer]
    setting: str = "rho"
    schedule: Mapping[str, float] = field(default_factory=dict)
    bases: tuple[str, ...] = ("sgd", "adamw")

    def values_in(self, arena: Arena) -> tuple[float, ...]:
        """Return what the setting is chosen from, smallest first.

        Args:
            arena: Where.
        """
        if self is BASE:
            return arena.learning_rates
        return tuple(float(f"{value * arena.radii:.3g}") for value in self.values)

    def choice(self, arena: Arena, lr: float, value: float) -> Choice:
        """Return the optimizer of a run.

        Args:
            arena: Where.
            lr: The base's learning rate.
            value: The setting; ignored by the base, whose setting is its learning rate.
        """
        base = OPTIMIZERS[arena.base]
        if self is BASE:
            return Choice(f"{base.name}:lr={lr:g}", base, dict(base.defaults) | {"lr": lr})
        settings = dict(base.defaults) | {"lr": lr, self.setting: value} | self.schedule

        def build(model: nn.Module, chosen: Mapping[str, float]) -> Optimizer:
            return self.wrap(base.build(model, chosen), model=model, **{self.setting: chosen[self.setting]})

        case = OptimizerCase(self.name, self.summary, base.name, settings, build)
        return Choice(f"{self.name}:{self.setting}={value:g}", case, settings)


def name_of(label: str) -> str:
    """Return the name of the method, or of the base, that a row's label begins with.

    Args:
        label: As in "sam:rho=0.1".
    """
    return label.partition(":")[0]


def _around(centre: float) -> tuple[float, ...]:
    """Return the grid that every radius is chosen from: about a third of its centre, the centre, three times that."""
    return tuple(float(f"{centre * factor:.3g}") for factor in _RELATIVE)


def _part_asam(base: Optimizer, **options: Any) -> Optimizer:
    return samopt.ASAM(base, direction=ReusedGradient(), **options)  # which remembers: one for each run


_L2, _ADAPTIVE = _around(0.1), _around(0.3)

BASE = Method("base", "SGD or AdamW alone; its learning rate, which all use, is chosen", (), lambda base, **_: base)
METHODS = {
    method.name: method
    for method in (
        BASE,
        Method("sam", "SAM, two passes", _L2, samopt.SAM),
        Method("asam", "ASAM, two passes", _ADAPTIVE, samopt.ASAM),
        Method("momentum-sam", "SAM along the momentum, one pass", _L2, samopt.MomentumSAM),
        Method(
            "momentum-asam", "ASAM along the momentum, one pass", _ADAPTIVE, partial(samopt.MomentumSAM, adaptive=True)
        ),
        Method(
            "momentum-sam-ahead",
            "SAM ahead along the momentum, as its authors do, one pass",
            _around(1.0),
            partial(samopt.MomentumSAM, ahead=True),
        ),
        Method(
            "adam-step-sam",
            "SAM along Adam's own step, one pass",
            _L2,
            partial(samopt.MomentumSAM, preconditioned=True),
            bases=("adamw",),
        ),
        Method("sam-last-half", "SAM from half of the run on", _L2, samopt.SAM, schedule={"rho_from": 0.5}),
        Method("asam-last-half", "ASAM from half of the run on", _ADAPTIVE, samopt.ASAM, schedule={"rho_from": 0.5}),
        Method("asam-last-quarter", "ASAM in the last quarter", _ADAPTIVE, samopt.ASAM, schedule={"rho_from": 0.75}),
        Method("sam-every-2", "SAM at every second step", _L2, samopt.SAM, schedule={"rho_every": 2}),
        Method("asam-every-2", "ASAM at every second step", _ADAPTIVE, samopt.ASAM, schedule={"rho_every": 2}),
        Method("asam-every-4", "ASAM at every fourth step", _ADAPTIVE, samopt.ASAM, schedule={"rho_every": 4}),
        Method("asam-quarter", "ASAM, ascent on a quarter", _ADAPTIVE, _part_asam, schedule={"ascent_part": 0.25}),
        Method("looksam", "LookSAM, SAM at every fifth step", _L2, samopt.LookSAM),
        Method("friendly-sam", "Friendly SAM, two passes", _L2, samopt.FriendlySAM),
        Method("gsam", "GSAM, two passes", _L2, samopt.GSAM),
        Method("wsam", "WSAM, two passes", _L2, samopt.WSAM),
        Method(
            "wsam-coupled", "WSAM, all of it through the base, two passes", _L2, partial(samopt.WSAM, decouple=False)
        ),
        Method("fisher-sam", "Fisher SAM, two passes", _L2, samopt.FisherSAM),
        Method(
            "tram",
            "TRAM, distance from the previous step, two passes",
            _around(1.0),
            partial(samopt.TRAM, max_radius=2.0),
            setting="scale",
        ),
        Method("lesam", "LE-SAM, two passes, a loss budget", _L2, samopt.LESAM, setting="budget"),
    )
}
"""By name, the base first."""
