"""Sharpness of Hugging Face models: their losses, their attention, their outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from samopt import sharpness

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        attn_implementation="sdpa",
    )
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(50, (8, 7), generator=generator),
            "attention_mask": torch.ones(8, 7, dtype=torch.long),
            "labels": torch.randint(3, (8,), generator=generator),
        }
        for _ in range(2)
    ]


def logits_loss(model, batch):
    """The model's loss, computed outside of it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])


def test_hf_loss_is_the_models_own(model, batches):
    model.eval()
    assert float(sharpness.hf_loss(model, batches[0])) == pytest.approx(float(logits_loss(model, batches[0])), rel=1e-6)
    without = {name: value for name, value in batches[0].items() if name != "labels"}
    with pytest.raises(ValueError, match="returned no loss for a batch with the keys .*; a batch needs 'labels'"):
        sharpness.hf_loss(model, without)


def test_measures_take_dict_batches(model, batches):
    by_model = sharpness.worst_case(model, sharpness.hf_loss, batches, rho=0.1, steps=5, m=4)
    by_hand = sharpness.worst_case(model, logits_loss, batches, rho=0.1, steps=5, m=4)
    assert by_model.value == pytest.approx(by_hand.value, rel=1e-4)
    assert len(by_model.per_batch) == 4
    layers = sharpness.per_layer(
        model, sharpness.hf_loss, batches, layers=["bert.encoder.layer.*", "classifier"], steps=1
    )
    assert list(layers.layers) == ["bert.encoder.layer.*", "classifier"]


def test_accuracy_of_a_dict_batch(model, batches):
    model.eval()
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    hits = model(**inputs).logits.argmax(-1) == batches[0]["labels"]
    assert float(sharpness.accuracy(model, batches[0])) == pytest.approx(float(hits.float().mean()))
    path = sharpness.interpolate(
        model, sharpness.hf_loss, batches, copy.deepcopy(model), accuracy_fn=sharpness.accuracy
    )
    assert len(set(path.accuracies)) == 1


def test_curvature_goes_through_fused_attention(model, batches):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    top = [sharpness.hessian_eigenvalues(m, sharpness.hf_loss, batches, tolerance=1e-5).value for m in (model, eager)]
    assert top[0] == pytest.approx(top[1], rel=1e-4)
    inside, outside = (
        sharpness.gauss_newton_eigenvalues(model, loss_fn, batches, tolerance=1e-5).value
        for loss_fn in (sharpness.hf_loss, logits_loss)
    )
    assert inside == pytest.approx(outside, rel=1e-4)


def test_normalised_logits_of_an_output(model, batches):
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.classifier.weight.mul_(4)
        louder.classifier.bias.mul_(4)
    options = {"rho": 0.05, "adaptive": True, "steps": 5, "normalize_logits": True}
    values = [sharpness.worst_case(m, logits_loss, batches, **options).value for m in (model, louder)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    with pytest.raises(ValueError, match="normalize_logits came too late: .* call it without labels in loss_fn"):
        sharpness.worst_case(model, sharpness.hf_loss, batches, **options)


def test_find_rho_goes_by_the_accuracy_of_a_classifier_and_by_the_loss_of_a_language_model(model, batches):
    import samopt

    def search(of, data):
        base = torch.optim.AdamW(of.parameters(), lr=1e-3)
        return samopt.find_rho(of, sharpness.hf_loss, data, optimizer=base, radii=[0.05], steps=2, folds=2)

    before = copy.deepcopy(model.state_dict())
    data = [{name: value.roll(shift, 0) for name, value in batch.items()} for batch in batches for shift in (0, 1)]
    assert search(model, data).score == "accuracy"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    tokens = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in data]
    # The model itself compares each output with the next token, so outputs and labels as they stand tell no accuracy.
    assert search(transformers.GPT2LMHeadModel(config), tokens).score == "loss"


def test_accuracy_refuses_a_model_that_shifts_its_labels():
    """It would tell how often the model repeats a token."""
    from tests.helpers import hf

    tokens = torch.arange(16).reshape(2, 8)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel predicts the next one; write accuracy_fn.*labels\[:, 1:\]"):
        sharpness.accuracy(hf.gpt2(), {"input_ids": tokens, "labels": tokens})
    assert 0 <= float(sharpness.accuracy(hf.t5(), {"input_ids": tokens, "labels": tokens})) <= 1  # its decoder shifts
