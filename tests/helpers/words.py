"""A tokenizer of forty words, tiny Llamas, and data for TRL's trainers, without a network."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(40))]
CONFIG: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.1,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words between blanks."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def language_model() -> torch.nn.Module:
    """A Llama of one layer, seeded."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


def reward_model() -> torch.nn.Module:
    """A Llama that scores, seeded."""
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**CONFIG, num_labels=1))


def text(start: int, count: int) -> str:
    """So many words."""
    return " ".join(f"w{(start * 7 + index * 3) % 40}" for index in range(count))


def texts(count: int = 16) -> Dataset:
    """Texts of three to seven words."""
    return Dataset.from_dict({"text": [text(index, 3 + index % 5) for index in range(count)]})


def preferences(count: int = 16) -> Dataset:
    """A prompt with a chosen and a rejected answer each."""
    return Dataset.from_dict(
        {
            "prompt": [text(index, 2) for index in range(count)],
            "chosen": [" " + text(index + 1, 3) for index in range(count)],
            "rejected": [" " + text(index + 2, 4) for index in range(count)],
        }
    )
