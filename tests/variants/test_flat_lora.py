"""Flat-LoRA perturbs whole weights as the loop by hand does, and never writes a frozen one."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import samopt
from samopt._step.adapter_layers import find_layers
from tests.helpers import adapters
from tests.helpers.adapters import DOUBLE, OwnWeight, ReadsWeight, frozen, hand_step, own, own_layers, trained
from tests.helpers.cases import TOLERANCE, assert_same, batch, bits, loss_of, mlp, same_bits

PERTURBATIONS = pytest.mark.parametrize("perturbation", ["noise", "gradient"])
EXACT = {"rtol": 1e-9, "atol": 1e-11}
STEPS = 4


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.01)


def flat(model: nn.Module, base: Any = adamw, rho: float = 0.1, **options: Any) -> samopt.FlatLoRA:
    return samopt.FlatLoRA(base(model), model=model, rho=rho, **options)


def take_step(optimizer: samopt.FlatLoRA, model: nn.Module, step: int = 0) -> Tensor:
    optimizer.zero_grad()
    loss = optimizer.backward(lambda: loss_of(model, batch(DOUBLE, seed=step)))
    optimizer.step()
    return loss


def assert_trains_alike(
    ours: nn.Module,
    optimizer: samopt.FlatLoRA,
    theirs: nn.Module,
    base: torch.optim.Optimizer,
    layers: list[adapters.Whole],
    loss: Callable[[nn.Module, int], Tensor],
    **options: Any,
) -> None:
    """A few steps of both give the same weights, and ours has written no frozen one."""
    before = frozen(ours)
    flags = [(p.requires_grad, p.grad) for p in ours.parameters() if not p.requires_grad]
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(lambda step=step: loss(ours, step))
        optimizer.step()

        def backward(step=step) -> Tensor:
            value = loss(theirs, step)
            value.backward()
            return value

        hand_step(base, layers, backward, perturbation=optimizer.perturbation, step=step, **options)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, **EXACT)
    assert adapters.differing(ours, before) == 0
    assert [(p.requires_grad, p.grad) for p in ours.parameters() if not p.requires_grad] == flags


def loss_at(model: nn.Module, step: int) -> Tensor:
    x, y = batch(DOUBLE, seed=step)
    return nn.functional.cross_entropy(model(x), y)


# The numbers


@PERTURBATIONS
@pytest.mark.parametrize("kind", [OwnWeight, ReadsWeight])
def test_layers_with_adapters_train_as_by_hand(kind, perturbation):
    ours, theirs = own(kind), own(kind)
    optimizer = flat(ours, perturbation=perturbation, seed=3)
    assert_trains_alike(ours, optimizer, theirs, adamw(theirs), own_layers(theirs), loss_at, seed=3)


class Convolved(nn.Module):
    """A convolution, a tied linear layer and a norm, without adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.LayerNorm(16)
        self.inner, self.outer, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.outer.weight = self.inner.weight
        self.double()

    def forward(self, x):
        return self.head(self.outer(torch.tanh(self.inner(self.norm(self.conv(x.unsqueeze(1)).flatten(1))))))


@PERTURBATIONS
@pytest.mark.parametrize("make", [lambda: mlp(DOUBLE), Convolved])
def test_a_model_without_adapters_moves_its_plain_weights(make, perturbation):
    ours, theirs = make(), make()
    layers = adapters.plain_layers(theirs)
    assert_trains_alike(ours, flat(ours, perturbation=perturbation), theirs, adamw(theirs), layers, loss_at)


@PERTURBATIONS
def test_the_loop_form_without_backward_and_the_closure_form_are_the_same(perturbation):
    results = []
    for form in ("backward", "loop", "closure"):
        model = own()
        optimizer = flat(model, perturbation=perturbation)
        for step in range(STEPS):
            if form == "backward":
                take_step(optimizer, model, step)
                continue

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, batch(DOUBLE, seed=step))
                loss.backward()
                return loss

            if form == "closure":
                optimizer.step(closure)
                continue
            loss = closure()
            with optimizer.perturbed(loss) if perturbation == "gradient" else torch.enable_grad():
                if perturbation == "gradient":
                    loss_of(model, batch(DOUBLE, seed=step)).backward()
            optimizer.step()
        results.append(bits(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@PERTURBATIONS
def test_all_micro_batches_of_a_window_see_one_perturbation(perturbation):
    ours, theirs = own(), own()
    optimizer, base, layers = flat(ours, perturbation=perturbation), adamw(theirs), own_layers(theirs)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(3):
            data = batch(DOUBLE, seed=10 * step + part)
            optimizer.backward(lambda data=data: loss_of(ours, data) / 3, last=part == 2)
        optimizer.step()

        def backward(step=step):
            for part in range(3):
                (loss_of(theirs, batch(DOUBLE, seed=10 * step + part)) / 3).backward()

        hand_step(base, layers, backward, perturbation=perturbation, step=step)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE[torch.float32])


@PERTURBATIONS
def test_the_radius_of_a_layer_is_that_of_its_group(perturbation):
    ours, theirs = own(), own()
    groups = lambda m: [{"params": trained(m[0]), "rho": 0.2}, {"params": trained(m[3])}]  # noqa: E731
    optimizer = samopt.FlatLoRA(torch.optim.AdamW(groups(ours), lr=0.01), model=ours, perturbation=perturbation)
    base = torch.optim.AdamW([{"params": g["params"]} for g in groups(theirs)], lr=0.01)
    assert optimizer.rho == [0.2, 0.05]
    assert_trains_alike(ours, optimizer, theirs, base, own_layers(theirs), loss_at, rho=[0.2, 0.05])


@PERTURBATIONS
def test_a_group_that_is_not_perturbed_keeps_its_layers_exact(perturbation):
    ours, theirs = own(), own()
    groups = [{"params": trained(ours[0]), "perturb": False}, {"params": trained(ours[3])}]
    optimizer = samopt.FlatLoRA(torch.optim.AdamW(groups, lr=0.01), model=ours, rho=0.1, perturbation=perturbation)
    assert_trains_alike(ours, optimizer, theirs, adamw(theirs), own_layers(theirs), loss_at, rho=[0.0, 0.1])


def test_groups_that_differ_for_one_layer_are_refused():
    model = own()
    groups = [{"params": [m.lora_A for m in (model[0], model[3])], "rho": 0.1}]
    groups.append({"params": [m.lora_B for m in (model[0], model[3])], "rho": 0.2})
    optimizer = samopt.FlatLoRA(torch.optim.AdamW(groups, lr=0.01), model=model)
    with pytest.raises(ValueError, match=r"the factors of 0 are in the param groups 0 and 1, whose rho differ \(0\.1"):
        loss_at(model, 0)
    for group in optimizer.param_groups:
        group["rho"] = 0.1
    take_step(optimizer, model)


@PERTURBATIONS
@pytest.mark.parametrize("make", [own, lambda: mlp(DOUBLE)], ids=["adapters", "plain weights"])
def test_a_paused_optimizer_is_its_base_and_goes_on(make, perturbation):
    """As a trainer pauses it for ``late=``."""
    ours, theirs = make(), make()
    layers = own_layers(theirs) if make is own else adapters.plain_layers(theirs)
    optimizer, base = flat(ours, perturbation=perturbation), adamw(theirs)
    forwards = []
    ours.register_forward_hook(lambda *_: forwards.append(1))
    for step in range(5):
        optimizer.is_paused = step in (0, 1, 3)
        forwards.clear()
        take_step(optimizer, ours, step)
        assert len(forwards) == (1 if optimizer.is_paused or perturbation == "noise" else 2)

        def backward(step=step):
            loss_of(theirs, batch(DOUBLE, seed=step)).backward()

        if optimizer.is_paused:
            base.zero_grad()
            backward()
            base.step()
        else:
            hand_step(base, layers, backward, perturbation=perturbation, step=step)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE[torch.float32])


@PERTURBATIONS
def test_a_schedule_that_starts_at_zero_begins_with_plain_steps(perturbation):
    ours, theirs = own(), own()
    optimizer, base, layers = flat(ours, perturbation=perturbation), adamw(theirs), own_layers(theirs)
    schedule = samopt.RhoScheduler(optimizer, lambda step: (1 - math.cos(math.pi * min(step / 4, 1))) / 2)
    plain = 0.0
    for step in range(6):
        rho = 0.1 * (1 - math.cos(math.pi * min(step / 4, 1))) / 2
        take_step(optimizer, ours, step)
        plain += float(optimizer.last_step.radius == 0)
        schedule.step()

        def backward(step=step):
            loss_of(theirs, batch(DOUBLE, seed=step)).backward()

        hand_step(base, layers, backward, perturbation=perturbation, step=step, rho=rho)
    assert plain == 1
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE[torch.float32])


def test_the_noise_has_the_scale_of_each_row():
    torch.manual_seed(0)
    layer = OwnWeight(400, 5).double()
    optimizer = flat(layer, rho=0.3)
    captured = []
    layer.register_forward_hook(lambda module, args, output: captured.append(module.weight - weight))
    weight = layer.weight.clone()
    for _ in range(200):
        optimizer.zero_grad()
        layer(torch.zeros(1, 400, dtype=DOUBLE)).sum().backward()
        optimizer.base_optimizer.zero_grad()
        optimizer.step()
    stacked = torch.stack(captured)
    whole = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    wanted = 0.3 * whole.norm(dim=1) / 20
    torch.testing.assert_close(stacked.std(dim=(0, 2)), wanted, rtol=0.02, atol=0)
    assert float((stacked.mean(dim=(0, 2)) / wanted).abs().max().detach()) < 4 / math.sqrt(200 * 400)
    correlation = (stacked[1:] * stacked[:-1]).mean(dim=(0, 2)) / wanted**2
    assert float(correlation.abs().max()) < 4 / math.sqrt(199 * 400)


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_metrics_of_the_noise_are_the_norms_asked_and_applied(backend):
    model = own()
    optimizer = flat(model, rho=0.2, backend=backend)
    layers = own_layers(model)
    moves = adapters.noise(layers, [0.2, 0.2], 0, 0)
    expected = 0.2 * math.sqrt(sum(float(layer.merged().detach().square().sum()) for layer in layers))
    loss = take_step(optimizer, model)
    assert float(optimizer.last_step.radius) == pytest.approx(expected, rel=1e-12)
    applied = math.sqrt(sum(float(move.square().sum()) for move in moves))
    assert float(optimizer.last_step.applied_radius) == pytest.approx(applied, rel=1e-12)
    assert float(optimizer.last_step.perturbed_loss) == float(loss)
    assert optimizer.last_step.loss is optimizer.last_step.sharpness is None


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_metrics_of_the_gradient_are_those_of_whole_weights(backend):
    model, theirs = own(), own()
    optimizer, layers = flat(model, rho=0.2, perturbation="gradient", backend=backend), own_layers(theirs)
    moves = adapters.uphill(layers, [1.0, 1.0], lambda: loss_of(theirs, batch(DOUBLE)).backward())
    weights = [layer.weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss_of(theirs, batch(DOUBLE)), weights)
    perturbed = adapters.backward_at(layers, [0.2 * m for m in moves], lambda: loss_of(theirs, batch(DOUBLE)).detach())
    loss = take_step(optimizer, model)
    last = optimizer.last_step
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert float(last.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert (float(last.radius), float(last.applied_radius)) == (0.2, pytest.approx(0.2, rel=1e-12))
    assert float(last.sharpness) == pytest.approx(float(perturbed - loss), rel=1e-5)
    assert last.perturbed_grad_norm is None  # nobody measures it: the frozen weights have none


# What stays as it was


@PERTURBATIONS
def test_frozen_bf16_weights_keep_every_bit_also_between_forward_and_backward(perturbation):
    model = own(dtype=torch.bfloat16)
    optimizer = flat(model, rho=0.05, perturbation=perturbation)
    before = frozen(model)
    for step in range(1000):
        optimizer.zero_grad()
        loss = loss_of(model, batch(torch.bfloat16, seed=step))
        if step % 100 == 0:
            assert adapters.differing(model, before) == 0
        loss.backward()
        if perturbation == "gradient":
            with optimizer.perturbed(loss):
                again = loss_of(model, batch(torch.bfloat16, seed=step))
                if step % 100 == 0:
                    assert adapters.differing(model, before) == 0
                again.backward()
        optimizer.step()
    assert adapters.differing(model, before) == 0
    assert float(optimizer.last_step.applied_radius) > 0


def test_a_loop_that_adds_and_subtracts_changes_most_bf16_weights():
    """What this optimizer is for: the published loop, on the same weights, does not bring them back."""
    model = own(dtype=torch.bfloat16)
    before, layers = frozen(model), own_layers(model)
    with torch.no_grad():
        for step in range(1000):
            moves = [move.bfloat16() for move in adapters.noise(layers, [0.05, 0.05], 0, step)]
            for layer, move in zip(layers, moves, strict=True):
                layer.weight.add_(move)
            for layer, move in zip(layers, moves, strict=True):
                layer.weight.sub_(move)
    total = sum(layer.weight.numel() for layer in layers)
    assert adapters.differing(model, before) > 0.5 * total


@PERTURBATIONS
def test_no_global_random_stream_is_touched(perturbation):
    model = own()
    optimizer = flat(model, perturbation=perturbation)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for step in range(3):
        take_step(optimizer, model, step)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(before[2], np.random.get_state(), strict=True))


@PERTURBATIONS
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_everything_as_it_was(perturbation, where):
    ours, theirs = own(), own()
    optimizer, other = flat(ours, perturbation=perturbation), flat(theirs, perturbation=perturbation)
    before, names = bits(ours), [set(vars(m)) for m in ours.modules()]
    calls = []

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("in backward")

    def failing() -> Tensor:
        calls.append(1)
        loss = loss_at(ours, 0)
        if len(calls) == (2 if perturbation == "gradient" else 1):
            if where == "forward":
                ours[0](torch.zeros(1, 5, dtype=DOUBLE))  # five inputs do not fit
            loss = Failing.apply(loss)
        return loss

    optimizer.zero_grad()
    with pytest.raises((ArithmeticError, RuntimeError)):
        optimizer.backward(failing)
    assert same_bits(ours, before)
    assert [set(vars(m)) for m in ours.modules()] == names
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    for step in range(2):
        take_step(optimizer, ours, step)
        take_step(other, theirs, step)
    assert same_bits(theirs, bits(ours))


@PERTURBATIONS
def test_gradients_that_the_model_itself_cleared_do_not_come_back(perturbation):
    """``model.zero_grad()`` knows nothing of the optimizer, nor of the gradients of whole weights."""
    ours, theirs = own(), own()
    optimizer, other = flat(ours, perturbation=perturbation), flat(theirs, perturbation=perturbation)
    for to_none in (True, False):
        (100 * loss_at(ours, 9)).backward()
        ours.zero_grad(set_to_none=to_none)
        loss = loss_at(ours, 0)
        loss.backward()
        if perturbation == "gradient":
            with optimizer.perturbed(loss):
                loss_at(ours, 0).backward()
        optimizer.step()
        take_step(other, theirs, 0)
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, their, **TOLERANCE[torch.float32])


def test_only_training_forwards_are_noisy():
    model = own()
    optimizer = flat(model, rho=0.5)
    x = batch(DOUBLE)[0]
    with torch.no_grad():
        exact = model(x)
    assert torch.equal(model.eval()(x), exact)
    model.train()
    assert not torch.equal(model(x), exact)
    assert torch.equal(model(x), model(x))  # one noise in a step
    with optimizer.exact():
        assert torch.equal(model(x), exact)
    own_weights = dict(model.named_parameters())
    doubled = {name: p.detach() * 2 for name, p in own_weights.items()}
    expected = own()
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.copy_(doubled[name])
    assert torch.equal(torch.func.functional_call(model, doubled, (x,)), expected(x))
    optimizer.detach()
    assert torch.equal(model(x), exact)


@PERTURBATIONS
def test_a_step_after_detach_says_so(perturbation):
    model = own()
    optimizer = flat(model, perturbation=perturbation)
    optimizer.detach()
    with pytest.raises(RuntimeError, match="detach|no call of 0, or of another adapter layer, was seen"):
        optimizer.backward(lambda: loss_at(model, 0))
    loss_at(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) found gradients"):
        optimizer.step()


# Life


@PERTURBATIONS
@pytest.mark.parametrize("through", ["samopt entry", "groups alone"])
def test_a_resumed_run_goes_on_bit_for_bit(perturbation, through):
    model = own(dtype=torch.bfloat16, dropout=0.1)
    optimizer = flat(model, perturbation=perturbation)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            optimizer.backward(lambda step=step: loss_of(model, batch(torch.bfloat16, seed=step)))
            optimizer.step()

    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if through == "groups alone":  # all that torch.distributed.checkpoint keeps
        del saved[1]["samopt"]
    train(model, optimizer, range(3, 6))
    again = own(dtype=torch.bfloat16, dropout=0.1)
    resumed = flat(again, perturbation=perturbation)
    train(again, resumed, range(2))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, range(3, 6))
    assert same_bits(again, bits(model))
    assert_same(resumed.state_dict(), optimizer.state_dict())


@PERTURBATIONS
def test_copies_train_on_alone(perturbation):
    model = own()
    optimizer = flat(model, perturbation=perturbation)
    take_step(optimizer, model)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    take_step(optimizer, model, 1)
    for other, its in copies:
        assert not same_bits(other, bits(model))
        take_step(its, other, 1)
        assert same_bits(other, bits(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert not any(
        name.startswith("_compiled")
        for m in torch.load(stream, weights_only=False).modules()
        for name in [key for key, value in vars(m).items() if value is not None]
    )


def test_seeds_and_steps_make_other_noise():
    results = []
    for seed in (0, 0, 1):
        model = own()
        optimizer = flat(model, seed=seed)
        x = batch(DOUBLE)[0]
        first = model(x)
        take_step(optimizer, model)
        results.append((first, bits(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[2][0])


# Ways to run a forward


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, whole: bool = False):
        super().__init__()
        self.layers, self.reentrant, self.whole = own(dropout=0.2), reentrant, whole

    def forward(self, x):
        x = x.clone().requires_grad_()
        if self.reentrant is None:
            return self.layers(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@PERTURBATIONS
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_repeated_with_the_same_perturbation(perturbation, reentrant):
    plain, checked = Checkpointed(None), Checkpointed(reentrant)
    one, other = flat(plain, perturbation=perturbation), flat(checked, perturbation=perturbation)
    for step in range(3):
        for model, optimizer in ((plain, one), (checked, other)):
            torch.manual_seed(step)
            take_step(optimizer, model, step)
    assert same_bits(checked, bits(plain))


def test_a_reentrant_checkpoint_around_the_whole_model_is_refused():
    model = own()
    optimizer = flat(model)  # noqa: F841  # it follows the model while it lives
    x, y = batch(DOUBLE)
    loss = nn.functional.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=True), y)
    with pytest.raises(RuntimeError, match="a training forward of Sequential began inside a backward pass"):
        loss.backward()


def test_the_graph_alone_holds_perturbed_weights():
    """With checkpointing, a perturbed weight is gone when its layer's forward is over."""
    import weakref

    held = []

    class Spying(OwnWeight):
        def forward(self, x):
            held.append(weakref.ref(self.weight.untyped_storage()))
            return super().forward(x)

    model = own(Spying)
    optimizer = flat(model)  # noqa: F841  # it follows the model while it lives
    x = batch(DOUBLE)[0].requires_grad_()
    output = model(x)
    assert len(held) == 2 and all(reference() is not None for reference in held)
    del output
    assert [reference() for reference in held] == [None, None]
    held.clear()
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    assert [reference() for reference in held] == [None, None]


@PERTURBATIONS
def test_autocast_runs_the_perturbed_weights_in_low_precision(perturbation):
    ours, theirs = own(dtype=torch.float32), own(dtype=torch.float32)
    optimizer, base, layers = flat(ours, perturbation=perturbation), adamw(theirs), own_layers(theirs)
    for step in range(3):
        data = batch(seed=step)

        def loss(model, data=data):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(model, data)

        optimizer.zero_grad()
        optimizer.backward(lambda loss=loss: loss(ours))
        optimizer.step()
        hand_step(base, layers, lambda loss=loss: loss(theirs).backward(), perturbation=perturbation, step=step)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@PERTURBATIONS
@pytest.mark.parametrize("setup", ["whole", "in place", "part"])
def test_a_compiled_model_trains_as_the_plain_one_and_is_compiled_no_more_after_the_second_step(perturbation, setup):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = own(), own()
    called = model
    if setup == "whole":
        called = torch.compile(model, backend=counter)
    elif setup == "in place":
        model.compile(backend=counter)
    else:
        model[0] = torch.compile(model[0], backend=counter)
    one = flat(plain, perturbation=perturbation)
    other = samopt.FlatLoRA(adamw(model), model=called, rho=0.1, perturbation=perturbation)
    counts = []
    for step in range(4):
        take_step(one, plain, step)
        take_step(other, called, step)
        counts.append(counter.frame_count)
    assert counts[0] >= 1 and counts[-1] == counts[1]
    for mine, their in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, their, **EXACT)
    torch._dynamo.reset()


@PERTURBATIONS
def test_a_scaled_loss_trains_as_the_plain_one(perturbation):
    plain, scaled = own(dtype=torch.float32), own(dtype=torch.float32)
    one, other = flat(plain, perturbation=perturbation), flat(scaled, perturbation=perturbation)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        data = batch(seed=step)
        one.zero_grad()
        one.backward(lambda data=data: loss_of(plain, data))
        one.step()
        other.zero_grad()
        other.backward(lambda data=data: scaler.scale(loss_of(scaled, data)))
        scaler.step(other)
        scaler.update()
    for mine, their in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


def test_a_forward_that_writes_into_a_frozen_weight_is_refused():
    class Normed(OwnWeight):
        def forward(self, x):
            with torch.no_grad():
                self.weight.renorm_(2, 0, 0.1)
            return super().forward(x)

    model = own(Normed)
    optimizer = flat(model)  # noqa: F841  # it follows the model while it lives
    with pytest.raises(RuntimeError, match="wrote into the frozen weight of 0"):
        loss_at(model, 0)


# Refusals


def refused(model: nn.Module, text: str, parameters: Any = None) -> None:
    base = torch.optim.AdamW(trained(model) if parameters is None else parameters, lr=0.01)
    groups = [dict(group) for group in base.param_groups]
    before = bits(model)
    for perturbation in ("noise", "gradient"):
        with pytest.raises(ValueError, match=text):
            samopt.FlatLoRA(base, model=model, perturbation=perturbation)
    assert [dict(group) for group in base.param_groups] == groups
    assert same_bits(model, before)


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class of that name: packed integers and how to read them."""

    def __new__(cls, data):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.quant_state = object()
        return made


class Int8Params(nn.Parameter):
    """Stands for bitsandbytes' class of that name."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)


def with_base(weight: nn.Parameter | None, **attributes: Any) -> nn.Module:
    layer = ReadsWeight(6, 3)
    layer.linear.weight = weight
    for name, value in attributes.items():
        setattr(layer.linear, name, value)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        with_base(Params4bit(torch.zeros(9, 1, dtype=torch.uint8))),
        with_base(Int8Params(torch.zeros(3, 6, dtype=torch.int8))),
        with_base(Int8Params(torch.zeros(3, 6, dtype=torch.float16))),
        with_base(nn.Parameter(torch.zeros(3, 6, dtype=torch.int8), requires_grad=False)),
        with_base(None, qweight=torch.zeros(3, 2, dtype=torch.int32)),
        with_base(nn.Parameter(torch.zeros(3, 6), requires_grad=False), quant_state=object()),
    ],
    ids=["4-bit", "8-bit", "8-bit before it is packed", "integers", "GPTQ", "state on the module"],
)
def test_a_quantised_base_is_refused(layer):
    refused(nn.Sequential(layer), r"the base weight of 0 is quantised \(Linear with .*load the base in bf16")


def made_by_pruning(layer):
    prune.random_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize(
    "make",
    [parametrizations.weight_norm, parametrizations.spectral_norm, made_by_pruning],
    ids=lambda make: make.__name__,
)
def test_a_plain_layer_whose_weight_is_made_in_the_forward_is_refused(make):
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    make(model[0])
    with pytest.raises(ValueError, match=r"the weight of 0, a \w*Linear, is made in the forward"):
        samopt.FlatLoRA(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    samopt.FlatLoRA(torch.optim.SGD(model[2].parameters(), lr=0.1), model=model)  # one that is not trained may be there


def test_layers_that_cannot_be_perturbed_are_refused_by_name():
    refused(
        nn.Sequential(nn.LayerNorm(3)), "neither an adapter layer nor a trained weight of a linear layer in model=Seq"
    )
    layer = own()
    layer[0].scaling = None
    refused(layer, r"0, a OwnWeight, has lora_A \(Parameter\), lora_B \(Parameter\) and scaling None")
    layer = own()
    layer[3].lora_B = nn.Parameter(torch.zeros(4, 2, dtype=DOUBLE))
    refused(layer, r"3 has lora_B of shape \(4, 2\) and lora_A of shape \(2, 12\), whose product")
    layer = own()
    layer[0].merged = True
    refused(layer, "the adapters of 0 are merged into its weight")
    layer = own()
    layer[0].weight.requires_grad_(True)
    refused(layer, "0 has adapters on a weight that is trained itself; freeze it")
    layer = own(ReadsWeight)
    layer[0].linear = nn.Identity()
    refused(layer, "0, a ReadsWeight, has lora_A and lora_B, but neither it nor a child")
    layer = own(ReadsWeight)
    layer[3].linear = layer[0].linear
    layer[3].lora_A, layer[3].lora_B = copy.deepcopy((layer[0].lora_A, layer[0].lora_B))
    refused(layer, "0 and 3 adapt one and the same base layer")
    layer = own(ReadsWeight)
    nn.utils.parametrizations.weight_norm(layer[0].linear)
    layer[0].linear.requires_grad_(False)
    refused(layer, "0, a ReadsWeight, has lora_A and lora_B, but neither it nor a child|has no parameter called weight")


def test_adapters_of_another_optimizer_are_refused():
    model = own()
    head = nn.Linear(3, 2, dtype=DOUBLE)
    refused(nn.Sequential(model, head), r"found 2 adapter layers \(0\.0 for one\)", head.parameters())


def test_options_that_it_does_not_take():
    model = own()
    base = adamw(model)
    with pytest.raises(ValueError, match="model= is missing"):
        samopt.FlatLoRA(base)
    with pytest.raises(ValueError, match=r"perturbation must be \"noise\" or \"gradient\", got 'momentum'"):
        samopt.FlatLoRA(base, model=model, perturbation="momentum")
    for name in ("direction", "combination", "norm", "geometry", "radius", "eta"):
        with pytest.raises(TypeError, match=f"FlatLoRA sets {name}= itself"):
            samopt.FlatLoRA(base, model=model, **{name: "gradient"})


def test_what_changes_after_the_optimizer_was_made_is_refused_in_the_forward():
    model = own()
    optimizer = flat(model)  # noqa: F841  # it follows the model while it lives
    model[0].merged = True
    with pytest.raises(RuntimeError, match="the adapters of 0 are merged into its weight"):
        loss_at(model, 0)
    model[0].merged = False
    model[3].weight = nn.Parameter(model[3].weight.clone(), requires_grad=False)
    with pytest.raises(
        RuntimeError, match="the weight of 3 was replaced by another tensor after the optimizer was made"
    ):
        loss_at(model, 0)


@PERTURBATIONS
@pytest.mark.parametrize("make", [own, lambda: mlp(DOUBLE)], ids=["adapters", "plain weights"])
def test_a_group_of_layers_that_were_not_there_is_refused_and_not_added(make, perturbation):
    model = make()
    last = list(model)[-1]
    rest = [p for p in trained(model) if not any(p is each for each in last.parameters())]
    optimizer = samopt.FlatLoRA(torch.optim.AdamW(rest, lr=0.01), model=model, perturbation=perturbation)
    with pytest.raises(ValueError, match=r"parameters of (2|3), but FlatLoRA found its layers when"):
        optimizer.add_param_group({"params": [p for p in last.parameters() if p.requires_grad]})
    assert len(optimizer.param_groups) == 1
    beside = nn.LayerNorm(6).double()
    optimizer.add_param_group({"params": beside.parameters()})  # a generator can be read only once
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(rest), 2]
    take_step(optimizer, model)


@PERTURBATIONS
@pytest.mark.parametrize("make", [own, lambda: mlp(DOUBLE)], ids=["adapters", "plain weights"])
def test_layers_that_were_frozen_since_do_not_move(make, perturbation):
    ours, theirs = make(), make()
    layers = own_layers(theirs) if make is own else adapters.plain_layers(theirs)
    optimizer, base = flat(ours, perturbation=perturbation), adamw(theirs)
    for model in (ours, theirs):
        model[0].requires_grad_(False)
    if perturbation == "noise":  # its place among the layers decides the numbers of a layer
        layers[0] = adapters.Whole(torch.zeros(0, 1), lambda: torch.zeros(0, 1), (1,))
    else:
        del layers[0]
    assert_trains_alike(ours, optimizer, theirs, base, layers, loss_at)


def test_merged_adapters_may_be_evaluated():
    model = own()
    model[0].merged = model[3].merged = False
    optimizer = flat(model, perturbation="gradient")
    take_step(optimizer, model)
    model[0].merged = True
    with torch.no_grad():
        model.eval()(batch(DOUBLE)[0])
    with pytest.raises(RuntimeError, match="the adapters of 0 are merged into its weight"):
        model.train()(batch(DOUBLE)[0])
    model[0].merged = False
    take_step(optimizer, model, 1)


def test_layers_are_found_in_the_order_of_the_modules():
    model = nn.ModuleDict({"b": own(), "a": own(ReadsWeight)})
    names = [layer.name for layer in find_layers([model], adamw(model).param_groups, "FlatLoRA")]
    assert names == ["b.0", "b.3", "a.0", "a.3"]
