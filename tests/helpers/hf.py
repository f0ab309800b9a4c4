"""Tiny models and data for the Hugging Face tests, and the loop written by hand that a Trainer is compared with."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import samopt
from samopt._replay.forward_calls import RngState
from samopt.integrations.transformers import SAMArguments, SAMTrainer, SAMTrainingArguments
from tests.helpers import cases

# Trainer collects garbage at every train(); it need not look through all that importing transformers has made.
gc.freeze()
atexit.register(gc.unfreeze)

VOCABULARY = 50
Batch = dict[str, Tensor]
LossOf = Callable[[nn.Module, Batch, Tensor | None, int], Tensor]


def bert(**options: Any) -> nn.Module:
    """A classifier with dropout and LayerNorm."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """A language model whose loss is normalised by ``num_items_in_batch``; tied embeddings, dropout."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    """An encoder-decoder with dropout."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        use_cache=False,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


class Norms(nn.Module):
    """BatchNorm (one without a fixed momentum) and dropout, in the way of a custom model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = cases.norms()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def norms() -> nn.Module:
    """A ``Norms``, seeded."""
    torch.manual_seed(0)
    return Norms()


def classification(count: int = 26, seed: int = 1) -> list[dict[str, Any]]:
    """Token ids ``(8,)`` with a label each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, (8,), generator=generator),
            "labels": int(torch.randint(3, (), generator=generator)),
        }
        for _ in range(count)
    ]


def language(count: int = 26, seed: int = 1) -> list[dict[str, Any]]:
    """Token ids ``(8,)`` with labels ``(8,)`` of which a varying number count."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(1, VOCABULARY, (8,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, 6, (), generator=generator))] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def points(count: int = 26, seed: int = 1) -> list[dict[str, Any]]:
    """Vectors ``(6,)`` with a label each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(6, generator=generator), "labels": int(torch.randint(3, (), generator=generator))}
        for _ in range(count)
    ]


def batches_of(rows: Sequence[dict[str, Any]], size: int = 4) -> list[Batch]:
    """The rows in order, collated."""
    return [transformers.default_data_collator(list(chunk)) for chunk in _chunks(rows, size)]


def mean_loss(model: nn.Module, batch: Batch, count: Tensor | None, accumulate: int) -> Tensor:
    """The model's own loss, a mean, as one part of ``accumulate``."""
    outputs = model(**batch)
    return outputs["loss"] / accumulate


def undivided_loss(model: nn.Module, batch: Batch, count: Tensor | None, accumulate: int) -> Tensor:
    """The model's own loss, not divided: what Trainer does for a model whose forward takes ``**kwargs``, BERT's too."""
    return model(**batch)["loss"]


def counted_loss(model: nn.Module, batch: Batch, count: Tensor | None, accumulate: int) -> Tensor:
    """The model's own loss as a sum divided by ``count``."""
    return model(**batch, num_items_in_batch=count)["loss"]


@dataclass
class History:
    """What a loop leaves behind besides the model."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)


class SeedEachStep(TrainerCallback):
    """Gives every optimizer step its own seed, so that loops which load data differently draw the same masks."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(1000 + state.global_step)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over every trainable parameter."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum over every trainable parameter."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train_by_hand(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_of: LossOf = mean_loss,
    *,
    sam: Callable[..., samopt.SharpnessAwareOptimizer] = samopt.SAM,
    base: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    accumulate: int = 1,
    epochs: int = 2,
    max_grad_norm: float = 0.0,
    clip_value: float | None = None,
    count: Callable[[Sequence[Batch]], Tensor] | None = None,
    autocast: bool = False,
) -> History:
    """Both passes over each window, clipping, step and a linear schedule, in plain torch around ``samopt``'s engine."""
    history = History()
    inner = base(model)
    optimizer = sam(inner, model=model)
    windows = list(_chunks(batches, accumulate))
    total = len(windows) * epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: (total - step) / total)
    model.train()
    for step, window in enumerate(itertools.chain.from_iterable(itertools.repeat(windows, epochs))):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        counted = None if count is None else count(window)

        def one_pass(starts: Iterable[RngState | None]) -> tuple[list[RngState], Tensor]:
            recorded, total_loss = [], torch.zeros(())
            for batch, start in zip(window, starts, strict=True):  # noqa: B023  # called in this iteration only
                if start is not None:
                    start.restore()
                recorded.append(RngState.capture())
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = loss_of(model, batch, counted, len(window))  # noqa: B023
                loss.backward()
                total_loss = total_loss + loss.detach()
            return recorded, total_loss

        starts, loss = one_pass([None] * len(window))
        with optimizer.perturbed(loss) as second:
            _, second.loss = one_pass(starts)
        history.losses.append(float(loss))
        history.sharpness.append(float(optimizer.last_step.sharpness))
        if max_grad_norm:
            history.grad_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        if clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), clip_value)
        optimizer.step()
        scheduler.step()
    return history


def make_trainer(
    folder: Path,
    model: nn.Module,
    rows: Any,
    *,
    kind: type[Trainer] = SAMTrainer,
    arguments: type[TrainingArguments] = SAMTrainingArguments,
    base: Callable[[nn.Module], torch.optim.Optimizer] | None = adamw,
    callbacks: Sequence[TrainerCallback] = (),
    seeded: bool = True,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer over the rows in order, quiet, logging every step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    if issubclass(arguments, SAMArguments):
        settings |= {"sam": "sam"}
    return kind(
        model,
        args=arguments(str(folder), **(settings | options)),
        train_dataset=rows,
        callbacks=[*([SeedEachStep()] if seeded else []), *callbacks],
        **({} if base is None else {"optimizers": (base(model), None)}),
        **(trainer_options or {}),
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    """The values of ``name`` in the log history."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
