"""Functional SAM on Hugging Face models that compute their loss themselves, against the recipe in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samopt
from tests.helpers.functional import recipe

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

RHO = 0.5
IDS = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))
ATTENTION = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
LABELS = torch.where(ATTENTION == 1, IDS, -100)


def bert(kind: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2 if kind == "QuestionAnswering" else 3,
    )
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
        )
    )


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


TEXT = {"input_ids": IDS, "attention_mask": ATTENTION}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "classification": (
        lambda: bert("SequenceClassification"),
        TEXT | {"labels": torch.tensor([0, 2, 1]), "output_hidden_states": True},
        ("logits",),
    ),
    "masked language model": (lambda: bert("MaskedLM"), TEXT | {"labels": LABELS}, ("logits",)),
    "question answering": (
        lambda: bert("QuestionAnswering"),
        TEXT | {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 3, 3])},
        ("start_logits", "end_logits"),
    ),
    "causal language model": (gpt2, TEXT | {"labels": LABELS, "output_hidden_states": True}, ("logits",)),
    "encoder-decoder": (t5, TEXT | {"labels": LABELS}, ("logits",)),
    "tuple": (gpt2, TEXT | {"labels": LABELS, "return_dict": False}, (1,)),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_computed_inside_equals_the_recipe(case: str, checkpointing: bool) -> None:
    make, inputs, keys = CASES[case]
    torch.manual_seed(0)
    model = make().double().train()
    plain = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def call(of: nn.Module) -> tuple[Tensor, list[Tensor]]:
        returned = of(**inputs)
        return returned[0], [returned[key] for key in keys]

    choose = (lambda returned: returned[1]) if case == "tuple" else None
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = samopt.FunctionalSAM(base, rho=RHO, model=model, outputs=choose)
    torch.manual_seed(1)
    expected = recipe(plain, [call], RHO)
    torch.manual_seed(1)
    optimizer.backward(lambda: model(**inputs)[0])
    assert any(parameter.grad.abs().max() > 1e-3 for parameter in model.parameters())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_a_loss_computed_outside_equals_the_one_inside() -> None:
    gradients = []
    for inside in (True, False):
        torch.manual_seed(0)
        model = bert("SequenceClassification").double().train()
        labels = torch.tensor([0, 2, 1])
        optimizer = samopt.FunctionalSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)

        def loss(model: nn.Module = model, labels: Tensor = labels, inside: bool = inside) -> Tensor:
            if inside:
                return model(**TEXT, labels=labels).loss
            return nn.functional.cross_entropy(model(**TEXT).logits, labels)

        torch.manual_seed(1)
        optimizer.backward(loss)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_an_adapter_equals_the_recipe() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    model = peft.get_peft_model(gpt2().double(), config).train()
    plain = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = samopt.FunctionalSAM(torch.optim.SGD(trained, lr=0.1), rho=RHO, model=model)

    def call(of: nn.Module) -> tuple[Tensor, list[Tensor]]:
        returned = of(**TEXT, labels=LABELS)
        return returned.loss, [returned.logits]

    torch.manual_seed(1)
    expected = recipe(plain, [call], RHO)
    torch.manual_seed(1)
    optimizer.backward(lambda: call(model)[0])
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.to(parameter.dtype), rtol=1e-6, atol=1e-9)
