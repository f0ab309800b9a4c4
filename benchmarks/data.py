"""From a pool of labelled examples to what one run trains on and is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.errors import BenchmarkError
from benchmarks.seeds import stream, stream_seed

__all__ = ["EVALUATION_SETS", "Pool", "Split", "make_split", "randomise_labels"]

EVALUATION_SETS = ("test", "validation")
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Pool:
    """All the examples of a task.

    Attributes:
        inputs: Shape ``(n, ...)``.
        labels: Shape ``(n,)``, int64.
        test_inputs: The data set's own test examples; None where it has none and each seed draws its own.
        test_labels: Their labels.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor | None = None
    test_labels: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """What one run trains on and is measured on.

    Attributes:
        inputs: Training examples, shape ``(n, ...)``.
        labels: Their labels, some of them randomised, shape ``(n,)``.
        clean_labels: Their labels before that, shape ``(n,)``.
        test_inputs: Examples to measure accuracy on, shape ``(m, ...)``.
        test_labels: Their labels, never randomised, shape ``(m,)``.
        randomised: How many training labels were drawn at random.
    """

    inputs: Tensor
    labels: Tensor
    clean_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    randomised: int


def make_split(
    pool: Pool,
    seed: int,
    *,
    classes: int,
    train_size: int | None = None,
    label_noise: float = 0.0,
    evaluate_on: str = "test",
) -> Split:
    """Split a pool, every class in proportion, and randomise some of the training labels.

    Where the pool has no test set, a fifth of it becomes one. For "validation", a fifth of what is left is held out and
    takes the test set's place: that is the set to choose settings on. The result depends on the arguments alone.

    Args:
        pool: The examples.
        seed: Decides every random choice.
        classes: Number of classes.
        train_size: How many training examples to keep; None for all.
        label_noise: Fraction of the training labels to randomise, in [0, 1).
        evaluate_on: "test" or "validation".

    Raises:
        BenchmarkError: If there are fewer training examples than asked for.
    """
    train, test = torch.arange(len(pool.labels)), None
    if pool.test_labels is None:
        train, test = _hold_out(train, pool.labels, seed, "test set")
    if evaluate_on == "validation":
        train, test = _hold_out(train, pool.labels, seed, "validation set")
    if train_size is not None:
        train = _keep(train, pool.labels, seed, train_size, classes)
    clean_labels = pool.labels[train]
    labels, randomised = randomise_labels(clean_labels, label_noise, classes, seed)
    if test is None:
        assert pool.test_inputs is not None and pool.test_labels is not None
        test_inputs, test_labels = pool.test_inputs, pool.test_labels
    else:
        test_inputs, test_labels = pool.inputs[test], pool.labels[test]
    return Split(pool.inputs[train], labels, clean_labels, test_inputs, test_labels, randomised)


def randomise_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> tuple[Tensor, int]:
    """Return the labels with ``round(fraction * n)`` of them drawn anew, uniformly from all classes, and that number.

    A drawn label may be the right one by chance. A larger fraction randomises the same examples and more.

    Args:
        labels: Shape ``(n,)``; not changed.
        fraction: How many to randomise, in [0, 1).
        classes: Number of classes.
        seed: Decides which, and what they become.

    Raises:
        BenchmarkError: If the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise BenchmarkError(
            f"label noise must be a fraction of the training labels in [0, 1), got {fraction:g}; for 40% write 0.4"
        )
    count = round(fraction * len(labels))
    drawn = torch.randint(classes, labels.shape, generator=stream(seed, "random labels"))
    chosen = torch.randperm(len(labels), generator=stream(seed, "labels to randomise"))[:count]
    noisy = labels.clone()
    noisy[chosen] = drawn[chosen]
    return noisy, count


def _hold_out(indices: Tensor, labels: Tensor, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    kept, held_out = train_test_split(
        indices.numpy(),
        test_size=_HELD_OUT,
        stratify=labels[indices].numpy(),
        random_state=stream_seed(seed, purpose),
    )
    return torch.from_numpy(kept), torch.from_numpy(held_out)


def _keep(indices: Tensor, labels: Tensor, seed: int, count: int, classes: int) -> Tensor:
    if not classes <= count <= len(indices):
        raise BenchmarkError(
            f"--train-size must be between {classes} (one example a class) and {len(indices)} (all there are), got "
            f"{count}; leave it out for the task's default"
        )
    if len(indices) - count < classes:
        return indices[torch.randperm(len(indices), generator=stream(seed, "train size"))[:count]]
    kept, _ = train_test_split(
        indices.numpy(),
        train_size=count,
        stratify=labels[indices].numpy(),
        random_state=stream_seed(seed, "train size"),
    )
    return torch.from_numpy(kept)
