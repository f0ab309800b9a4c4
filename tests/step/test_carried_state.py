"""Loss functions that carry a state from one call to the next, outside every module of ``model=``."""

from __future__ import annotations

import copy
import functools
import queue
import types
import weakref

import pytest
import torch
from torch import nn

import samopt
from samopt.parts.direction import ReusedGradient
from tests.helpers.cases import sam_epsilon, second_gradient
from tests.helpers.two_passes import FORMS

DOUBLE = torch.float64
RHO = 0.4
LR = 0.2
STEPS = 3


class Recurrent(nn.Module):
    """Reads a hidden state and returns the next one beside its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(4, 5, dtype=DOUBLE), nn.Linear(5, 3, dtype=DOUBLE)

    def forward(self, x, hidden):
        hidden = self.cell(x, hidden)
        return self.head(hidden), hidden


def batch(number):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number), dtype=DOUBLE)


def loss_and_hidden(model, x, hidden):
    output, hidden = model(x, hidden)
    return nn.functional.cross_entropy(output, torch.arange(6) % 3), hidden.detach()


def zeros():
    return torch.zeros(6, 5, dtype=DOUBLE)


def trained_by_hand(windows):
    """Weights, hidden state and losses of loops whose second pass begins with the hidden state of the first."""
    model, hidden, losses = Recurrent(), zeros(), []
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for window in windows:
        ends = []

        def one_pass(window=window, start=hidden, ends=ends):
            total, state = 0.0, start
            for number in window:
                loss, state = loss_and_hidden(model, batch(number), state)
                total = total + loss
            ends.append(state)
            total.backward()
            return total

        losses.append(second_gradient(list(model.parameters()), one_pass, sam_epsilon, RHO)[0])
        hidden = ends[0]
        base.step()
    return [p.detach() for p in model.parameters()], hidden, losses


def variable(model):
    hidden = zeros()

    def compute(x):
        nonlocal hidden
        loss, hidden = loss_and_hidden(model, x, hidden)
        return loss

    return compute, lambda: hidden


def global_variable(model):
    space = {"model": model, "hidden": zeros(), "loss_and_hidden": loss_and_hidden}
    exec(
        "def compute(x):\n    global hidden\n    loss, hidden = loss_and_hidden(model, x, hidden)\n    return loss",
        space,
    )
    return space["compute"], lambda: space["hidden"]


def variable_of_a_helper(model):
    compute, hidden = variable(model)
    return (lambda x: compute(x) * 1.0), hidden


class Trainer:
    def __init__(self, model):
        self.model, self.hidden = model, zeros()

    def compute(self, x):
        loss, self.hidden = loss_and_hidden(self.model, x, self.hidden)
        return loss


def attribute(model):
    trainer = Trainer(model)
    return trainer.compute, lambda: trainer.hidden


class Slotted:
    __slots__ = ("hidden",)


def slot(model):
    held = Slotted()
    held.hidden = zeros()

    def compute(x):
        loss, held.hidden = loss_and_hidden(model, x, held.hidden)
        return loss

    return compute, lambda: held.hidden


def entry_of_a_dict(model):
    state = types.SimpleNamespace(memory={"hidden": (zeros(),)})

    def compute(x):
        loss, hidden = loss_and_hidden(model, x, *state.memory["hidden"])
        state.memory["hidden"] = (hidden,)
        return loss

    return compute, lambda: state.memory["hidden"][0]


def name_that_is_not_there_at_first(model):
    state = {}

    def compute(x):
        loss, state["hidden"] = loss_and_hidden(model, x, state.get("hidden", zeros()))
        return loss

    return compute, lambda: state["hidden"]


PLACES = [
    variable,
    global_variable,
    variable_of_a_helper,
    attribute,
    slot,
    entry_of_a_dict,
    name_that_is_not_there_at_first,
]


@pytest.mark.parametrize("form", ["backward", "closure", "window"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hidden_state_is_carried_on_from_the_first_pass(place, form):
    model = Recurrent()
    compute, hidden = place(model)
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = samopt.SAM(base, rho=RHO, model=model)
    windows = [[3 * i, 3 * i + 1, 3 * i + 2] if form == "window" else [i] for i in range(STEPS)]
    losses = []
    for window in windows:
        if form == "window":
            optimizer.zero_grad()
            for number in window:
                optimizer.backward(functools.partial(compute, batch(number)), last=number == window[-1])
            losses.append(optimizer.last_step.loss)
            optimizer.step()
        else:
            FORMS[form](optimizer, functools.partial(compute, batch(window[0])))
            losses.append(optimizer.last_step.loss)
    weights, wanted_hidden, wanted_losses = trained_by_hand(windows)
    for found, wanted in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden(), wanted_hidden, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(losses, wanted_losses, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_a_base_that_calls_its_closure_itself_carries_the_state_as_the_loop_by_hand_does():
    def train(optimizer, model, passes):
        state = {"hidden": zeros()}

        def closure():
            optimizer.zero_grad()
            loss, state["hidden"] = loss_and_hidden(model, batch(0), state["hidden"])
            loss.backward()
            return loss

        optimizer.step(passes(closure, state))
        return [p.detach() for p in model.parameters()], state["hidden"]

    def both(closure, state):
        def oracle():
            start = state["hidden"]

            def one_pass():
                state["hidden"] = start
                loss = closure()
                ends.append(state["hidden"])
                return loss

            ends = []
            second = second_gradient(list(theirs.parameters()), one_pass, sam_epsilon, RHO)[1]
            state["hidden"] = ends[0]
            return second

        return oracle

    ours, theirs = Recurrent(), Recurrent()
    lbfgs = functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
    found = train(samopt.SAM(lbfgs(ours.parameters()), rho=RHO, model=ours), ours, lambda closure, _: closure)
    wanted = train(lbfgs(theirs.parameters()), theirs, both)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["backward", "closure"])
def test_what_a_function_keeps_for_the_log_is_the_first_passs(form):
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    calls, outputs, perturbed = 0, None, None

    def compute():
        nonlocal calls, outputs, perturbed
        calls += 1
        outputs, _ = model(batch(0), zeros())
        if optimizer.is_perturbed:
            perturbed = outputs
        return nn.functional.cross_entropy(outputs, torch.arange(6) % 3)

    for step in range(2):
        wanted = copy.deepcopy(model)(batch(0), zeros())[0]
        FORMS[form](optimizer, compute)
        assert calls == step + 1
        assert torch.equal(outputs, wanted)
        assert not torch.equal(perturbed, wanted)  # bound by the second pass alone, so it is left alone
        perturbed = None


def test_a_list_that_a_function_appends_to_sees_both_passes():
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    losses = []

    def compute():
        loss, _ = loss_and_hidden(model, batch(0), zeros())
        losses.append(loss.item())
        return loss

    optimizer.backward(compute)
    found = optimizer.last_step
    assert losses == [found.loss.item(), found.perturbed_loss.item()]


def test_a_closure_may_change_the_model_after_it_has_cleared_the_gradients():
    class Cooling(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.temperature = nn.Linear(4, 3, dtype=DOUBLE), 1.0

        def forward(self, x):
            return self.layer(x) / self.temperature

    def loss_of(model):
        model.temperature *= 0.5
        return nn.functional.cross_entropy(model(batch(0)), torch.arange(6) % 3)

    model, twin = Cooling(), Cooling()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    base = torch.optim.SGD(twin.parameters(), lr=LR)
    for step in range(STEPS):
        FORMS["closure"](optimizer, lambda: loss_of(model))

        def one_pass(step=step):
            twin.temperature = 0.5**step
            loss = loss_of(twin)
            loss.backward()
            return loss

        second_gradient(list(twin.parameters()), one_pass, sam_epsilon, RHO)
        base.step()
        assert model.temperature == twin.temperature
        for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


QUEUES = {
    "variable": (lambda held: held.queue, "'queue'"),
    "list": (lambda held: [held.queue], r"'queue\[0\]'"),
    "attribute": (lambda held: held, "an attribute"),
}


@pytest.mark.parametrize("form", ["backward", "closure", "window"])
@pytest.mark.parametrize("kind", QUEUES)
def test_a_tensor_that_a_function_writes_in_place_is_as_after_the_first_pass(kind, form):
    model, held = Recurrent(), types.SimpleNamespace(queue=zeros())
    make, name = QUEUES[kind]
    queue = make(held)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)

    def compute(x):
        loss, hidden = loss_and_hidden(model, x, zeros())
        tensor = queue if kind == "variable" else queue[0] if kind == "list" else queue.queue
        tensor.copy_(tensor.roll(1, 0) + hidden)
        return loss

    wanted = zeros()
    with pytest.warns(UserWarning, match=f"wrote in place into {name}, a torch.float64 tensor of shape .6, 5") as said:
        for step in range(STEPS):
            numbers = [2 * step, 2 * step + 1] if form == "window" else [step]
            for number in numbers:
                wanted = wanted.roll(1, 0) + loss_and_hidden(model, batch(number), zeros())[1]
            if form == "window":
                optimizer.zero_grad()
                optimizer.backward(functools.partial(compute, batch(numbers[0])), last=False)
                optimizer.backward(functools.partial(compute, batch(numbers[1])))
                optimizer.step()
            else:
                FORMS[form](optimizer, functools.partial(compute, batch(step)))
            torch.testing.assert_close(held.queue, wanted, rtol=1e-12, atol=1e-14)
    assert len(said) == 1


@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize("part", ["whole", "one gradient"])
def test_gradients_in_memory_that_a_function_names_are_the_second_passs(part, form):
    def train(optimizer, model, step):
        flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=DOUBLE)
        for p, place in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = place.view_as(p)
        named = flat if part == "whole" else model.head.weight.grad

        def compute(x):
            flat.zero_()  # in a closure it is the place for this
            assert named.count_nonzero() == 0
            return loss_and_hidden(model, x, zeros())[0]

        for number in range(STEPS):
            step(optimizer, functools.partial(compute, batch(number)))
        return [p.detach() for p in model.parameters()]

    def ours(optimizer, compute):
        if form == "closure":

            def closure():
                loss = compute()
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            optimizer.zero_grad(set_to_none=False)
            optimizer.backward(compute)
            optimizer.step()

    def by_hand(optimizer, compute):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        second_gradient(parameters, lambda: (loss := compute()).backward() or loss, sam_epsilon, RHO)
        optimizer.step()

    model, twin = Recurrent(), Recurrent()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    found = train(samopt.SAM(base, rho=RHO, model=model), model, ours)
    wanted = train(torch.optim.SGD(twin.parameters(), lr=LR, momentum=0.9), twin, by_hand)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["backward", "closure"])
def test_tensors_of_inference_mode_among_the_variables_are_no_obstacle(form):
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    with torch.inference_mode():
        scale = torch.ones((), dtype=DOUBLE)
    FORMS[form](optimizer, lambda: loss_and_hidden(model, batch(0), zeros())[0] * scale.item())


@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_the_state_is_the_first_passs_after_a_second_pass_that_fails(error, form):
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    trainer = Trainer(model)

    def compute():
        loss = trainer.compute(batch(0))
        if optimizer.is_perturbed:
            raise error
        return loss

    _, wanted = loss_and_hidden(copy.deepcopy(model), batch(0), zeros())
    with pytest.raises(error):
        FORMS[form](optimizer, compute)
    assert torch.equal(trainer.hidden, wanted)


def test_nothing_is_held_after_the_step():
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)

    def step():
        trainer, x = Trainer(model), batch(0)
        optimizer.backward(lambda: trainer.compute(x))
        return [weakref.ref(x), weakref.ref(trainer.hidden), weakref.ref(trainer)]

    assert [each() for each in step()] == [None] * 3


def test_a_queue_that_is_filled_by_another_thread_is_left_alone():
    model = Recurrent()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    waiting = queue.Queue()
    waiting.put(0)
    waiting.put(1)

    def compute():
        loss, _ = loss_and_hidden(model, batch(waiting.get(timeout=1)), zeros())
        if optimizer.is_perturbed:
            waiting.put(2)  # as a loader's thread does at any time
        return loss

    optimizer.backward(compute)
    assert list(waiting.queue) == [2]


class Judge(nn.Module):
    """A network of another optimizer, with statistics, a counter, dropout, and trained parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.dropout = nn.BatchNorm1d(3, dtype=DOUBLE), nn.Dropout(0.3)
        self.head = nn.Linear(3, 1, dtype=DOUBLE)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.dropout(self.norm(x))) / self.calls

    def score(self, maker, x):
        return nn.functional.softplus(-self(maker(x))).mean()


def maker():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, dtype=DOUBLE), nn.Tanh(), nn.Linear(5, 3, dtype=DOUBLE))


class Adversaries:
    def __init__(self, maker, judge):
        self.maker, self.nets = maker, [{"judge": judge}]

    def loss(self, x):
        return self.nets[0]["judge"].score(self.maker, x)


def with_default(maker, judge):
    def compute(x, judge=judge):
        return judge.score(maker, x)

    return compute


REACHED = {
    "variable": lambda maker, judge: lambda x: judge.score(maker, x),
    "object": lambda maker, judge: Adversaries(maker, judge).loss,
    "default value": with_default,
    "method of the module": lambda maker, judge: functools.partial(judge.score, maker),
    "partial": lambda maker, judge: functools.partial(Judge.score, judge, maker),
}


@pytest.mark.parametrize("given", ["its own network", "no model"])
@pytest.mark.parametrize("form", ["backward", "closure"])
@pytest.mark.parametrize("way", REACHED)
def test_a_network_outside_model_is_as_after_the_first_pass(way, form, given):
    ours, judge, theirs, their_judge = maker(), Judge(), maker(), Judge()
    base = torch.optim.SGD(ours.parameters(), lr=LR)
    optimizer = samopt.SAM(base, rho=RHO, model=ours if given == "its own network" else None)
    their_base = torch.optim.SGD(theirs.parameters(), lr=LR)
    compute = REACHED[way](ours, judge)
    for step in range(STEPS):
        x, before, passes = batch(step), copy.deepcopy(their_judge), []

        def one_pass(x=x, before=before, passes=passes):
            # The second pass finds the first one's averages, which training does not read, and the counter before it.
            passes.append(copy.deepcopy(before))
            torch.manual_seed(10)
            loss = passes[-1].score(theirs, x)
            loss.backward()
            return loss

        second_gradient(list(theirs.parameters()), one_pass, sam_epsilon, RHO)
        their_base.step()
        their_judge = passes[0]

        torch.manual_seed(10)
        for p in judge.parameters():
            p.grad = None
        FORMS[form](optimizer, functools.partial(compute, x))
        for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        assert judge.calls == their_judge.calls
        for found, wanted in zip(judge.buffers(), their_judge.buffers(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        for found, wanted in zip(judge.parameters(), their_judge.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)
        for p in their_judge.parameters():
            p.grad = None


@pytest.mark.parametrize("form", ["backward", "closure"])
def test_the_pass_for_a_reused_direction_carries_nothing_on(form):
    def run(direction):
        model, judge, calls = maker(), Judge(), {"calls": 0}
        base = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer = samopt.SAM(base, rho=RHO, direction=direction, model=model) if direction else base

        def compute():
            calls["calls"] += 1
            return judge.score(model, batch(0)) * calls["calls"]

        torch.manual_seed(5)
        for _ in range(STEPS):
            if direction:
                FORMS[form](optimizer, compute)
            else:  # without the pass, at w: what is left of the plain step alone
                optimizer.zero_grad()
                compute().backward()
                optimizer.step()
        return judge.calls, calls["calls"], int(judge.norm.num_batches_tracked), torch.rand(())

    assert run(ReusedGradient(every=1)) == run(None)
