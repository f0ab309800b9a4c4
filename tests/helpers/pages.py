"""Reads the documentation pages into headings and code blocks."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "REPOSITORY", "Block", "Heading", "read"]

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted({*REPOSITORY.glob("README.md"), *REPOSITORY.glob("CONTRIBUTING.md"), *REPOSITORY.glob("docs/**/*.md")})

_FENCE = re.compile(r"(?P<indent> *)(?P<marker>`{3,}|~{3,}) *(?P<language>\S*)")
_NOTE = re.compile(r" *<!-- docs: (?P<text>.*?) -->\s*")
_HEADING = re.compile(r"(?P<level>#{1,6}) +(?P<title>.*\S)")


@dataclass(frozen=True)
class Heading:
    """A heading: its depth (1 is the page's title), its text, and its line."""

    level: int
    title: str
    line: int


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line its text starts on, and the docs comment just before it."""

    language: str
    source: str
    line: int
    note: str


def read(page: Path) -> list[Heading | Block]:
    """Return the headings and the code blocks of ``page`` in order."""
    parts: list[Heading | Block] = []
    note = ""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if fence := _FENCE.match(line):
            body = []
            for _, inner in lines:
                if inner.strip() == fence["marker"]:
                    break
                body.append(inner.removeprefix(fence["indent"]))
            parts.append(Block(fence["language"], "\n".join(body), number + 1, note))
            note = ""
        elif heading := _HEADING.match(line):
            parts.append(Heading(len(heading["level"]), heading["title"], number))
        if comment := _NOTE.fullmatch(line):
            note = comment["text"]
        elif line.strip():
            note = ""
    return parts
