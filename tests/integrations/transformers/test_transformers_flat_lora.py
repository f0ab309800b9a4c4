"""Flat-LoRA in a Trainer is the loop by hand, resumes bit for bit, and leaves frozen weights alone."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch

from tests.helpers import hf
from tests.helpers.adapters import differing, frozen, hand_step, peft_layers, trained
from tests.helpers.cases import bits, same_bits

pytestmark = pytest.mark.hf

PERTURBATIONS = pytest.mark.parametrize("perturbation", ["noise", "gradient"])
RHO, SEED = 0.2, 7


def adapted(dtype=torch.float32):
    """A frozen base of a dtype under factors in fp32, as peft makes and loads them."""
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(hf.bert().to(dtype), config)


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
