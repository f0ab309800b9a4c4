"""What surrounds the steps of a SAMTrainer run is that of a run without SAM: saving, resuming, evaluating, stopping."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

import samopt
from samopt.integrations.transformers import SAMTrainer
from tests.helpers import cases, hf

pytestmark = pytest.mark.hf

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
PLAIN = {"kind": transformers.Trainer, "arguments": transformers.TrainingArguments}


def same_model(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def random_state():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [hf.bert, lambda: hf.bert().bfloat16()], ids=["fp32", "bf16"])
def test_resuming_inside_an_epoch_is_bit_identical(build, accumulate, tmp_path):
    options = {
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulate,
        "sam_rho_schedule": "linear_warmup",
        "sam_rho_warmup_steps": 6,
        "sam_rho": 0.2,
        "seeded": False,
    }
    whole, resumed = build(), build()
    trainer = hf.make_trainer(tmp_path, whole, hf.classification(), **options)
    trainer.train()
    end = random_state()
    again = hf.make_trainer(tmp_path, resumed, hf.classification(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_model(whole, resumed)
    assert random_state() == end
    for name in ("loss", "sharpness/sam", "sharpness/radius"):
        assert hf.logged(again, name) == hf.logged(trainer, name)
    for ours, theirs in zip(again.sam_optimizer.state.values(), trainer.sam_optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("region", ["previous", "ema", "pretrained"])
def test_resuming_keeps_the_reference_of_tram(region, tmp_path):
    options = {"sam": "tram", "sam_trust_region": region, "sam_scale": 10.0, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = hf.bert(), hf.bert()
    trainer = hf.make_trainer(tmp_path, whole, hf.classification(), **options)
    trainer.train()
    again = hf.make_trainer(tmp_path, resumed, hf.classification(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_model(whole, resumed)
    assert hf.logged(again, "sharpness/distance") == hf.logged(trainer, "sharpness/distance")
    assert hf.logged(again, "sharpness/distance")[-1] > 0


def test_a_checkpoint_is_the_base_optimizers(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    data = hf.points()
    trainer = hf.make_trainer(tmp_path, hf.norms(), data, **options)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    plain_model = hf.norms()
    base = hf.adamw(plain_model)
    base.load_state_dict(saved)
    assert set(saved) == {"state", "param_groups", "samopt"}
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    plain = hf.make_trainer(tmp_path / "plain", plain_model, data, **PLAIN, **options)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert plain.state.global_step == 7


def test_going_on_from_a_checkpoint_without_sam(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
    data = hf.points(24)
    hf.make_trainer(tmp_path, hf.norms(), data, **PLAIN, **options).train()
    model, by_hand = hf.norms(), hf.norms()
    hf.make_trainer(tmp_path, model, data, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    base = hf.adamw(by_hand)
    by_hand.train()
    for step, batch in enumerate(hf.batches_of(data)):
        torch.manual_seed(1000 + step)
        base.zero_grad()
        if step == 3:
            optimizer = samopt.SAM(base, model=by_hand)
        by_hand(**batch)["loss"].backward()
        if step < 3:
            base.step()
            continue
        with optimizer.perturbed():
            by_hand(**batch)["loss"].backward()
        optimizer.step()
    assert same_model(model, by_hand)


def test_a_resumed_run_uses_its_own_options(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    hf.make_trainer(tmp_path, hf.norms(), hf.points(), **options).train()
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), sam="asam", sam_eta=0.3, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (group,) = trainer.sam_optimizer.param_groups
    assert (group["rho"], group["eta"]) == (0.5, 0.3)


def test_training_twice_goes_on_with_the_same_base(tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), num_train_epochs=1)
    trainer.train()
    first = trainer.sam_optimizer
    trainer.args.sam_rho = 0.3
    trainer.train()
    assert trainer.sam_optimizer is not first
    assert trainer.sam_optimizer.base_optimizer is first.base_optimizer
    assert trainer.sam_optimizer.param_groups[0]["rho"] == 0.3
    saved = first.base_optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "samopt"}


def test_evaluating_and_saving_inside_training_change_nothing(tmp_path):
    class Watch(SAMTrainer):
        def prediction_step(self, *args, **options):
            self.seen = getattr(self, "seen", [])
            self.seen.append((self.state.global_step, self.is_second_pass, cases.bits(self.model)))
            return super().prediction_step(*args, **options)

    class Weights(TrainerCallback):
        def __init__(self):
            self.after = {}

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.after[state.global_step + 1] = cases.bits(kwargs["model"])

    data = hf.points()
    model, undisturbed = hf.norms(), hf.norms()
    weights = Weights()
    trainer = hf.make_trainer(
        tmp_path,
        model,
        data,
        kind=Watch,
        callbacks=[weights],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=False,
        gradient_accumulation_steps=2,
        trainer_options={"eval_dataset": data[:8]},
    )
    trainer.train()
    hf.make_trainer(tmp_path / "other", undisturbed, data, gradient_accumulation_steps=2).train()
    assert same_model(model, undisturbed)
    assert {step for step, _, _ in trainer.seen} == {2, 4, 6, 8}
    for step, second, bits in trainer.seen:
        assert not second
        assert all(torch.equal(a, b) for a, b in zip(bits, weights.after[step], strict=True))
    saved = transformers.trainer_utils.get_last_checkpoint(str(tmp_path))
    held = hf.norms()
    held.load_state_dict(load_file(f"{saved}/model.safetensors"))
    assert same_model(held, model)


def counting(rows, tmp_path, **options):
    """Train with a zero learning rate; return every count, log and random state that a user could look at."""

    class Count(TrainerCallback):
        def __init__(self):
            self.calls = []

    def note(event):
        def hook(self, args, state, control, **kwargs):
            self.calls.append((event, state.global_step, sorted(kwargs)))

        return hook

    for event in EVENTS:
        setattr(Count, event, note(event))
    count = Count()
    model = hf.norms()
    before = cases.bits(model)
    trainer = hf.make_trainer(
        tmp_path,
        model,
        rows,
        base=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        callbacks=[count],
        gradient_accumulation_steps=3,
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=2,
        seeded=False,
        trainer_options={"eval_dataset": rows[:8]},
        **options,
    )
    model.main_input_name = "x"
    trainer.train()
    assert cases.same_bits(model, before)
    changing = ("runtime", "per_second", "grad_norm")  # the norm is that of the gradients stepped with
    history = [
        {key: value for key, value in entry.items() if not key.startswith("sharpness/") and not key.endswith(changing)}
        for entry in trainer.state.log_history
    ]
    buffers = [buffer.clone() for buffer in model.buffers()]
    counters = (trainer.state.num_input_tokens_seen, trainer.state.total_flos, trainer.state.global_step)
    return count.calls, history, counters, random_state(), buffers


def test_what_is_logged_and_counted_is_that_of_a_run_without_sam(tmp_path):
    rows = hf.points()
    plain = counting(rows, tmp_path / "plain", **PLAIN)
    ours = counting(rows, tmp_path / "sam")
    assert ours[:4] == plain[:4]
    assert ours[2][0] == 2 * 26 * 6  # rows, epochs and entries a row: counted once
    assert all(torch.equal(a, b) for a, b in zip(ours[4], plain[4], strict=True))


def test_user_statistics_can_tell_the_passes_apart(tmp_path):
    class Counting(SAMTrainer):
        seen = 0

        def compute_loss(self, model, inputs, **options):
            if not self.is_second_pass:
                self.seen += len(inputs["labels"])
            return super().compute_loss(model, inputs, **options)

    trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=Counting, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.seen == 2 * 26
    assert not trainer.is_second_pass


@pytest.mark.parametrize("stop", ["epoch", "training"])
def test_stopping_inside_a_window(stop, tmp_path):
    """Trainer leaves the gradients of a cut-off window to the next; so the second pass covers its batches too."""

    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and not getattr(self, "done", False):
                self.done = True
                setattr(control, f"should_{stop}_stop", True)

    data = hf.points(24)  # 6 batches in windows of 3; stopped after the first batch of the second window
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(
        tmp_path,
        model,
        data,
        callbacks=[Stop()],
        gradient_accumulation_steps=3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    batches = hf.batches_of(data)
    optimizer = samopt.SAM(hf.adamw(by_hand), model=by_hand)
    by_hand.train()
    windows = [batches[:3]] if stop == "training" else [batches[:3], [batches[3], *batches[:3]], batches[3:]]
    for step, window in enumerate(windows):
        optimizer.zero_grad()
        states = []
        for index, batch in enumerate(window):
            if index == 0 or len(window) == 4 and index == 1:
                torch.manual_seed(1000 + step)
            states.append(torch.get_rng_state())
            hf.mean_loss(by_hand, batch, None, 3).backward()
        with optimizer.perturbed():
            for batch, state in zip(window, states, strict=True):
                torch.set_rng_state(state)
                hf.mean_loss(by_hand, batch, None, 3).backward()
        optimizer.step()
    assert trainer.state.global_step == len(windows)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Failing(SAMTrainer):
    """Raises ``error`` in the second pass of step 2, in the window's second micro-batch."""

    error: BaseException
    noted: list[list[Tensor]]  # of the class: an instance's attributes are put back after the second pass

    def compute_loss(self, model, inputs, **options):
        loss = super().compute_loss(model, inputs, **options)
        if self.is_second_pass and self.state.global_step == 2:
            Failing.noted.append(cases.bits(self.model))
            if len(Failing.noted) == 2:
                raise self.error
        return loss


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_in_the_second_pass_leaves_the_weights_exact(error, tmp_path):
    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.bits = cases.bits(kwargs["model"])

    weights = Weights()
    model = hf.norms()
    trainer = hf.make_trainer(
        tmp_path, model, hf.points(), kind=Failing, callbacks=[weights], gradient_accumulation_steps=2
    )
    trainer.error, Failing.noted = error, []
    with pytest.raises(type(error)):
        trainer.train()
    assert len(Failing.noted) == 2
    assert not cases.same_bits(model, Failing.noted[-1])
    assert cases.same_bits(model, weights.bits)
    assert not trainer.is_second_pass
    assert all(p.grad is None for p in model.parameters())


def test_a_smaller_batch_after_running_out_of_memory_in_the_second_pass(tmp_path):
    class OutOfMemory(SAMTrainer):
        failures: list[int] = []  # of the class: an instance's attributes are put back after the second pass

        def compute_loss(self, model, inputs, **options):
            loss = super().compute_loss(model, inputs, **options)
            if self.is_second_pass and not OutOfMemory.failures:
                OutOfMemory.failures.append(len(inputs["labels"]))
                raise RuntimeError("CUDA out of memory.")
            return loss

    data = hf.points(24)
    model, small = hf.norms(), hf.norms()
    trainer = hf.make_trainer(
        tmp_path, model, data, kind=OutOfMemory, auto_find_batch_size=True, gradient_accumulation_steps=2
    )
    trainer.train()
    size = trainer._train_batch_size
    assert size < 4
    comparison = hf.make_trainer(tmp_path, small, data, per_device_train_batch_size=size, gradient_accumulation_steps=2)
    comparison.train()
    for ours, theirs in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_and_schedules_follow_the_steps(tmp_path):
    data = hf.points()
    trainer = hf.make_trainer(tmp_path, hf.norms(), data, num_train_epochs=1, sam_every=3)
    trainer.train()
    assert hf.logged(trainer, "sharpness/radius") == pytest.approx([0.05, 0, 0, 0.05, 0, 0, 0.05])
    assert len(hf.logged(trainer, "sharpness/perturbed_loss")) == 3
    cosine = hf.make_trainer(tmp_path, hf.norms(), data, num_train_epochs=1, sam_rho_schedule="cosine")
    cosine.train()
    expected = [0.025 * (1 + numpy.cos(numpy.pi * step / 7)) for step in range(7)]
    assert hf.logged(cosine, "sharpness/radius") == pytest.approx(expected)
    following = hf.make_trainer(
        tmp_path, hf.norms(), data, num_train_epochs=1, sam_rho_schedule="proportional_to_lr", learning_rate=1e-2
    )
    following.train()
    assert hf.logged(following, "sharpness/radius") == pytest.approx(
        [5 * rate for rate in hf.logged(following, "learning_rate")]
    )


@pytest.mark.parametrize("late", ["last 40 %", 0.4])
def test_a_late_share_perturbs_the_last_steps_alone(late, tmp_path):
    """Seven steps of two micro-batches, of which the last three are perturbed, as a loop by hand does it."""
    data = hf.points(52)
    calls = []  # of no Trainer, so that nothing is put back

    class Counting(SAMTrainer):
        def compute_loss(self, *args, **options):
            calls.append(self.state.global_step)
            return super().compute_loss(*args, **options)

    options = {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    model, by_hand = hf.norms(), hf.norms()
    trainer = hf.make_trainer(tmp_path, model, data, kind=Counting, sam_late=late, **options)
    trainer.train()
    assert [calls.count(step) for step in range(7)] == [2, 2, 2, 2, 4, 4, 2]  # 13 batches: the last window has one
    assert hf.logged(trainer, "sharpness/radius") == pytest.approx([0, 0, 0, 0, 0.05, 0.05, 0.05])
    every = hf.make_trainer(tmp_path, by_hand, data, sam_rho=0.0, **options)

    class FromStep(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            optimizer = every.sam_optimizer
            if state.global_step >= 4:
                optimizer.rho = 0.05

    every.add_callback(FromStep())
    every.train()
    assert same_model(model, by_hand)


def test_a_late_share_resumes_as_if_uninterrupted(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1, "sam_late": "last 50 %"}
    whole = hf.make_trainer(tmp_path / "whole", hf.norms(), hf.points(), **options)
    whole.train()
    for step in (3, 6):  # before and in the last share
        resumed = hf.make_trainer(tmp_path / str(step), hf.norms(), hf.points(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same_model(resumed.model, whole.model)
    radii = hf.logged(whole, "sharpness/radius")
    assert radii == pytest.approx([0, 0, 0, 0.05, 0.05, 0.05, 0.05])


def test_a_late_share_of_a_stream_needs_max_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(hf.points(20))

    with pytest.raises(ValueError, match="max_steps"):
        hf.make_trainer(tmp_path, hf.norms(), Stream(), sam_late="last 25 %").train()
    trainer = hf.make_trainer(tmp_path, hf.norms(), Stream(), sam_late="last 25 %", max_steps=8)
    trainer.train()
    assert hf.logged(trainer, "sharpness/radius") == pytest.approx([0] * 6 + [0.05] * 2)


def test_steps_without_a_perturbation_cost_one_pass(tmp_path):
    calls = []  # of no Trainer, so that nothing is put back

    class Counting(SAMTrainer):
        def compute_loss(self, *args, **options):
            calls.append(self)
            return super().compute_loss(*args, **options)

    options = {"num_train_epochs": 1, "kind": Counting}
    every = hf.make_trainer(tmp_path, hf.norms(), hf.points(), sam_every=7, **options)
    every.train()
    zero = hf.make_trainer(tmp_path, hf.norms(), hf.points(), sam_rho=0.0, **options)
    zero.train()
    assert (calls.count(every), calls.count(zero)) == (8, 7)
    plain = hf.norms()
    hf.make_trainer(tmp_path, plain, hf.points(), num_train_epochs=1, **PLAIN).train()
    assert same_model(zero.model, plain)
