"""The compared methods: each with the one setting that is chosen on validation data, from three values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

import samopt
from benchmarks.choice import Choice
from benchmarks.frontier.arenas import Arena
from benchmarks.registry import OPTIMIZERS, OptimizerCase
from samopt.direction import ReusedGradient

__all__ = ["BASE", "METHODS", "Method", "name_of"]

_RELATIVE = (0.3, 1.0, 3.0)
_LARGEST_RADIUS = 2.0  # of TRAM, whose distance may be anything


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: What a person types.
        summary: What it does, in a few words.
        values: What its setting is chosen from, where the arena does not scale it; see ``values_in``.
        wrap: Makes the optimizer from the base, the model and the setting.
        setting: The setting that is chosen.
        schedule: Further settings of a run, see ``benchmarks.training.Run``.
        bases: The bases that it can wrap.
    """

    name: str
    summary: str
    values: tuple[float, ...]
    wrap: Callable[[Optimizer, nn.Module, float], Optimizer]
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
            return self.wrap(base.build(model, chosen), model, chosen[self.setting])

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


def _sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.SAM(base, rho=rho, model=model)


def _asam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.ASAM(base, rho=rho, model=model)


def _momentum_sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.MomentumSAM(base, rho=rho, model=model)


def _momentum_asam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.MomentumSAM(base, rho=rho, adaptive=True, model=model)


def _adam_step_sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.MomentumSAM(base, rho=rho, preconditioned=True, model=model)


def _part_asam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.ASAM(base, rho=rho, direction=ReusedGradient(), model=model)


def _look_sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.LookSAM(base, rho=rho, model=model)


def _friendly_sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.FriendlySAM(base, rho=rho, model=model)


def _gsam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.GSAM(base, rho=rho, model=model)


def _wsam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.WSAM(base, rho=rho, model=model)


def _coupled_wsam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.WSAM(base, rho=rho, decouple=False, model=model)


def _fisher_sam(base: Optimizer, model: nn.Module, rho: float) -> Optimizer:
    return samopt.FisherSAM(base, rho=rho, model=model)


def _tram(base: Optimizer, model: nn.Module, scale: float) -> Optimizer:
    return samopt.TRAM(base, scale=scale, max_radius=_LARGEST_RADIUS, model=model)


def _lesam(base: Optimizer, model: nn.Module, budget: float) -> Optimizer:
    return samopt.LESAM(base, budget=budget, model=model)


_L2, _ADAPTIVE = _around(0.1), _around(0.3)

BASE = Method("base", "SGD or AdamW alone; its learning rate, which all use, is chosen", (), lambda b, m, v: b)
METHODS = {
    method.name: method
    for method in (
        BASE,
        Method("sam", "SAM, two passes", _L2, _sam),
        Method("asam", "ASAM, two passes", _ADAPTIVE, _asam),
        Method("momentum-sam", "SAM along the momentum, one pass", _L2, _momentum_sam),
        Method("momentum-asam", "ASAM along the momentum, one pass", _ADAPTIVE, _momentum_asam),
        Method("adam-step-sam", "SAM along Adam's own step, one pass", _L2, _adam_step_sam, bases=("adamw",)),
        Method("sam-last-half", "SAM from half of the run on", _L2, _sam, schedule={"rho_from": 0.5}),
        Method("asam-last-half", "ASAM from half of the run on", _ADAPTIVE, _asam, schedule={"rho_from": 0.5}),
        Method("asam-last-quarter", "ASAM in the last quarter", _ADAPTIVE, _asam, schedule={"rho_from": 0.75}),
        Method("sam-every-2", "SAM at every second step", _L2, _sam, schedule={"rho_every": 2}),
        Method("asam-every-2", "ASAM at every second step", _ADAPTIVE, _asam, schedule={"rho_every": 2}),
        Method("asam-every-4", "ASAM at every fourth step", _ADAPTIVE, _asam, schedule={"rho_every": 4}),
        Method("asam-quarter", "ASAM, ascent on a quarter", _ADAPTIVE, _part_asam, schedule={"ascent_part": 0.25}),
        Method("looksam", "LookSAM, SAM at every fifth step", _L2, _look_sam),
        Method("friendly-sam", "Friendly SAM, two passes", _L2, _friendly_sam),
        Method("gsam", "GSAM, two passes", _L2, _gsam),
        Method("wsam", "WSAM, two passes", _L2, _wsam),
        Method("wsam-coupled", "WSAM, all of it through the base, two passes", _L2, _coupled_wsam),
        Method("fisher-sam", "Fisher SAM, two passes", _L2, _fisher_sam),
        Method("tram", "TRAM, distance from the previous step, two passes", _around(1.0), _tram, setting="scale"),
        Method("lesam", "LE-SAM, two passes, a loss budget", _L2, _lesam, setting="budget"),
    )
}
"""By name, the base first."""
