"""``reuse_trunk=True``: the trunk runs once, and the result is that of two full passes, bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import samopt
from samopt.parts import Friendly, Momentum, SurrogateGap
from tests.helpers.cases import BASES, assert_same, batch, loss_of, norms


class Network(nn.Module):
    """BatchNorm and dropout in the trunk."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = norms()[:5]
        self.fc = nn.Linear(8, 3) if head is None else head

    def forward(self, x):
        return self.fc(self.trunk(x))


def make(kind=samopt.SAM, head=None, only=r"^fc\.", base="sgd-momentum", **options):
    torch.manual_seed(0)
    model = Network(copy.deepcopy(head))
    radius = {} if kind is samopt.LESAM else {"rho": 0.3}
    return model, kind(BASES[base](model.parameters()), model=model, only=only, **radius, **options)


def step(model, optimizer, number, loss=loss_of, clear=True):
    torch.manual_seed(number)
    if clear:
        optimizer.zero_grad()
    data = batch(seed=number)
    result = optimizer.backward(lambda: loss(model, data))
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    drawn = torch.rand(3)
    optimizer.step()
    return result.detach(), gradients, drawn


def with_dropout_after(model, data):
    """A loss that draws numbers before and after the model's call, and uses the weights besides."""
    x, y = data
    logits = model(x + 0.1 * torch.randn_like(x))
    penalty = sum(p.square().sum() for p in model.parameters())
    return nn.functional.cross_entropy(nn.functional.dropout(logits, 0.2), y) + 1e-3 * penalty


HEADS = {
    "linear": nn.Linear(8, 3),
    "deep": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)),
}


@pytest.mark.parametrize("loss", [loss_of, with_dropout_after])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", [samopt.SAM, samopt.ASAM, samopt.FisherSAM, samopt.FriendlySAM, samopt.LESAM])
def test_the_result_is_that_of_two_full_passes(kind, head, loss):
    model, optimizer = make(kind, HEADS[head], reuse_trunk=True)
    expected_model, expected = make(kind, HEADS[head])
    for number in range(4):
        got, want = step(model, optimizer, number, loss), step(expected_model, expected, number, loss)
        assert_same(got, want)
        assert_same(model.state_dict(), expected_model.state_dict())
        assert_same(optimizer.last_step.to_dict(), expected.last_step.to_dict())
        assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


def test_the_trunk_runs_once_and_the_head_twice():
    model, optimizer = make(reuse_trunk=True)
    runs = []
    model.trunk.register_forward_pre_hook(lambda *_: runs.append("trunk"))
    model.fc.register_forward_pre_hook(lambda *_: runs.append("fc"))
    step(model, optimizer, 0)
    assert runs == ["trunk", "fc", "fc"]
    assert "forward" not in vars(model)


def test_a_sequential_and_a_wrapped_model():
    torch.manual_seed(0)
    nets = [norms(), norms()]
    nets[1].load_state_dict(nets[0].state_dict())
    outer = [nn.ModuleDict({"net": net}) for net in nets]  # the loss calls the module inside model=
    made = [
        samopt.SAM(BASES["adamw"](model.parameters()), rho=0.3, model=model, only="head", reuse_trunk=reuse)
        for model, reuse in zip(outer, [True, False], strict=True)
    ]
    for number in range(3):
        for net, optimizer in zip(nets, made, strict=True):
            step(net, optimizer, number)
        assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_under_autocast():
    def loss(model, data):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(data[0]), data[1])

    model, optimizer = make(reuse_trunk=True)
    expected_model, expected = make()
    for number in range(3):
        assert_same(step(model, optimizer, number, loss), step(expected_model, expected, number, loss))


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_first_gradients_that_move_nothing_leave_one_plain_pass(factor):
    def loss(model, data):
        return factor * loss_of(model, data)

    results = []
    for options in ({"reuse_trunk": True}, {}):
        model, optimizer = make(base="sgd", **options)
        torch.manual_seed(0)
        optimizer.backward(lambda model=model: loss(model, batch()))
        assert optimizer.waits_for_step
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_were_left_are_refused():
    model, optimizer = make(reuse_trunk=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="Call optimizer.zero_grad"):
        step(model, optimizer, 0, clear=False)


def test_no_perturbation_is_one_plain_pass():
    model, optimizer = make(reuse_trunk=True)
    optimizer.rho = 0.0
    calls = []
    optimizer.backward(lambda: calls.append(None) or loss_of(model, batch()))
    assert len(calls) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_reuses_its_own_trunk(duplicate):
    torch.manual_seed(0)
    model = norms()
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only="head", reuse_trunk=True)
    step(model, optimizer, 0)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert twin_optimizer.reuse_trunk
    assert_same(step(model, optimizer, 1), step(twin, twin_optimizer, 1))
    assert_same(model.state_dict(), twin.state_dict())


# What is refused


class Tied(nn.Module):
    """The head's weight is used in the trunk: by name, or only in the forward."""

    def __init__(self, by_name):
        super().__init__()
        self.first, self.fc = nn.Linear(6, 6), nn.Linear(6, 6)
        if by_name:
            self.first.weight = self.fc.weight
        self.by_name = by_name

    def forward(self, x):
        hidden = self.first(x)
        return self.fc(torch.tanh(hidden if self.by_name else hidden @ self.fc.weight))


class Forward(nn.Module):
    """A trunk and a head with a forward of the test's."""

    def __init__(self, forward):
        super().__init__()
        self.trunk, self.fc = nn.Linear(6, 6), nn.Linear(6, 6)
        self.called = forward
        self.register_parameter("unused", None)

    def forward(self, x):
        return self.called(self, x)


def keeps_features(model, x):
    model.features = model.trunk(x)
    return model.fc(model.features)


def switches_autocast(model, x):
    hidden = model.trunk(x)
    with torch.autocast("cpu", torch.bfloat16):
        return model.fc(hidden)


def simple(model, x):
    return model.fc(model.trunk(x))


def mean_loss(model, data):
    return model(data[0]).square().mean()


def two_calls(model, data):
    return mean_loss(model, data) + mean_loss(model, data)


def calls_a_part(model, data):
    return mean_loss(model, data) + model.trunk(data[0]).mean()


def other_leaf(model, data):
    return mean_loss(model, data) * OTHER


OTHER = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (lambda: Forward(simple), two_calls, r"made 2 calls of the model \(Forward, Forward\), not one"),
        (lambda: Forward(simple), calls_a_part, r"made 2 calls of the model \(Forward, Linear\), not one"),
        (lambda: Forward(lambda m, x: m.fc(m.trunk(x)) * 2), mean_loss, "what Forward returns, a Tensor, is not the"),
        (lambda: Forward(lambda m, x: m.fc(m.fc(m.trunk(x)))), mean_loss, "Linear, which moves, was called 2 times"),
        (lambda: Forward(lambda m, x: m.trunk(x)), mean_loss, "Linear, which moves, was called 0 times"),
        (lambda: Forward(switches_autocast), mean_loss, "switches autocast or gradients"),
        (lambda: Forward(keeps_features), mean_loss, "changed state of the model .*: features"),
        (lambda: Forward(simple), other_leaf, r"has a gradient for a tensor of shape \(\) that the base does not own"),
        (lambda: Tied(True), mean_loss, "is also used outside the head, as first.weight"),
        (lambda: Tied(False), mean_loss, "input of the head depends on the parameters that move"),
        (lambda: torch.compile(Forward(simple), backend="eager"), mean_loss, "hides the calls inside it"),
        (lambda: nn.DataParallel(Forward(simple)), mean_loss, "DataParallel hides the calls"),
    ],
)  # fmt: skip
def test_what_cannot_be_reused_is_refused_and_leaves_everything_as_it_was(model, loss, message):
    torch.manual_seed(0)
    model = model()
    base = BASES["sgd-momentum"](model.parameters())
    optimizer = samopt.SAM(base, rho=0.3, model=model, only=r"^fc\.", reuse_trunk=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    data = batch()
    with pytest.raises(RuntimeError, match=message):
        optimizer.backward(lambda: loss(model, data))
    assert_same(dict(model.named_parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.is_perturbed


def test_another_batch_in_the_second_pass_is_refused():
    model, optimizer = make(reuse_trunk=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    batches = itertools.count()
    with pytest.raises(RuntimeError, match="given another input in the second pass"):
        optimizer.backward(lambda: loss_of(model, batch(seed=next(batches))))
    assert_same(dict(model.named_parameters()), before)
    step(model, optimizer, 0)


def test_an_input_of_the_head_that_is_written_into_is_refused():
    model, optimizer = make(head=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)), reuse_trunk=True)
    step(model, optimizer, 0)  # the smallest module with what moves is the linear layer, whose own input is left alone
    model, optimizer = make(head=WritesIntoItsInput(), only=r"^fc\.", reuse_trunk=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="input of the head was written into"):
        step(model, optimizer, 0)
    assert_same(dict(model.named_parameters()), before)


class Counts(nn.Module):
    """Reads a buffer that it writes into."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * self.count


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "wrote into _u of _SpectralNorm, a buffer"),
        (Counts, "wrote into count of Counts, a buffer of the trunk"),
        (
            lambda: Checkpointed(nn.BatchNorm1d(8)),
            "ran a part of the trunk again .* num_batches_tracked of",
        ),
    ],
)
def test_a_trunk_that_another_run_would_change_is_refused(layer, message):
    torch.manual_seed(0)
    layer = layer()
    model, optimizer = make(reuse_trunk=True)
    model.trunk.append(layer)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only=r"^fc\.", reuse_trunk=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=message):
        step(model, optimizer, 0)
    assert_same(dict(model.named_parameters()), before)
    assert not optimizer.is_perturbed


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpointed_trunk_without_state_is_reused():
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5))
    runs = []
    for reuse in (True, False):
        model, _ = make()
        model.trunk.append(Checkpointed(copy.deepcopy(inner)))
        base = BASES["sgd-momentum"](model.parameters())
        optimizer = samopt.SAM(base, rho=0.3, model=model, only=r"^fc\.", reuse_trunk=reuse)
        runs.append([step(model, optimizer, number) for number in range(3)] + [model.state_dict()])
    assert_same(runs[0], runs[1])


class RunsItsHeadInEvalMode(Network):
    def forward(self, x):
        hidden = self.trunk(x)
        self.fc.eval()
        logits = self.fc(hidden)
        self.fc.train()
        return logits


def test_a_head_whose_mode_the_model_changes_is_refused():
    torch.manual_seed(0)
    model = RunsItsHeadInEvalMode(HEADS["deep"])
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.3, model=model, only=r"^fc\.", reuse_trunk=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="has its head in another mode while it calls it"):
        step(model, optimizer, 0)
    assert_same(dict(model.named_parameters()), before)


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.relu_() * self.scale)


def test_other_forms_and_windows_are_refused():
    model, optimizer = make(reuse_trunk=True)
    with pytest.raises(RuntimeError, match="takes one micro-batch a step"):
        optimizer.backward(lambda: loss_of(model, batch()), last=False)
    loss_of(model, batch()).backward()
    with pytest.raises(RuntimeError, match="works in 'loss = optimizer.backward.compute_loss.' alone"):
        optimizer.perturbed().__enter__()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="works in 'loss = optimizer.backward.compute_loss.' alone"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (samopt.SAM, {"only": None}, ValueError, "needs model= and an only="),
        (samopt.SAM, {"direction": Momentum()}, ValueError, "Momentum takes one; leave it out"),
        (samopt.SAM, {"combination": SurrogateGap()}, ValueError, "SurrogateGap combines all gradients"),
        (samopt.GSAM, {}, TypeError, "GSAM sets reuse_trunk= itself"),
        (samopt.MomentumSAM, {}, TypeError, "one pass runs the trunk once anyway"),
    ],
)
def test_options_that_do_not_go_with_it(kind, options, error, message):
    with pytest.raises(error, match=message):
        make(kind, reuse_trunk=True, **({"only": "head"} | options))


def test_tram_does_not_take_it():
    model = norms()
    with pytest.raises(TypeError, match="TRAM sets reuse_trunk= itself"):
        samopt.TRAM(BASES["sgd"](model.parameters()), model=model, only="head", reuse_trunk=True)


def test_friendly_directions_are_made_of_the_heads_gradients():
    model, optimizer = make(direction=Friendly(), reuse_trunk=True)
    expected_model, expected = make(direction=Friendly())
    for number in range(3):
        assert_same(step(model, optimizer, number), step(expected_model, expected, number))
