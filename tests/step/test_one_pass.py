"""The momentum direction in one pass: the user's loop does not change, the weights are exact whenever anyone looks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import samopt
from samopt.parts.direction import Momentum
from tests.helpers.cases import asam_epsilon, batch, bits, loss_of, mlp, sam_epsilon, same_bits

BASES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), "momentum_buffer"),
    "sgd-maximize": (lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, maximize=True), "momentum_buffer"),
    "adamw": (lambda params: torch.optim.AdamW(params, lr=0.01), "exp_avg"),
    "adamw-fused": (lambda params: torch.optim.AdamW(params, lr=0.01, fused=True), "exp_avg"),
}
VARIANTS = {"sam": (samopt.SAM, sam_epsilon, 0.1), "asam": (samopt.ASAM, asam_epsilon, 0.5)}

each_base = pytest.mark.parametrize("base", BASES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def one_pass(model: nn.Module, base: str = "sgd", variant: str = "sam", **options: Any):
    wrap, _, rho = VARIANTS[variant]
    return wrap(BASES[base][0](model.parameters()), rho=rho, direction="momentum", model=model, **options)


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    buffer: str,
    epsilon: Callable[..., list[Tensor]],
    rho: float,
    backward: Callable[[], None],
) -> None:
    """One step of a stock optimizer whose gradient is taken along its own momentum."""
    parameters = list(model.parameters())
    start = bits(model)
    momenta = [optimizer.state[p].get(buffer) for p in parameters]
    with torch.no_grad():
        for p, move in zip(parameters, epsilon(start, momenta, [rho] * len(parameters)), strict=True):
            p.copy_(p.double() + move)
    optimizer.zero_grad()
    backward()
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    optimizer.step()


@each_base
@each_variant
def test_unchanged_loop_equals_the_hand_written_one(base, variant) -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer = one_pass(model, base, variant)
    make, buffer = BASES[base]
    stock = make(reference.parameters())
    _, epsilon, rho = VARIANTS[variant]
    for step in range(5):
        data = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        by_hand(reference, stock, buffer, epsilon, rho, lambda data=data: loss_of(reference, data).backward())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_preconditioned_direction_is_the_step_adam_would_take() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    base = torch.optim.Adam([w], lr=0.1, betas=(0.5, 0.9), eps=1e-3)
    optimizer = samopt.SAM(base, rho=0.3, direction=Momentum(preconditioned=True))
    gradients = [torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 1.0])]
    for gradient in gradients:
        w.grad = gradient.double()
        base.step()
    m = 0.5 * (0.5 * gradients[0]) + 0.5 * gradients[1]
    v = 0.9 * (0.1 * gradients[0] ** 2) + 0.1 * gradients[1] ** 2
    direction = m.double() / ((v.double() / (1 - 0.9**2)).sqrt() + 1e-3)
    start = w.detach().clone()
    optimizer.ascend()
    torch.testing.assert_close(w - start, 0.3 * direction / direction.norm(), rtol=1e-6, atol=1e-8)
    optimizer.restore()
    assert torch.equal(w, start)


@pytest.mark.parametrize("form", ["closure", "closure without model", "context", "primitives"])
def test_every_form_is_the_unchanged_loop(form) -> None:
    model, reference = mlp(), mlp()
    expected = one_pass(reference)
    optimizer = samopt.SAM(
        BASES["sgd"][0](model.parameters()),
        rho=0.1,
        direction="momentum",
        model=model if form == "closure" else None,
    )
    for step in range(4):
        data = batch(seed=step)
        expected.zero_grad()
        loss_of(reference, data).backward()
        expected.step()

        def closure(data=data) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, data)
            loss.backward()
            return loss

        if form.startswith("closure"):
            optimizer.step(closure)
        elif form == "context":
            with optimizer.perturbed():
                closure()
            optimizer.step()
        else:
            optimizer.ascend()
            closure()
            optimizer.step()
    assert same_bits(model, bits(reference))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(seed=step)).backward()
        optimizer.step()


def test_weights_are_moved_from_forward_to_the_end_of_backward_and_no_longer() -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact = bits(model)
    loss = loss_of(model, batch(seed=7))
    assert optimizer.is_perturbed and not same_bits(model, exact)
    loss.backward()
    assert not optimizer.is_perturbed and same_bits(model, exact)


@pytest.mark.parametrize("look", ["eval forward", "no_grad forward", "state_dict", "deepcopy", "pickle", "step"])
def test_whoever_looks_between_forward_and_backward_finds_exact_weights(look) -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact = bits(model)
    data = batch(seed=7)
    loss = loss_of(model, data)
    if look == "eval forward":
        model.eval()
        model(data[0])
        model.train()
    elif look == "no_grad forward":
        with torch.no_grad():
            model(data[0])
    elif look == "state_dict":
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), exact, strict=True))
    elif look == "deepcopy":
        assert same_bits(copy.deepcopy((optimizer, model))[1], exact)
    elif look == "pickle":
        assert same_bits(pickle.loads(pickle.dumps((optimizer, model)))[1], exact)
    else:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    assert same_bits(model, exact)

    # The graph of the forward pass is still good: its backward moves the weights again, to the same bits.
    if look != "step":
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert same_bits(model, exact)


def test_accumulation_is_the_large_batch() -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = one_pass(model), one_pass(reference)
    for step in range(4):
        x, y = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (loss_of(model, (x[part], y[part])) / 2).backward()
            with torch.no_grad():
                model(x)
        optimizer.step()
        expected.zero_grad()
        loss_of(reference, (x, y)).backward()
        expected.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_two_backward_passes_through_one_forward() -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = one_pass(model), one_pass(reference)
    for each_model, each in ((model, optimizer), (reference, expected)):
        for step in range(3):
            x, y = batch(torch.float64, seed=step)
            each.zero_grad()
            logits = each_model(x)
            first, second = logits[:, 0].pow(2).mean(), nn.functional.cross_entropy(logits, y)
            if each_model is model:
                first.backward(retain_graph=True)
                second.backward()
            else:
                (first + second).backward()
            each.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_gradient_penalty_reads_the_moved_weights_throughout() -> None:
    model = mlp(torch.float64)
    optimizer = one_pass(model)
    x, y = batch(torch.float64)

    def penalised(module: Callable[[Tensor], Tensor]) -> Tensor:
        inputs = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(module(inputs), y)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + slope.square().sum()

    optimizer.zero_grad()
    penalised(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    penalised(model).backward()
    found = [p.grad.clone() for p in model.parameters()]

    with optimizer.perturbed():
        moved = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(
        penalised(lambda inputs: torch.func.functional_call(mlp(torch.float64), moved, (inputs,))), list(moved.values())
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.recompute = mlp(), True

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.recompute else self.body(x)

    models = [Checkpointed(), Checkpointed()]
    models[1].recompute = False
    for model in models:
        optimizer = one_pass(model)
        for step in range(3):
            x, y = batch(seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
            optimizer.step()
    assert same_bits(models[0], bits(models[1]))


def whole_model_checkpointed(model: nn.Module, seed: int, **options: bool) -> None:
    x, y = batch(seed=seed)
    nn.functional.cross_entropy(checkpoint(model, x.requires_grad_(), **options), y).backward()


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_the_whole_model(early_stop: bool) -> None:
    models = [mlp(), mlp()]
    for model in models:
        optimizer = one_pass(model)
        for step in range(3):
            optimizer.zero_grad()
            if model is models[0]:
                with set_checkpoint_early_stop(early_stop):
                    whole_model_checkpointed(model, step, use_reentrant=False)
            else:
                x, y = batch(seed=step)
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert same_bits(models[0], bits(models[1]))


def test_reentrant_checkpointing_of_the_whole_model_is_refused() -> None:
    model = mlp()
    optimizer = one_pass(model)
    whole_model_checkpointed(model, 0, use_reentrant=True)  # no momentum yet: nothing moves
    optimizer.step()
    optimizer.zero_grad()
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"forward of Sequential began inside a backward pass.*use_reentrant=False"):
        whole_model_checkpointed(model, 1, use_reentrant=True)
    assert same_bits(model, before)
    whole_model_checkpointed(model, 1, use_reentrant=False)
    optimizer.step()
    assert not same_bits(model, before)


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    model, reference = mlp(), mlp()
    optimizer, expected = one_pass(model), one_pass(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        data = batch(seed=step)
        before = bits(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, data)).backward()
        if step == 2:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same_bits(model, before)
            continue
        expected.zero_grad()
        loss_of(reference, data).backward()
        expected.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_leave_exact_weights_for_whoever_looks_next(where) -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fail = mlp(), False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body[0](x)
            if self.fail and where == "forward":
                raise torch.OutOfMemoryError("forward")
            if self.fail:
                hidden.register_hook(self.break_off)
            return self.body[2](self.body[1](hidden))

        def break_off(self, gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("backward")

    model = Fragile()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact = bits(model)
    model.fail = True
    with pytest.raises(torch.OutOfMemoryError, match=where):
        loss_of(model, batch(seed=5)).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), exact, strict=True))
    model.fail = False
    trained(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_run_is_the_uninterrupted_one(dtype) -> None:
    model, resumed_model = mlp(dtype), mlp(dtype)
    optimizer, resumed = one_pass(model), one_pass(resumed_model)
    for step in range(6):
        if step == 3:
            resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each_model, each in ((model, optimizer), (resumed_model, resumed))[: 1 if step < 3 else 2]:
            each.zero_grad()
            loss_of(each_model, batch(dtype, seed=step)).backward()
            each.step()
    assert same_bits(resumed_model, bits(model))


def test_zero_rho_is_the_base_alone() -> None:
    model, reference = mlp(), mlp()
    optimizer = samopt.SAM(BASES["sgd"][0](model.parameters()), rho=0.0, direction="momentum", model=model)
    trained(model, optimizer, 4)
    trained(reference, BASES["sgd"][0](reference.parameters()), 4)
    assert same_bits(model, bits(reference))


def test_low_precision_weights_are_exact_after_a_thousand_steps() -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), direction="momentum", model=model)
    exact = bits(model)
    data = batch(torch.bfloat16)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
    assert same_bits(model, exact)


def test_dropout_and_batchnorm_see_one_pass() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    model, stock = build(), build()
    optimizer = samopt.SAM(BASES["sgd"][0](model.parameters()), rho=0.1, direction="momentum", model=model)
    trained(model, optimizer, 3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    build()
    trained(stock, BASES["sgd"][0](stock.parameters()), 3)
    assert model[1].num_batches_tracked == stock[1].num_batches_tracked == 3
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("measured", [None, True])
def test_metrics_of_one_pass(measured) -> None:
    model = mlp(torch.float64)
    optimizer = one_pass(model, measure_grad_norms=measured)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(torch.float64))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step.to_dict()["applied_radius"] == 0.0
    loss = optimizer.step(closure)
    metrics = optimizer.last_step.to_dict()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    expected = {"perturbed_loss": float(loss.detach()), "radius": 0.1, "applied_radius": 0.1}
    if measured:
        expected["perturbed_grad_norm"] = float(norm)
    assert metrics == pytest.approx(expected)


def test_a_gradient_from_another_point_is_refused() -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    before = bits(model)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model[2](model[1](model[0](batch()[0]))), batch()[1]).backward()
    with pytest.raises(RuntimeError, match="no training forward of Sequential since the last step.*model="):
        optimizer.step()
    assert same_bits(model, before)


@pytest.mark.parametrize(
    ("direction", "error", "message"),
    [("downhill", ValueError, "got 'downhill'"), (3, TypeError, "got 3")],
)
def test_unknown_directions_are_refused(direction, error, message) -> None:
    with pytest.raises(error, match=message):
        samopt.SAM(mlp().parameters(), torch.optim.SGD, lr=0.1, direction=direction)


def test_a_base_without_momentum_is_named() -> None:
    model = mlp()
    optimizer = samopt.SAM(torch.optim.Adagrad(model.parameters()), direction="momentum", model=model)
    with pytest.raises(ValueError, match=r"Adagrad keeps \['step', 'sum'\]; give the base momentum"):
        trained(model, optimizer)


def test_hooks_go_with_the_optimizer() -> None:
    model = mlp()
    optimizer = one_pass(model)
    watched = weakref.ref(optimizer)
    hooks = [model._forward_pre_hooks, model._forward_hooks, model._state_dict_pre_hooks]
    assert all(hooks)
    del optimizer
    gc.collect()
    assert watched() is None and not any(hooks)


def test_a_backward_through_an_evaluation_is_at_the_exact_weights() -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer = one_pass(model)
    loss_of(model, batch(torch.float64)).backward()
    optimizer.step()
    reference.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    loss_of(model.eval(), batch(torch.float64, seed=1)).backward()
    assert not optimizer.is_perturbed
    expected = torch.autograd.grad(loss_of(reference, batch(torch.float64, seed=1)), list(reference.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
