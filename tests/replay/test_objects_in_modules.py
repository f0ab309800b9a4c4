"""Objects that a module holds, modules that are in no registry, and hooks with state: a second pass leaves no trace."""

from __future__ import annotations

import copy
import datetime
import functools
import logging
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import Enum

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import assert_same
from tests.helpers.two_passes import FORMS

each_form = pytest.mark.parametrize("form", FORMS)

Pair = namedtuple("Pair", "a b")


class Phase(Enum):
    WARMUP = 1


class Tally:
    """Counts, and holds something else besides."""

    def __init__(self, **others):
        self.calls = 0
        vars(self).update(others)

    def hit(self, *_):
        self.calls += 1
        if isinstance(getattr(self, "counts", None), dict):
            self.counts["calls"] = self.counts.get("calls", 0) + 1

    __call__ = hit


OWNER = nn.Linear(1, 1)


def _dead_proxy():
    return weakref.proxy(nn.Linear(1, 1))


BESIDE = {
    "a counter": lambda: {"counts": Counter()},
    "a defaultdict": lambda: {"counts": defaultdict(int)},
    "an ordered dict": lambda: {"counts": OrderedDict()},
    "a named tuple": lambda: {"pair": Pair(1, 2)},
    "an enum": lambda: {"phase": Phase.WARMUP},
    "a function": lambda: {"reduce": lambda x: x},
    "a function of torch": lambda: {"reduce": torch.mean},
    "a class": lambda: {"kind": int},
    "a partial": lambda: {"reduce": functools.partial(torch.sum, dim=0)},
    "a module": lambda: {"head": nn.Linear(2, 2)},
    "a date": lambda: {"began": datetime.datetime(2026, 1, 1)},
    "a logger": lambda: {"log": _logger()},
    "a range": lambda: {"layers": range(3)},
    "a weak proxy": lambda: {"trainer": weakref.proxy(OWNER)},
    "a weak proxy of nothing": lambda: {"trainer": _dead_proxy()},
    "a generic alias": lambda: {"kind": list[int]},
    "an empty object": lambda: {"extra": types.SimpleNamespace()},
}


def _logger():
    log = logging.getLogger("samopt.tests.objects")
    log.handlers = [logging.StreamHandler()]  # which holds a lock and a file
    return log


class Counting(nn.Module):
    def __init__(self, tally):
        super().__init__()
        self.linear, self.tally = nn.Linear(3, 2), tally

    def forward(self, x):
        self.tally.hit()
        return self.linear(x)


def step(model, form):
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    FORMS[form](optimizer, lambda: model(torch.ones(4, 3)).square().mean())


@each_form
@pytest.mark.parametrize("beside", BESIDE)
def test_an_object_counts_one_pass_whatever_else_it_holds(form, beside):
    tally = Tally(**BESIDE[beside]())
    step(Counting(tally), form)
    assert tally.calls == 1
    assert dict(getattr(tally, "counts", {"calls": 1})) == {"calls": 1}


@each_form
def test_an_object_that_holds_the_model_or_a_method_of_its_own_counts_one_pass(form):
    tally = Tally()
    model = Counting(tally)
    tally.owner, tally.callback = model, tally.hit
    step(model, form)
    assert tally.calls == 1


@each_form
def test_the_object_behind_a_bound_method_counts_one_pass(form):
    tally = Tally()

    class Calling(nn.Linear):
        def forward(self, x):
            self.report()
            return super().forward(x)

    model = Calling(3, 2)
    model.report = tally.hit
    step(model, form)
    assert tally.calls == 1


@pytest.mark.parametrize("held", [threading.Lock, lambda: iter([1, 2, 3]), lambda: open(__file__)])  # noqa: SIM115
def test_an_object_with_a_position_elsewhere_is_left_alone_as_a_whole(held):
    tally = Tally(held=held())
    step(Counting(tally), "backward")
    assert tally.calls == 2


class HiddenTeacher(nn.Module):
    """Keeps a teacher where ``parameters()`` and ``state_dict()`` do not find it."""

    def __init__(self, hide):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(3, 2)
        teacher = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        hide(self, teacher)

    @property
    def teacher(self):
        found = vars(self)["hidden"]
        found = vars(found)["it"] if isinstance(found, types.SimpleNamespace) else found
        return (
            found if isinstance(found, nn.Module) else next(iter(found.values() if isinstance(found, dict) else found))
        )

    def forward(self, x):
        with torch.no_grad():
            for theirs, ours in zip(self.teacher[0].parameters(), self.student.parameters(), strict=True):
                theirs.lerp_(ours, 0.1)
            target = self.teacher(x)
        return self.student(x) - target


HIDE = {
    "list": lambda model, teacher: setattr(model, "hidden", [teacher]),
    "tuple": lambda model, teacher: setattr(model, "hidden", (teacher,)),
    "dict": lambda model, teacher: setattr(model, "hidden", {"teacher": teacher}),
    "object": lambda model, teacher: setattr(model, "hidden", types.SimpleNamespace(it=teacher)),
    "namespace": lambda model, teacher: vars(model).update(hidden=teacher),
}


@each_form
@pytest.mark.parametrize("hide", HIDE)
def test_a_hidden_teacher_is_that_of_one_pass(form, hide):
    model = HiddenTeacher(HIDE[hide])
    once = copy.deepcopy(model)
    x = torch.randn(5, 3)
    once(x)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    FORMS[form](optimizer, lambda: model(x).square().mean())
    assert_same(model.teacher.state_dict(), once.teacher.state_dict())


@each_form
def test_a_hidden_part_that_another_optimizer_trains_keeps_the_gradient_of_one_pass(form):
    model = HiddenTeacher(HIDE["list"])
    model.scale = [nn.Linear(2, 2)]
    forward = model.forward
    model.forward = lambda x: model.scale[0](forward(x))
    once = copy.deepcopy(model)
    x = torch.randn(5, 3)
    once_forward = HiddenTeacher.forward
    once.scale[0](once_forward(once, x)).square().mean().backward()
    optimizer = samopt.SAM(torch.optim.SGD(model.student.parameters(), lr=0.1), rho=0.5, model=model)
    FORMS[form](optimizer, lambda: model(x).square().mean())
    torch.testing.assert_close(model.scale[0].weight.grad, once.scale[0].weight.grad, rtol=0, atol=0)


@each_form
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("is_method", [True, False])
def test_a_hook_with_state_counts_one_pass(form, kind, is_method):
    tally = Tally()
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    getattr(model[2], f"register_{kind}")(tally.hit if is_method else tally)
    step(model, form)
    assert tally.calls == 1


@each_form
@pytest.mark.parametrize("proxy", [lambda: weakref.proxy(OWNER), _dead_proxy], ids=["alive", "dead"])
def test_a_weak_proxy_in_a_module_is_left_alone(form, proxy):
    """Lightning gives modules proxies of their trainer and of each other."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    vars(model[0])["owner"] = proxy()  # as an attribute, torch would take it for a part
    step(model, form)
    assert type(vars(model[0])["owner"]) in weakref.ProxyTypes
