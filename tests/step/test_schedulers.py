"""Schedules: torch's drive the base through the wrapper, and ``RhoScheduler`` drives the radius the same way."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import samopt
from samopt import RhoScheduler
from tests.helpers.cases import (
    BASES,
    FORMS,
    TOLERANCE,
    VARIANTS,
    assert_equal,
    batch,
    bits,
    closure_of,
    mlp,
    parameter_groups,
    sam_epsilon,
    same_bits,
    textbook_step,
)
from tests.helpers.published import PRESETS

STEPS = 8
RHO = 0.05

LR_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, STEPS),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.7)], milestones=[3]
    ),
}


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def advance(scheduler: Any) -> None:
    """One scheduler step; the metric of ReduceLROnPlateau never improves."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def schedule_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What schedulers write into the groups."""
    keys = ("lr", "momentum", "betas")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


@pytest.mark.parametrize("reload", ["never", "in place", "into new objects"])
@pytest.mark.parametrize("built_on", ["wrapper", "base"])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_a_scheduled_run_equals_the_stock_base_under_the_same_scheduler(
    name: str, base: str, built_on: str, reload: str
) -> None:
    def build(seed: int = 0) -> tuple[nn.Module, samopt.SAM, Any]:
        model = mlp(torch.float64, seed)
        optimizer = samopt.SAM(BASES[base](model.parameters()), rho=RHO)
        return model, optimizer, LR_SCHEDULERS[name](optimizer if built_on == "wrapper" else optimizer.base_optimizer)

    with warnings.catch_warnings():
        # One of SequentialLR's own, in stock loops too, about a deprecated argument it passes on.
        warnings.filterwarnings("error", message="Detected call of")
        model, optimizer, scheduler = build()
        expected = mlp(torch.float64)
        stock = BASES[base](parameter_groups(expected, [RHO]))
        stock_scheduler = LR_SCHEDULERS[name](stock)
        initial = schedule_of(stock)
        for step in range(STEPS):
            if step == STEPS // 2 and reload == "in place":
                optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
            elif step == STEPS // 2 and reload == "into new objects":
                saved = [through_a_file(thing.state_dict()) for thing in (model, optimizer, scheduler)]
                model, optimizer, scheduler = build(seed=1)
                for thing, state in zip((model, optimizer, scheduler), saved, strict=True):
                    thing.load_state_dict(state)
            assert schedule_of(optimizer) == schedule_of(stock)
            data = batch(torch.float64, seed=step)
            list(FORMS.values())[step % len(FORMS)](optimizer, model, data)
            textbook_step(expected, stock, data, sam_epsilon)
            assert_equal(model, expected)
            advance(scheduler)
            advance(stock_scheduler)
    assert schedule_of(optimizer) == schedule_of(stock) != initial


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("built_on", ["wrapper", "base"])
def test_torch_sees_every_step_and_still_warns_when_the_order_is_wrong(form: str, built_on: str) -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()))
    scheduler = lr_scheduler.StepLR(optimizer if built_on == "wrapper" else optimizer.base_optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FORMS[form](optimizer, model, batch())
        scheduler.step()
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()))
    scheduler = lr_scheduler.StepLR(optimizer if built_on == "wrapper" else optimizer.base_optimizer, 1)
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        scheduler.step()


# A schedule of rho: how to make it for an optimizer, and the factor expected after k steps.
RHO_SCHEDULES: dict[str, tuple[Callable[[Any], RhoScheduler], Callable[[int], float]]] = {
    "warm-up": (lambda opt: RhoScheduler.linear_warmup(opt, steps=4), lambda k: min(k / 4, 1.0)),
    "warm-up from a quarter": (
        lambda opt: RhoScheduler.linear_warmup(opt, steps=3, start=0.25),
        lambda k: [0.25, 0.5, 0.75, 1.0][min(k, 3)],
    ),
    "cosine": (
        lambda opt: RhoScheduler.cosine(opt, steps=4),
        lambda k: [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0][min(k, 4)],
    ),
    "cosine to a half": (
        lambda opt: RhoScheduler.cosine(opt, steps=2, final=0.5),
        lambda k: [1.0, 0.75, 0.5][min(k, 2)],
    ),
    "proportional to lr": (
        lambda opt: RhoScheduler.proportional_to_lr(opt, max_lr=0.1),
        lambda k: 0.8**k,
    ),
    "proportional to lr with minima": (
        lambda opt: RhoScheduler.proportional_to_lr(opt, max_lr=0.1, min_lr=0.05, min_factor=0.2),
        lambda k: 0.2 + 0.8 * max(0.8**k * 0.1 - 0.05, 0.0) / 0.05,
    ),
    "callable": (lambda opt: RhoScheduler(opt, lambda step: 1 / (1 + step)), lambda k: 1 / (1 + k)),
    "every third step": (lambda opt: RhoScheduler.every(opt, 3), lambda k: float(k in (0, 3, 6))),
    "late phase": (lambda opt: RhoScheduler.late(opt, start=3), lambda k: float(k >= 3)),
    "late phase with a ramp": (
        lambda opt: RhoScheduler.late(opt, start=2, ramp=2),
        lambda k: [0.0, 0.0, 1 / 3, 2 / 3, 1.0][min(k, 4)],
    ),
    "below a learning rate": (lambda opt: RhoScheduler.below_lr(opt, 0.06), lambda k: float(0.1 * 0.8**k <= 0.06)),
}


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("name", RHO_SCHEDULES)
def test_a_run_under_a_rho_schedule_equals_the_textbook_with_each_steps_rho(name: str, reload: bool) -> None:
    make, factor = RHO_SCHEDULES[name]
    rhos = [0.05, 0.2]

    def build(seed: int) -> tuple[nn.Module, samopt.SAM, Any, RhoScheduler]:
        model = mlp(torch.float64, seed)
        optimizer = samopt.SAM(BASES["sgd-momentum"](parameter_groups(model, rhos)))
        return model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.8), make(optimizer)

    run = build(0)
    expected = mlp(torch.float64)
    stock = BASES["sgd-momentum"](parameter_groups(expected, rhos))
    for step in range(6):
        if reload and step == 3:
            saved = [through_a_file(thing.state_dict()) for thing in run]
            run = build(1)
            for thing, state in zip(run, saved, strict=True):
                thing.load_state_dict(state)
        model, optimizer, lr_schedule, rho_schedule = run
        wanted = [rho * factor(step) for rho in rhos]
        assert rho_schedule.get_last_rho() == pytest.approx(wanted, rel=1e-12, abs=1e-17)
        assert [group["rho"] for group in optimizer.base_optimizer.param_groups] == rho_schedule.get_last_rho()
        data = batch(torch.float64, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        for group, rho in zip(stock.param_groups, wanted, strict=True):
            group.update(rho=rho, lr=0.1 * 0.8**step)
        textbook_step(expected, stock, data, sam_epsilon)
        assert_equal(model, expected)
        lr_schedule.step()
        rho_schedule.step()


def test_a_rho_schedule_may_be_built_after_its_optimizer_was_loaded() -> None:
    model = mlp()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.2)
    schedule = RhoScheduler.linear_warmup(optimizer, steps=4)
    schedule.step()
    saved = through_a_file([optimizer.state_dict(), schedule.state_dict()])
    assert saved[1] == {"last_step": 1, "base_rhos": [0.2]}
    other = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.9)
    other.load_state_dict(saved[0])
    resumed = RhoScheduler.linear_warmup(other, steps=4)
    resumed.load_state_dict(saved[1])
    for each in (schedule, resumed):
        each.step()
    assert resumed.get_last_rho() == schedule.get_last_rho() == [0.1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", ["warm-up", "cosine", "proportional to lr", "late phase", "below a learning rate"])
def test_a_copied_rho_schedule_drives_the_copied_optimizer(name: str, duplicate: Callable[[Any], Any]) -> None:
    make, factor = RHO_SCHEDULES[name]
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    schedule = make(optimizer)
    twin, twin_schedule = duplicate((optimizer, schedule))
    before = schedule.get_last_rho()
    twin.param_groups[0]["lr"] = 0.08
    twin_schedule.step()
    assert twin.param_groups[0]["rho"] == pytest.approx(0.2 * factor(1))
    assert schedule.get_last_rho() == before


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_group_that_joins_later_is_scheduled_from_then_on(through: str) -> None:
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    schedule = RhoScheduler.linear_warmup(optimizer, steps=4)
    schedule.step()
    joined = optimizer if through == "wrapper" else optimizer.base_optimizer
    joined.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.4})
    schedule.step()
    assert schedule.get_last_rho() == [0.1, 0.2]
    assert schedule.state_dict() == {"last_step": 2, "base_rhos": [0.2, 0.4]}


def test_adadeltas_own_rho_is_left_alone() -> None:
    optimizer = samopt.SAM(torch.optim.Adadelta(mlp().parameters(), rho=0.7), rho=0.2)
    schedule = RhoScheduler.linear_warmup(optimizer, steps=2)
    schedule.step()
    assert (optimizer.param_groups[0]["sam_rho"], optimizer.param_groups[0]["rho"]) == (0.1, 0.7)


def test_numpy_and_tensor_factors_serve() -> None:
    numpy = pytest.importorskip("numpy")
    for half in (numpy.float32(0.5), numpy.float64(0.5), torch.tensor(0.5)):
        model, expected = mlp(torch.float64), mlp(torch.float64)
        optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.2)
        RhoScheduler(optimizer, lambda step, half=half: half)
        optimizer.step(closure_of(optimizer, model, batch(torch.float64)))
        textbook_step(expected, BASES["sgd"](parameter_groups(expected, [0.1])), batch(torch.float64), sam_epsilon)
        for got, want in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])  # 0.2 * numpy.float32 is float32


def test_a_schedule_of_a_plain_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got SGD; wrap it first, as in samopt\.SAM\(optimizer, rho=0\.05\)"):
        RhoScheduler(BASES["sgd"](mlp().parameters()), lambda step: 1.0)


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_a_bad_factor_is_refused_and_leaves_everything(bad: float) -> None:
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    with pytest.raises(ValueError, match=f"must be >= 0 and finite, got {bad} at step 0"):
        RhoScheduler(optimizer, lambda step: bad)
    assert optimizer.param_groups[0]["rho"] == 0.2
    schedule = RhoScheduler(optimizer, lambda step: 0.5 if step == 0 else bad)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=f"must be >= 0 and finite, got {bad} at step 1"):
        schedule.step()
    assert schedule.get_last_rho() == [0.1]
    assert schedule.state_dict() == before


def test_a_state_for_more_groups_is_refused_and_leaves_everything() -> None:
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    schedule = RhoScheduler.linear_warmup(optimizer, steps=4)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="2 param groups, but the optimizer has 1"):
        schedule.load_state_dict({"last_step": 3, "base_rhos": [0.1, 0.2]})
    assert schedule.state_dict() == before
    assert schedule.get_last_rho() == [0.0]


@pytest.mark.parametrize(
    ("start", "total", "perturbed"),
    [
        ("last 25 %", 8, 2),
        ("last 25%", 8, 2),
        (" last 25 %", 9, 3),
        ("last 10 %", 30, 3),
        ("last 12.5 %", 8, 1),
        ("last 100 %", 5, 5),
        ("last 1 %", 5, 1),
        ("0.1", 30, 3),
    ],
)
def test_a_late_share_perturbs_the_last_steps_alone_and_the_others_cost_one_pass(start, total, perturbed) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=RHO, model=model)
    schedule = RhoScheduler.late(optimizer, start, total=total)
    stock = BASES["sgd-momentum"](parameter_groups(expected, [RHO]))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    costs = []
    for step in range(total):
        data = batch(torch.float64, seed=step)
        optimizer.step(closure_of(optimizer, model, data))
        schedule.step()
        costs.append(len(forwards))
        forwards.clear()
        if step < total - perturbed:
            stock.step(closure_of(stock, expected, data))
        else:
            textbook_step(expected, stock, data, sam_epsilon)
    assert costs == [1] * (total - perturbed) + [2] * perturbed
    assert_equal(model, expected)


def test_a_late_share_resumes_where_it_was() -> None:
    made = [samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2) for _ in range(2)]
    first, second = (RhoScheduler.late(optimizer, "last 50 %", ramp=1, total=8) for optimizer in made)
    factors = []
    for step in range(8):
        if step == 5:
            second.load_state_dict(through_a_file(first.state_dict()))
            first = second
        factors.append(first.get_last_rho()[0] / 0.2)
        first.step()
    assert factors == [0, 0, 0, 0, 0.5, 1, 1, 1]


def test_a_late_share_of_time_follows_the_clock_and_goes_on_from_a_checkpoint(monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("samopt.rho_scheduler.time.monotonic", lambda: now[0])
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    schedule = RhoScheduler.late(optimizer, "last 25 %", seconds=100)
    for passed, rho in ((50.0, 0.0), (74.9, 0.0)):
        now[0] = 1000.0 + passed
        schedule.step()
        assert schedule.get_last_rho() == [rho]
    saved = through_a_file(schedule.state_dict())
    assert saved["seconds"] == pytest.approx(74.9)
    copied = pickle.dumps(schedule)
    now[0] = 5.0  # another machine's clock
    resumed = RhoScheduler.late(samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2), "last 25 %", seconds=100)
    resumed.load_state_dict(saved)
    twin = pickle.loads(copied)
    for each in (resumed, twin):
        now[0] = 5.0
        each.load_state_dict(saved)
        each.step()
        assert each.get_last_rho() == [0.0]
        now[0] = 5.2
        each.step()
        assert each.get_last_rho() == [0.2]


def test_a_late_share_of_time_is_refused_on_several_ranks(monkeypatch) -> None:
    monkeypatch.setattr("samopt.rho_scheduler.runs_on_several_ranks", lambda: True)
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    with pytest.raises(ValueError, match="seconds= follows the clock of this process.*use total="):
        RhoScheduler.late(optimizer, "last 25 %", seconds=10)
    assert RhoScheduler.late(optimizer, "last 25 %", total=10).get_last_rho() == [0.0]


@pytest.mark.parametrize("variant", [*VARIANTS, *PRESETS], ids=lambda variant: variant.name)
def test_a_paused_optimizer_is_its_base_and_goes_on(variant) -> None:
    base = getattr(variant, "usual_base", "sgd-momentum")
    model, expected = mlp(), mlp()
    optimizer = variant.wrap(BASES[base](model.parameters()), rho=variant.rho, model=model)
    stock = BASES[base](expected.parameters())
    optimizer.is_paused = True
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
        stock.step(closure_of(stock, expected, batch(seed=step)))
    assert same_bits(model, bits(expected))
    assert (len(forwards), optimizer.rho, optimizer.perturbs_this_step) == (3, variant.rho, False)
    optimizer.is_paused = False
    for step in range(3, 5):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
        stock.step(closure_of(stock, expected, batch(seed=step)))
    assert not same_bits(model, bits(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda opt: RhoScheduler.linear_warmup(opt, steps=0), "steps must be at least 1, got 0"),
        (lambda opt: RhoScheduler.linear_warmup(opt, steps=2, start=1.5), r"start must be in \[0, 1\], got 1.5"),
        (lambda opt: RhoScheduler.cosine(opt, steps=-1), "steps must be at least 1, got -1"),
        (lambda opt: RhoScheduler.cosine(opt, steps=2, final=-0.1), "final must be >= 0, got -0.1"),
        (lambda opt: RhoScheduler.every(opt, 0), "k must be at least 1, got 0"),
        (lambda opt: RhoScheduler.late(opt, -1), "start must be a step >= 0, or a share .* got -1"),
        (lambda opt: RhoScheduler.late(opt, 0.25), 'start must be a step .* such as "last 25 %"; got 0.25'),
        (lambda opt: RhoScheduler.late(opt, 3, ramp=-1), "ramp must be >= 0, got -1"),
        (lambda opt: RhoScheduler.late(opt, 3, total=10), r"total= and seconds= go with a share .* got start=3"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %"), "give either total= .* got total=None and seconds=None"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %", total=4, seconds=2.0), "got total=4 and seconds=2.0"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %", total=0), "total must be at least 1, got 0"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %", seconds=0.0), "seconds must be > 0"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %", seconds=-1.0), "seconds must be >= 0 and finite, got -1.0"),
        (lambda opt: RhoScheduler.late(opt, "last 25 %", ramp=2, seconds=9.0), "has no ramp of steps"),
        (lambda opt: RhoScheduler.late(opt, "first 10 %", total=4), 'written as "last 25 %" or 0.25; got .first 10 %'),
        (lambda opt: RhoScheduler.late(opt, "last 0 %", total=4), "above 0 and up to 1 .* got 'last 0 %'"),
        (lambda opt: RhoScheduler.late(opt, "last 101%", total=4), "got 'last 101%'"),
        (lambda opt: RhoScheduler.late(opt, "last 25", total=4), "got 'last 25'"),
        (lambda opt: RhoScheduler.below_lr(opt, 0.0), "lr must be > 0, got 0.0"),
        (lambda opt: RhoScheduler.proportional_to_lr(opt, 0.1, 0.1), "max_lr must be larger than min_lr"),
        (lambda opt: RhoScheduler.proportional_to_lr(opt, 0.1, min_factor=2.0), r"min_factor must be in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[Any], RhoScheduler], message: str) -> None:
    optimizer = samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)
    with pytest.raises(ValueError, match=message):
        make(optimizer)
    assert optimizer.param_groups[0]["rho"] == 0.2


def scheduled_sam() -> samopt.SAM:
    return samopt.SAM(BASES["sgd"](mlp().parameters()), rho=0.2)


def test_a_second_schedule_starts_from_the_initial_rho_and_the_first_says_that_it_was_replaced() -> None:
    optimizer = scheduled_sam()
    first = RhoScheduler.linear_warmup(optimizer, steps=4)  # rho is 0 now
    second = RhoScheduler.cosine(optimizer, steps=4)
    assert second.base_rhos == [0.2] and second.get_last_rho() == [0.2]
    with pytest.raises(RuntimeError, match="another RhoScheduler, made later"):
        first.step()
    second.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_a_rho_that_was_set_by_hand_is_the_next_schedules_initial_one() -> None:
    optimizer = scheduled_sam()
    first = RhoScheduler.linear_warmup(optimizer, steps=4)
    optimizer.param_groups[0]["rho"] = 0.5
    assert RhoScheduler.cosine(optimizer, steps=4).base_rhos == [0.5]
    assert first.base_rhos == [0.2]


def test_a_schedule_goes_on_when_a_newer_one_is_gone() -> None:
    optimizer = scheduled_sam()
    first = RhoScheduler.linear_warmup(optimizer, steps=4)
    newer = RhoScheduler.cosine(optimizer, steps=4)
    del newer
    gc.collect()
    first.step()
    assert first.get_last_rho() == [0.05]
