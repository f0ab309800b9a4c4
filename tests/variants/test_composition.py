"""The four parts go together in every way: combinations that no paper has, against loops by hand in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt
from samopt import reference
from samopt.parts import Fisher, Friendly, FunctionalGradient, LossBudget, Momentum, SurrogateGap
from tests.helpers.cases import batch, mlp

STEPS = 4
DISTANCE = 0.4


def distance() -> torch.Tensor:
    return torch.tensor(DISTANCE, dtype=torch.float64)


def train(optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module) -> list[torch.Tensor]:
    for step in range(STEPS):
        x, y = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        optimizer.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    return list(model.parameters())


class ByHand:
    """Training whose steps are written out below: a direction, a geometry, a radius, a combination.

    With ``functional`` the second gradient is the outputs' Jacobian times the loss's derivative at ``w``.
    """

    def __init__(self, direction, t_squared, radius, combine, functional=False) -> None:
        self.model = mlp(torch.float64)
        self.parameters = list(self.model.parameters())
        self.base = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)
        self.direction, self.t_squared, self.radius, self.combine = direction, t_squared, radius, combine
        self.functional = functional

    def train(self) -> list[torch.Tensor]:
        for step in range(STEPS):
            x, y = batch(torch.float64, seed=step)

            def loss(x=x, y=y):
                return nn.functional.cross_entropy(self.model(x), y)

            _, g = reference.gradient(self.parameters, loss)
            d = self.direction(g)
            t_squared = [self.t_squared(w.detach(), entry) for w, entry in zip(self.parameters, d, strict=True)]
            length = torch.stack([(a * b * b).sum() for a, b in zip(t_squared, d, strict=True)]).sum().sqrt()
            r = self.radius(length)
            epsilon = [r * a * b / length for a, b in zip(t_squared, d, strict=True)]
            second_loss = loss
            if self.functional:
                z = self.model(x).detach().requires_grad_()
                (v,) = torch.autograd.grad(nn.functional.cross_entropy(z, y), z)

                def second_loss(x=x, v=v):
                    return (self.model(x) * v).sum()

            g_p = reference.perturbed_gradient(self.parameters, second_loss, epsilon)
            reference.update(self.parameters, self.base, self.combine(g, g_p))
        return self.parameters


def plain(g):
    return g


def second(g, g_p):
    return g_p


def ones(w, d):
    return torch.ones_like(w)


def adaptive(w, d):
    return (w.abs() + 0.01) ** 2 if w.dim() > 1 else torch.ones_like(w)


def fisher(w, d):
    return 1 / (1 + 0.1 * d * d)


def gap(g, g_p):
    share = reference.dot(g, g_p) / reference.dot(g_p, g_p)
    return [p - 0.4 * (entry - share * p) for p, entry in zip(g_p, g, strict=True)]


class FriendlyByHand:
    """``g - EMA(g)``."""

    def __init__(self) -> None:
        self.average = None

    def __call__(self, g):
        before = self.average or [torch.zeros_like(entry) for entry in g]
        self.average = [0.9 * m + 0.1 * entry for m, entry in zip(before, g, strict=True)]
        return [entry - m for entry, m in zip(g, self.average, strict=True)]


CASES = {
    "TRAM along Friendly SAM's direction": (
        lambda base, model: samopt.TRAM(base, model=model, trust_region=distance, direction=Friendly()),
        lambda: ByHand(FriendlyByHand(), adaptive, lambda length: DISTANCE, second),
    ),
    "TRAM with GSAM's combination": (
        lambda base, model: samopt.TRAM(base, model=model, trust_region=distance, combination=SurrogateGap(0.4)),
        lambda: ByHand(plain, adaptive, lambda length: DISTANCE, gap),
    ),
    "TRAM in Fisher SAM's geometry": (
        lambda base, model: samopt.TRAM(base, model=model, trust_region=distance, geometry="fisher"),
        lambda: ByHand(plain, fisher, lambda length: DISTANCE, second),
    ),
    "TRAM, Friendly, Fisher and GSAM at once": (
        lambda base, model: samopt.TRAM(
            base,
            model=model,
            trust_region=distance,
            geometry=Fisher(),
            eta=0.1,
            direction=Friendly(),
            combination=SurrogateGap(0.4),
        ),
        lambda: ByHand(FriendlyByHand(), fisher, lambda length: DISTANCE, gap),
    ),
    "LE-SAM's radius with GSAM's combination": (
        lambda base, model: samopt.LESAM(base, budget=0.05, max_radius=0.3, model=model, combination=SurrogateGap(0.4)),
        lambda: ByHand(plain, ones, lambda length: min(0.05 / float(length), 0.3), gap),
    ),
    "TRAM with the functional gradient": (
        lambda base, model: samopt.TRAM(base, model=model, trust_region=distance, combination=FunctionalGradient()),
        lambda: ByHand(plain, adaptive, lambda length: DISTANCE, second, functional=True),
    ),
    "Functional SAM along Friendly SAM's direction in ASAM's geometry": (
        lambda base, model: samopt.FunctionalSAM(base, rho=0.4, adaptive=True, direction=Friendly(), model=model),
        lambda: ByHand(FriendlyByHand(), adaptive, lambda length: 0.4, second, functional=True),
    ),
    "LE-SAM's radius with the functional gradient": (
        lambda base, model: samopt.LESAM(
            base, budget=0.05, max_radius=0.3, model=model, combination=FunctionalGradient()
        ),
        lambda: ByHand(plain, ones, lambda length: min(0.05 / float(length), 0.3), second, functional=True),
    ),
    "a loss budget in Fisher's geometry": (
        lambda base, model: samopt.SharpnessAwareOptimizer(
            base, geometry=Fisher(), rho=0.05, eta=0.1, radius=LossBudget(0.3), model=model
        ),
        lambda: ByHand(plain, fisher, lambda length: min(0.05 / float(length), 0.3), second),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_go_together(case: str) -> None:
    make, by_hand = CASES[case]
    model = mlp(torch.float64)
    ours = train(make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model), model)
    for mine, other in zip(ours, by_hand().train(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_combination_resumes_to_the_bit(case: str) -> None:
    make, _ = CASES[case]
    model, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    train(optimizer, model)
    twin.load_state_dict(model.state_dict())
    resumed = make(torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, other in zip(train(optimizer, model), train(resumed, twin), strict=True):
        assert torch.equal(mine, other)


def test_a_group_holds_a_rho_only_where_it_is_a_radius() -> None:
    model = mlp(torch.float64)
    tram = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, scale=3.0)
    assert (tram.param_groups[0]["scale"], "rho" in tram.param_groups[0], tram.rho) == (3.0, False, 3.0)
    budgeted = samopt.LESAM(torch.optim.SGD(model.parameters(), lr=0.1), budget=0.2, model=model)
    assert (budgeted.param_groups[0]["budget"], "rho" in budgeted.param_groups[0]) == (0.2, False)
    sam = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    sam.rho = 0.3
    assert (sam.param_groups[0]["rho"], sam.rho) == (0.3, 0.3)


def test_one_pass_directions_take_no_second_gradient_to_combine() -> None:
    base = torch.optim.SGD(mlp(torch.float64).parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="SurrogateGap combines the gradients of two passes"):
        samopt.SAM(base, direction=Momentum(), combination=SurrogateGap())
