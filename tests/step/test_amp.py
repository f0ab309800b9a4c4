"""Mixed precision: under a ``GradScaler`` or autocast the update is the hand-written loop's without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import samopt
from tests.helpers.cases import (
    BASES,
    TOLERANCE,
    VARIANTS,
    Variant,
    assert_equal,
    assert_same,
    batch,
    bits,
    closure_of,
    loss_of,
    mlp,
    parameters_of,
    sam_epsilon,
    same_bits,
    second_gradient,
)

SCALE = 1024.0
CLIP = 0.05  # well below the gradients' norm, so that it always acts
Data = tuple[Tensor, Tensor]


def make_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, **options)


def data_of(step: int, micro: int = 0) -> Data:
    return batch(torch.float64, seed=10 * step + micro)


def hand_written_step(
    model: nn.Module, base: torch.optim.Optimizer, variant: Variant, batches: list[Data], clip: float | None = None
) -> None:
    """One textbook step without a scaler; the loss is the mean over ``batches``."""

    def backward() -> Tensor:
        losses = [loss_of(model, data) / len(batches) for data in batches]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    second_gradient(parameters_of(base), backward, variant.epsilon, variant.rho)
    if clip is not None:
        clip_grad_norm_(model.parameters(), clip)
    base.step()


def scaled_passes(
    model: nn.Module,
    optimizer: samopt.SharpnessAwareOptimizer,
    scaler: torch.amp.GradScaler,
    batches: list[Data],
    poison: str = "",
) -> None:
    """Both passes of the explicit form; ``poison`` names the pass and the means of an overflow, "first input" say."""

    def run(which: str) -> None:
        handle = None
        if poison == f"{which} hook":  # on the last parameter, so that looking at the first is not enough
            handle = list(model.parameters())[-1].register_hook(lambda g: g * torch.inf)
        for x, y in batches:
            x = torch.full_like(x, torch.inf) if poison == f"{which} input" else x
            scaler.scale(loss_of(model, (x, y)) / len(batches)).backward()
        if handle is not None:
            handle.remove()

    optimizer.zero_grad()
    run("first")
    with optimizer.perturbed():
        run("second")


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "adamw-fused"])
@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if variant.scale_invariant], ids=lambda variant: variant.name
)
def test_scaled_explicit_form_equals_the_unscaled_loop(
    variant: Variant, base: str, clip: float | None, micro_batches: int
) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = (
        variant.wrap(BASES[base](model.parameters()), rho=variant.rho),
        BASES[base](expected.parameters()),
    )
    scaler = make_scaler(growth_interval=2)
    for step in range(5):
        batches = [data_of(step, micro) for micro in range(micro_batches)]
        scaled_passes(model, optimizer, scaler, batches)
        if clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        hand_written_step(expected, stock, variant, batches, clip)
        assert_equal(model, expected)
    assert scaler.get_scale() == 4 * SCALE  # it grew after the second and the fourth good step
    assert not {"grad_scale", "found_inf"} & (set(vars(optimizer)) | set(vars(optimizer.base_optimizer)))


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw-fused"])
@pytest.mark.parametrize("poison", ["first input", "first hook", "second input", "second hook"])
def test_an_overflow_in_either_pass_skips_the_step_and_halves_the_scale(
    poison: str, base: str, clip: float | None
) -> None:
    variant = VARIANTS[0]
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer = variant.wrap(BASES[base](model.parameters()), rho=variant.rho)
    stock = BASES[base](expected.parameters())
    scaler = make_scaler()
    for step in range(4):
        overflow = step in (0, 2)
        before, state = bits(model), copy.deepcopy(optimizer.base_optimizer.state_dict())
        scaled_passes(model, optimizer, scaler, [data_of(step)], poison if overflow else "")
        assert same_bits(model, before)
        if clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert same_bits(model, before)
            assert_same(optimizer.base_optimizer.state_dict(), state)
        else:
            hand_written_step(expected, stock, variant, [data_of(step)], clip)
            assert_equal(model, expected)
    assert scaler.get_scale() == SCALE / 4


def test_a_skipped_step_still_demands_a_perturbed_pass_for_the_next() -> None:
    model = mlp(torch.float64)
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()))
    scaler = make_scaler()
    scaled_passes(model, optimizer, scaler, [data_of(0)], "second hook")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before = bits(model)
    scaler.scale(loss_of(model, data_of(1))).backward()
    with pytest.raises(RuntimeError, match="no perturbed pass since the last step"):
        scaler.step(optimizer)
    assert same_bits(model, before)


@pytest.mark.parametrize("clip", ["", "before", "after"])
def test_unscaling_before_the_second_pass_is_refused(clip: str) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()))
    scaler = make_scaler()
    before = bits(model)
    scaler.scale(loss_of(model, data_of(0))).backward()
    scaler.unscale_(optimizer)
    if clip == "before":
        clip_grad_norm_(model.parameters(), CLIP)
    with pytest.raises(RuntimeError, match=r"unscale_\(optimizer\) was called before the second pass; call it after"):
        with optimizer.perturbed():
            scaler.scale(loss_of(model, data_of(0))).backward()
        if clip == "after":
            clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
    assert same_bits(model, before)
    assert not optimizer.state
    # The loop can go on from here.
    optimizer.zero_grad()
    scaler.update()
    scaled_passes(model, optimizer, scaler, [data_of(1)])
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    hand_written_step(expected, BASES["sgd-momentum"](expected.parameters()), VARIANTS[0], [data_of(1)])
    assert_equal(model, expected)


def test_a_closure_is_refused_and_the_weights_stay() -> None:
    model = mlp(torch.float64)
    optimizer = samopt.SAM(BASES["adamw-fused"](model.parameters()))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps optimizer.step, so that more frames lie between
    scaler = make_scaler()
    before, calls = bits(model), []
    scaler.scale(loss_of(model, data_of(0))).backward()
    with pytest.raises(
        RuntimeError, match=r"GradScaler.step was given a closure.*optimizer.backward\(lambda: scaler.scale"
    ):
        scaler.step(optimizer, lambda: calls.append("called"))
    assert not calls
    assert same_bits(model, before)
    assert not optimizer.state


def test_unscaling_inside_the_block_is_unscaling_after_the_pass() -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, scaler = samopt.SAM(BASES["sgd"](model.parameters())), make_scaler()
    scaler.scale(loss_of(model, data_of(0))).backward()
    with optimizer.perturbed():
        scaler.scale(loss_of(model, data_of(0))).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), CLIP)
    scaler.step(optimizer)
    hand_written_step(expected, BASES["sgd"](expected.parameters()), VARIANTS[0], [data_of(0)], CLIP)
    assert_equal(model, expected)


@pytest.mark.parametrize("form", ["explicit", "closure"])
def test_a_disabled_scaler_changes_nothing(form: str) -> None:
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = samopt.SAM(BASES["adamw-fused"](model.parameters())), BASES["adamw-fused"](expected.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        if form == "closure":
            scaler.step(optimizer, closure_of(optimizer, model, data_of(step)))
        else:
            scaled_passes(model, optimizer, scaler, [data_of(step)])
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        hand_written_step(expected, stock, VARIANTS[0], [data_of(step)])
    assert_equal(model, expected)


def test_a_fused_base_does_not_offer_its_scaler_protocol_through_the_wrapper() -> None:
    base = BASES["adamw-fused"](mlp().parameters())
    assert base._step_supports_amp_scaling
    assert not hasattr(samopt.SAM(base), "_step_supports_amp_scaling")


def test_sparse_gradients_are_unscaled_once() -> None:
    def table() -> nn.Embedding:
        return nn.Embedding.from_pretrained(torch.linspace(-1, 1, 15).reshape(5, 3), freeze=False, sparse=True)

    model, expected = table(), table()
    rows = torch.tensor([0, 3, 3, 1])

    def loss(module: nn.Module) -> Tensor:
        return (module(rows) - 1).square().sum()

    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)
    stock = torch.optim.SGD(expected.parameters(), lr=0.1)
    scaler = make_scaler()

    def backward() -> Tensor:
        value = loss(expected)
        value.backward()
        return value

    for unscale in (False, True, True):
        optimizer.zero_grad()
        scaler.scale(loss(model)).backward()
        with optimizer.perturbed():
            scaler.scale(loss(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        second_gradient(parameters_of(stock), backward, sam_epsilon, 0.3)
        stock.step()
    torch.testing.assert_close(model.weight, expected.weight, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", ["explicit", "closure"])
def test_an_autocast_region_around_both_passes_sees_the_weights_of_each(form: str) -> None:
    """Autocast caches low-precision copies of the weights, which the ascent and the restore make stale."""
    variant = Variant("sam", samopt.SAM, sam_epsilon, 0.5)
    model, expected = mlp(), mlp()
    optimizer = samopt.SAM(BASES["sgd-momentum"](model.parameters()), rho=variant.rho)
    stock = BASES["sgd-momentum"](expected.parameters())

    for step in range(3):
        data = batch(seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            if form == "closure":
                optimizer.step(closure_of(optimizer, model, data))
            else:
                optimizer.zero_grad()
                loss_of(model, data).backward()
                with optimizer.perturbed():
                    loss_of(model, data).backward()
                restored = loss_of(model, data).detach()
                optimizer.step()

        def backward(data: Data = data) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(expected, data)
            loss.backward()
            return loss

        if form == "explicit":
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(restored, loss_of(expected, data).detach())
        second_gradient(parameters_of(stock), backward, variant.epsilon, variant.rho)
        stock.step()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.hf
def test_accelerates_optimizer_steps_through_the_scaler() -> None:
    """It wraps ``optimizer.step`` once more and passes a closure of None."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    model, expected = mlp(torch.float64), mlp(torch.float64)
    optimizer, stock = samopt.SAM(BASES["adamw-fused"](model.parameters())), BASES["adamw-fused"](expected.parameters())
    scaler = make_scaler()
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    for step, poison in enumerate(["", "first hook", "", "second hook", ""]):
        scaled_passes(model, optimizer, scaler, [data_of(step)], poison)
        prepared.step()  # which updates the scale, too
        assert prepared.step_was_skipped == bool(poison)
        if not poison:
            hand_written_step(expected, stock, VARIANTS[0], [data_of(step)])
        assert_equal(model, expected)
    assert scaler.get_scale() == SCALE / 4
    scaler.scale(loss_of(model, data_of(5))).backward()
    scaler.unscale_(optimizer)
    with optimizer.perturbed():
        scaler.scale(loss_of(model, data_of(5))).backward()
    with pytest.raises(RuntimeError, match="was called before the second pass"):
        prepared.step()
    assert_equal(model, expected)
