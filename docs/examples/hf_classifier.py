"""A Hugging Face classifier with ASAM, from nothing to a curve of its sharpness.

python docs/examples/hf_classifier.py --output_dir results/hf --sam asam --sam_rho 0.1

The task needs no download: tell whether a sequence holds more large numbers than small ones. The curve is written to
``sharpness.png`` in the output folder; every value is also in the Trainer's log.
"""

import pathlib
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from samopt.integrations.transformers import SAMTrainer, SAMTrainingArguments, SharpnessCallback


@dataclass
class Arguments(SAMTrainingArguments):
    """The Trainer's arguments with other defaults; every one of them is an option of the command line."""

    sam: str = "asam"
    sam_rho: float = 0.1
    learning_rate: float = 3e-3
    max_steps: int = 150
    per_device_train_batch_size: int = 32
    logging_steps: int = 5
    eval_strategy: str = "steps"
    eval_steps: int = 25
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True


def examples(n):
    """Return ``n`` sequences of 16 numbers below 40, labelled 1 where most are 20 or more."""
    numbers = torch.randint(40, (n, 16))
    return [{"input_ids": row, "labels": int((row >= 20).sum() > 8)} for row in numbers]


def accuracy(prediction):
    """Return the share of sequences whose label is predicted."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def draw(history, path):
    """Draw every logged value of sharpness against the step."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, label in (
        ("sharpness/sam", "rise of the loss in the optimizer's own ascent"),
        ("sharpness/worst_case", "worst case on the evaluation data"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="sharpness: rise of the loss", ylim=(0, None))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    figure.savefig(path, dpi=120)


def main():
    """Train, evaluate, and draw."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    trainer = SAMTrainer(
        BertForSequenceClassification(config),
        args=arguments,
        train_dataset=examples(2048),
        eval_dataset=examples(256),
        compute_metrics=accuracy,
        callbacks=[SharpnessCallback(["worst_case"], examples=64, max_fraction=None)],
    )
    trainer.train()
    path = pathlib.Path(arguments.output_dir) / "sharpness.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(trainer.state.log_history, path)
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}, curve in {path}")


if __name__ == "__main__":
    main()
