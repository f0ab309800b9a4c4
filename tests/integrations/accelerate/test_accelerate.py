"""A loop around accelerate with the one changed line is the loop that a person would write by hand."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import nn

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward
from tests.helpers import cases, hf
from tests.helpers.ranks import run_on_launched_ranks

pytestmark = pytest.mark.hf

EPOCHS = 2
RANKS = 2


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate shares its state between instances."""
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def prepared(accelerator, model, base, sam=samopt.SAM, rows=None, **options):
    """The user's set-up: model, optimizer, data and a schedule that ends at zero, all prepared."""
    loader = torch.utils.data.DataLoader(hf.points() if rows is None else rows, batch_size=4)
    optimizer = sam(base(model), model=model)
    steps = -(-len(loader) // accelerator.gradient_accumulation_steps) * EPOCHS
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0, steps - step) / steps)
    return accelerator.prepare(model, optimizer, loader, scheduler)


def train(accelerator, model, optimizer, loader, scheduler, clip=None, overflow=(), **options):
    """The user's loop, with the one changed line."""
    backward = SharpnessAwareBackward(accelerator, model, optimizer, **options)
    losses, step = [], 0

    def compute_loss(batch):
        loss = model(**batch)["loss"]
        return loss * float("inf") if (step, backward.optimizer.is_perturbed) in overflow else loss

    model.train()
    for _ in range(EPOCHS):
        for batch in loader:
            if accelerator.step % accelerator.gradient_accumulation_steps == 0:
                torch.manual_seed(1000 + step)
            with accelerator.accumulate(model):
                losses.append(float(backward(compute_loss, batch)))
                if accelerator.sync_gradients:
                    step += 1
                    if clip == "norm":
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    elif clip == "value":
                        accelerator.clip_grad_value_(model.parameters(), 0.01)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return backward, losses


def by_hand(model, base, sam=samopt.SAM, accumulate=1, clip=None, autocast=None, scaler=None, overflow=()):
    """The same in plain torch."""
    batches = hf.batches_of(hf.points())
    inner = base(model)
    optimizer = sam(inner, model=model)
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    total = len(windows) * EPOCHS
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: (total - step) / total)
    losses = []
    model.train()
    for step, window in enumerate(windows * EPOCHS):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()

        def one_pass(second, window=window, step=step):
            for batch in window:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = model(**batch)["loss"].float()
                if (step, second) in overflow:
                    loss = loss * float("inf")
                if not second:
                    losses.append(float(loss.detach()))
                parts = loss / accumulate
                (parts if scaler is None else scaler.scale(parts)).backward()

        one_pass(False)
        with optimizer.perturbed() as second:
            if second.is_needed:
                one_pass(True)
        if clip is not None and scaler is not None:
            scaler.unscale_(optimizer)
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        if scaler is None:
            optimizer.step()
            scheduler.step()
        else:
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                scheduler.step()
    return losses


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation_clipping_and_schedule(accumulate, clip):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, plain = hf.norms(), hf.norms()
    user = prepared(accelerator, model, hf.adamw)
    _, losses = train(accelerator, *user, clip=clip)  # 7 batches: the epoch's last window is partial
    assert losses == by_hand(plain, hf.adamw, accumulate=accumulate, clip=clip)
    assert same(model, plain)
    assert user[3].get_last_lr() == [0.0]


def test_a_schedule_made_for_the_base():
    """It shares the groups with the optimizer around it, also once accelerate has copied the state dict."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = hf.norms(), hf.norms()
    base = hf.adamw(model)
    loader = torch.utils.data.DataLoader(hf.points(), batch_size=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: (8 - step) / 8)
    train(accelerator, *accelerator.prepare(model, samopt.SAM(base, model=model), loader, scheduler))
    by_hand(plain, hf.adamw, accumulate=2)
    assert same(model, plain)


@pytest.mark.parametrize("sam", [samopt.ASAM, samopt.FisherSAM, samopt.TRAM, samopt.FunctionalSAM])
def test_every_optimizer(sam):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = hf.norms(), hf.norms()
    train(accelerator, *prepared(accelerator, model, hf.momentum_sgd, sam))
    by_hand(plain, hf.momentum_sgd, sam, accumulate=2)
    assert same(model, plain)


def test_bf16():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, plain = hf.norms(), hf.norms()
    _, losses = train(accelerator, *prepared(accelerator, model, hf.adamw), clip="norm")
    assert losses == by_hand(plain, hf.adamw, accumulate=2, clip="norm", autocast=torch.bfloat16)
    assert same(model, plain)


@pytest.mark.parametrize("clip", [None, "norm"])
@pytest.mark.parametrize("overflow", [(), {(1, False)}, {(2, True)}], ids=["finite", "first pass", "second pass"])
def test_fp16(overflow, clip):
    """Accelerate has no scaler for the CPU, so the test puts one in place."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = make_scaler()
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    model, plain = hf.norms(), hf.norms()
    train(accelerator, *prepared(accelerator, model, hf.adamw), clip=clip, overflow=overflow)
    scaler = make_scaler()
    by_hand(plain, hf.adamw, accumulate=2, clip=clip, autocast=torch.float16, scaler=scaler, overflow=overflow)
    assert same(model, plain)
    assert accelerator.scaler.get_scale() == scaler.get_scale()


def test_a_loss_function_that_consumes_its_inputs():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = hf.norms(), hf.norms()
    model, optimizer, loader, _ = prepared(accelerator, model, hf.momentum_sgd)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)

    def compute_loss(batch, scale):
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(model(batch["x"].mul_(scale))["logits"], labels)

    model.train()
    for index, batch in enumerate(loader):
        torch.manual_seed(index)
        with accelerator.accumulate(model):
            backward(compute_loss, batch, scale=2)
            optimizer.step()
            optimizer.zero_grad()
    inner = samopt.SAM(hf.momentum_sgd(plain), model=plain)
    plain.train()
    batches = hf.batches_of(hf.points())
    for start in range(0, 7, 2):
        window = list(enumerate(batches))[start : start + 2]

        def one_pass(window=window):
            for index, batch in window:
                torch.manual_seed(index)
                (nn.functional.cross_entropy(plain(2 * batch["x"])["logits"], batch["labels"]) / 2).backward()

        one_pass()
        with inner.perturbed():
            one_pass()
        inner.step()
        inner.zero_grad()
    assert same(model, plain)


def test_saving_and_loading_the_state(tmp_path):
    def start():
        reset()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = hf.bert().bfloat16()  # rounded stochastically: the rounding's position is part of the state
        return accelerator, *prepared(accelerator, model, hf.adamw, samopt.TRAM, hf.classification())

    accelerator, *user = start()
    train(accelerator, *user)
    accelerator.save_state(str(tmp_path / "saved"))
    torch.manual_seed(5)
    train(accelerator, *user)
    again, *resumed = start()
    again.load_state(str(tmp_path / "saved"))
    torch.manual_seed(5)
    train(again, *resumed)
    assert same(user[0], resumed[0])
    assert user[1].optimizer.state_dict()["samopt"].keys() == resumed[1].optimizer.state_dict()["samopt"].keys()
    saved = torch.load(tmp_path / "saved" / "optimizer.bin", weights_only=False)
    hf.adamw(hf.bert().bfloat16()).load_state_dict(saved)


def test_an_error_in_the_second_pass_leaves_the_weights_exact():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, _ = prepared(accelerator, hf.norms(), hf.adamw)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)
    before = cases.bits(model)

    def compute_loss(batch):
        if backward.optimizer.is_perturbed:
            raise ValueError("bad batch")
        return model(**batch)["loss"]

    with pytest.raises(ValueError, match="bad batch"):
        for batch in loader:
            with accelerator.accumulate(model):
                backward(compute_loss, batch)
    assert cases.same_bits(model, before)


def test_the_metrics_are_those_of_the_window():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    user = prepared(accelerator, hf.norms(), hf.adamw)
    backward, losses = train(accelerator, *user)
    step = backward.optimizer.last_step
    assert float(step.loss) == pytest.approx(losses[-1] / 2)  # the last window holds one batch, divided by two
    assert float(step.perturbed_loss) > float(step.loss)


def small(rho=0.05, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, model=model)
    accelerator = Accelerator(cpu=True, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(4)]
    return accelerator, model, optimizer, SharpnessAwareBackward(accelerator, model, optimizer), data


def square_loss(model):
    return lambda x: model(x).square().sum(1).log1p().mean()


def gradient_by_hand(batches, rho=0.05):
    """SAM's gradient of the mean over some batches at the weights that ``small`` begins with, in plain torch."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)

    def take():
        model.zero_grad()
        for x in batches:
            (square_loss(model)(x) / len(batches)).backward()
        return [p.grad.clone() for p in model.parameters()]

    first = take()
    norm = torch.sqrt(sum((g * g).sum() for g in first))
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p += rho * g / norm
    return take()


@pytest.mark.parametrize("between", ["nothing", "no_sync", "clipping", "another loss"])
def test_accumulation_by_hand_with_a_plain_accelerator_is_an_error(between):
    accelerator, model, optimizer, backward, data = small()
    before = cases.bits(model)
    backward(square_loss(model), data[0])
    if between == "clipping":
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with accelerator.no_sync(model) if between == "no_sync" else contextlib.nullcontext():
        compute = (lambda x: model(x).abs().mean()) if between == "another loss" else square_loss(model)
        with pytest.raises(
            RuntimeError, match=r"gradient_accumulation_steps=k\).*with accelerator.accumulate\(model\)"
        ):
            backward(compute, data[1])
    assert all(torch.equal(a, b) for a, b in zip(cases.bits(model), before, strict=True))
    optimizer.zero_grad()
    backward(square_loss(model), data[2])
    for ours, theirs in zip(model.parameters(), gradient_by_hand([data[2]]), strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-12)
    optimizer.step()


def test_a_window_begins_at_zero_grad():
    """A window that was given up, because a loss was not finite, say, leaves nothing behind."""
    accelerator, model, optimizer, backward, data = small(gradient_accumulation_steps=2)
    with accelerator.accumulate(model):
        backward(square_loss(model), data[0])
    optimizer.optimizer.zero_grad()  # the prepared one clears at the end of a window only
    accelerator.step = 0
    for x in data[1:3]:
        with accelerator.accumulate(model):
            backward(square_loss(model), x)
    for ours, theirs in zip(model.parameters(), gradient_by_hand(data[1:3]), strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-12)


def test_a_step_that_is_left_out_leaves_the_next_window_alone():
    _, model, optimizer, backward, data = small()
    backward(square_loss(model), data[0])
    optimizer.zero_grad()
    backward(square_loss(model), data[1])
    for ours, theirs in zip(model.parameters(), gradient_by_hand([data[1]]), strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-12)


def test_the_accelerator_s_own_backward_is_no_second_pass():
    accelerator, model, optimizer, _, data = small()
    accelerator.backward(square_loss(model)(data[0]))
    with pytest.raises(RuntimeError, match="found gradients but no perturbed pass.*accelerate, SharpnessAwareBackward"):
        optimizer.step()


def test_misuse_is_explained():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = hf.norms()
    plain = accelerator.prepare(hf.adamw(model))
    with pytest.raises(TypeError, match=r"has prepared, got AcceleratedOptimizer of AdamW; write optimizer"):
        SharpnessAwareBackward(accelerator, model, plain)
    with pytest.raises(TypeError, match=r"has prepared, got SAM; write"):
        SharpnessAwareBackward(accelerator, model, samopt.SAM(hf.adamw(model), model=model))
    with pytest.raises(ValueError, match=r"got ASAM without one: .* write samopt.ASAM\(base_optimizer, model=model\)"):
        SharpnessAwareBackward(accelerator, model, accelerator.prepare(samopt.ASAM(hf.adamw(model))))
    ours = accelerator.prepare(samopt.SAM(hf.adamw(model), model=model))
    backward = SharpnessAwareBackward(accelerator, model, ours)
    with pytest.raises(TypeError, match=r"without arguments while gradients are accumulated over 2 batches"):
        backward(lambda: model(**hf.batches_of(hf.points())[0])["loss"])
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="SharpnessAwareBackward cannot run a second pass under DEEPSPEED"):
        SharpnessAwareBackward(accelerator, model, ours)


def sam_for_the_head(model):
    """Two optimizers over one model: the body's steps with the gradients of the first pass."""
    head = samopt.SAM(torch.optim.SGD(model[2].parameters(), lr=0.1), rho=0.5, model=model)
    return head, torch.optim.SGD(model[0].parameters(), lr=0.1)


def tram_of_all(model):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return (samopt.TRAM(base, model=model, trust_region="pretrained", scale=10.0, sync_perturbation=True),)


TOGETHER = {"two optimizers": sam_for_the_head, "tram": tram_of_all}
WHOLE = [cases.batch(torch.float64, seed=seed) for seed in range(4)]


def train_together(accelerator, make, batches):
    """The weights after training one model; every batch is a window of two halves."""
    model = cases.mlp(torch.float64)
    model, *optimizers = accelerator.prepare(model, *make(model))
    backward = SharpnessAwareBackward(accelerator, model, optimizers[0])
    for x, y in batches:
        for half in (slice(0, None, 2), slice(1, None, 2)):
            with accelerator.accumulate(model):
                backward(lambda x, y: nn.functional.cross_entropy(model(x), y), x[half], y[half])
                for each in optimizers:
                    each.step()
                    each.zero_grad()
    return cases.bits(model)


def rank_main(rank, folder):
    """One rank's part of the two-process runs."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for sync in (False, True):
        reset()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
        assert accelerator.num_processes == RANKS
        model = hf.bert()
        user = prepared(accelerator, model, hf.momentum_sgd, rows=hf.classification(32))
        train(accelerator, *user, clip="norm", sync_perturbation=sync)
        torch.save(cases.bits(model), folder / f"{sync}-{rank}.pt")
    for name, make in TOGETHER.items():
        reset()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        part = [(x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]) for x, y in WHOLE]
        torch.save(train_together(accelerator, make, part), folder / f"{name}-{rank}.pt")
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_launched_ranks(rank_main, folder, RANKS)
    names = (False, True, *TOGETHER)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_as_one_with_the_whole_batch(name, ranks):
    """What a second optimizer steps with, and TRAM's distance, are of all processes, with DDP made by prepare()."""
    want = train_together(Accelerator(cpu=True, gradient_accumulation_steps=2), TOGETHER[name], WHOLE)
    for weights in ranks[name]:
        torch.testing.assert_close(weights, want, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sync", [False, True], ids=["per-rank", "synced"])
def test_two_processes(sync, ranks):
    first, second = ranks[sync]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = hf.bert()
    model.train()
    base = hf.momentum_sgd(model)
    optimizer = samopt.SAM(base, model=model)
    batches = hf.batches_of(hf.classification(32))
    shards = [batches[rank::RANKS] for rank in range(RANKS)]
    # Accelerate counts a scheduler's steps in batches of one process: here it is stepped by the loop, at every batch.
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: max(0, 8 - step) / 8)
    for step in range(4):
        windows = [shard[step % 2 * 2 : step % 2 * 2 + 2] for shard in shards]

        def backward(rank, step=step, windows=windows):
            torch.manual_seed(1000 + step)
            for batch in windows[rank]:
                (model(**batch)["loss"] / 2).backward()

        def averaged(gradients):
            for p, *parts in zip(model.parameters(), *gradients, strict=True):
                p.grad = sum(parts) / RANKS

        def gradient(rank, backward=backward):
            optimizer.zero_grad()
            backward(rank)
            if not sync:
                with optimizer.perturbed():
                    backward(rank)
            return [p.grad.clone() for p in model.parameters()]

        averaged([gradient(rank) for rank in range(RANKS)])
        if sync:
            second_gradients = []
            with optimizer.perturbed():
                for rank in range(RANKS):
                    for p in model.parameters():
                        p.grad = None
                    backward(rank)
                    second_gradients.append([p.grad.clone() for p in model.parameters()])
            averaged(second_gradients)
        scheduler.step()  # in the loop it has been stepped at the window's first batch
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        base.step()
        scheduler.step()
    for ours, theirs in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_model_that_another_optimizer_trains_gets_the_first_pass_s_gradients():
    """One loss over two prepared models, of which one is trained with SAM; by hand in fp64."""

    def make():
        torch.manual_seed(0)
        return nn.Linear(6, 3, dtype=torch.float64)

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 4, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (4, 4), generator=generator)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours, other = make(), make()
    optimizer = samopt.SAM(torch.optim.SGD(ours.parameters(), lr=0.1), rho=0.3, model=ours)
    models = accelerator.prepare(ours, other, optimizer, torch.optim.SGD(other.parameters(), lr=0.1))
    prepared, prepared_other, optimizer, optimizer_of_other = models
    backward = SharpnessAwareBackward(accelerator, prepared, optimizer)
    for x, y in zip(inputs, labels, strict=True):
        with accelerator.accumulate(prepared, prepared_other):
            backward(lambda x, y: nn.functional.cross_entropy(prepared(x) + prepared_other(x), y), x, y)
            for each in (optimizer, optimizer_of_other):
                each.step()
                each.zero_grad()

    model, companion = make(), make()
    for first in (0, 2):

        def gradients():
            total = sum(
                nn.functional.cross_entropy(model(inputs[index]) + companion(inputs[index]), labels[index]) / 2
                for index in (first, first + 1)  # noqa: B023  # called in this iteration only
            )
            return torch.autograd.grad(total, [*model.parameters(), *companion.parameters()])

        at_w = gradients()
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in at_w[:2]))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), at_w, strict=False):
                parameter += 0.3 * gradient / norm
        above = gradients()
        with torch.no_grad():
            for parameter, gradient, second in zip(model.parameters(), at_w, above, strict=False):
                parameter -= 0.3 * gradient / norm + 0.1 * second
            for parameter, gradient in zip(companion.parameters(), at_w[2:], strict=True):
                parameter -= 0.1 * gradient
    for found, expected in ((ours, model), (other, companion)):
        for one, two in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_a_function_that_returns_no_tensor_is_named():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model, optimizer = accelerator.prepare(model, optimizer)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)
    with pytest.raises(TypeError, match=r"returns the loss as a tensor, got dict; return the loss alone"):
        backward(lambda x: {"loss": model(x).sum()}, torch.ones(1, 2))
