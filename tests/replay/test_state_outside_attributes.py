"""State of a forward in its class, in global generators, in scripted modules and in unusual tensors counts once."""

from __future__ import annotations

import copy
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt._replay.module_state import sample
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, watched_step

each_form = pytest.mark.parametrize("form", FORMS)
GENERATOR = torch.Generator()
PYTHONS = random.Random()
NUMPYS = np.random.default_rng()
X, Y = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def drawn_by_a_helper() -> float:
    return PYTHONS.random() + NUMPYS.random()


class Base(nn.Module):
    """Counts where all of its kind do."""

    count = 0
    calls: list[int] = []  # noqa: RUF012  # this is what is tested
    table: dict[str, int] = {}  # noqa: RUF012
    averages = torch.zeros(2)

    def tick(self) -> None:
        type(self).count += 1
        self.calls.append(len(self.calls))
        self.table["calls"] = self.table.get("calls", 0) + 1
        self.averages.add_(1)


class Shared(Base):
    """Draws from generators of its class and of its module."""

    own = torch.Generator()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        noise = torch.rand(x.shape, generator=GENERATOR, dtype=x.dtype) + torch.rand(1, generator=self.own)
        DRAWN.append(noise + drawn_by_a_helper())
        return self.layer(x * DRAWN[-1])


DRAWN: list[Tensor] = []


def start_anew() -> None:
    Shared.count = 0
    Base.calls.clear()
    Base.table.clear()
    Base.averages.zero_()
    DRAWN.clear()
    for each in (GENERATOR, Shared.own):
        each.manual_seed(0)
    PYTHONS.seed(0)
    NUMPYS.bit_generator.state = np.random.default_rng(0).bit_generator.state


def found() -> list[object]:
    states = [GENERATOR.get_state().tolist(), Shared.own.get_state().tolist(), PYTHONS.getstate()]
    counts = [Shared.count, list(Base.calls), dict(Base.table), Base.averages.tolist()]
    return [*counts, *states, NUMPYS.bit_generator.state]


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


@each_form
def test_class_attributes_and_generators_in_global_variables(form) -> None:
    torch.manual_seed(0)
    model = Shared().double()
    start_anew()
    loss_of(copy.deepcopy(model)).backward()
    want = found()

    start_anew()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    watched_step(model, optimizer, form, loss_of)
    assert len(DRAWN) == 2
    torch.testing.assert_close(DRAWN[0], DRAWN[1], rtol=0, atol=0)
    assert found() == want
    assert "count" not in vars(Base) or Base.count == 0


def test_class_attributes_come_back_after_a_pass_that_fails() -> None:
    torch.manual_seed(0)
    model = Shared().double()
    start_anew()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    loss_of(model).backward()
    want = found()
    with pytest.raises(RuntimeError, match="no luck"), optimizer.perturbed():
        model(X)
        raise RuntimeError("no luck")
    assert found() == want


def closed_over() -> nn.Module:
    generator, drawn = torch.Generator().manual_seed(0), []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.drawn = lambda: drawn

        def forward(self, x: Tensor) -> Tensor:
            drawn.append(torch.rand(x.shape, generator=generator, dtype=x.dtype))
            return self.layer(x * drawn[-1])

    return Net().double()


@each_form
def test_a_generator_of_the_function_that_made_the_class(form) -> None:
    model = closed_over()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    watched_step(model, optimizer, form, loss_of)
    first, second = model.drawn()
    assert torch.equal(first, second)


class Scripted(nn.Module):
    """A part that keeps a buffer, in place and by another tensor in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("average", torch.zeros(5))
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.last = x.detach().mean(0) + 0.5 * self.last
        return x * self.scale + 0.1 * self.last


@each_form
@pytest.mark.parametrize("whole", [False, True], ids=["a part", "the whole"])
def test_scripted_modules(form, whole) -> None:
    """By hand on the model that is not scripted."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 5), Scripted(), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    want = by_hand(plain, loss_of, [name for name, _ in plain.named_parameters()], 0.3)
    model = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls scripting deprecated
        if whole:
            model = torch.jit.script(model)
        else:
            model[1], model[2] = torch.jit.script(model[1]), torch.jit.script(model[2])
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    torch.manual_seed(0)
    FORMS[form](optimizer, lambda: loss_of(model))
    for name, p in plain.named_parameters():
        after = dict(model.named_parameters())[name]
        torch.testing.assert_close(after, p - 0.1 * want.gradients[name], rtol=1e-11, atol=1e-13)
    once = copy.deepcopy(plain)
    loss_of(once)
    for name, buffer in once.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=0, atol=0)


class Keeps(nn.Module):
    """Writes into a tensor of some layout through ``.data``, which leaves no trace in its version counter."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.kept = make()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.data.add_(1)
        return self.layer(x)


LAYOUTS = {
    "transposed": lambda: torch.zeros(100, 200).t(),
    "every second row": lambda: torch.zeros(200, 100)[::2],
    "channels last": lambda: torch.zeros(8, 16, 16, 16).contiguous(memory_format=torch.channels_last),
    "permuted": lambda: torch.zeros(30, 20, 10).permute(2, 0, 1),
    "conjugate": lambda: torch.zeros(10, dtype=torch.complex64).conj(),
    "negative": lambda: torch.zeros(10, dtype=torch.complex64).conj().imag,
    "large conjugate": lambda: torch.zeros(8000, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_form
def test_tensors_of_unusual_layouts(form, layout) -> None:
    torch.manual_seed(0)
    model = Keeps(LAYOUTS[layout]).double()
    want = by_hand(model, loss_of, ["layer.weight", "layer.bias"], 0.3)
    kept = model.kept
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    assert_leaves_no_trace(watched_step(model, optimizer, form, loss_of), want)
    assert model.kept is kept
    assert bool((kept == 1).all())


@pytest.mark.parametrize("layout", ["transposed", "every second row", "channels last", "permuted"])
def test_a_sample_of_any_layout_has_entries_all_over(layout) -> None:
    tensor = LAYOUTS[layout]()
    tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    entries = sample(tensor)
    assert 60 <= len(entries) <= 140
    assert len(set(entries.tolist())) == len(entries)
    assert entries.max() > 0.95 * tensor.numel()


def add_one(module: nn.Module, args: object) -> None:
    module.kept.add_(1)


@each_form
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor(form) -> None:
    model = nn.Linear(5, 3).double()
    model.kept = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    model.register_forward_pre_hook(add_one)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    watched_step(model, optimizer, form, loss_of)
    assert [part.tolist() for part in model.kept.unbind()] == [[1, 1], [1, 1, 1]]


class Key:
    """What a weak dictionary may have as a key or value."""


@each_form
@pytest.mark.parametrize("kind", [weakref.WeakKeyDictionary, weakref.WeakValueDictionary])
def test_weak_dictionaries(form, kind) -> None:
    keys = [Key(), Key()]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.seen = kind()

        def forward(self, x: Tensor) -> Tensor:
            if kind is weakref.WeakKeyDictionary:
                self.seen[keys[0]] = self.seen.get(keys[0], 0) + 1
            else:
                self.seen[len(self.seen)] = keys[len(self.seen)]
            return self.layer(x)

    model = Net().double()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    watched_step(model, optimizer, form, loss_of)
    assert list(model.seen.values()) == ([1] if kind is weakref.WeakKeyDictionary else keys[:1])
    keys.clear()
    assert len(model.seen) == 0
