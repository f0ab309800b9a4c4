"""From a pool of labelled examples to what one run trains on and is measured on; and random streams.

Every purpose has a stream of its own, so that no choice depends on how many draws came before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.harness.errors import BenchmarkError

EvaluationSet = Literal["test", "validation"]
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

    def to(self, device: torch.device) -> Split:
        """Return the same split on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


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
    takes the test set's place: settings are chosen on that. The result depends on the arguments alone.

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
    """Return the labels with ``round(fraction * n)`` of them drawn uniformly from all classes, and that number.

    A drawn label may be the right one by chance. A larger fraction randomises the same examples and more.
    """
    count = round(fraction * len(labels))
    drawn = torch.randint(classes, labels.shape, generator=stream(seed, "random labels"))
    chosen = torch.randperm(len(labels), generator=stream(seed, "labels to randomise"))[:count]
    noisy = labels.clone()
    noisy[chosen] = drawn[chosen]
    return noisy, count


def _hold_out(indices: Tensor, labels: Tensor, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split  # the study gpu runs without scikit-learn

    kept, held_out = train_test_split(
        indices.numpy(), test_size=_HELD_OUT, stratify=labels[indices].numpy(), random_state=stream_seed(seed, purpose)
    )
    return torch.from_numpy(kept), torch.from_numpy(held_out)


def _keep(indices: Tensor, labels: Tensor, seed: int, count: int, classes: int) -> Tensor:
    if not classes <= count <= len(indices):
        raise BenchmarkError(
            f"--train-size must be between {classes} (one example a class) and {len(indices)} (all there are), got "
            f"{count}; leave it out for the task's default"
        )
    if len(indices) - count < classes:  # too few are left over for a stratified split
        return indices[torch.randperm(len(indices), generator=stream(seed, "train size"))[:count]]
    from sklearn.model_selection import train_test_split

    kept, _ = train_test_split(
        indices.numpy(),
        train_size=count,
        stratify=labels[indices].numpy(),
        random_state=stream_seed(seed, "train size"),
    )
    return torch.from_numpy(kept)


def stream_seed(seed: int, purpose: str) -> int:
    """Return the seed of the stream for ``purpose``, in [0, 2^32)."""
    return int.from_bytes(hashlib.sha256(f"{purpose}: {seed}".encode()).digest()[:4], "big")


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return a new generator for ``purpose``."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose))
