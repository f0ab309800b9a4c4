"""Compiled models: nothing of ours recompiles them, and their steps are those of a loop that seeds each pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import samopt
from tests.helpers import cases
from tests.helpers.cases import two_pass_step, wrapped_step

# "inductor" needs a C++ compiler and takes a while; the other two see the same frames, guards and graph breaks.
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
VARIANTS = {"sam": (samopt.SAM, 0.3, None), "asam": (samopt.ASAM, 0.3, 0.01)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    """A class of its own: torch compiles no frame of an ``nn.Sequential`` that is compiled in place."""

    def __init__(self, dropout):
        super().__init__()
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5 if dropout else 0.0)]
        self.layers = nn.Sequential(*layers, nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


def build(dropout):
    torch.manual_seed(0)
    return Network(dropout)


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


def data(seed):
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))


def compile_it(inner, setup, backend):
    """Return what the loop calls and what it gives as ``model=``."""
    if setup == "in place":
        inner.compile(backend=backend, fullgraph=True)
        return inner, inner
    compiled = torch.compile(inner, backend=backend, fullgraph=True)
    return compiled, compiled if setup == "compiled" else inner


CASES = [
    ("compiled", "closure", "sam"),
    ("compiled", "explicit", "asam"),
    ("inner", "closure", "asam"),
    ("inner", "explicit", "sam"),
    ("in place", "closure", "sam"),
    ("in place", "explicit", "asam"),
]


@pytest.mark.parametrize("setup, form, variant", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_compiled_once_and_trains_as_a_seeded_loop(backend, setup, form, variant):
    wrap, rho, eta = VARIANTS[variant]
    dropout = form == "closure" or setup in (
        "compiled",
        "in place",
    )  # else it warns
    inner = build(dropout)
    counter = CompileCounterWithBackend(backend)
    called, given = compile_it(inner, setup, counter)
    optimizer = wrap(torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9), rho=rho, model=given)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def step(seed):
        torch.manual_seed(seed)
        optimizer.param_groups[0]["rho"] = rho / (1 + seed)
        wrapped_step(optimizer, [lambda: loss_of(called, data(seed))] * 2, form)
        scheduler.step()

    def interrupted():
        loss_of(called, data(9)).backward()
        raise KeyboardInterrupt

    passes_of_another_step = [lambda: loss_of(called, data(9)), interrupted]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the second pass drew")
        step(0)
        compiled_frames = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(1)
            saved = [b.clone() for b in inner.buffers()]
            with pytest.raises(KeyboardInterrupt):
                wrapped_step(optimizer, passes_of_another_step, form)
            torch._foreach_copy_(list(inner.buffers()), saved)  # the interrupted step is none of the oracle's
            step(2)
    assert counter.frame_count == compiled_frames == 1
    assert not counters["graph_break"]

    twin = build(dropout)
    stock = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    run = torch.compile(twin) if backend == "inductor" else twin  # inductor draws other masks than eager torch does
    plain = torch.optim.lr_scheduler.StepLR(stock, 1, gamma=0.5)

    def seeded(seed):
        torch.manual_seed(seed)
        return loss_of(run, data(seed))

    for seed in range(3):
        first, after = [b.clone() for b in twin.buffers()], []

        def first_pass(seed=seed, after=after):
            loss = seeded(seed)
            after.extend(b.clone() for b in twin.buffers())
            return loss

        rhos = [rho / (1 + seed)] * len(list(twin.parameters()))
        two_pass_step(stock, [first_pass, lambda seed=seed: seeded(seed)], rhos, eta)
        plain.step()
        torch._foreach_copy_(list(twin.buffers()), after)
        assert not torch.equal(first[0], after[0])
    exact = {"rtol": 2e-5, "atol": 2e-6}  # fp32 with two chances to round differently, three steps long
    torch.testing.assert_close(list(inner.parameters()), list(twin.parameters()), **exact)
    torch.testing.assert_close(list(inner.buffers()), list(twin.buffers()), **exact)


@pytest.mark.parametrize("setup", ["inner", "in place, later"])
def test_masks_that_cannot_be_replayed_are_announced_once(setup):
    inner = build(dropout=True)
    called, given = (inner, inner) if setup == "in place, later" else compile_it(inner, setup, "eager")
    optimizer = samopt.SAM(torch.optim.SGD(inner.parameters(), lr=0.1), model=given)
    if setup == "in place, later":  # torch keeps the compiled call where the optimizer follows the model's calls
        inner.compile(backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="Give model= the module that your loop calls") as caught:
        for seed in range(2):
            wrapped_step(optimizer, [lambda seed=seed: loss_of(called, data(seed))] * 2, "explicit")
    ours = [w.filename for w in caught if "Give model=" in str(w.message)]  # the compiler may have some of its own
    assert ours == [cases.__file__]  # the loop is there


def test_an_eager_model_gets_no_such_warning(recwarn):
    model = build(dropout=True)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for form in ("closure", "explicit"):
        wrapped_step(optimizer, [lambda: loss_of(model, data(0))] * 2, form)
    frozen = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    loss_of(model.layers[0], data(0)).backward()  # a part of the model, without random numbers
    with frozen.perturbed():
        loss_of(model.layers[0], data(0)).backward()
    assert not recwarn.list


@pytest.mark.parametrize("kind", [samopt.SAM, samopt.MomentumSAM])
def test_a_compiled_step_of_the_base_calls_the_closure_uncompiled(kind):
    weights = []
    for is_compiled in (True, False):
        model = build(dropout=True).double()
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model)
        if is_compiled:
            base = optimizer.base_optimizer
            base.step = torch.compile(base.step, backend="eager")

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, data(0).double())
            loss.backward()
            return loss

        torch.manual_seed(0)
        losses = [optimizer.step(closure).item() for _ in range(3)]
        weights.append((losses, [p.detach() for p in model.parameters()], torch.get_rng_state()))
    cases.assert_same(*weights)


FORMS_OF_A_STEP = ["perturbed", "backward", "closure"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS_OF_A_STEP)
def test_a_compiled_training_step_is_the_uncompiled_one(form):
    """The parts that cannot be compiled run as they are: a graph break, and no other result."""
    weights = []
    for is_compiled in (True, False):
        model = build(dropout=form != "perturbed").double()
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, model=model)

        def train_step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            if form == "perturbed":
                loss = loss_of(model, x)
                loss.backward()
                with optimizer.perturbed(loss):
                    loss_of(model, x).backward()
                optimizer.step()
            elif form == "backward":
                loss = optimizer.backward(lambda: loss_of(model, x))
                optimizer.step()
            else:

                def closure():
                    optimizer.zero_grad()
                    loss = loss_of(model, x)
                    loss.backward()
                    return loss

                loss = optimizer.step(closure)
            return loss

        run = torch.compile(train_step, backend="eager") if is_compiled else train_step
        for seed in range(3):
            torch.manual_seed(seed)
            run(data(seed).double())
        weights.append([*model.parameters(), *model.buffers()])
        assert not optimizer.is_perturbed
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_step_whose_masks_cannot_be_repeated_is_refused_and_leaves_exact_weights():
    """The calls of the model before ``perturbed()`` are compiled there, so nobody can know the numbers they drew."""
    model = build(dropout=True)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)

    def train_step(x):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        with optimizer.perturbed(loss):
            loss_of(model, x).backward()
        optimizer.step()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="Compile the model or the function that computes the loss"):
        torch.compile(train_step, backend="eager")(data(0))
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.is_perturbed and all(parameter.grad is None for parameter in model.parameters())
    train_step(data(0))  # as it is, the same step is right
