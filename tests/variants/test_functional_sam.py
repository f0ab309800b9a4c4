"""Functional SAM against its recipe: the loss's derivative at the outputs, the outputs' Jacobian at ``w + epsilon``."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import samopt
from samopt.parts import FunctionalGradient
from tests.helpers.cases import (
    FORMS,
    asam_epsilon,
    assert_equal,
    batch,
    bits,
    loss_of,
    mlp,
    refused,
    sam_epsilon,
    same_bits,
)
from tests.helpers.functional import Call, recipe

DOUBLE = torch.float64
RHO = 0.3


def wrap(model: nn.Module, rho: float = RHO, **options: Any) -> samopt.FunctionalSAM:
    return samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, model=model, **options)


def explicit(optimizer: samopt.SharpnessAwareOptimizer, *losses: Callable[[], Tensor]) -> None:
    """All first passes, then all second ones."""
    optimizer.zero_grad()
    for loss in losses:
        loss().backward()
    with optimizer.perturbed():
        for loss in losses:
            loss().backward()


def assert_recipe(model: nn.Module, optimizer: samopt.SharpnessAwareOptimizer, *calls: Call, **options: Any) -> None:
    """A window in the explicit form and in ``backward`` leaves the recipe's gradient, with the same random numbers."""
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    expected = recipe(twin, calls, **{"rho": RHO} | options)
    start = copy.deepcopy(model.state_dict())
    extra = options.get("extra")

    def loss_of(call: Call) -> Tensor:
        loss = call(model)[0]
        return loss if extra is None else loss + extra(model)

    def in_backward() -> None:
        optimizer.zero_grad()
        for call in calls:
            optimizer.backward(lambda call=call: loss_of(call), last=call is calls[-1])

    for form in (lambda: explicit(optimizer, *[lambda call=call: loss_of(call) for call in calls]), in_backward):
        model.load_state_dict(start)
        torch.manual_seed(0)
        form()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    optimizer.zero_grad()


def cross_entropy(seed: int = 0, size: int = 16) -> Call:
    x, y = batch(DOUBLE, seed=seed, size=size)

    def call(model: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = model(x)
        return F.cross_entropy(z, y), [z]

    return call


class Shaped(nn.Module):
    """Two heads on a body, whose outputs ``shape`` packs."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.shape = shape
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.body(x).tanh()
        return self.shape(self.left(h), self.right(h))


class Output(dict):
    """As Hugging Face's: entries are attributes, too."""

    __getattr__ = dict.get


@dataclasses.dataclass
class Packed:
    left: Tensor
    rest: list[Any]


class Slots:
    __slots__ = ("left", "right")

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right


@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_the_recipe_in_every_form(form: str) -> None:
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = wrap(model), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        data = batch(DOUBLE, seed=step)

        def call(of: nn.Module, data=data) -> tuple[Tensor, Sequence[Tensor]]:
            z = of(data[0])
            return F.cross_entropy(z.float(), data[1]), [z]

        FORMS[form](optimizer, model, data)
        for p, gradient in zip(twin.parameters(), recipe(twin, [call], RHO), strict=True):
            p.grad = gradient
        stock.step()
    assert_equal(model, twin)


def test_it_is_neither_sam_nor_the_base() -> None:
    model = mlp(DOUBLE)
    call = cross_entropy()
    ours = recipe(model, [call], RHO)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    explicit(optimizer, lambda: call(model)[0])
    plain = torch.autograd.grad(call(model)[0], list(model.parameters()))
    for gradient, sam, base in zip(ours[:-1], list(model.parameters())[:-1], plain[:-1], strict=True):
        assert not torch.allclose(gradient, sam.grad, rtol=1e-3)
        assert not torch.allclose(gradient, base, rtol=1e-3)
    torch.testing.assert_close(ours[-1], plain[-1])  # the outputs are linear in the last bias


def test_outputs_that_are_linear_in_the_weights_give_the_plain_gradient() -> None:
    model = nn.Linear(6, 3).double()
    call = cross_entropy()
    explicit(wrap(model, rho=5.0), lambda: call(model)[0])
    plain = torch.autograd.grad(call(model)[0], list(model.parameters()))
    for p, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_windows_with_dropout_and_batch_norm_equal_the_recipe(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)).double()
    assert_recipe(model, wrap(model), *[cross_entropy(seed, 8) for seed in range(size)])


def _two(z: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that couples both outputs."""
    return (z[0].square().sum(-1) * z[1].exp().sum(-1)).mean()


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], list[Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda out: [out[0], out[1]]),
    "list with ids": (lambda a, b: [a.argmax(-1), a, b], lambda out: [out[1], out[2]]),
    "nested": (lambda a, b: {"heads": [(a,), b], "n": 3}, lambda out: [out["heads"][0][0], out["heads"][1]]),
    "dataclass": (lambda a, b: Packed(a, [None, b]), lambda out: [out.left, out.rest[1]]),
    "slots": (lambda a, b: Slots(a, b), lambda out: [out.left, out.right]),
    "two logits": (
        lambda a, b: Output(start_logits=a, end_logits=b, states=a * 2),
        lambda out: [out.start_logits, out.end_logits],
    ),
    "halves of one tensor": (lambda a, b: torch.cat([a, b], -1).split([3, 2], -1), lambda out: [out[0], out[1]]),
    "views": (lambda a, b: (a.unsqueeze(1)[:, 0], b.t().t()), lambda out: [out[0], out[1]]),
    "one tensor twice": (lambda a, b: (a, a, b), lambda out: [out[0], out[2]]),
    "in another precision": (lambda a, b: (a.float().double(), b.float()), lambda out: [out[0], out[1].double()]),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_several_outputs(kind: str) -> None:
    shape, take = SHAPES[kind]
    model, x = Shaped(shape), batch(DOUBLE)[0]

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        outputs = take(of(x))
        return _two((outputs[0], outputs[1])), outputs

    if kind == "in another precision":  # the recipe's outputs come after casts, which round in fp32

        def loss() -> Tensor:
            return call(model)[0]

        expected = recipe(copy.deepcopy(model), [call], RHO)
        explicit(wrap(model), loss)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)
        return
    assert_recipe(model, wrap(model), call)


def test_an_output_that_the_loss_leaves_out_counts_for_nothing() -> None:
    model, x = Shaped(lambda a, b: (a, b)), batch(DOUBLE)[0]

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = of(x)
        return z[0].square().sum(), [z[0]]

    for p in (model.right.weight, model.right.bias):
        p.requires_grad_(False)
    model.left.bias.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(trained, lr=0.1), rho=RHO, model=model)
    explicit(optimizer, lambda: call(model)[0])
    ours = [p.grad for p in trained]
    twin = copy.deepcopy(model)
    del twin.right
    twin.right = nn.Linear(8, 2).double().requires_grad_(False)
    first = torch.autograd.grad(call(twin)[0], [p for p in twin.parameters() if p.requires_grad])
    z = twin(x)[0]
    v = torch.autograd.grad(z.square().sum(), z)[0]
    weights = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, move in zip(weights, sam_epsilon(weights, first, [RHO] * len(weights)), strict=True):
            p.add_(move)
    for gradient, expected in zip(ours, torch.autograd.grad(twin(x)[0], weights, v), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


class LossInside(Shaped):
    """Computes its loss from its logits, as a Hugging Face model with labels, and returns hidden states, too."""

    def __init__(self, cast: bool = False) -> None:
        super().__init__(lambda a, b: a)
        self.cast = cast

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.body(x).tanh()
        logits = self.left(h) + self.right(h).sum(-1, keepdim=True)
        loss = F.cross_entropy(logits * 2, labels)
        return Output(loss=loss, logits=logits.float() if self.cast else logits, hidden_states=(h, logits))


def test_a_loss_computed_inside_the_model() -> None:
    model = LossInside()
    x, y = batch(DOUBLE)

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        out = of(x, labels=y)
        return out.loss, [out.logits]

    assert_recipe(model, wrap(model), call)


def test_a_loss_computed_inside_from_logits_that_are_cast_afterwards() -> None:
    """As accelerate's wrapper of a mixed-precision forward does."""
    model, plain = LossInside(cast=True), LossInside()
    x, y = batch(DOUBLE)

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        out = of(x, labels=y)
        return out.loss, [out.logits]

    explicit(wrap(model), lambda: call(model)[0])
    for p, gradient in zip(model.parameters(), recipe(plain, [call], RHO), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_the_tensors_can_be_named() -> None:
    model, x = Shaped(lambda a, b: {"features": a, "made": a.sin(), "right": b}), batch(DOUBLE)[0]

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        out = of(x)
        return _two((out["made"], out["right"])), [out["made"], out["right"]]

    assert_recipe(model, wrap(model, outputs=lambda out: (out["made"], out["right"])), call)


def test_what_the_loss_takes_past_the_outputs_is_taken_at_the_perturbed_weights() -> None:
    model = mlp(DOUBLE)

    def penalty(of: nn.Module) -> Tensor:
        return sum(p.square().square().sum() for p in of.parameters())

    assert_recipe(model, wrap(model), cross_entropy(), extra=penalty)


def test_one_batch_through_several_calls() -> None:
    """Two views of a batch, and a term that couples them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 3)).double()
    x, y = batch(DOUBLE)

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        first, second = of(x), of(x)
        return F.cross_entropy(first, y) + (first - second).square().mean(), [first, second]

    assert_recipe(model, wrap(model), call)


def test_outputs_used_twice_and_changed_in_place() -> None:
    model = mlp(DOUBLE)
    x, y = batch(DOUBLE)

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = of(x)
        loss = z.exp().mean()  # exp keeps its own result, so that z may be changed in place afterwards
        changed = z.mul_(3.0).add_(1.0) if of is model else z * 3.0 + 1.0
        return loss + F.cross_entropy(changed, y), [z]

    assert_recipe(model, wrap(model), call)


def test_two_backward_passes_over_one_call_and_a_look_at_a_gradient() -> None:
    model = mlp(DOUBLE)
    x, y = batch(DOUBLE)
    optimizer = wrap(model)

    def both() -> None:
        z = model(x)
        loss = F.cross_entropy(z, y)
        torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        loss.backward(retain_graph=True)
        z.square().mean().backward()

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = of(x)
        return F.cross_entropy(z, y) + z.square().mean(), [z]

    expected = recipe(copy.deepcopy(model), [call], RHO)
    both()
    with optimizer.perturbed():
        both()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise", ["no_grad", "evaluation", "kept graph", "cleared backward"])
def test_calls_that_are_no_part_of_a_pass_count_for_nothing(noise: str) -> None:
    model = mlp(DOUBLE)
    optimizer, call = wrap(model), cross_entropy()
    expected = recipe(copy.deepcopy(model), [call], RHO)
    kept = []

    def disturb() -> None:
        x = batch(DOUBLE, seed=9, size=5)[0]
        if noise == "no_grad":
            with torch.no_grad():
                model(x)
        elif noise == "evaluation":
            model.eval()
            model(x)
            model.train()
        elif noise == "kept graph":
            kept.append(model(x))
        else:
            model(x).sum().backward()
            optimizer.zero_grad()

    disturb()
    call(model)[0].backward()
    if noise != "cleared backward":
        disturb()
    with optimizer.perturbed():
        call(model)[0].backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_gradients_cleared_between_forward_and_backward() -> None:
    model = mlp(DOUBLE)
    optimizer, call = wrap(model), cross_entropy()
    expected = recipe(copy.deepcopy(model), [call], RHO)
    loss = call(model)[0]
    optimizer.zero_grad()
    loss.backward()
    with optimizer.perturbed():
        loss = call(model)[0]
        optimizer.zero_grad()
        loss.backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_batches_in_another_order_are_known_by_their_tensors() -> None:
    model = mlp(DOUBLE)
    optimizer, calls = wrap(model), [cross_entropy(seed) for seed in range(3)]
    expected = recipe(copy.deepcopy(model), calls, RHO)
    for call in calls:
        call(model)[0].backward()
    with optimizer.perturbed():
        for call in reversed(calls):
            call(model)[0].backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_around_the_model(use_reentrant: bool, size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)).double()

    def checkpointed(seed: int) -> Call:
        x, y = batch(DOUBLE, seed=seed)
        x.requires_grad_(use_reentrant)

        def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
            z = checkpoint(of, x, use_reentrant=use_reentrant) if of is model else of(x)
            return F.cross_entropy(z, y), [z]

        return call

    assert_recipe(model, wrap(model), *[checkpointed(seed) for seed in range(size)])


def test_a_compiled_model_equals_the_recipe() -> None:
    model = mlp(DOUBLE)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=compiled)
    call = cross_entropy()
    expected = recipe(copy.deepcopy(model), [call], RHO)
    for _ in range(2):
        explicit(optimizer, lambda: call(compiled)[0])
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_several_outputs_of_a_compiled_model() -> None:
    model, x = Shaped(lambda a, b: (a, b)), batch(DOUBLE)[0]
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=compiled)

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = of(x)
        return _two(z), z

    expected = recipe(copy.deepcopy(model), [call], RHO)
    explicit(optimizer, lambda: call(compiled)[0])
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_loss_inside_a_compiled_model_is_refused() -> None:
    model = LossInside()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=compiled)
    x, y = batch(DOUBLE)
    with pytest.raises(RuntimeError, match="takes more from a compiled model.*compute the loss outside"):
        optimizer.backward(lambda: compiled(x, labels=y)["loss"])


def test_a_power_of_two_as_loss_scale_changes_no_bit() -> None:
    model, plain = mlp(), mlp()
    scaled, expected = wrap(model), wrap(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        x, y = batch(seed=step)
        scaled.zero_grad()
        scaled.backward(lambda: scaler.scale(F.cross_entropy(model(x), y)))  # noqa: B023  # called at once
        scaler.step(scaled)
        scaler.update()
        expected.zero_grad()
        expected.backward(lambda: F.cross_entropy(plain(x), y))  # noqa: B023  # called at once
        expected.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("where", ["first", "second"])
def test_an_overflow_skips_the_update(where: str) -> None:
    model = mlp()
    optimizer, (x, y) = wrap(model), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = bits(model)
    passes = []

    def loss() -> Tensor:
        passes.append(1)
        factor = float("inf") if len(passes) == (1 if where == "first" else 2) else 1.0
        z = model(x)
        # In the second pass, what goes past the outputs is what can overflow.
        return scaler.scale(F.cross_entropy(z, y) * (factor if where == "first" else 1.0)) + sum(
            p.sum() * (factor if where == "second" else 1.0) for p in model.parameters()
        )

    optimizer.backward(loss)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0


def test_asam_and_a_larger_radius_equal_the_recipe() -> None:
    model = mlp(DOUBLE)
    assert_recipe(model, wrap(model, adaptive=True, rho=1.0), cross_entropy(), rho=1.0, epsilon=asam_epsilon)


@pytest.mark.parametrize("region", ["previous", "ema", "pretrained"])
def test_a_trust_region_that_runs_the_model_again(region: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)).double()
    base = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer = samopt.TRAM(
        base, model=model, trust_region=region, scale=5.0, combination=FunctionalGradient(), max_radius=2.0
    )
    for step in range(3):
        call, twin = cross_entropy(step), copy.deepcopy(model)
        torch.manual_seed(step)
        optimizer.zero_grad()
        optimizer.backward(lambda call=call: call(model)[0])
        radius = float(optimizer.last_step.radius)
        assert (radius > 0) == (step > 0)
        torch.manual_seed(step)
        for p, gradient in zip(model.parameters(), recipe(twin, [call], radius, asam_epsilon), strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
        optimizer.step()


def test_frozen_and_sparse_parameters() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)
            self.head.bias.requires_grad_(False)
            self.double()

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).tanh())

    model, ids, y = Tagger(), torch.tensor([1, 2, 2]), torch.tensor([0, 1, 2])
    twin = copy.deepcopy(model)
    twin.table.sparse = False
    optimizer = samopt.FunctionalSAM(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), rho=RHO, model=model
    )
    explicit(optimizer, lambda: F.cross_entropy(model(ids), y))
    weights = [twin.table.weight, twin.head.weight]
    z = twin(ids)
    loss = F.cross_entropy(z, y)
    (v,) = torch.autograd.grad(loss, z, retain_graph=True)
    moves = sam_epsilon(weights, torch.autograd.grad(loss, weights), [RHO] * 2)
    with torch.no_grad():
        for p, move in zip(weights, moves, strict=True):
            p.add_(move)
    expected = torch.autograd.grad(twin(ids), weights, v)
    torch.testing.assert_close(model.table.weight.grad.to_dense(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.head.weight.grad, expected[1], rtol=1e-10, atol=1e-12)


def test_the_perturbed_loss_is_the_loss_at_the_perturbed_weights() -> None:
    ours, theirs = mlp(DOUBLE), mlp(DOUBLE)
    functional = wrap(ours)
    sam = samopt.SAM(torch.optim.SGD(theirs.parameters(), lr=0.1), rho=RHO, model=theirs)
    call = cross_entropy()
    functional.backward(lambda: call(ours)[0])
    sam.backward(lambda: call(theirs)[0])
    assert functional.last_step.perturbed_loss == sam.last_step.perturbed_loss
    assert functional.last_step.loss == sam.last_step.loss


def test_nothing_is_kept_after_a_step_and_the_model_holds_nothing_of_the_optimizer() -> None:
    model = mlp(DOUBLE)
    optimizer = wrap(model)
    sizes = []
    for step in range(3):
        explicit(optimizer, lambda step=step: cross_entropy(step)(model)[0])
        optimizer.step()
        gc.collect()
        sizes.append(sum(type(thing) is Tensor and thing.shape == (16, 3) for thing in gc.get_objects()))
    assert sizes[2] == sizes[1] == sizes[0]
    assert not any(hook for p in model.modules() for hook in (p._forward_hooks, p._backward_hooks))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_a_radius_of_zero_is_the_base_in_one_pass() -> None:
    model, plain = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, stock = wrap(model, rho=0.0), torch.optim.SGD(plain.parameters(), lr=0.1)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy()(model)[0]

    optimizer.backward(loss)
    optimizer.step()
    cross_entropy()(plain)[0].backward()
    stock.step()
    assert calls == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


# What is refused


@pytest.mark.parametrize("form", ["perturbed", "first_step"])
def test_a_second_pass_of_the_loops_own_at_a_radius_of_zero_is_the_base(form) -> None:
    """Code with first_step and second_step runs its second pass also where a schedule has set the radius to 0."""
    ours, theirs = mlp(DOUBLE), mlp(DOUBLE)
    optimizer = wrap(ours, rho=0.0)
    stock = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for seed in range(2):
        data = batch(DOUBLE, seed=seed)
        loss_of(ours, data).backward()
        if form == "perturbed":
            with optimizer.perturbed():
                loss_of(ours, data).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True)
            loss_of(ours, data).backward()
            optimizer.second_step(zero_grad=True)
        stock.zero_grad()
        loss_of(theirs, data).backward()
        stock.step()
    assert same_bits(ours, bits(theirs))


@pytest.mark.parametrize(
    "make", [samopt.FunctionalSAM, lambda base: samopt.SAM(base, combination=FunctionalGradient())]
)
def test_a_model_is_needed(make: Any) -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("FunctionalGradient follows the model's forward calls, but model= is missing", model, base, TypeError):
        make(base)


def test_an_optimizer_over_two_models_is_refused() -> None:
    encoder, head = nn.Linear(6, 4), nn.Linear(4, 3)
    base = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
    with refused("outputs of Linear, the first of model=, but the base.*parameters of Linear", head, base, ValueError):
        samopt.FunctionalSAM(base, model=[encoder, head])


def test_a_module_with_state_beside_the_model_is_taken() -> None:
    model, statistics = mlp(DOUBLE), nn.BatchNorm1d(3, affine=False).double()
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=[model, statistics])
    x, y = batch(DOUBLE)
    optimizer.backward(lambda: F.cross_entropy(statistics(model(x)), y))
    assert int(statistics.num_batches_tracked) == 1


@pytest.mark.parametrize("direction", ["momentum", "momentum-uphill", samopt.parts.ReusedGradient()])
def test_one_pass_directions_are_refused(direction: Any) -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with refused("FunctionalGradient .* two passes, and this direction takes one", model, base, ValueError):
        samopt.FunctionalSAM(base, model=model, direction=direction)


def test_fixed_options_and_other_arguments_are_refused() -> None:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with refused("sets combination= itself", model, base, TypeError):
        samopt.FunctionalSAM(base, model=model, combination=None)
    with refused("outputs must be a callable .*got 'logits'", model, base, TypeError):
        samopt.FunctionalSAM(base, model=model, outputs="logits")


def failing(
    model: nn.Module, loss: Callable[[], Tensor], match: str, error: Any = RuntimeError, **options: Any
) -> None:
    """A step raises this error, and leaves the weights exact."""
    optimizer = wrap(model, **options)
    before = bits(model)
    with pytest.raises(error, match=match):
        explicit(optimizer, loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.is_perturbed


def by_turn(*losses: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """One loss in each pass."""
    turns = iter(losses)
    return lambda: next(turns)()


def test_a_first_pass_without_a_forward_call() -> None:
    model = mlp(DOUBLE)
    x, y = batch(DOUBLE)
    failing(model, lambda: F.cross_entropy(model[2](model[1](model[0](x))), y), "saw no forward call of model=")


def test_a_first_pass_whose_loss_does_not_come_from_the_outputs() -> None:
    model = Shaped(lambda a, b: Output(logits=a * 1.0, scores=a))
    x = batch(DOUBLE)[0]
    failing(model, lambda: model(x).scores.square().sum(), "no gradient reached .logits of Shaped.*outputs=")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (lambda a, b: (a, a.sin()), r"Shaped returned \[0\], \[1\], and computes another of them from \[0\].*outputs="),
        (lambda a, b: (b.cos().sum(-1, True) + a, [b]), r"another of them from \[1\]\[0\]"),
        (lambda a, b: (a, a.view(-1)), r"another of them from \[0\]"),
    ],
)
def test_outputs_made_from_one_another(shape: Any, match: str) -> None:
    model, x = Shaped(shape), batch(DOUBLE)[0]
    failing(model, lambda: model(x)[0].square().sum(), match, ValueError)


class Carries(nn.Module):
    """Starts each call from its last output, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(6, 6).double(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x + self.last).tanh()
        return self.last


def rollout(model: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        x = model(x)
    return x.exp().sum()


def carried(model: Any, x: Tensor) -> Tensor:
    model.last = 0.0
    return model(x).exp().sum() + model(2 * x).exp().sum()


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: nn.Linear(6, 6).double(), rollout),
        (lambda: torch.compile(nn.Linear(6, 6).double(), backend="aot_eager"), rollout),
        (Carries, carried),
    ],
)
def test_an_output_that_is_fed_back_into_the_model(make: Any, loss: Any) -> None:
    """Its gradient has the Jacobian of the next call in it, at ``w``; the recipe is that of the whole loop."""
    model, x = make(), batch(DOUBLE)[0]
    failing(model, lambda: loss(model, x), "forward call 2 of .* is computed from an output of an earlier", ValueError)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(6, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(3):
            h = self.cell(x, h)
        return self.head(h)


class Cell(Loop):
    def forward(self, x: Tensor, h: Tensor) -> Any:  # type: ignore[override]
        h = self.cell(x, h)
        return self.head(h), h


def test_a_loop_inside_the_model_and_what_is_fed_back_besides_the_outputs_or_detached() -> None:
    assert_recipe(loop := Loop(), wrap(loop), cross_entropy(0), cross_entropy(1))
    x, y = batch(DOUBLE)

    def hidden(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        h, outputs = torch.zeros_like(x), []
        for _ in range(3):
            logits, h = of(x, h)
            outputs.append(logits)
        return sum(F.cross_entropy(each, y) for each in outputs), outputs

    assert_recipe(cell := Cell(), wrap(cell, outputs=lambda returned: returned[0]), hidden)

    def detached(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        first = of(x)
        second = of(first.detach())
        return first.exp().mean() + second.exp().mean(), [first, second]

    torch.manual_seed(0)
    assert_recipe(layer := nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double(), wrap(layer), detached)


def test_a_parameter_among_the_outputs() -> None:
    model, x = Shaped(lambda a, b: (a, model.left.bias)), batch(DOUBLE)[0]
    failing(model, lambda: model(x)[0].square().sum(), r"\[1\] of Shaped is a parameter or an input itself", ValueError)


@pytest.mark.parametrize("shape", [lambda a, b: a.square().sum(), lambda a, b: {"loss": a.sum(), "n": 3}])
def test_a_model_that_returns_a_loss_alone(shape: Any) -> None:
    model, x = Shaped(shape), batch(DOUBLE)[0]

    def loss() -> Tensor:
        out = model(x)
        return out if isinstance(out, Tensor) else out["loss"]

    failing(model, loss, "a scalar among it that may be the loss, and nothing named logits.*outputs=", TypeError)


@pytest.mark.parametrize(
    "shape",
    [
        lambda a, b: (a.square().sum(), a),
        lambda a, b: {"loss": a.square().sum(), "scores": a, "mean_logits": a.detach().mean(-1)},
    ],
)
def test_a_loss_beside_outputs_without_a_name(shape: Any) -> None:
    """They may be made on the way to that loss: per-token losses of a fused head, say."""
    model, x = Shaped(shape), batch(DOUBLE)[0]

    def loss() -> Tensor:
        out = model(x)
        return out[0] if isinstance(out, tuple) else out["loss"]

    failing(model, loss, "a scalar among it that may be the loss, and nothing named logits.*outputs=", TypeError)


def test_a_loss_that_is_linear_in_the_outputs_is_said_to_be_sams_once() -> None:
    """As the negative log-likelihood of log-probabilities is; that of logits is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3), nn.LogSoftmax(-1)).double()
    x, y = batch(DOUBLE)
    optimizer, sam = wrap(model), samopt.SAM(torch.optim.SGD((twin := copy.deepcopy(model)).parameters()), rho=RHO)
    with pytest.warns(UserWarning, match="the loss is linear in what FunctionalGradient takes for the outputs.*SAM's"):
        explicit(optimizer, lambda: F.nll_loss(model(x), y))
    explicit(sam, lambda: F.nll_loss(twin(x), y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit(optimizer, lambda: F.nll_loss(model(x), y))


@pytest.mark.parametrize("chosen", [[], ["logits"], [None]])
def test_outputs_that_are_no_tensors(chosen: Any) -> None:
    model, x = mlp(DOUBLE), batch(DOUBLE)[0]
    failing(model, lambda: model(x).sum(), "outputs= must return a tensor", TypeError, outputs=lambda out: chosen)


def test_other_calls_in_the_second_pass() -> None:
    model, call = mlp(DOUBLE), cross_entropy
    one, two = lambda: call(0)(model)[0], lambda: call(0)(model)[0] + call(1)(model)[0]
    failing(model, by_turn(one, two), r"first pass differentiated 1 forward call\(s\) .*second pass more")
    failing(model, by_turn(two, one), r"first pass differentiated 2 forward call\(s\) .*second pass repeated 1")


def test_another_batch_size_in_the_second_pass() -> None:
    model = mlp(DOUBLE)
    turns = by_turn(lambda: cross_entropy(size=16)(model)[0], lambda: cross_entropy(size=8)(model)[0])
    failing(model, turns, r"call 1 of Sequential returned the output of shape \(16, 3\).*of shape \(8, 3\)")


def test_a_second_pass_that_is_left_out() -> None:
    model = mlp(DOUBLE)
    optimizer, call = wrap(model), cross_entropy()
    call(model)[0].backward()
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"differentiated 1 forward call\(s\).*repeated 0"), optimizer.perturbed():
        pass
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_an_output_that_the_loss_takes_in_one_pass_only() -> None:
    for shape in (lambda a, b: (a, b), lambda a, b: torch.cat([a, b], -1).split([3, 2], -1)):
        model, x = Shaped(shape), batch(DOUBLE)[0]
        both, left = lambda: _two(model(x)), lambda: model(x)[0].square().sum()  # noqa: B023  # called in this turn
        failing(model, by_turn(both, left), "in the first pass the loss depended on .*in the second pass it did not")
    # At w the loss did not take the other, so its derivative is 0 there.
    model = Shaped(lambda a, b: (a, b))
    optimizer, twin = wrap(model), copy.deepcopy(model)
    explicit(optimizer, by_turn(lambda: model(x)[0].square().sum() + 0 * _norm(model), lambda: _two(model(x))))

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        z = of(x)
        return z[0].square().sum() + 0 * _norm(of), [z[0]]

    for p, gradient in zip(model.parameters(), recipe(twin, [call], RHO), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


def _norm(model: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in model.parameters())


def test_more_backward_passes_in_the_second_pass() -> None:
    model, call = mlp(DOUBLE), cross_entropy()
    optimizer = wrap(model)
    call(model)[0].backward()
    with pytest.raises(RuntimeError, match="more backward passes in the second pass"), optimizer.perturbed():
        loss = call(model)[0]
        loss.backward(retain_graph=True)
        loss.backward()


def test_a_gradient_that_the_first_pass_alone_logs() -> None:
    model, call = mlp(DOUBLE), cross_entropy()
    optimizer = wrap(model)
    loss = call(model)[0]
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    with (
        pytest.raises(RuntimeError, match=r"in the first pass than in the second \(torch.autograd.grad is one, too"),
        optimizer.perturbed(),
    ):
        call(model)[0].backward()


def _first(out: Any) -> Tensor:
    return out[0].square().sum()


@pytest.mark.parametrize(
    "write",
    [
        lambda out: _first(out) + out[1].mul_(2).exp().sum(),
        lambda out: _first(out) + out[1].sum() + out[1].mul_(2).exp().sum(),
        lambda out: _first(out) + (out[2].add_(1) * out[1]).exp().sum(),  # another view of the same memory
    ],
)
def test_a_view_among_the_outputs_that_the_loss_writes_into(write: Any) -> None:
    """The write gives the view, and others of its memory, another place in the graph, past the hooks."""

    def shape(a: Tensor, b: Tensor) -> Any:
        return a, b[:, :1], b[:, 1:]

    model, x = Shaped(shape), batch(DOUBLE)[0]
    failing(model, lambda: write(model(x)), r"\[[12]\] of Shaped was written into after the forward.*logits / 2")


def test_outputs_that_the_loss_may_write_into() -> None:
    """One that is no view, and a view after the backward pass."""
    model, x = Shaped(lambda a, b: (a * 1, b[:, 1:])), batch(DOUBLE)[0]
    made: list[Tensor] = []

    def call(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        if made:
            made.pop().detach().zero_()
        out = of(x)
        made.append(out[1])
        return (out[0].sub_(1) * 2).exp().sum() + out[1].exp().sum(), list(out)

    def expected(of: nn.Module) -> tuple[Tensor, Sequence[Tensor]]:
        out = of(x)
        return ((out[0] - 1) * 2).exp().sum() + out[1].exp().sum(), list(out)

    optimizer, gradients = wrap(model), recipe(copy.deepcopy(model), [expected], RHO)
    explicit(optimizer, lambda: call(model)[0])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_graph_of_the_first_pass_in_the_second() -> None:
    model, call = mlp(DOUBLE), cross_entropy()
    optimizer = wrap(model)
    loss = call(model)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a forward call of the first"), optimizer.perturbed():
        loss.backward()


def test_a_gradient_of_a_gradient() -> None:
    model, call = mlp(DOUBLE), cross_entropy()
    optimizer = wrap(model)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more.*create_graph=True"):
        torch.autograd.grad(call(model)[0], list(model.parameters()), create_graph=True)
    assert not optimizer.is_perturbed


def test_a_detached_optimizer_says_what_it_misses() -> None:
    model, call = mlp(DOUBLE), cross_entropy()
    optimizer = wrap(model)
    optimizer.detach()
    call(model)[0].backward()
    with pytest.raises(RuntimeError, match="saw no forward call"), optimizer.perturbed():
        pass


def test_an_interrupted_second_pass_leaves_exact_weights_and_the_next_step_is_right() -> None:
    model, twin = mlp(DOUBLE), mlp(DOUBLE)
    optimizer, call = wrap(model), cross_entropy()
    call(model)[0].backward()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed():
        call(model)
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    explicit(optimizer, lambda: call(model)[0])
    for p, gradient in zip(model.parameters(), recipe(twin, [call], RHO), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)
