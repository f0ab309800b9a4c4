"""Every forward of the first pass is repeated with its own random numbers; forwards outside a step belong to none."""

from __future__ import annotations

import gc
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import samopt
from tests.helpers.two_passes import FORMS

each_form = pytest.mark.parametrize("form", FORMS)


class Noisy(nn.Module):
    """Draws from every global stream, and notes what it drew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        object.__setattr__(self, "drawn", drawn_by.setdefault(id(self), []))

    def forward(self, x):
        hidden = self.drop(torch.ones(len(x), 16) + 0 * self.first(x))
        mark = (hidden.detach() != 0).tolist(), random.random(), float(np.random.rand()), torch.rand(2).tolist()
        drawn_by[id(self)].append(mark)
        return self.last(hidden * self.first(x) * (0.5 + mark[1]))


drawn_by: dict[int, list] = {}


def make(rho=0.3):
    """A model, its optimizer and what it draws; the same in every run, with steps too small to diverge."""
    random.seed(0)
    np.random.seed(0)
    drawn_by.clear()
    model = Noisy()
    drawn_by[id(model)] = drawn = []
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.01), rho=rho, model=model)
    return model, optimizer, drawn


def data(seed=0, size=5):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def loss_of(output):
    return output.square().mean()


def several_forwards(model):
    return loss_of(model(data(0))) + loss_of(model(data(1))) * loss_of(model(data(2)))


def teacher_without_gradients(model):
    with torch.no_grad():
        target = model(data(3))
    return (model(data(3)) - target).square().mean()


def teacher_in_eval_mode(model):
    model.eval()
    with torch.no_grad():
        target = model(data(3))
    model.train()
    return (model(data(3)) - target).square().mean()


def teacher_in_inference_mode(model):
    with torch.inference_mode():
        target = model(data(3)).clone()
    return (model(data(3)) - target.clone()).square().mean()


def two_views_of_one_input(model):
    x = data(4)
    return (model(x) - model(x)).square().mean() + loss_of(model(x))


def inner_modules_alone(model):
    return loss_of(model.drop(model.first(data(5)))) + loss_of(model(data(5)))


def an_auxiliary_output_that_is_dropped(model):
    model(data(6))
    return loss_of(model(data(7)))


LOSSES = [
    several_forwards,
    teacher_without_gradients,
    teacher_in_eval_mode,
    teacher_in_inference_mode,
    two_views_of_one_input,
    inner_modules_alone,
]


@each_form
@pytest.mark.parametrize("compute", LOSSES, ids=lambda each: each.__name__)
def test_both_passes_draw_the_same(compute, form):
    model, optimizer, drawn = make()
    for step in range(3):
        drawn.clear()
        torch.manual_seed(step)
        FORMS[form](optimizer, lambda: compute(model))
        half = len(drawn) // 2
        assert drawn[:half] == drawn[half:] and half


def test_a_forward_that_raised_belongs_to_no_pass() -> None:
    model, optimizer, drawn = make()
    failures = [ArithmeticError()]

    class Fails(nn.Module):
        def forward(self, x):
            if failures:
                raise failures.pop()
            return x

    model.last = nn.Sequential(model.last, Fails())
    x = data(0)
    with pytest.raises(ArithmeticError):
        model(x)
    loss_of(model(x)).backward()
    with optimizer.perturbed():
        loss_of(model(x)).backward()
    assert drawn[1] == drawn[2] != drawn[0]


def test_modules_that_are_called_in_another_order_draw_what_they_drew() -> None:
    models, x = nn.ModuleList([Noisy(), Noisy()]), data(0)
    drawn = [[] for _ in models]
    drawn_by.update(zip(map(id, models), drawn, strict=True))
    optimizer = samopt.SAM(torch.optim.SGD(models.parameters(), lr=0.01), rho=0.3, model=models)
    sum(loss_of(each(x)) for each in models).backward()
    with optimizer.perturbed():
        sum(loss_of(each(x)) for each in reversed(models)).backward()
    assert all(first == second for first, second in drawn)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("form", ["closure", "backward"])
def test_a_forward_whose_output_is_dropped_is_repeated_where_the_start_of_the_pass_is_known(form):
    model, optimizer, drawn = make()
    FORMS[form](optimizer, lambda: an_auxiliary_output_that_is_dropped(model))
    assert drawn[:2] == drawn[2:] and len(drawn) == 4


class Biased(nn.Module):
    """Its output is a view, as that of a linear layer with a bias is for input of three dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_micro_batches_whose_loss_writes_into_the_logits_are_repeated_as_those_whose_loss_does_not():
    runs = []
    for writes in (True, False):
        model = Biased()
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

        def passes(model=model, writes=writes):
            for seed in range(3):
                logits = model(data(seed).unsqueeze(0))
                assert logits._base is not None
                loss_of(logits.mul_(0.5) if writes else logits * 0.5).backward()

        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            passes()
            with optimizer.perturbed():
                passes()
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_masks_that_are_not_repeated_are_said_once():
    """Losses of hidden layers alone leave the output, by which a call is known, without a gradient."""
    model, hidden, masks = Biased(), [], []
    model.body[2].register_forward_hook(lambda module, args, output: hidden.append(output))
    model.body[2].register_forward_hook(lambda module, args, output: masks.append((output != 0).tolist()))
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

    def loss(seed):
        model(data(seed))
        return loss_of(hidden.pop())

    def passes():
        for seed in range(3):
            loss(seed).backward()

    passes()
    with pytest.warns(UserWarning, match="repeats none that is known of the first.*optimizer.backward"):
        with optimizer.perturbed():
            passes()
        assert masks[:3] != masks[3:]
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        passes()
        with optimizer.perturbed():
            passes()
        optimizer.step()
        optimizer.zero_grad()
        masks.clear()
        for seed in range(3):
            optimizer.backward(lambda seed=seed: loss(seed), last=seed == 2)
        assert masks[:3] == masks[3:]


@each_form
def test_a_parameter_or_an_input_that_the_model_returns_keeps_no_hook(form):
    model = Biased()
    x = data().requires_grad_()
    model.register_forward_hook(lambda module, args, output: (output, module.head.bias, args[0]))
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    for _ in range(3):
        FORMS[form](optimizer, lambda: sum(loss_of(each) for each in model(x)))
    assert not model.head.bias._backward_hooks and not x._backward_hooks


@each_form
@pytest.mark.parametrize("where", ["before zero_grad", "behind zero_grad", "behind step", "many"])
@pytest.mark.parametrize("how", ["train mode", "no_grad", "eval mode"])
def test_forwards_between_steps_belong_to_no_step(how, where, form):
    model, optimizer, drawn = make()

    def look():
        model.train(how != "eval mode")
        with torch.set_grad_enabled(how != "no_grad"):
            for seed in range(30 if where == "many" else 2):
                kept.append(float(loss_of(model(data(seed))).detach()))
        model.train()

    kept = []
    for step in range(4):
        if where == "before zero_grad":
            look()
            optimizer.zero_grad()
        elif where in ("behind zero_grad", "many"):
            optimizer.zero_grad()
            look()
        drawn.clear()
        FORMS[form](optimizer, lambda step=step: several_forwards(model) + loss_of(model(data(step))))
        assert len(drawn) == 8
        assert drawn[:4] == drawn[4:]
        if where == "behind step":
            look()


def records(optimizer):
    calls = optimizer._passes._replay._calls
    return len(calls._records)


@pytest.mark.parametrize("how", ["train mode", "no_grad", "eval mode"])
def test_thousands_of_forwards_outside_a_step_leave_no_records(how):
    model, optimizer, _ = make()
    FORMS["perturbed"](optimizer, lambda: several_forwards(model))
    assert records(optimizer) == 0
    optimizer.zero_grad()
    model.train(how != "eval mode")
    most = 0
    for _ in range(5000):
        with torch.set_grad_enabled(how == "train mode"):
            model.drop(data())
        most = max(most, records(optimizer))
    gc.collect()
    assert most <= 4096  # a pass may have that many calls
    size = sum(len(each.state.cpu) for each in optimizer._passes._replay._calls._records)
    assert size < 2**25
    model.train()
    drawn = drawn_by[id(model)]
    drawn.clear()
    FORMS["perturbed"](optimizer, lambda: several_forwards(model))
    assert drawn[:3] == drawn[3:]
