"""Texts for language models: Austen's novels, WordNet's definitions, Python's sources; and windows of their tokens."""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.data import stream
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.wordnet import read_lexicon

DEBIAN_NOVELS = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
NOVELS = {
    "train": ("EMMA", "MANSFIELD PARK", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY"),
    "validation": ("NORTHANGER ABBEY",),
    "test": ("PERSUASION",),
}
"""What each of the novels, named by its first line, is for."""

_HOW_TO_GET = (
    "On Debian: apt-get install r-cran-janeaustenr (found without --novels). Elsewhere: unpack the package and pass "
    "--novels PATH/janeaustenr/data/Rdata.rdb"
)
_SOURCES = ("argparse.py", "ast.py", "dataclasses.py", "inspect.py", "pathlib.py", "tarfile.py", "typing.py")
_STRINGS, _STRING = 16, 9  # R's types of a vector of strings, and of a string


def read_texts(novels: Path, wordnet: Path) -> dict[str, str]:
    """Return the texts by name: "train", "validation" and "test" of Austen, "glosses", "glosses test", and "python".

    A gloss is a line "word: definition"; their order is shuffled, and the last tenth is the test.
    """
    found = read_novels(novels)
    texts = {part: "\n".join(found[title] for title in titles) for part, titles in NOVELS.items()}
    synsets = read_lexicon(wordnet)
    order = torch.randperm(len(synsets), generator=stream(0, "glosses")).tolist()
    glosses = [f"{synsets[index].words[0]}: {synsets[index].definition}\n" for index in order]
    tested = math.ceil(len(glosses) / 10)
    texts["glosses"], texts["glosses test"] = "".join(glosses[:-tested]), "".join(glosses[-tested:])
    library = Path(sysconfig.get_path("stdlib"))
    texts["python"] = "\n".join((library / name).read_text(encoding="utf-8") for name in _SOURCES)
    return texts


def read_novels(path: Path) -> dict[str, str]:
    """Return Austen's novels by their first line, in capitals, from the data file of the R package janeaustenr."""
    try:
        novels = {lines[0].upper(): "\n".join(lines) for lines in map(_lines, _records(path.read_bytes()))}
    except (OSError, zlib.error, ValueError, IndexError) as error:
        raise BenchmarkError(
            f"language reads Austen's novels from {path}, which cannot be read: {error}. {_HOW_TO_GET}"
        ) from error
    missing = [title for titles in NOVELS.values() for title in titles if title not in novels]
    if missing:
        raise BenchmarkError(f"{path} holds {', '.join(novels) or 'nothing'}, not {', '.join(missing)}. {_HOW_TO_GET}")
    return novels


def _records(content: bytes) -> Iterator[bytes]:
    """Return the objects of R's database for lazy loading: each is its length and a zlib stream."""
    while content:
        stream_ = zlib.decompressobj()
        yield stream_.decompress(content[4:])
        content = stream_.unused_data


def _lines(record: bytes) -> list[str]:
    """Return a serialised vector of strings (R Internals, 1.8): a header, then type, length and bytes of each."""

    def integer(place: int) -> int:
        return int.from_bytes(record[place : place + 4], "big", signed=True)

    if record[:2] != b"X\n":
        raise ValueError(f"an object starts with {record[:2]!r}, not with R's mark of binary data")
    place = 14 if integer(2) < 3 else 18 + integer(14)  # version 3 names an encoding
    if integer(place) & 0xFF != _STRINGS:
        raise ValueError("an object is no vector of strings")
    count, place, lines = integer(place + 4), place + 8, []
    for _ in range(count):
        length = integer(place + 4)
        if integer(place) & 0xFF != _STRING or length < 0 or place + 8 + length > len(record):
            raise ValueError(f"line {len(lines) + 1} of an object is no string")
        lines.append(record[place + 8 : place + 8 + length].decode("utf-8"))
        place += 8 + length
    return lines


def byte_tokens(text: str) -> Tensor:
    """Return the UTF-8 bytes of a text, shape ``(n,)``, int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """Return windows of ``length`` tokens and the next, evenly spaced, shape ``(count, length + 1)``."""
    _check_length(tokens, length)
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    return tokens[starts[:, None] + torch.arange(length + 1)]


def draw(tokens: Tensor, length: int, count: int, seed: int, purpose: str) -> Tensor:
    """Return windows from random places, shape ``(count, length + 1)``."""
    _check_length(tokens, length)
    starts = torch.randint(len(tokens) - length, (count,), generator=stream(seed, purpose))
    return tokens[starts[:, None] + torch.arange(length + 1)]


def _check_length(tokens: Tensor, length: int) -> None:
    if len(tokens) <= length:
        raise BenchmarkError(f"a text has {len(tokens)} tokens, and windows need {length + 1}; give a longer text")
