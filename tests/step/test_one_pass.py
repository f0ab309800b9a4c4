"""The momentum direction in one pass: the user's loop does not change, and no weight moves."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import samopt
from samopt.parts.direction import Momentum
from tests.helpers import one_pass as helpers
from tests.helpers.cases import batch, bits, loss_of, mlp, same_bits
from tests.helpers.one_pass import AHEAD, GEOMETRIES, UPHILL, assert_close, hand_step

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd-maximize": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, maximize=True),
    "sgd-nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, dampening=0.0),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}
RADII = {"sam": 0.1, "asam": 0.5, "fisher": 0.1}
SIGNS = {"momentum": AHEAD, "momentum-uphill": UPHILL}

each_base = pytest.mark.parametrize("base", BASES)


def one_pass(model: nn.Module, base: str = "sgd", geometry: str = "sam", direction: Any = "momentum", **options: Any):
    return helpers.one_pass(model, BASES[base], geometry=geometry, direction=direction, rho=RADII[geometry], **options)


@each_base
@pytest.mark.parametrize("geometry", RADII)
@pytest.mark.parametrize("direction", SIGNS)
def test_unchanged_loop_equals_the_hand_written_one(direction, geometry, base) -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = one_pass(model, base, geometry, direction), BASES[base](reference.parameters())
    options = {"epsilon": GEOMETRIES[geometry][1], "sign": SIGNS[direction], "rho": RADII[geometry]}
    for step in range(5):
        data = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        optimizer.step()
        expected = hand_step(stock, lambda data=data: backward_of(reference, data), **options)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-11, atol=1e-12)
    assert_close(model, reference)


def backward_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    loss = loss_of(model, data)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("uphill", [False, True])
def test_momentum_sam_goes_ahead_as_its_authors_do_or_uphill(uphill) -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer = samopt.MomentumSAM(BASES["sgd"](model.parameters()), rho=0.3, uphill=uphill, model=model)
    stock = BASES["sgd"](reference.parameters())
    for step in range(4):
        data = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        hand_step(stock, lambda data=data: backward_of(reference, data), sign=UPHILL if uphill else AHEAD, rho=0.3)
    assert_close(model, reference)


def test_groups_have_their_own_radius_and_may_stay() -> None:
    def groups(model):
        first, second, third = model[0].weight, model[2].weight, [model[0].bias, model[2].bias]
        return [{"params": [first]}, {"params": [second], "rho": 0.7}, {"params": third, "perturb": False}]

    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer = samopt.SAM(
        torch.optim.SGD(groups(model), lr=0.1, momentum=0.9), rho=0.2, direction="momentum", model=model
    )
    stock = torch.optim.SGD(groups(reference), lr=0.1, momentum=0.9)
    for step in range(4):
        data = batch(torch.float64, seed=step)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        hand_step(stock, lambda data=data: backward_of(reference, data), rho=[0.2, 0.7, 0.0, 0.0])
    assert_close(model, reference)


def test_a_frozen_part_stays_and_one_that_is_thawed_joins() -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = one_pass(model), BASES["sgd"](reference.parameters())
    for step in range(6):
        data = batch(torch.float64, seed=step)
        for each in (model, reference):
            each[2].requires_grad_(step >= 3)
        optimizer.zero_grad()
        loss_of(model, data).backward()
        optimizer.step()
        hand_step(stock, lambda data=data: backward_of(reference, data), rho=0.1)
    assert_close(model, reference)


@pytest.mark.parametrize("nearest", [False, True])
def test_low_precision_weights_are_rounded_at_random_around_the_exact_point(nearest) -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 64, bias=False).to(torch.bfloat16)
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=1.0)
    optimizer = samopt.SAM(base, rho=0.01, direction="momentum", model=model, stochastic_rounding=not nearest)
    momentum = base.state[model.weight]["momentum_buffer"] = torch.randn(64, 256).to(torch.bfloat16)
    exact = model.weight.detach().clone()
    want = exact.double() - 0.01 * momentum.double() / momentum.double().norm()
    ulp = torch.exp2(torch.floor(torch.log2(want.abs())) - 7)
    seen = []
    for _ in range(100):
        seen.append(model(torch.eye(256, dtype=torch.bfloat16)).detach().T.double())  # w + epsilon itself
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        assert torch.equal(model.weight, exact)
        assert bool(((seen[-1] - want).abs() <= ulp * (0.5 if nearest else 1.0) * (1 + 1e-5)).all())
    assert all(torch.equal(value, seen[0]) is nearest for value in seen[1:])
    missing = (torch.stack(seen).mean(0) - want).norm() / (exact.double() - want).norm()
    assert (float(missing) > 0.5) if nearest else (float(missing) < 0.25)


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
    torch.testing.assert_close(w - start, -0.3 * direction / direction.norm(), rtol=1e-6, atol=1e-8)
    optimizer.restore()
    assert torch.equal(w, start)


@pytest.mark.parametrize("form", ["closure", "closure without model", "context", "primitives"])
def test_every_form_is_the_unchanged_loop(form) -> None:
    model, reference = mlp(), mlp()
    expected = one_pass(reference)
    optimizer = samopt.SAM(
        BASES["sgd"](model.parameters()),
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


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, dtype: Any = torch.float32) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(dtype, seed=step)).backward()
        optimizer.step()


def test_no_weight_moves_between_forward_and_backward() -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact = bits(model)
    data = batch(seed=7)
    loss = loss_of(model, data)
    assert not optimizer.is_perturbed and same_bits(model, exact)
    with optimizer.exact():
        assert not torch.equal(loss, loss_of(model, data))
    loss.backward()
    assert same_bits(model, exact)


class Spy(nn.Module):
    """A model that looks at its own weights, or runs other code, in the middle of its forward."""

    def __init__(self, look: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.body, self.look = mlp(), look

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[1](self.body[0](x))
        if self.look is not None:
            self.look(self)
        return self.body[2](hidden)


def in_thread(action: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


LOOKS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "parameters": bits,
    "state_dict": lambda model: [value.clone() for value in model.state_dict().values()],
    "parameters in a thread": lambda model: in_thread(lambda: bits(model)),
    "state_dict in a thread": lambda model: in_thread(lambda: [v.clone() for v in model.state_dict().values()]),
    "parameters_to_vector": lambda model: [nn.utils.parameters_to_vector(model.parameters()).detach()],
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("when", ["in the forward", "in the backward", "between"])
def test_weights_are_exact_at_every_moment(when, look) -> None:
    model = Spy()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact, seen = LOOKS[look](model), []
    if when == "in the forward":
        model.look = lambda self: seen.append(LOOKS[look](self))
    loss = loss_of(model, batch(seed=7))
    model.look = None
    if when == "between":
        seen.append(LOOKS[look](model))
    elif when == "in the backward":
        model.body[0].bias.register_hook(lambda gradient: seen.append(LOOKS[look](model)))
    loss.backward()
    assert len(seen) == 1 and all(map(torch.equal, seen[0], exact))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_exact_weights_inside_its_handler(where, error) -> None:
    model = Spy()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact, reference = bits(model), copy.deepcopy(model)
    expected = one_pass(reference)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def fail(*_: Any) -> None:
        raise error("stopped")

    handle = None
    if where == "forward":
        model.look = fail
    else:
        handle = model.body[0].bias.register_hook(fail)
    optimizer.zero_grad()
    try:
        loss_of(model, batch(seed=5)).backward()
    except error:
        assert same_bits(model, exact)
        assert all(map(torch.equal, model.state_dict().values(), exact))
        assert not any("weight" in vars(module) for module in model.modules())
    else:
        raise AssertionError("nothing was raised")
    model.look = None
    if handle is not None:
        handle.remove()
    trained(model, optimizer)
    trained(reference, expected)
    assert same_bits(model, bits(reference))


@pytest.mark.parametrize(
    "look", ["eval forward", "no_grad forward", "exact forward", "state_dict", "deepcopy", "pickle"]
)
def test_a_look_between_forward_and_backward_changes_no_gradient(look) -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    exact = bits(model)
    data = batch(seed=7)
    expected = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    loss = loss_of(model, data)
    want = functional_call(mlp(), dict(model.named_parameters()), data[0])
    if look == "eval":
        assert torch.equal(model.eval()(data[0]), want)
        model.train()
    elif look == "no_grad":
        with torch.no_grad():
            assert torch.equal(model(data[0]), want)
    elif look == "exact":
        with optimizer.exact():
            assert torch.equal(model(data[0]), want)
    elif look == "state_dict":
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), exact, strict=True))
    elif look == "deepcopy":
        assert same_bits(copy.deepcopy((optimizer, model))[1], exact)
    else:
        assert same_bits(pickle.loads(pickle.dumps((optimizer, model)))[1], exact)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert same_bits(model, exact)


@pytest.mark.parametrize("then", ["at once", "after the next forward"])
@pytest.mark.parametrize("width", [12, 6000])
def test_a_graph_that_outlives_its_step_is_right_or_refused(width, then) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    optimizer = one_pass(model)
    trained(model, optimizer, dtype=torch.float64)
    data = batch(torch.float64, seed=7)
    expected = torch.autograd.grad(loss_of(model, data), list(model.parameters()))
    loss = loss_of(model, data)
    optimizer.step()
    if then != "at once":
        trained(model, optimizer, 1, torch.float64)
    optimizer.zero_grad()
    if width == 6000 and then != "at once":  # the memory of large tensors is used again
        with pytest.raises(RuntimeError, match="inplace"):  # torch's own words
            loss.backward()
    else:
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert all(map(torch.equal, gradients, expected))


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
        penalised(lambda inputs: functional_call(mlp(torch.float64), moved, (inputs,))), list(moved.values())
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
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.0, direction="momentum", model=model)
    trained(model, optimizer, 4)
    trained(reference, BASES["sgd"](reference.parameters()), 4)
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
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1, direction="momentum", model=model)
    trained(model, optimizer, 3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    build()
    trained(stock, BASES["sgd"](stock.parameters()), 3)
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


@pytest.mark.parametrize("mode", ["eval", "exact", "detached"])
def test_a_gradient_from_another_point_is_refused(mode) -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    before = bits(model)
    optimizer.zero_grad()
    if mode == "exact":
        with optimizer.exact():
            loss_of(model, batch()).backward()
    elif mode == "eval":
        loss_of(model.eval(), batch()).backward()
    else:
        optimizer.detach()
        loss_of(model, batch()).backward()
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


@pytest.mark.parametrize("how", ["deleted", "detached"])
def test_what_follows_the_model_goes_with_the_optimizer(how) -> None:
    model = mlp()
    optimizer = one_pass(model)
    trained(model, optimizer)
    watched = weakref.ref(optimizer)
    slot = "_compiled_call_impl"
    assert all(slot in vars(module) for module in model.modules())
    if how == "deleted":
        del optimizer
        gc.collect()
        assert watched() is None
    else:
        optimizer.detach()
        optimizer.detach()
    assert not any(slot in vars(module) for module in model.modules())


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
