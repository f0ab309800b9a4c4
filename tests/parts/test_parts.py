"""Directions, radii and combinations on their own: what the published algorithms do not say, but users meet."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samopt
from samopt.parts.combination import ReusedComponent, SurrogateGap, WeightedSharpness
from samopt.parts.direction import Friendly, Gradient, Momentum, ReusedGradient
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    assert_equal,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    parameters_of,
    sam_epsilon,
    same_bits,
)
from tests.helpers.published import PRESETS, GapLoop, LookLoop
from tests.helpers.ranks import run_on_ranks

DOUBLE = torch.float64
each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def build(preset, dtype=DOUBLE, **options):
    model = mlp(dtype)
    return model, preset.wrap(BASES[preset.usual_base](model.parameters()), rho=preset.rho, model=model, **options)


def train(optimizer, model, steps, first=0, dtype=DOUBLE):
    for step in range(first, first + steps):
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))


COMBINING = [preset for preset in PRESETS if preset.name in ("gsam", "wsam", "wsam-coupled", "look")]


@pytest.mark.parametrize(
    "rule", [SurrogateGap(alpha=0.0), WeightedSharpness(gamma=0.5, decouple=False), ReusedComponent(every=1)]
)
def test_a_combination_at_sams_setting_is_sam_to_the_bit(rule) -> None:
    model, plain = mlp(), mlp()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.1, combination=rule)
    expected = samopt.SAM(BASES["sgd-momentum"](plain.parameters()), rho=0.1)
    train(optimizer, model, 4, dtype=torch.float32)
    train(expected, plain, 4, dtype=torch.float32)
    assert same_bits(model, bits(plain))


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p.name not in ("functional", "preconditioned")], ids=lambda preset: preset.name
)
def test_a_complex_weight_trains_as_the_real_numbers_that_it_holds(preset) -> None:
    torch.manual_seed(0)
    start, matrix = torch.randn(5, 3, 2, dtype=DOUBLE), torch.randn(8, 30, dtype=DOUBLE)
    trained = []
    for is_complex in (True, False):
        weight = nn.Parameter(torch.view_as_complex(start.clone()) if is_complex else start.clone())
        optimizer = preset.wrap(BASES[preset.usual_base]([weight]), rho=0.3)
        for _ in range(6):

            def closure(weight=weight, optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                numbers = torch.view_as_real(weight) if weight.is_complex() else weight
                loss = (matrix @ numbers.flatten()).cos().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        trained.append(torch.view_as_real(weight.detach()) if is_complex else weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(trained[0], start, atol=1e-2)


@each_preset
def test_to_maximize_is_to_minimize_the_negative_loss_to_the_bit(preset) -> None:
    trained = []
    for maximize in (True, False):
        model = mlp()
        base = BASES[preset.usual_base]([{"params": list(model.parameters()), "maximize": maximize}])
        optimizer = preset.wrap(base, rho=preset.rho, model=model)
        for step in range(5):

            def closure(model=model, optimizer=optimizer, sign=1 if maximize else -1, step=step) -> Tensor:
                optimizer.zero_grad()
                loss = sign * loss_of(model, batch(seed=step))
                loss.backward()
                return loss

            optimizer.step(closure)
        trained.append(model)
    assert same_bits(trained[0], bits(trained[1]))
    assert not same_bits(trained[0], bits(mlp()))


class Steepest(Gradient):
    """Moves one tensor alone, that with the longest gradient: made of all gradients at once, and of one at least."""

    def from_gradients(self, parameters, gradients):
        longest = int(torch.stack([gradient.norm() for gradient in gradients]).argmax())
        return [gradient * (index == longest) for index, gradient in enumerate(gradients)]


def test_a_direction_is_not_asked_where_nothing_has_a_gradient() -> None:
    model = mlp()
    before = bits(model)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1, direction=Steepest())
    assert optimizer.step(lambda: 3.0) == 3.0
    assert same_bits(model, before)
    train(optimizer, model, 1, dtype=torch.float32)
    assert not same_bits(model, before)


def test_a_friendly_direction_without_an_average_is_sam_to_the_bit() -> None:
    model, plain = mlp(), mlp()
    optimizer = samopt.FriendlySAM(BASES["adamw"](model.parameters()), rho=0.1, sigma=0.0)
    expected = samopt.SAM(BASES["adamw"](plain.parameters()), rho=0.1)
    train(optimizer, model, 4, dtype=torch.float32)
    train(expected, plain, 4, dtype=torch.float32)
    assert same_bits(model, bits(plain))


@pytest.mark.parametrize(
    "name", ["gsam", "wsam", "wsam-coupled", "look", "functional", "preconditioned", "momentum", "reused"]
)
def test_a_power_of_two_as_loss_scale_changes_no_bit(name) -> None:
    preset = next(preset for preset in PRESETS if preset.name == name)
    model, optimizer = build(preset, dtype=torch.float32)
    plain, expected = build(preset, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(5):
        data = batch(seed=step)
        optimizer.zero_grad()
        expected.zero_grad()
        for each, of, scale in ((optimizer, model, scaler.scale), (expected, plain, lambda loss: loss)):
            if each.is_one_pass:
                if each.needs_first_pass:
                    with each.first_pass():
                        scale(loss_of(of, data)).backward()
                scale(loss_of(of, data)).backward()
                continue
            scale(loss_of(of, data)).backward()
            with each.perturbed() as second:
                if second.is_needed:
                    scale(loss_of(of, data)).backward()
        scaler.step(optimizer)
        scaler.update()
        expected.step()
    assert same_bits(model, bits(plain))


@each_preset
def test_a_copied_or_pickled_optimizer_trains_on_as_the_first(preset) -> None:
    model, optimizer = build(preset)
    train(optimizer, model, 2)
    for twin_model, twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(twin, twin_model, 3, first=2)
        fresh_model, fresh = build(preset)
        train(fresh, fresh_model, 5)
        assert same_bits(twin_model, bits(fresh_model))


@each_preset
def test_a_checkpoint_of_the_plain_base_starts_the_parts_anew(preset) -> None:
    stock_model = mlp(DOUBLE)
    stock = BASES[preset.usual_base](stock_model.parameters())
    stock.step(closure_of(stock, stock_model, batch(DOUBLE, seed=7)))
    model, optimizer = build(preset)
    train(optimizer, model, 2)
    model.load_state_dict(stock_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
    loop, reference = preset.textbook(), copy.deepcopy(stock_model)
    base = BASES[preset.usual_base](reference.parameters())
    base.load_state_dict(copy.deepcopy(stock.state_dict()))
    base.param_groups[0]["rho"] = preset.rho
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, batch(DOUBLE, seed=step)))
        loop(reference, base, batch(DOUBLE, seed=step))
    assert_equal(model, reference)


@pytest.mark.parametrize("preset", COMBINING, ids=lambda preset: preset.name)
def test_a_group_that_does_not_move_takes_part_in_the_combination(preset) -> None:
    model, reference = mlp(DOUBLE), mlp(DOUBLE)
    groups = [{"params": [p for p in of.parameters() if p.dim() == d]} for of in (model, reference) for d in (2, 1)]
    optimizer = preset.wrap(torch.optim.SGD(groups[:2], lr=0.1), rho=preset.rho)
    optimizer.param_groups[1]["perturb"] = False
    base = torch.optim.SGD(groups[2:], lr=0.1)
    loop = preset.textbook()
    loop.epsilon = lambda direction: sam_epsilon(
        loop.parameters,
        [d if p.dim() == 2 else None for p, d in zip(loop.parameters, direction, strict=True)],
        loop.rhos,
    )
    for group in base.param_groups:
        group["rho"] = preset.rho
    for step in range(4):
        data = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        loop(reference, base, data)
    assert_equal(model, reference)


def test_a_step_between_two_ascents_can_leave_out_the_second_pass_altogether() -> None:
    model, reference = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, every=3, alpha=0.7)
    base = torch.optim.SGD([{"params": list(reference.parameters()), "rho": 0.1}], lr=0.1)
    loop = LookLoop()
    for step in range(5):
        data = batch(DOUBLE, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        if optimizer.perturbs_this_step:
            with optimizer.perturbed():
                loss_of(model, data).backward()
        optimizer.step()
        loop(reference, base, data)
        assert float(optimizer.last_step.radius) == (0.1 if step % 3 == 0 else float(optimizer.last_step.radius))
    assert_equal(model, reference)


def test_an_interrupted_combination_leaves_exact_weights_and_no_gradients(monkeypatch) -> None:
    model = mlp()
    optimizer = samopt.GSAM(BASES["sgd"](model.parameters()), rho=0.1)
    before = bits(model)

    def interrupted(self, parameters: Any, first: Any, second: Any) -> None:
        second[0].zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(SurrogateGap, "combine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(optimizer, model, batch()))
    assert same_bits(model, before)
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    reference = mlp()
    base = torch.optim.SGD([{"params": list(reference.parameters()), "rho": 0.1}], lr=0.1)
    optimizer.step(closure_of(optimizer, model, batch()))
    GapLoop()(reference, base, batch())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("wrap", [samopt.GSAM, samopt.FriendlySAM])
def test_sparse_gradients_are_refused_with_the_weights_exact(wrap) -> None:
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = wrap(torch.optim.SGD(table.parameters(), lr=0.1), rho=0.1)
    before = bits(table)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step(closure)
    assert same_bits(table, before)
    assert not optimizer.is_perturbed


def test_gradients_that_are_huge_or_zero_combine_to_finite_ones() -> None:
    for size in (1e30, 0.0):
        w = nn.Parameter(torch.tensor([1.0, 2.0]))
        for wrap in (samopt.GSAM, samopt.LookSAM):
            optimizer = wrap([w], torch.optim.SGD, lr=0.0, rho=0.1)
            optimizer.step(lambda optimizer=optimizer, w=w, size=size: _backward(optimizer, size * w.square().sum()))
            assert torch.isfinite(w.grad).all()


def _backward(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    return loss


def test_a_loss_budget_sets_the_radius_up_to_its_limit() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=DOUBLE))
    optimizer = samopt.LESAM([w], torch.optim.SGD, lr=0.1, budget=0.5, max_radius=0.2)
    for slope, radius in ((10.0, 0.05), (5.0, 0.1), (1.0, 0.2), (0.0, 0.0)):
        optimizer.zero_grad()
        (slope * (0.6 * w[0] + 0.8 * w[1])).backward()
        before = w.detach().clone()
        with optimizer.perturbed():
            moved = (w - before).detach()
            (slope * (0.6 * w[0] + 0.8 * w[1])).backward()
        torch.testing.assert_close(moved, radius * torch.tensor([0.6, 0.8], dtype=DOUBLE), rtol=1e-12, atol=1e-15)
        if slope:
            assert float(optimizer.last_step.radius) == pytest.approx(radius, rel=1e-12)


def test_a_first_pass_of_its_own_comes_every_k_steps_and_may_be_on_part_of_the_batch() -> None:
    model, reference = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=0.1, direction=ReusedGradient(every=2))
    stock = BASES["sgd-momentum"](reference.parameters())
    ascents: list[int] = []

    def part_of(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return data[0][:4], data[1][:4]

    for step in range(5):
        data = batch(DOUBLE, seed=step)
        full = closure_of(optimizer, model, data)
        part = closure_of(optimizer, model, part_of(data))

        def counted(part=part, step=step) -> Tensor:
            ascents.append(step)
            return part()

        loss = optimizer.step(full, counted)
        weights = bits(reference)
        if step % 2 == 0:
            direction = torch.autograd.grad(loss_of(reference, part_of(data)), parameters_of(stock))
        with torch.no_grad():
            for p, move in zip(reference.parameters(), sam_epsilon(weights, direction, [0.1] * 4), strict=True):
                p.add_(move)
        stock.zero_grad()
        expected = loss_of(reference, data)
        expected.backward()
        with torch.no_grad():
            for p, value in zip(reference.parameters(), weights, strict=True):
                p.copy_(value)
        stock.step()
        torch.testing.assert_close(loss, expected, **TOLERANCE[DOUBLE])
    assert ascents == [0, 2, 4]
    assert_equal(model, reference)


def test_a_first_pass_of_its_own_leaves_gradients_buffers_and_random_numbers_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1, direction=ReusedGradient(), model=model)
    loss_of(model.eval(), batch(seed=1)).backward()
    model.train()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = copy.deepcopy(list(model.buffers()))
    random = torch.get_rng_state()
    assert optimizer.needs_first_pass
    with optimizer.first_pass():
        loss_of(model, batch(seed=2)).backward()
    assert not optimizer.needs_first_pass
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_a_first_pass_that_fails_leaves_everything_and_is_still_due() -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1, direction=ReusedGradient(), model=model)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), optimizer.first_pass():
        loss_of(model, batch()).backward()
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="ended without gradients"), optimizer.first_pass():
        loss_of(model, batch())
    assert optimizer.needs_first_pass
    assert same_bits(model, before)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="has not been taken"):
        loss_of(model, batch()).backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combination": "gsam"}, TypeError, "combination must be None or an object"),
        ({"combination": SurrogateGap(), "direction": "momentum"}, ValueError, "combines the gradients of two passes"),
        ({"combination": SurrogateGap(), "direction": ReusedGradient()}, ValueError, "combines the gradients of two"),
        ({"direction": Friendly}, TypeError, "direction must be"),
        ({"direction": "uphill"}, ValueError, "direction must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        samopt.SAM(torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9), rho=0.1, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SurrogateGap(-1.0), "alpha must be >= 0"),
        (lambda: WeightedSharpness(1.0), r"gamma must be in \[0, 1\)"),
        (lambda: ReusedComponent(every=0), "every must be at least 1"),
        (lambda: ReusedGradient(every=0), "every must be at least 1"),
        (lambda: Friendly(decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: Momentum(own=True, decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: Momentum(own=True, preconditioned=True), "own=True keeps a plain average.*leave out preconditioned="),
        (lambda: Momentum(own=True, buffer="exp_avg"), "own=True keeps a plain average.*leave out.*buffer="),
        (lambda: samopt.LESAM(mlp().parameters(), torch.optim.SGD, lr=0.1, max_radius=0.0), "max_radius must be > 0"),
        (lambda: samopt.MomentumSAM(mlp().parameters(), torch.optim.SGD, lr=0.1), "has momentum=0"),
        (
            lambda: samopt.SAM(torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0), direction=Momentum()),
            "has momentum=0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
def test_directions_by_name_are_the_presets(base) -> None:
    for name in ("momentum", "momentum-uphill"):
        model, twin = mlp(), mlp()
        named = samopt.SAM(BASES[base](model.parameters()), rho=0.1, direction=name, model=model)
        preset = samopt.MomentumSAM(
            BASES[base](twin.parameters()), rho=0.1, uphill=name == "momentum-uphill", model=twin
        )
        for step in range(3):
            for each, of in ((named, model), (preset, twin)):
                each.zero_grad()
                loss_of(of, batch(seed=step)).backward()
                each.step()
        assert same_bits(model, bits(twin))


def test_a_radius_is_not_also_a_budget() -> None:
    with pytest.raises(TypeError, match=r"rho=0.1; its radius follows from budget= and max_radius="):
        samopt.LESAM(mlp().parameters(), torch.optim.SGD, lr=0.1, rho=0.1)


def test_an_ascent_closure_without_its_direction_is_refused() -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1)
    closure = closure_of(optimizer, model, batch())
    with pytest.raises(TypeError, match="ReusedGradient"):
        optimizer.step(closure, closure)


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS if preset.name != "reused"], ids=lambda preset: preset.name
)
def test_ranks_train_as_one_process_does(preset) -> None:
    model = mlp(DOUBLE)
    stock = BASES[preset.usual_base](model.parameters())
    stock.param_groups[0]["rho"] = preset.rho
    loop = preset.textbook()
    for step in range(5):
        loop(model, stock, batch(DOUBLE, seed=step))
    weights = run_on_ranks(train_replica, preset.name, 5)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    torch.testing.assert_close(weights[0], bits(model), **TOLERANCE[DOUBLE])


def train_replica(name: str, steps: int) -> list[Tensor]:
    preset = next(preset for preset in PRESETS if preset.name == name)
    model = DistributedDataParallel(mlp(DOUBLE))
    base = BASES[preset.usual_base](model.parameters())
    synced = name in ("lesam", "functional", "preconditioned")
    optimizer = preset.wrap(base, rho=preset.rho, model=model, sync_perturbation=synced)
    part = slice(8 * torch.distributed.get_rank(), 8 * torch.distributed.get_rank() + 8)
    for step in range(steps):
        x, y = batch(DOUBLE, seed=step)
        optimizer.step(closure_of(optimizer, model, (x[part], y[part])))
    return bits(model)


@pytest.mark.parametrize(
    "name", ["friendly", "look", "gsam", "wsam", "wsam-coupled", "lesam", "functional", "preconditioned", "momentum"]
)
def test_shards_train_as_one_process_does(name) -> None:
    from tests.helpers.sharded import uneven

    preset = next(preset for preset in PRESETS if preset.name == name)
    model = uneven()
    stock = BASES[preset.usual_base](model.parameters())
    stock.param_groups[0]["rho"] = preset.rho
    loop = preset.textbook()
    for step in range(5):
        loop(model, stock, batch(DOUBLE, seed=step))
    weights = run_on_ranks(train_shards, name, 5)
    torch.testing.assert_close(weights[0], bits(model), **TOLERANCE[DOUBLE])


def train_shards(name: str, steps: int) -> list[Tensor]:
    from tests.helpers.sharded import full, fully_sharded, own_part, uneven

    preset = next(preset for preset in PRESETS if preset.name == name)
    model = fully_sharded(uneven())
    optimizer = preset.wrap(BASES[preset.usual_base](model.parameters()), rho=preset.rho, model=model)
    for step in range(steps):
        optimizer.step(closure_of(optimizer, model, own_part(step)))
    return full(model.parameters())
