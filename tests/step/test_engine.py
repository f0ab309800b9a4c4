"""One step, checked number by number against a hand computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import samopt
from samopt.parts.geometry import Fisher

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def quadratic(w: Tensor, curvature: Tensor):
    """``0.5 w^T diag(curvature) w``: gradient ``curvature * w``."""
    return lambda: 0.5 * (curvature * w * w).sum()


def one_step(optimizer: samopt.SharpnessAwareOptimizer, loss_of) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return optimizer.step(closure)


def test_sam_step_on_a_quadratic() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    loss = one_step(optimizer, quadratic(w, torch.ones(2, dtype=torch.float64)))
    # g = w = (3, 4), |g| = 5, epsilon = 0.5 g / 5 = (0.3, 0.4); gradient there (3.3, 4.4); w - 0.1 of it.
    torch.testing.assert_close(w.data, torch.tensor([2.67, 3.56], dtype=torch.float64), **EXACT)
    assert float(loss.detach()) == 12.5
    assert optimizer.last_step.to_dict() == pytest.approx(
        {
            "loss": 12.5,
            "perturbed_loss": 0.5 * (3.3**2 + 4.4**2),
            "sharpness": 0.5 * (3.3**2 + 4.4**2) - 12.5,
            "grad_norm": 5.0,
            "perturbed_grad_norm": 5.5,
            "radius": 0.5,
            "applied_radius": 0.5,
        }
    )


def test_asam_step_scales_matrices_and_not_vectors() -> None:
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    b = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = samopt.ASAM([w, b], torch.optim.SGD, rho=0.6, eta=0.0, lr=1.0)
    one_step(optimizer, lambda: (2 * w).sum() + 0.5 * (b * b).sum())
    # g_w = (2, 2), T = (1, 2); g_b = 3, T = 1: T g = (2, 4, 3), norm sqrt(29).
    # epsilon_b = 0.6 * 3 / sqrt(29); the gradient of w does not depend on w.
    torch.testing.assert_close(w.data, torch.tensor([[-1.0, -4.0]], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(b.data, torch.tensor([-0.6 * 3 / math.sqrt(29)], dtype=torch.float64), **EXACT)
    metrics = optimizer.last_step.to_dict()
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(4 + 4 + 9))
    assert metrics["applied_radius"] == pytest.approx(0.6)


def test_asam_moves_by_the_squared_length() -> None:
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimizer = samopt.ASAM([w], torch.optim.SGD, rho=0.6, eta=0.5, lr=1.0)
    (3 * w).sum().backward()
    optimizer.ascend()
    # T = (1.5, 2.5), T g = (4.5, 7.5), epsilon = 0.6 T^2 g / |T g|.
    norm = math.sqrt(4.5**2 + 7.5**2)
    expected = torch.tensor([[1 + 0.6 * 1.5**2 * 3 / norm, -2 + 0.6 * 2.5**2 * 3 / norm]], dtype=torch.float64)
    torch.testing.assert_close(w.data, expected, **EXACT)
    optimizer.restore()
    assert w.tolist() == [[1.0, -2.0]]


def test_linf_moves_by_the_sign() -> None:
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64))
    optimizer = samopt.ASAM([w], torch.optim.SGD, rho=0.1, eta=0.0, norm="linf", lr=1.0)
    (w * torch.tensor([4.0, -1.0, 0.0])).sum().backward()
    optimizer.ascend()
    torch.testing.assert_close(w.data, torch.tensor([[1.1, -2.2, 0.5]], dtype=torch.float64), **EXACT)


def test_fisher_metric_shrinks_steep_directions() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = samopt.SharpnessAwareOptimizer([w], torch.optim.SGD, geometry=Fisher(), rho=0.3, eta=1.0, lr=1.0)
    (w * torch.tensor([2.0, 1.0])).sum().backward()
    optimizer.ascend()
    # T^2 = 1 / (1 + g^2) = (1/5, 1/2); T^2 g = (0.4, 0.5); |T g| = sqrt(4/5 + 1/2).
    norm = math.sqrt(4 / 5 + 1 / 2)
    expected = torch.tensor([1 + 0.3 * 0.4 / norm, 1 + 0.3 * 0.5 / norm], dtype=torch.float64)
    torch.testing.assert_close(w.data, expected, **EXACT)


def test_maximised_group_moves_downhill() -> None:
    up = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    down = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    base = torch.optim.SGD([{"params": [up]}, {"params": [down], "maximize": True}], lr=0.1)
    optimizer = samopt.SAM(base, rho=0.5)
    (3 * up + 4 * down).sum().backward()
    optimizer.ascend()
    assert up.item() == pytest.approx(1 + 0.5 * 3 / 5)
    assert down.item() == pytest.approx(1 - 0.5 * 4 / 5)


@pytest.mark.parametrize("form", ["closure", "explicit", "primitives", "migration", "migration_zero_grad"])
def test_every_form_takes_the_same_step(form: str) -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    loss_of = quadratic(w, torch.tensor([1.0, 2.0]))

    for _ in range(3):
        if form == "closure":
            one_step(optimizer, loss_of)
            continue
        optimizer.zero_grad()
        loss_of().backward()
        if form == "explicit":
            with optimizer.perturbed():
                loss_of().backward()
            optimizer.step()
        elif form == "primitives":
            optimizer.ascend()
            loss_of().backward()
            optimizer.restore()
            optimizer.step()
        else:
            optimizer.first_step(zero_grad=form == "migration_zero_grad")
            loss_of().backward()
            optimizer.second_step(zero_grad=True)

    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    curvature, velocity = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        gradient = curvature * expected
        velocity = 0.9 * velocity + curvature * (expected + 0.5 * gradient / gradient.norm())
        expected = expected - 0.1 * velocity
    torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=1e-6)


def test_explicit_form_records_both_losses() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    loss_of = quadratic(w, torch.ones(2, dtype=torch.float64))
    loss = loss_of()
    loss.backward()
    with optimizer.perturbed(loss) as second:
        assert optimizer.is_perturbed
        second.loss = loss_of()
        second.loss.backward()
    assert not optimizer.is_perturbed
    assert float(optimizer.last_step.sharpness) == pytest.approx(0.5 * (3.3**2 + 4.4**2) - 12.5)


def test_gradients_are_consumed_on_entry() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    w.sum().backward()
    with optimizer.perturbed():
        assert w.grad is None
        (2 * w).sum().backward()
    assert w.grad.tolist() == [2.0, 2.0]


def test_adaptive_keyword_of_existing_sam_code_is_asam() -> None:
    first = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    second = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    migrated = samopt.SAM([first], torch.optim.SGD, 0.6, True, lr=0.1)
    plain = samopt.ASAM([second], torch.optim.SGD, rho=0.6, lr=0.1)
    for w, optimizer in ((first, migrated), (second, plain)):
        (w**3).sum().backward()
        optimizer.ascend()
    assert torch.equal(first, second)


def test_step_without_closure_returns_none_and_with_one_its_first_value() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    values = iter(["first", "second"])

    def closure() -> dict[str, object]:
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return {"loss": loss, "pass": next(values)}

    assert optimizer.step(closure)["pass"] == "first"
    assert float(optimizer.last_step.loss) == 25.0
    w.grad = None
    assert optimizer.step() is None


def test_a_loop_that_steps_the_base_itself() -> None:
    def passes(w: torch.nn.Parameter, optimizer: samopt.SAM) -> None:
        loss_of = quadratic(w, torch.ones(2, dtype=torch.float64))
        optimizer.zero_grad()
        loss_of().backward()
        with optimizer.perturbed():
            loss_of().backward()

    ours, theirs = (torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64)) for _ in range(2))
    stepped = samopt.SAM([ours], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    handed = samopt.SAM([theirs], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    handed.base_optimizer.register_step_pre_hook(lambda *_: handed.prepare_base_step())
    for _ in range(3):
        passes(ours, stepped)
        stepped.step()
        passes(theirs, handed)
        handed.base_optimizer.step()
    assert torch.equal(ours, theirs)
    ours.grad = torch.ones_like(ours)
    theirs.grad = torch.ones_like(theirs)
    for optimizer in (stepped, handed):  # the second gradient is used up in both
        with pytest.raises(RuntimeError, match="no perturbed pass since the last step"):
            optimizer.step()
