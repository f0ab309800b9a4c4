"""Modules and gradients that belong to no ``model=``: what the function that computes the loss reads counts once."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import assert_same
from tests.helpers.two_passes import FORMS, by_hand, state_of

RHO, LR = 0.4, 0.1
with_function = pytest.mark.parametrize("form", ["backward", "closure"])


class Balanced(nn.Module):
    """A loss with a running mean, a count, a history, a generator, and a weight that another optimizer trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.calls, self.last, self.history = 0, None, []
        self.noise = torch.Generator().manual_seed(3)

    def forward(self, logits, labels):
        self.calls += 1
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * logits.mean(0)  # replaced: the second pass starts from the old one
        self.history.append(float(self.mean[0]))
        self.last = logits.detach()
        noise = torch.randn(logits.shape, generator=self.noise, dtype=logits.dtype)
        return nn.functional.cross_entropy((logits - self.mean + 0.1 * noise) * self.scale, labels)


class Both(nn.Module):
    """What the oracle trains a copy of: the model, a loss with state, and a teacher whose averages move."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.criterion = Balanced()
        self.teacher = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=0.3)).double().requires_grad_(False)


def loss_of(network, criterion, teacher, seed):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    soft = teacher(x).softmax(1)
    logits = network(x)
    return criterion(logits, torch.arange(10) % 3) - (soft * logits.log_softmax(1)).sum(1).mean()


class Script:
    """A training script written as a class, with a list of teachers."""

    def __init__(self, both, seed):
        self.network, self.parts, self.seed = both.network, {"criterion": both.criterion}, seed
        self.teachers = [both.teacher]

    def loss(self):
        return loss_of(self.network, self.parts["criterion"], self.teachers[0], self.seed)

    __call__ = loss


def from_variables(both, seed):
    network, criterion, teacher = both.network, both.criterion, both.teacher
    return lambda: loss_of(network, criterion, teacher, seed)


REACH = {
    "variables": from_variables,
    "a bound method": lambda both, seed: Script(both, seed).loss,
    "an object that is called": Script,
    "a partial": lambda both, seed: functools.partial(loss_of, both.network, both.criterion, both.teacher, seed=seed),
}  # fmt: skip


def check_steps(both, optimizer, form, reach, steps=3):
    """Take steps, and compare every weight, buffer, attribute and gradient with those of two passes by hand."""
    owned = [name for name, _ in both.named_parameters() if name.startswith("network.")]
    for seed in range(steps):
        want = by_hand(both, lambda each, seed=seed: REACH["variables"](each, seed)(), owned, RHO)
        weights = {name: p.detach().clone() for name, p in both.named_parameters()}
        torch.manual_seed(0)
        FORMS[form](optimizer, REACH[reach](both, seed))
        found = state_of(both)
        for name in owned:
            torch.testing.assert_close(found.pop(name), weights[name] - LR * want.gradients[name])
            del want.state[name]
        assert_same(found, want.state)
        torch.testing.assert_close(both.criterion.scale.grad, want.gradients["criterion.scale"])


@with_function
@pytest.mark.parametrize("given", [True, False], ids=["model", "no model"])
@pytest.mark.parametrize("reach", REACH)
def test_modules_that_the_loss_function_reads_count_once(reach, given, form):
    both = Both()
    model = {"model": both.network} if given else {}
    optimizer = samopt.SAM(torch.optim.SGD(both.network.parameters(), lr=LR), rho=RHO, **model)
    check_steps(both, optimizer, form, reach)
    assert both.criterion.calls == 3 and both.network[1].num_batches_tracked == 3


def test_a_window_counts_each_micro_batch_once():
    ours, theirs = Both(), Both()
    optimizer = samopt.SAM(torch.optim.SGD(ours.network.parameters(), lr=LR), rho=RHO, model=ours.network)
    optimizer.backward(REACH["variables"](ours, 0), last=False)
    optimizer.backward(REACH["variables"](ours, 1))
    for seed in (0, 1):
        REACH["variables"](theirs, seed)().backward()
    assert_same(state_of(ours), state_of(theirs))  # before the step, the weights are back
    torch.testing.assert_close(ours.criterion.scale.grad, theirs.criterion.scale.grad)


def test_the_generators_step_leaves_the_discriminator_as_one_pass_does():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    critic = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1)).double()
    z = torch.randn(9, 4, dtype=torch.float64)
    once, judge = copy.deepcopy(generator), copy.deepcopy(critic)
    optimizer = samopt.ASAM(torch.optim.Adam(generator.parameters()), rho=0.5, model=generator)
    torch.manual_seed(5)
    optimizer.backward(lambda: -critic(generator(z)).mean())
    optimizer.step()
    torch.manual_seed(5)
    (-judge(once(z)).mean()).backward()
    for name, value in judge.state_dict().items():
        assert_same(critic.state_dict()[name], value)
    for ours, theirs in zip(critic.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_module_is_looked_after_for_as_long_as_it_is_read():
    both = Both()
    optimizer = samopt.SAM(torch.optim.SGD(both.network.parameters(), lr=LR), rho=RHO, model=both.network)
    optimizer.backward(REACH["variables"](both, 0))
    optimizer.step()
    x = torch.randn(10, 6, dtype=torch.float64)
    loss = both.network(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    with optimizer.perturbed(loss):
        both.teacher(x)  # of another loop: nothing says that it belongs to this pass
        both.network(x).square().mean().backward()
    assert both.teacher[1].num_batches_tracked == 2


@pytest.mark.parametrize("given", [True, False], ids=["model", "no model"])
@pytest.mark.parametrize("form", ["backward", "closure", "perturbed"])
def test_gradients_of_an_input_that_is_attacked_later_on_are_the_first_passs(form, given):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    model = {"model": network} if given else {}
    optimizer = samopt.SAM(torch.optim.SGD(network.parameters(), lr=LR), rho=RHO, **model)

    def compute_loss():
        return nn.functional.cross_entropy(network(x), torch.arange(10) % 3)

    FORMS[form](optimizer, compute_loss)
    x.requires_grad_()  # the same code, and one more leaf
    (want,) = torch.autograd.grad(compute_loss(), x)
    FORMS[form](optimizer, compute_loss)
    torch.testing.assert_close(x.grad, want)
