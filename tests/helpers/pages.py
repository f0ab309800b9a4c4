"""Reads the code blocks of the documentation pages."""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "REPOSITORY", "Block", "read"]

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted({*REPOSITORY.glob("README.md"), *REPOSITORY.glob("CONTRIBUTING.md"), *REPOSITORY.glob("docs/**/*.md")})

_FENCE = re.compile(r"(?P<indent> *)(?P<marker>`{3,}|~{3,}) *(?P<language>\S*)")
_NOTE = re.compile(r" *<!-- docs: (?P<text>.*?) -->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line its text starts on, and the docs comment just before it."""

    language: str
    source: str
    line: int
    note: str


def read(page: Path) -> list[Block]:
    """Return the code blocks of ``page`` in order."""
    blocks: list[Block] = []
    note = ""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if fence := _FENCE.match(line):
            body = []
            for _, inner in lines:
                if inner.strip() == fence["marker"]:
                    break
                body.append(inner.removeprefix(fence["indent"]))
            blocks.append(Block(fence["language"], "\n".join(body), number + 1, note))
            note = ""
        if comment := _NOTE.fullmatch(line):
            note = comment["text"]
        elif line.strip():
            note = ""
    return blocks
