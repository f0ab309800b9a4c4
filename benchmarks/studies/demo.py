"""Train a small ConvNet on real digits, clean and with 40 % random labels; under three minutes."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from benchmarks.harness.rows import open_log
from benchmarks.studies import train

render = train.render


def study(
    seeds: list[NonNegativeInt] = [0, 1, 2],
    epochs: PositiveInt = 20,
    output: Path = Path("results/demo"),
) -> None:
    """Train SGD, SAM, ASAM, AdamW and SAM around AdamW.

    Args:
        seeds: Comma-separated.
        epochs: Passes over the training data.
        output: Folder, replaced.
    """
    open_log(output, restart=True)
    train.study("digits", seeds=seeds, epochs=epochs, label_noise=[0.0, 0.4], output=output)
