"""Parameters that the optimizer does not own keep the gradients of the first pass, never the sum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, watched_step

each_form = pytest.mark.parametrize("form", FORMS)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(self.norm(torch.tanh(self.body(x)))))


def loss_on(seed):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda model: nn.functional.cross_entropy(model(x), torch.arange(10) % 3)


@each_form
@pytest.mark.parametrize("before", ["none", "accumulated", "zeros"])
@pytest.mark.parametrize("owned", ["body", "head", "norm"])
def test_others_keep_the_first_passs_gradients(owned, before, form):
    model = Network().double()
    parameters = list(getattr(model, owned).parameters())
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.4, model=model)
    names = [name for name, _ in model.named_parameters() if name.startswith(owned)]
    for p in model.parameters():
        if before != "none" and p.requires_grad and not any(p is each for each in parameters):
            p.grad = torch.full_like(p, 0.5) if before == "accumulated" else torch.zeros_like(p)
    for seed in range(3):  # no one clears the others' in between, so they add up over steps
        want = by_hand(model, loss_on(seed), names, 0.4)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed)), want)


@each_form
def test_others_keep_what_they_had_after_a_failed_second_pass(form):
    model = Network().double()
    optimizer = samopt.SAM(torch.optim.SGD(model.body.parameters(), lr=0.1), rho=0.4, model=model)
    first = copy.deepcopy(model)
    loss_on(0)(first).backward()

    def failing(each):
        loss = loss_on(0)(each)
        if optimizer.is_perturbed:
            loss.backward()
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        watched_step(model, optimizer, form, failing)
    if form == "first_step":  # it has no context that would end the pass
        optimizer.restore()
        optimizer.zero_grad()
    for part in ("norm", "head"):
        for ours, theirs in zip(getattr(model, part).parameters(), getattr(first, part).parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for p in model.body.parameters())
    optimizer.zero_grad()
    model.zero_grad()
    names = [name for name, _ in model.named_parameters() if name.startswith("body")]
    want = by_hand(model, loss_on(1), names, 0.4)
    assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(1)), want)


@each_form
def test_two_optimizers_share_a_loss(form):
    """As Muon users have it: matrices in one, the rest in another that is plain."""
    ours, theirs = Network().double(), Network().double()

    def split(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]

    matrices, rest = split(ours)
    optimizer = samopt.SAM(torch.optim.SGD(matrices, lr=0.1, momentum=0.9), rho=0.4, model=ours)
    plain = torch.optim.AdamW(rest, lr=0.01)
    their_matrices, their_rest = split(theirs)
    base = torch.optim.SGD(their_matrices, lr=0.1, momentum=0.9)
    their_plain = torch.optim.AdamW(their_rest, lr=0.01)
    names = [name for name, p in theirs.named_parameters() if p.dim() > 1 and p.requires_grad]
    for seed in range(4):
        plain.zero_grad()
        FORMS[form](optimizer, lambda seed=seed: loss_on(seed)(ours))
        plain.step()
        theirs.zero_grad()
        want = by_hand(theirs, loss_on(seed), names, 0.4)
        for name, p in theirs.named_parameters():
            p.grad = want.gradients[name]
        base.step()
        their_plain.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_two_wrapped_optimizers_share_a_loss():
    model = Network().double()
    body = samopt.SAM(torch.optim.SGD(model.body.parameters(), lr=0.1), rho=0.4, model=model)
    head = samopt.ASAM(torch.optim.SGD(model.head.parameters(), lr=0.1), rho=0.7, model=model)
    names = [name for name, _ in model.named_parameters() if name.startswith("body")]
    want = by_hand(model, loss_on(0), names, 0.4)
    loss_on(0)(model).backward()
    first = [p.grad.clone() for p in model.head.parameters()]
    with body.perturbed():
        loss_on(0)(model).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.head.parameters(), first, strict=True))
    second = [p.grad.clone() for p in model.body.parameters()]
    with head.perturbed():
        loss_on(0)(model).backward()
    for name, p in model.body.named_parameters():
        torch.testing.assert_close(p.grad, want.gradients[f"body.{name}"], rtol=1e-11, atol=1e-13)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.body.parameters(), second, strict=True))
    body.step()
    head.step()


@pytest.mark.parametrize("given", ["model", "list"])
def test_a_list_of_models_covers_a_loss_module_with_parameters_and_state(given):
    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.ones(3, 3))
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, outputs, y):
            self.seen += 1
            self.calls += 1
            return (outputs - self.centres[y]).square().mean()

    class Both(nn.Module):
        def __init__(self, network, criterion):
            super().__init__()
            self.network, self.criterion = network, criterion

        def forward(self, x, y):
            return self.criterion(self.network(x), y)

    both = Both(Network(), Centres()).double()
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    optimizer = samopt.SAM(
        torch.optim.SGD(both.network.body.parameters(), lr=0.1),
        rho=0.4,
        model=[both.network, both.criterion] if given == "list" else both,
    )
    names = [name for name, _ in both.named_parameters() if name.startswith("network.body")]

    def compute_loss(each):
        return each.criterion(each.network(x), torch.arange(10) % 3)

    want = by_hand(both, compute_loss, names, 0.4)
    assert_leaves_no_trace(watched_step(both, optimizer, "perturbed", compute_loss), want)


@pytest.mark.parametrize("form", ["backward", "closure", "perturbed"])
def test_without_a_model_the_others_keep_the_first_passs_gradients_too(form):
    """What the loss depends on is known from its graph."""
    model = Network().double()
    optimizer = samopt.SAM(torch.optim.SGD(model.body.parameters(), lr=0.1), rho=0.4)
    names = [name for name, _ in model.named_parameters() if name.startswith("body")]
    for seed in range(3):
        want = by_hand(model, loss_on(seed), names, 0.4)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed)), want)


def test_parameters_that_get_no_gradients_get_none_from_the_second_pass():
    model = Network().double()
    body = list(model.body.parameters())
    optimizer = samopt.SAM(torch.optim.SGD(body, lr=0.1), rho=0.4)
    loss = loss_on(0)(model)
    loss.backward(inputs=body)
    with optimizer.perturbed(loss):
        loss_on(0)(model).backward(inputs=body)
    others = [p for p in model.parameters() if all(p is not mine for mine in body)]
    assert others and all(p.grad is None for p in others)


@pytest.mark.parametrize("form", ["backward", "closure", "perturbed"])  # first_step is not told the loss
@pytest.mark.parametrize("leaf", ["perturbation of the inputs", "tensor of a loss", "module outside model="])
def test_leaves_that_belong_to_no_model_keep_the_gradient_of_the_first_pass(form, leaf):
    """Free adversarial training reads the inputs' gradient; a learned temperature is a tensor of the loss."""
    torch.manual_seed(0)
    model, outside = nn.Linear(3, 2), nn.Linear(2, 2)
    x, delta, scale = torch.randn(6, 3), torch.zeros(6, 3, requires_grad=True), torch.ones((), requires_grad=True)

    def compute():
        out = model(x + delta) * scale
        return (outside(out) if leaf == "module outside model=" else out).square().mean()

    leaves = [delta, scale, *(outside.parameters() if leaf == "module outside model=" else ())]
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    for _ in range(2):
        wanted = torch.autograd.grad(compute(), leaves)
        for each in leaves:
            each.grad = None
        FORMS[form](optimizer, compute)
        for each, gradient in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(each.grad, gradient, rtol=1e-6, atol=1e-8)
