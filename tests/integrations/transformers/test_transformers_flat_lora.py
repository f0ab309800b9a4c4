"""Flat-LoRA in a Trainer is the loop by hand, resumes bit for bit, and leaves frozen weights alone."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch

from tests.helpers import hf
from tests.helpers.adapters import differing, frozen, hand_step, peft_layers, trained
from tests.helpers.cases import bits, same_bits
from tests.helpers.ranks import run_on_launched_ranks

pytestmark = pytest.mark.hf

PERTURBATIONS = pytest.mark.parametrize("perturbation", ["noise", "gradient"])
RHO, SEED = 0.2, 7


def adapted(dtype=torch.float32):
    """A frozen base of a dtype under factors in fp32, as peft makes and loads them."""
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(hf.bert().to(dtype), config)


def language_model():
    """Its loss counts tokens over ranks. Without dropout, whose masks each rank draws for itself."""
    model = hf.gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def slow_sgd(model):
    """So slow that the rounding of the perturbation stays rounding."""
    return torch.optim.SGD(trained(model), lr=0.01, momentum=0.9)


def options_of(perturbation):
    return {"sam": "flat-lora", "sam_rho": RHO, "sam_options": {"perturbation": perturbation}, "seed": SEED}


@PERTURBATIONS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_loop_by_hand(perturbation, accumulate, tmp_path):
    data = hf.classification(24)
    ours, theirs = adapted(), adapted()
    before = frozen(ours)
    options = {"base": slow_sgd, "gradient_accumulation_steps": accumulate} | options_of(perturbation)
    trainer = hf.make_trainer(tmp_path, ours, data, **options)
    trainer.train()
    base, layers = slow_sgd(theirs), peft_layers(theirs)
    batches = hf.batches_of(data)
    windows = [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]
    total = 2 * len(windows)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: (total - step) / total)
    theirs.train()
    for step, window in enumerate(itertools.chain(windows, windows)):

        def backward(step=step, window=window):
            torch.manual_seed(1000 + step)
            for batch in window:
                hf.undivided_loss(theirs, batch, None, accumulate).backward()

        hand_step(base, layers, backward, perturbation=perturbation, rho=RHO, seed=SEED, step=step)
        schedule.step()
    assert trainer.state.global_step == total
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert not same_bits(ours, bits(adapted()))
    assert differing(ours, before) == 0
    assert (len(hf.logged(trainer, "sharpness/sam")) > 0) == (perturbation == "gradient")


@PERTURBATIONS
def test_a_resumed_run_is_bit_identical(perturbation, tmp_path):
    # peft replaces the factors when it loads a checkpoint, so the Trainer has to make the base, after that.
    options = options_of(perturbation) | {"save_strategy": "steps", "save_steps": 3, "seeded": False, "base": None}
    whole, resumed = adapted(torch.bfloat16), adapted(torch.bfloat16)
    before = frozen(whole)
    hf.make_trainer(tmp_path, whole, hf.classification(), **options).train()
    again = hf.make_trainer(tmp_path, resumed, hf.classification(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(resumed, bits(whole))
    assert differing(whole, before) == 0


def train_on_ranks(rank, folder):
    for name, options in RANKS.items():
        model = language_model()
        settings = {"base": slow_sgd, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
        hf.make_trainer(folder / "run", model, hf.language(24), **settings | options).train()
        torch.save(bits(model), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


RANKS = {
    "noise": options_of("noise"),
    "gradient": options_of("gradient") | {"sam_sync_perturbation": True},
}


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    run_on_launched_ranks(train_on_ranks, tmp_path)
    for perturbation in RANKS:
        whole = language_model()
        options = options_of(perturbation) | {"base": slow_sgd}
        hf.make_trainer(tmp_path, whole, hf.language(24), **options).train()
        first, second = (torch.load(tmp_path / f"{perturbation}-{rank}.pt") for rank in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for mine, other in zip(first, bits(whole), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_checkpointed_activations_change_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = adapted()
        options = options_of("noise") | {"base": slow_sgd, "num_train_epochs": 1}
        if checkpointing:
            options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        hf.make_trainer(tmp_path, model, hf.classification(), **options).train()
        results.append(bits(model))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
