"""The algorithms of SAM's published relatives, written as loops around a stock base optimizer, with fp64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import samopt
from samopt.parts import ReusedGradient
from tests.helpers.cases import Preset, loss_of, rhos_of, sam_epsilon


class Loop:
    """What every loop needs: gradients at ``w`` and at ``w + epsilon``, and a memory from step to step."""

    def __init__(self) -> None:
        self.steps = 0
        self.memory: list[Tensor] | None = None

    def __call__(self, model: nn.Module, base: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> Tensor:
        self.parameters = [p for group in base.param_groups for p in group["params"]]
        self.rhos = rhos_of(base)
        self.model, self.base, self.data = model, base, data
        loss, gradients = self.step()
        self.steps += 1
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        base.step()
        return loss

    def step(self) -> tuple[Tensor, list[Tensor]]:
        """The loss to return and the base's gradients."""
        raise NotImplementedError

    def gradient(self, moves: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients at the weights plus ``moves``, in fp64."""
        saved = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, move in zip(self.parameters, moves or [], strict=False):
                p.copy_(p.double() + move)
        self.base.zero_grad()
        loss = loss_of(self.model, self.data)
        loss.backward()
        with torch.no_grad():
            for p, value in zip(self.parameters, saved, strict=True):
                p.copy_(value)
        return loss.detach(), [p.grad.double() for p in self.parameters]

    def epsilon(self, direction: Sequence[Tensor]) -> list[Tensor]:
        return sam_epsilon(self.parameters, direction, self.rhos)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


class MomentumLoop(Loop):
    """The gradient at ``w + rho m / ||m||``; the base's own buffer is ``m``."""

    sign = 1.0

    def step(self) -> tuple[Tensor, list[Tensor]]:
        states = [self.base.state.get(p, {}) for p in self.parameters]
        buffers = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
        if any(buffer is None for buffer in buffers):
            return self.gradient()
        return self.gradient(self.epsilon([self.sign * buffer.double() for buffer in buffers]))


class AheadLoop(MomentumLoop):
    """Becker et al. 2024: the gradient at ``w - rho m / ||m||``."""

    sign = -1.0


class FriendlyLoop(Loop):
    """Li et al. 2024, algorithm 1, with sigma 1 and lambda 0.9."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        past = self.memory or [torch.zeros_like(entry) for entry in g]
        self.memory = [0.9 * m + 0.1 * entry for m, entry in zip(past, g, strict=True)]
        _, g_p = self.gradient(self.epsilon([entry - m for entry, m in zip(g, self.memory, strict=True)]))
        return loss, g_p


class LookLoop(Loop):
    """Liu et al. 2022, algorithm 1, with k = 3 and alpha 0.7; norms and inner products of each tensor."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        if self.steps % 3 == 0:
            _, g_s = self.gradient(self.epsilon(g))
            ratios = self.ratios(zip(g, g_s, strict=True), zip(g, g, strict=True))
            self.memory = [s - share * entry for s, entry, share in zip(g_s, g, ratios, strict=True)]
            return loss, g_s
        ratios = self.ratios(zip(g, g, strict=True), zip(self.memory, self.memory, strict=True))
        return loss, [entry + 0.7 * ratio**0.5 * v for entry, v, ratio in zip(g, self.memory, ratios, strict=True)]

    def ratios(self, above: Iterable[tuple[Tensor, Tensor]], below: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        pairs = [(float((a * b).sum()), float((c * d).sum())) for (a, b), (c, d) in zip(above, below, strict=True)]
        return [product / square if square else 0.0 for product, square in pairs]


class WholeLookLoop(LookLoop):
    """The same with norms and inner products over all parameters."""

    def ratios(self, above: Iterable[tuple[Tensor, Tensor]], below: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        products = [float((a * b).sum()) for a, b in above]
        return [sum(products) / sum(float((c * d).sum()) for c, d in below)] * len(products)


class GapLoop(Loop):
    """Zhuang et al. 2022, algorithm 1, with alpha 0.4."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        _, g_p = self.gradient(self.epsilon(g))
        share = dot(g, g_p) / dot(g_p, g_p)
        orthogonal = [entry - share * p for entry, p in zip(g, g_p, strict=True)]
        return loss, [p - 0.4 * v for p, v in zip(g_p, orthogonal, strict=True)]


class WeightedLoop(Loop):
    """Yue et al. 2023, its algorithm with gamma 0.8: the base steps along ``g``, then the sharpness is subtracted."""

    def __call__(self, model: nn.Module, base: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().__call__(model, base, data)
        rates = [group["lr"] for group in base.param_groups for _ in group["params"]]
        with torch.no_grad():
            for w, lr, rise in zip(self.parameters, rates, self.memory, strict=True):
                w.copy_(w.double() - lr * 0.8 / 0.2 * rise)
        return loss

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        _, g_p = self.gradient(self.epsilon(g))
        self.memory = [p - entry for p, entry in zip(g_p, g, strict=True)]
        return loss, g


class CoupledLoop(Loop):
    """Yue et al. 2023, the gradient of ``L + gamma / (1 - gamma) (L_p - L)`` with gamma 0.8."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        _, g_p = self.gradient(self.epsilon(g))
        return loss, [entry + 0.8 / 0.2 * (p - entry) for p, entry in zip(g_p, g, strict=True)]


class BudgetLoop(Loop):
    """Wang et al. 2026: radius ``min(budget / ||g||, 0.3)``; the groups' number is the budget."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        length = dot(g, g) ** 0.5
        radii = [min(budget / length, 0.3) for budget in self.rhos]
        _, g_p = self.gradient([r * entry / length for r, entry in zip(radii, g, strict=True)])
        return loss, g_p


class PreconditionedLoop(Loop):
    """SAM in the metric ``sqrt(v_hat) + eps`` of Adam's own state; a plain step before there is one."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        if not all(self.base.state.get(p) for p in self.parameters):
            return loss, g
        uphill, squares = [], 0.0
        for group in self.base.param_groups:
            for p in group["params"]:
                state, along = self.base.state[p], g[len(uphill)]
                v_hat = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** int(state["step"]))
                uphill.append(along / (v_hat.sqrt() + group["eps"]))
                squares += float((along * uphill[-1]).sum())
        _, g_p = self.gradient([rho * up / squares**0.5 for rho, up in zip(self.rhos, uphill, strict=True)])
        return loss, g_p


class ReuseLoop(Loop):
    """The gradient of every second first pass, ascended along for two steps."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        if self.steps % 2 == 0:
            _, self.memory = self.gradient()
        return self.gradient(self.epsilon(self.memory))


class FunctionalLoop(Loop):
    """Singh et al. 2025: the outputs' Jacobian at ``w + epsilon``, the loss's derivative in them at ``w``."""

    def step(self) -> tuple[Tensor, list[Tensor]]:
        loss, g = self.gradient()
        z = self.model(self.data[0]).detach().requires_grad_()
        (v,) = torch.autograd.grad(nn.functional.cross_entropy(z.float(), self.data[1]), z)
        saved = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, move in zip(self.parameters, self.epsilon(g), strict=True):
                p.copy_(p.double() + move)
        gradients = torch.autograd.grad(self.model(self.data[0]), self.parameters, v)
        with torch.no_grad():
            for p, value in zip(self.parameters, saved, strict=True):
                p.copy_(value)
        return loss, [gradient.double() for gradient in gradients]


def _budgeted(params, base_optimizer=None, *, rho=0.05, **options):
    return samopt.LESAM(params, base_optimizer, budget=rho, max_radius=0.3, **options)


def _look(params, base_optimizer=None, **options):
    return samopt.LookSAM(params, base_optimizer, every=3, alpha=0.7, **options)


def _look_as_a_whole(params, base_optimizer=None, **options):
    return samopt.LookSAM(params, base_optimizer, every=3, alpha=0.7, per_tensor=False, **options)


def _weighted(params, base_optimizer=None, **options):
    return samopt.WSAM(params, base_optimizer, gamma=0.8, **options)


def _coupled(params, base_optimizer=None, **options):
    return samopt.WSAM(params, base_optimizer, gamma=0.8, decouple=False, **options)


def _uphill(params, base_optimizer=None, **options):
    return samopt.MomentumSAM(params, base_optimizer, uphill=True, **options)


def _reused(params, base_optimizer=None, **options):
    return samopt.SAM(params, base_optimizer, direction=ReusedGradient(every=2), **options)


PRESETS = [
    Preset("momentum-uphill", _uphill, MomentumLoop, 0.1, without=("sgd",)),
    Preset("momentum", samopt.MomentumSAM, AheadLoop, 0.1, without=("sgd",)),
    Preset("friendly", samopt.FriendlySAM, FriendlyLoop, 0.1),
    Preset("look", _look, LookLoop, 0.1),
    Preset("look-whole", _look_as_a_whole, WholeLookLoop, 0.1),
    Preset("gsam", samopt.GSAM, GapLoop, 0.1),
    Preset("wsam", _weighted, WeightedLoop, 0.1),
    Preset("wsam-coupled", _coupled, CoupledLoop, 0.1),
    Preset("lesam", _budgeted, BudgetLoop, 0.02),
    Preset("functional", samopt.FunctionalSAM, FunctionalLoop, 0.1, needs_model=True),
    Preset("reused", _reused, ReuseLoop, 0.1),
    Preset("preconditioned", samopt.PreconditionedSAM, PreconditionedLoop, 0.02, without=("sgd", "sgd-momentum")),
]
