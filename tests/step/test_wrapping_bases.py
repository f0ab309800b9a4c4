"""Bases that wrap another optimizer, take no closure, or keep a layout of their own."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import (
    assert_same,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    sam_epsilon,
    same_bits,
    second_gradient,
)

DOUBLE = torch.float64


class Lookahead(torch.optim.Optimizer):
    """Slow weights around a fast optimizer; its state dict has the layout of its paper's reference code."""

    def __init__(self, fast: torch.optim.Optimizer, every: int = 2, share: float = 0.5):
        self.fast, self.every, self.share, self.steps = fast, every, share, 0
        super().__init__(fast.param_groups, {})
        self.param_groups = fast.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.fast.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    s.lerp_(p.detach(), self.share)
                    p.data.copy_(s)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"fast_state": self.fast.state_dict(), "slow_weights": copy.deepcopy(self.slow), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fast.load_state_dict(state_dict["fast_state"])
        self.param_groups = self.fast.param_groups
        self.slow = copy.deepcopy(state_dict["slow_weights"])
        self.steps = state_dict["steps"]


class ScheduleFreeWrapper(torch.optim.Optimizer):
    """As schedule-free's wrapper: averages beside a base that is held, and two entries in its state dict."""

    def __init__(self, base: torch.optim.Optimizer, beta: float = 0.9):
        self.base, self.beta, self.k = base, beta, 0
        self.averages = {p: p.detach().clone() for group in base.param_groups for p in group["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.base.step(closure)
        self.k += 1
        for p, average in self.averages.items():
            average.lerp_(p.detach(), 1 / self.k)
        return loss

    def state_dict(self) -> dict[str, Any]:
        averages = [average.clone() for average in self.averages.values()]
        return {"base": self.base.state_dict(), "averages": averages, "k": self.k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict["base"])
        for average, value in zip(self.averages.values(), state_dict["averages"], strict=True):
            average.copy_(value)
        self.k = state_dict["k"]


class WithoutClosure(torch.optim.SGD):
    """A base whose ``step`` takes nothing."""

    def step(self) -> None:  # type: ignore[override]
        super().step()


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lookahead": lambda parameters: Lookahead(sgd(parameters)),
    "schedule-free": lambda parameters: ScheduleFreeWrapper(sgd(parameters)),
    "no closure": lambda parameters: WithoutClosure(parameters, lr=0.1, momentum=0.9),
}
each_base = pytest.mark.parametrize("kind", MAKERS)


def take_step(optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module, seed: int, form: str) -> None:
    data = batch(DOUBLE, seed=seed)
    optimizer.zero_grad()
    if form == "closure":
        optimizer.step(closure_of(optimizer, model, data))
    elif form == "backward":
        optimizer.backward(lambda: loss_of(model, data))
        optimizer.step()
    else:
        loss_of(model, data).backward()
        with optimizer.perturbed():
            loss_of(model, data).backward()
        optimizer.step()


@each_base
@pytest.mark.parametrize("form", ["closure", "backward", "perturbed"])
def test_training_is_that_of_the_loop_by_hand(kind: str, form: str) -> None:
    ours, theirs = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = samopt.SAM(MAKERS[kind](ours.parameters()), rho=0.3, model=ours)
    base = MAKERS[kind](theirs.parameters())
    for step in range(5):
        take_step(optimizer, ours, step, form)

        def one_pass(step: int = step) -> torch.Tensor:
            loss = loss_of(theirs, batch(DOUBLE, seed=step))
            loss.backward()
            return loss

        second_gradient(list(theirs.parameters()), one_pass, sam_epsilon, 0.3)
        base.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@each_base
@pytest.mark.parametrize("moved", [False, True], ids=["as saved", "moved as accelerate does"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, moved: bool) -> None:
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(MAKERS[kind](model.parameters()), rho=0.3, model=model)
    for step in range(3):
        take_step(optimizer, model, step, "closure")
    saved = copy.deepcopy(optimizer.state_dict())
    assert "samopt" in saved
    if moved:  # accelerate.utils.move_to_device rebuilds every mapping and sequence
        saved = rebuilt(saved)
    other = mlp(DOUBLE)
    other.load_state_dict(model.state_dict())
    resumed = samopt.SAM(MAKERS[kind](other.parameters()), rho=0.3, model=other)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        take_step(optimizer, model, step, "closure")
        take_step(resumed, other, step, "closure")
    assert same_bits(model, bits(other))
    assert resumed.param_groups is resumed.base_optimizer.param_groups


def rebuilt(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("cpu")
    if isinstance(value, dict):
        return type(value)({key: rebuilt(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(each) for each in value)
    return value


class Failing(torch.optim.SGD):
    """Fails after half of its state was loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["param_groups"][0]["lr"] == 77:
            self.param_groups[0]["momentum"] = 55
            raise RuntimeError("half loaded")


@pytest.mark.parametrize("fault", ["shapes", "groups", "base", "option", "part", "rounding"])
def test_a_failed_load_changes_nothing(fault: str) -> None:
    model = mlp(torch.bfloat16)
    base = Failing(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = samopt.LookSAM(base, rho=0.3, model=model, every=2)
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, batch(torch.bfloat16, seed=step)))
    bad = copy.deepcopy(optimizer.state_dict())
    if fault == "shapes":
        bad["param_groups"][0]["params"] = bad["param_groups"][0]["params"][:-1]
    elif fault == "groups":
        bad["param_groups"].append(copy.deepcopy(bad["param_groups"][0]))
    elif fault == "base":
        bad["param_groups"][0]["lr"] = 77
    elif fault == "option":
        bad["param_groups"][0]["rho"] = -1.0
    elif fault == "part":
        bad["samopt"]["combination"] = {"steps": 9, "component": "not a list"}
    else:
        bad["samopt"]["rounding"] = "many"
    before = copy.deepcopy(optimizer.state_dict())
    groups, state = optimizer.param_groups, optimizer.state
    with pytest.raises((ValueError, RuntimeError, TypeError, KeyError, AttributeError)):
        optimizer.load_state_dict(bad)
    assert_same(optimizer.state_dict(), before)
    assert optimizer.param_groups is groups and optimizer.state is state
    twin = mlp(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    other = samopt.LookSAM(Failing(twin.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=twin, every=2)
    other.load_state_dict(before)
    for step in range(3):
        for each, trained in ((model, optimizer), (twin, other)):
            trained.step(closure_of(trained, each, batch(torch.bfloat16, seed=step)))
    assert same_bits(model, bits(twin))


class CurvatureBase(torch.optim.SGD):
    """Differentiates the gradients, as AdaHessian and Sophia do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.enable_grad():
            torch.autograd.grad([p.grad for p in parameters], parameters, [torch.ones_like(p) for p in parameters])
        return super().step() if loss is None else loss


@pytest.mark.parametrize("form", ["closure", "perturbed"])
def test_a_base_that_differentiates_the_gradients_is_refused_by_name(form: str) -> None:
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(CurvatureBase(model.parameters(), lr=0.1), rho=0.3, model=model)
    before = bits(model)

    def one_pass() -> torch.Tensor:
        loss = loss_of(model, batch(DOUBLE))
        loss.backward(create_graph=True)
        return loss

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return one_pass()

    with pytest.raises(RuntimeError, match="CurvatureBase differentiates the gradients once more"):
        if form == "closure":
            optimizer.step(closure)
        else:
            one_pass()
            with optimizer.perturbed():
                one_pass()
            optimizer.step()
    assert same_bits(model, before)


def test_readers_of_per_sample_gradients_get_the_second_passs_only() -> None:
    model = mlp(DOUBLE)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

    def per_sample(parameter: nn.Parameter) -> Callable[[Any], None]:
        def add(gradient: torch.Tensor) -> None:  # as Opacus: what is there is added to
            held = getattr(parameter, "grad_sample", None)
            parameter.grad_sample = gradient.clone() if held is None else held + gradient

        return add

    for parameter in model.parameters():
        parameter.register_hook(per_sample(parameter))
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad_sample = None
        take_step(optimizer, model, step, "perturbed")
        for parameter in model.parameters():
            assert torch.equal(parameter.grad_sample, parameter.grad)


@pytest.mark.parametrize(
    "value",
    [torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(-0.1), torch.tensor([0.1, 0.2]), torch.tensor(True)],
    ids=["nan", "inf", "negative", "two elements", "flag"],
)
def test_tensors_that_are_no_radius_are_refused(value: torch.Tensor) -> None:
    model = mlp(DOUBLE)
    with pytest.raises(ValueError, match="rho must be"):
        samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=value)  # type: ignore[call-overload]
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.rho = value
    assert optimizer.rho == 0.1
    optimizer.param_groups[0]["rho"] = value
    with pytest.raises(ValueError, match="rho must be"):
        take_step(optimizer, model, 0, "perturbed")


def test_the_constructors_options_win_over_a_checkpoints() -> None:
    model = mlp(DOUBLE)
    first = samopt.ASAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.9, eta=0.5, model=model)
    saved = copy.deepcopy(first.state_dict())
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    saved.pop("samopt")
    base.load_state_dict(saved)
    again = samopt.ASAM(base, rho=0.2, eta=0.03, model=model)
    assert again.rho == 0.2 and again.param_groups[0]["eta"] == 0.03
    assert samopt.ASAM(again.base_optimizer, model=model).param_groups[0]["eta"] == 0.01
    base.param_groups[0]["rho"] = 0.7  # the user's own group option
    assert samopt.SAM(base, rho=0.1).rho == 0.7


def of_a_copy(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return copy.deepcopy(base)


def of_a_pickle(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(base))


def of_its_own_checkpoint(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    fresh = type(base)([{"params": list(group["params"])} for group in base.param_groups], lr=0.1)
    fresh.load_state_dict(base.state_dict())
    return fresh


def of_its_groups(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(base.param_groups, lr=0.1)


def reloaded(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    base.load_state_dict(base.state_dict())
    return base


def grown(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    base.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    return base


SOURCES = [of_a_copy, of_a_pickle, of_its_own_checkpoint, of_its_groups, reloaded, grown]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("change", ["nothing", "schedule", "setter", "added group", "loaded"])
def test_what_an_older_wrapper_left_in_a_group_is_not_the_users(change: str, source: Any) -> None:
    model = mlp(DOUBLE)
    own, plain = [*model.parameters()][:2], [*model.parameters()][2:]
    base = torch.optim.AdamW([{"params": own, "rho": 0.4, "perturb": False}, {"params": plain}], lr=1e-3)
    older = samopt.ASAM(base, rho=0.9, eta=0.5, model=model)
    if change == "schedule":
        samopt.RhoScheduler.linear_warmup(older, steps=5)
    elif change == "setter":
        older.rho = 0.05
    elif change == "added group":
        older.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    elif change == "loaded":
        older.load_state_dict(samopt.ASAM(copy.deepcopy(base), rho=0.8, eta=0.3).state_dict())

    again = samopt.ASAM(source(base), rho=0.2, eta=0.03)
    groups = again.param_groups
    assert [group["rho"] for group in groups[1:]] == [0.2] * (len(groups) - 1)
    assert [group["eta"] for group in groups] == [0.03] * len(groups)
    if change != "loaded":  # what the user wrote into a group goes along, as a schedule has left it
        assert groups[0]["rho"] == {"schedule": 0.0, "setter": 0.05}.get(change, 0.4)
        assert [group["perturb"] for group in groups] == [False] + [True] * (len(groups) - 1)
    groups[1]["rho"] = 0.7  # and now the user writes
    assert samopt.SAM(again.base_optimizer, rho=0.1).param_groups[1]["rho"] == 0.7


@pytest.mark.parametrize("source", SOURCES[:-1])
def test_options_of_another_kind_of_wrapper_are_not_the_users(source: Any) -> None:
    base = torch.optim.AdamW(mlp(DOUBLE).parameters(), lr=1e-3)
    samopt.LESAM(base, budget=0.9)
    middle = samopt.SAM(source(base), rho=0.3)
    assert middle.rho == 0.3
    assert samopt.LESAM(source(middle.base_optimizer), budget=0.2).param_groups[0]["budget"] == 0.2


def test_a_base_keeps_a_rho_of_its_own_through_all_of_this() -> None:
    base = torch.optim.Adadelta(mlp(DOUBLE).parameters(), rho=0.8)
    samopt.SAM(base, rho=0.05)
    again = samopt.SAM(copy.deepcopy(base), rho=0.2)
    assert (again.param_groups[0]["rho"], again.param_groups[0]["sam_rho"]) == (0.8, 0.2)


@pytest.mark.parametrize("kind", ["samopt", "a script's"])
def test_a_factory_that_returns_a_wrapper_is_refused(kind: str) -> None:
    class Script(torch.optim.SGD):
        def first_step(self) -> None:
            pass

    def factory(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        if kind == "samopt":
            return samopt.SAM(torch.optim.SGD(parameters, lr=0.1))
        made = Script(parameters, lr=0.1)
        made.base_optimizer = torch.optim.SGD(parameters, lr=0.1)  # type: ignore[attr-defined]
        return made

    with pytest.raises(TypeError, match="already wraps SGD"):
        samopt.SAM(mlp().parameters(), factory)
