"""What a run trains on, what settings are chosen on, and the two domains it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.seeds import stream
from benchmarks.wordnet.lexicon import SUPERSENSES, Synset

__all__ = ["Example", "Split", "make_split"]


@dataclass(frozen=True)
class Example:
    """A word in a text, and the supersense it has there."""

    word: str
    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Examples for each purpose; no synset serves two of them, but the two tests are of the same synsets.

    Attributes:
        train: Definitions.
        validation: Definitions, to choose settings on.
        definitions: Test in the domain of training.
        usages: Test in the shifted domain: a usage example of each synset in ``definitions``.
    """

    train: list[Example]
    validation: list[Example]
    definitions: list[Example]
    usages: list[Example]


def make_split(synsets: Sequence[Synset], seed: int, *, train_size: int, test_size: int) -> Split:
    """Split the lexicon.

    Every part takes the supersenses in turn, so that each has as many examples as it can in equal shares. Test and
    validation are the same for all seeds; the training examples are drawn by seed from what is left.

    Args:
        synsets: The lexicon.
        seed: The run's seed.
        train_size: Number of training examples.
        test_size: Number of examples in each test, and in the validation set.

    Raises:
        BenchmarkError: If the lexicon has too few synsets.
    """
    order = _shuffled(range(len(synsets)), 0, "wordnet held out")
    with_usage = [index for index in order if synsets[index].examples]
    test = _in_turns(synsets, with_usage, test_size)
    rest = _without(order, test)
    validation = _in_turns(synsets, rest, test_size)
    pool = _without(rest, validation)
    train = _in_turns(synsets, _shuffled(pool, seed, "wordnet training"), train_size)
    for part, wanted in ((test, test_size), (validation, test_size), (train, train_size)):
        if len(part) < wanted:
            raise BenchmarkError(
                f"the lexicon has {len(synsets)} synsets, {len(with_usage)} of them with a usage example: too few for "
                f"{train_size} training, {test_size} validation and {test_size} test examples; ask for less with "
                "--train-size and --test-size"
            )
    return Split(
        [_definition(synsets[index]) for index in train],
        [_definition(synsets[index]) for index in validation],
        [_definition(synsets[index]) for index in test],
        [_usage(synsets[index]) for index in test],
    )


def _definition(synset: Synset) -> Example:
    return Example(synset.words[0], synset.definition, synset.supersense)


def _usage(synset: Synset) -> Example:
    text = synset.examples[0]
    return Example(synset.word_in(text), text, synset.supersense)


def _shuffled(indices: Sequence[int], seed: int, purpose: str) -> list[int]:
    order = torch.randperm(len(indices), generator=stream(seed, purpose)).tolist()
    return [indices[position] for position in order]


def _without(indices: Sequence[int], taken: Sequence[int]) -> list[int]:
    gone = set(taken)
    return [index for index in indices if index not in gone]


def _in_turns(synsets: Sequence[Synset], candidates: Sequence[int], count: int) -> list[int]:
    """Return the first ``count`` candidates, one of each supersense in every turn until it has no more."""
    queues: list[list[int]] = [[] for _ in SUPERSENSES]
    for index in candidates:
        queues[synsets[index].supersense].append(index)
    turns = max(map(len, queues), default=0)
    dealt = [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)]
    return dealt[:count]
