"""WordNet's database files: every synset with its definition, its usage examples and its supersense."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError

__all__ = ["DEBIAN_FOLDER", "SUPERSENSES", "Synset", "read_lexicon"]

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
        """Return the word that ``text`` uses: the first whose beginning occurs in it, else the first of all.

        Args:
            text: One of the examples.
        """
        lowered = text.lower()
        return next((word for word in self.words if word.lower()[:_STEM] in lowered), self.words[0])


def read_lexicon(folder: Path) -> list[Synset]:
    """Return every synset that has a definition, in the order of the files.

    Args:
        folder: Holds the four data files (format: wndb(5WN)).

    Raises:
        BenchmarkError: If a file is missing or is something else; says how to get them.
    """
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        found = "a folder without" if folder.is_dir() else "no folder, so not"
        raise BenchmarkError(
            f"wordnet looks for its files in {folder}; found {found} {', '.join(missing)}. {_HOW_TO_GET}"
        )
    return [synset for name in _FILES for synset in _read(folder / name)]


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
