"""Every optimizer of torch as the base: each step equals the textbook's around a stock instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import samopt
from tests.helpers.cases import (
    VARIANTS,
    Epsilon,
    Variant,
    assert_equal,
    batch,
    closure_of,
    loss_of,
    parameters_of,
    sam_epsilon,
    second_gradient,
)

STEPS = 3

# Name of the class, its arguments.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "foreach": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 1e-2}),
    ("Adam", {"lr": 0.01, "fused": True}),
    ("Adam", {"lr": 0.01, "maximize": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "foreach": True}),
    ("AdamW", {"lr": 0.01, "fused": True}),
    ("AdamW", {"lr": 0.01, "maximize": True, "foreach": False}),
    ("AdamW", {"lr": torch.tensor(0.01), "foreach": False}),
    ("NAdam", {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 1e-2}),
    ("RAdam", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01, "foreach": True}),
    ("Adagrad", {"lr": 0.01, "lr_decay": 0.1}),
    ("Adagrad", {"lr": 0.01, "fused": True}),
    ("Adadelta", {"lr": 0.5, "rho": 0.7}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Rprop", {"lr": 0.01}),
    ("ASGD", {"lr": 0.1, "t0": 1}),
    ("Adafactor", {"lr": 0.01}),
    ("Adafactor", {"lr": 0.01, "maximize": True, "foreach": True}),
    ("LBFGS", {"lr": 0.5, "max_iter": 4}),
    ("LBFGS", {"lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
    ("Muon", {"lr": 0.02}),
    ("Muon", {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    ("SparseAdam", {"lr": 0.01}),
    ("SparseAdam", {"lr": 0.01, "maximize": True}),
]
CASES = [
    pytest.param(name, options, id=f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})")
    for name, options in ROWS
    if hasattr(torch.optim, name)  # Adafactor and Muon are newer than the oldest torch we support
]


class SparseClassifier(nn.Module):
    """An embedding with sparse gradients, the only kind SparseAdam takes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.abs().mul(3).long().clamp(max=8)).sum(1)


def model_for(name: str) -> nn.Module:
    """A fp64 model that the optimizer can train: matrices only for Muon, sparse gradients only for SparseAdam."""
    torch.manual_seed(3)
    if name == "SparseAdam":
        return SparseClassifier().double()
    bias = name != "Muon"
    return nn.Sequential(nn.Linear(6, 12, bias=bias), nn.Tanh(), nn.Linear(12, 3, bias=bias)).double()


def signed(epsilon: Epsilon, options: dict[str, Any]) -> Epsilon:
    """The perturbation that is bad for the objective: downhill where the base maximises."""
    sign = -1 if options.get("maximize") else 1

    def turned(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], radii: Sequence[float]) -> list[Tensor]:
        return [sign * move for move in epsilon(weights, gradients, radii)]

    return turned


def textbook_run(model: nn.Module, base: Optimizer, epsilon: Epsilon, radius: float) -> list[list[float]]:
    """Three steps of a stock ``base`` whose closure does both passes.

    Returns:
        For each step, the first-pass loss of each time the base called its closure.
    """
    losses: list[list[float]] = []
    for step in range(STEPS):
        data = batch(torch.float64, seed=step)
        calls: list[float] = []

        def closure(data: tuple[Tensor, Tensor] = data, calls: list[float] = calls) -> Tensor:
            def backward() -> Tensor:
                loss = loss_of(model, data)
                loss.backward()
                return loss

            first, second = second_gradient(parameters_of(base), backward, epsilon, radius)
            calls.append(float(first))
            return second

        base.step(closure)
        losses.append(calls)
    return losses


def make(name: str, model: nn.Module, options: dict[str, Any]) -> Optimizer:
    base: Optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    return base


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_closure_form_equals_the_textbook_around_a_stock_base(
    name: str, options: dict[str, Any], variant: Variant
) -> None:
    model, expected = model_for(name), model_for(name)
    optimizer = variant.wrap(make(name, model, options), rho=variant.rho)
    returned = []
    for step in range(STEPS):
        returned.append(float(optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step))).detach()))
    losses = textbook_run(expected, make(name, expected, options), signed(variant.epsilon, options), variant.rho)
    assert returned == pytest.approx([calls[0] for calls in losses], rel=1e-12)
    assert_equal(model, expected)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case.values[0] != "LBFGS"])
def test_explicit_form_equals_the_textbook_around_a_stock_base(name: str, options: dict[str, Any]) -> None:
    model, expected = model_for(name), model_for(name)
    optimizer = samopt.SAM(make(name, model, options), rho=0.05)
    for step in range(STEPS):
        data = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        with optimizer.perturbed():
            loss_of(model, data).backward()
        optimizer.step()
    textbook_run(expected, make(name, expected, options), signed(sam_epsilon, options), 0.05)
    assert_equal(model, expected)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_class_form_is_the_instance_form(name: str, options: dict[str, Any]) -> None:
    # The one collision: a class-form rho is the ball's, so Adadelta keeps its default.
    options = {key: value for key, value in options.items() if key != "rho"}
    one, two = model_for(name), model_for(name)
    pairs = [
        (one, samopt.SAM(one.parameters(), getattr(torch.optim, name), rho=0.1, **options)),
        (two, samopt.SAM(make(name, two, options), rho=0.1)),
    ]
    for model, optimizer in pairs:
        for step in range(STEPS):
            optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    class_form, instance_form = (optimizer for _, optimizer in pairs)
    assert type(class_form.base_optimizer) is type(instance_form.base_optimizer) is getattr(torch.optim, name)
    for group, other in zip(class_form.param_groups, instance_form.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_rho_zero_is_the_stock_base_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    model, expected = model_for(name), model_for(name)
    optimizer, stock = samopt.SAM(make(name, model, options), rho=0.0), make(name, expected, options)
    calls = {"wrapped": 0, "stock": 0}

    def counting(label: str, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def counted() -> Tensor:
            calls[label] += 1
            return closure()

        return counted

    for step in range(STEPS):
        data = batch(torch.float64, seed=step)
        got = optimizer.step(counting("wrapped", closure_of(optimizer, model, data)))
        want = stock.step(counting("stock", closure_of(stock, expected, data)))
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))
    assert calls["wrapped"] == calls["stock"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def torch_optimizers() -> Iterable[type[Optimizer]]:
    return (
        value
        for value in vars(torch.optim).values()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    )


def test_every_optimizer_of_this_torch_is_in_the_table() -> None:
    missing = {cls.__name__ for cls in torch_optimizers()} - {name for name, _ in ROWS}
    assert not missing, f"add rows for {missing}"


def test_adadeltas_rho_is_the_only_keyword_we_share_with_a_base() -> None:
    ours = set(inspect.signature(samopt.SharpnessAwareOptimizer).parameters)
    ours |= set(inspect.signature(samopt.SAM).parameters) | set(inspect.signature(samopt.ASAM).parameters)
    shared = {
        (cls.__name__, name) for cls in torch_optimizers() for name in set(inspect.signature(cls).parameters) & ours
    }
    assert shared - {(cls.__name__, "params") for cls in torch_optimizers()} == {("Adadelta", "rho")}


def test_adadelta_keeps_its_rho_and_ours_is_sam_rho() -> None:
    model = model_for("Adadelta")
    optimizer = samopt.SAM(torch.optim.Adadelta(model.parameters(), rho=0.7), rho=0.05)
    (group,) = optimizer.param_groups
    assert (group["rho"], group["sam_rho"], optimizer.option_key("rho")) == (0.7, 0.05, "sam_rho")
    class_form = samopt.SAM(model.parameters(), torch.optim.Adadelta, rho=0.05)
    (group,) = class_form.param_groups
    assert (group["rho"], group["sam_rho"]) == (0.9, 0.05)


def test_capturable_bases_fail_on_the_cpu_as_they_do_alone_and_move_nothing() -> None:
    model = model_for("AdamW")
    optimizer = samopt.SAM(torch.optim.AdamW(model.parameters(), capturable=True), rho=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(AssertionError, match="capturable"):
        optimizer.step(closure_of(optimizer, model, batch(torch.float64)))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.is_perturbed


class ModalSGD(torch.optim.SGD):
    """A base with modes, methods and attributes of its own, like the schedule-free optimizers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = "train"
        self.modes: list[str] = []

    def train(self) -> None:
        self.mode = "train"
        self.modes.append("train")

    def eval(self) -> None:
        self.mode = "eval"
        self.modes.append("eval")


def test_unknown_attributes_reach_the_base() -> None:
    base = ModalSGD(model_for("SGD").parameters(), lr=0.1)
    optimizer = samopt.SAM(base)
    optimizer.eval()
    assert optimizer.mode == "eval"
    optimizer.train()
    assert base.modes == ["eval", "train"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = optimizer.nonsense


def test_a_factory_serves_as_the_class() -> None:
    model, expected = model_for("SGD"), model_for("SGD")
    optimizer = samopt.SAM(model.parameters(), lambda params, lr: torch.optim.SGD(params, lr=lr), rho=0.05, lr=0.1)
    for step in range(STEPS):
        optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step)))
    textbook_run(expected, torch.optim.SGD(expected.parameters(), lr=0.1), sam_epsilon, 0.05)
    assert_equal(model, expected)
