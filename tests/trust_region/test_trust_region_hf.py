"""Trust regions on Hugging Face models made from a configuration: masks, heads, embeddings, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.trust_region import InputNoise, Pretrained

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.hf

EXACT = {"rtol": 1e-8, "atol": 1e-14}
IDS = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
ATTENTION = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
LABELS = torch.where(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]) == 1, IDS, -100)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}


def bert(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**(SIZES | options), intermediate_size=32, max_position_embeddings=16)
    return getattr(transformers, f"BertFor{kind}")(config).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).double()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).double()


def optimize(model: nn.Module, **options: Any) -> samopt.TRAM:
    trained = [p for p in model.parameters() if p.requires_grad]
    return samopt.TRAM(torch.optim.SGD(trained, lr=0.5), model=model, **options)


def take_step(optimizer: samopt.TRAM, model: nn.Module, batch: dict[str, Tensor], seed: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        output = model(**batch)
        loss = output.logits.square().sum() if output.get("loss") is None else output.loss
        loss.backward()
        return loss

    torch.manual_seed(seed)
    optimizer.step(closure)


def outputs(models: tuple[nn.Module, ...], batch: dict[str, Tensor], seed: int) -> list[Any]:
    """What each model returns with the masks of this step."""
    found = []
    for model in models:
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(model(**batch))
    return found


def kl(reference: Tensor, current: Tensor) -> Tensor:
    p, q = reference.log_softmax(-1), current.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def averaged(values: Tensor, counts: Tensor) -> Tensor:
    return torch.stack([row[counted].mean() for row, counted in zip(values, counts.bool(), strict=True)]).mean()


def next_token_labelled() -> Tensor:
    counts = torch.zeros(3, 6, dtype=torch.bool)
    for example, position in ((e, t) for e in range(3) for t in range(5)):
        counts[example, position] = LABELS[example, position + 1] != -100
    return counts


EVERYWHERE = torch.ones(3, 6, dtype=torch.bool)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], Tensor | None]] = {
    "sequence classification": (
        lambda: bert("SequenceClassification"),
        {"input_ids": IDS, "attention_mask": ATTENTION, "labels": torch.tensor([0, 2, 1])},
        None,
    ),
    "sequence classification, loss outside": (
        lambda: bert("SequenceClassification"),
        {"input_ids": IDS, "attention_mask": ATTENTION},
        None,
    ),
    "token classification": (
        lambda: bert("TokenClassification"),
        {"input_ids": IDS, "attention_mask": ATTENTION, "labels": LABELS.clamp(max=2)},
        (LABELS != -100) & ATTENTION.bool(),
    ),
    "masked language model": (
        lambda: bert("MaskedLM"),
        {"input_ids": IDS, "labels": LABELS},
        LABELS != -100,
    ),
    "causal language model": (gpt2, {"input_ids": IDS, "labels": LABELS}, next_token_labelled()),
    "causal language model, loss outside": (gpt2, {"input_ids": IDS, "attention_mask": ATTENTION}, ATTENTION),
    "encoder-decoder": (
        t5,
        {"input_ids": IDS, "attention_mask": ATTENTION.flip(0), "labels": LABELS},
        LABELS != -100,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("region", ["previous", "pretrained"])
def test_distance_is_over_the_positions_that_are_trained(case: str, region: str) -> None:
    make, batch, counts = CASES[case]
    model = make()
    trusted, optimizer = copy.deepcopy(model), optimize(model, trust_region=region)
    for step in range(3):
        reference, current = outputs((trusted, model), batch, step)
        values = kl(reference.logits, current.logits)
        expected = values.mean() if counts is None else averaged(values, counts)
        if region == "previous":
            trusted = copy.deepcopy(model)
        take_step(optimizer, model, batch, step)
        torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
    assert expected > 1e-6


def test_both_heads_of_a_question_answering_model_count() -> None:
    model = bert("QuestionAnswering", num_labels=2)
    batch = {"input_ids": IDS, "start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 2, 4])}
    trusted, optimizer = copy.deepcopy(model), optimize(model, trust_region="pretrained")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    for step in range(2):
        reference, current = outputs((trusted, model), batch, step)
        heads = [kl(getattr(reference, name), getattr(current, name)) for name in ("start_logits", "end_logits")]
        torch.manual_seed(step)
        optimizer.step(closure)
        torch.testing.assert_close(optimizer.last_step.distance, (heads[0] + heads[1]).mean(), **EXACT)
    assert optimizer.last_step.distance > 1e-5


def test_tuples_are_read_as_outputs_are() -> None:
    model = bert("SequenceClassification", return_dict=False)
    optimizer = optimize(model, trust_region="pretrained")
    trusted = copy.deepcopy(model)
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}
    for step in range(2):
        reference, current = outputs((trusted, model), batch, step)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(**batch)[0]
            loss.backward()
            return loss

        torch.manual_seed(step)
        optimizer.step(closure)
        expected = kl(reference[1], current[1]).mean()
        torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
    assert optimizer.last_step.distance > 1e-5


def test_the_reference_computes_no_loss() -> None:
    model = gpt2()
    optimizer = optimize(model)
    graded = []
    loss_function = model.loss_function

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        graded.append(torch.is_grad_enabled())
        return loss_function(*args, **kwargs)

    model.loss_function = watched
    for step in range(2):
        take_step(optimizer, model, {"input_ids": IDS, "labels": LABELS}, step)
    assert optimizer.last_step.distance > 0
    assert graded == [True] * 4


def test_gradient_checkpointing_changes_nothing() -> None:
    distances = []
    for checkpointing in (False, True):
        model = bert("SequenceClassification")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = optimize(model, trust_region="previous")
        for step in range(3):
            take_step(optimizer, model, {"input_ids": IDS, "labels": torch.tensor([0, 2, 1])}, step)
        distances.append(optimizer.last_step.distance)
    torch.testing.assert_close(distances[0], distances[1], **EXACT)
    assert distances[0] > 1e-5


@contextmanager
def noisy(embeddings: list[nn.Module], noise: Callable[[Tensor], Tensor]) -> Generator[None]:
    handles = [each.register_forward_hook(lambda m, args, output: output + noise(output)) for each in embeddings]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("case", ["sequence classification", "causal language model", "encoder-decoder"])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_goes_onto_the_embeddings(case: str, kind: str) -> None:
    make, batch, counts = CASES[case]
    model = make()
    region = InputNoise(std=0.5, kind=kind)
    optimizer = optimize(model, trust_region=region)
    embeddings = {
        "sequence classification": lambda m: [m.bert.embeddings.word_embeddings],
        "causal language model": lambda m: [m.transformer.wte],
        "encoder-decoder": lambda m: [m.encoder.embed_tokens, m.decoder.embed_tokens],
    }[case]
    for step in range(2):
        twin = copy.deepcopy(model)
        current = outputs((twin,), batch, step)[0]
        with noisy(embeddings(twin), region._noise(0)):
            reference = outputs((twin,), batch, step)[0]
        values = kl(reference.logits, current.logits)
        expected = values.mean() if counts is None else averaged(values, counts)
        take_step(optimizer, model, batch, step)
        torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
    assert expected > 1e-5
    assert not any(module._forward_hooks for module in embeddings(model))


def test_noise_goes_onto_given_embeddings_and_named_modules() -> None:
    model = bert("SequenceClassification")
    region = InputNoise(std=0.5)
    optimizer = optimize(model, trust_region=region)
    embedded = model.bert.embeddings.word_embeddings(IDS).detach()
    noise = region._noise(0)(embedded)
    reference, current = (
        outputs((copy.deepcopy(model),), {"inputs_embeds": each}, 0)[0] for each in (embedded + noise, embedded)
    )
    take_step(optimizer, model, {"inputs_embeds": embedded}, 0)
    torch.testing.assert_close(optimizer.last_step.distance, kl(reference.logits, current.logits).mean(), **EXACT)

    model = bert("SequenceClassification")
    optimizer = optimize(model, trust_region=InputNoise(std=0.5, embedding="bert.embeddings"))
    take_step(optimizer, model, {"input_ids": IDS}, 0)
    assert optimizer.last_step.distance > 0
    with pytest.raises(ValueError, match=r"embedding='bert.words'\) names no module of BertForSequenceClassification"):
        optimize(model, trust_region=InputNoise(embedding="bert.words"))
    optimizer = optimize(model, trust_region=InputNoise(embedding=nn.Embedding(3, 3)))
    with pytest.raises(RuntimeError, match="did not call them; name the module it calls"):
        model(input_ids=IDS)


def test_frozen_embeddings_are_not_held_but_take_noise() -> None:
    model = bert("SequenceClassification")
    model.bert.embeddings.requires_grad_(False)
    previous = optimize(model, trust_region="previous")
    take_step(previous, model, {"input_ids": IDS}, 0)
    held = previous.state_dict()["samopt"]["radius"]["weights"]
    assert held and not any("embeddings" in name for name in held)
    noise = optimize(model, trust_region=InputNoise(std=0.5))
    take_step(noise, model, {"input_ids": IDS}, 1)
    assert noise.last_step.distance > 0


def lora(**options: Any) -> Any:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **options)
    return peft.get_peft_model(bert("SequenceClassification"), config)


BATCH = {"input_ids": IDS, "attention_mask": ATTENTION, "labels": torch.tensor([0, 2, 1])}


def test_an_adapter_is_switched_off_instead_of_copied() -> None:
    model = lora(lora_dropout=0.0)
    base = copy.deepcopy(model)  # its adapters are still the identity
    optimizer = optimize(model, trust_region="pretrained")
    assert optimizer.state_dict()["samopt"]["radius"]["weights"] == {}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for step in range(3):
        reference, current = outputs((base, model), BATCH, step)
        expected = kl(reference.logits, current.logits).mean()
        take_step(optimizer, model, BATCH, step)
        torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert expected > 1e-6
    assert not torch.equal(outputs((model,), BATCH, 0)[0].logits, outputs((base,), BATCH, 0)[0].logits)


def test_an_adapters_own_dropout_does_not_shift_the_masks() -> None:
    model = lora(lora_dropout=0.5)
    optimizer = optimize(model, trust_region="pretrained")
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(2):
        take_step(optimizer, model, BATCH, step)
        assert optimizer.last_step.distance.item() == 0.0


def test_trainable_parameters_beside_an_adapter_are_held() -> None:
    model = lora()
    norm = model.base_model.model.bert.encoder.layer[0].output.LayerNorm
    norm.requires_grad_(True)
    start = copy.deepcopy(model)
    optimizer = optimize(model, trust_region=Pretrained())
    held = optimizer.state_dict()["samopt"]["radius"]["weights"]
    assert sorted(name.rpartition(".")[2] for name in held) == ["bias", "weight"]
    assert all("LayerNorm" in name for name in held)
    for step in range(3):
        reference, current = outputs((start, model), BATCH, step)
        take_step(optimizer, model, BATCH, step)
        expected = kl(reference.logits, current.logits).mean()
        torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
    assert expected > 1e-6


def test_an_adapter_added_by_transformers_is_switched_off_too() -> None:
    model = bert("SequenceClassification")
    base = copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(20)
    optimizer = optimize(model, trust_region="pretrained")
    reference, current = outputs((base, model), BATCH, 0)
    expected = kl(reference.logits, current.logits).mean()
    take_step(optimizer, model, BATCH, 0)
    torch.testing.assert_close(optimizer.last_step.distance, expected, **EXACT)
    assert expected > 1e-6
    assert not torch.equal(outputs((base,), BATCH, 0)[0].logits, outputs((model,), BATCH, 0)[0].logits)


def test_adapters_come_back_when_the_reference_fails() -> None:
    model = lora()
    optimizer = optimize(model, trust_region="pretrained")
    take_step(optimizer, model, BATCH, 0)
    before = outputs((model,), BATCH, 1)[0].logits

    def fail(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("the reference failed")

    handle = model.base_model.model.classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the reference failed"):
        model(**BATCH)
    handle.remove()
    assert torch.equal(outputs((model,), BATCH, 1)[0].logits, before)
    assert not any(module._forward_hooks for module in model.modules() if hasattr(module, "lora_dropout"))
