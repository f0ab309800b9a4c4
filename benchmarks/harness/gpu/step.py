"""What every step is given, and where its results go."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Options:
    """The arguments of a step.

    Attributes:
        step: Name of the step.
        device: "cuda" or "cpu".
        end: When to stop by itself, in seconds of ``time.monotonic``.
        out: Folder of the results.
        quick: Whether to do only what finds a mistake in the code.
        data: File of images that ``pack`` has made; None for none.
    """

    step: str
    device: str
    end: float
    out: Path
    quick: bool
    data: Path | None

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def write(self, **values: Any) -> None:
        """Append a row to the results; the file is complete and closed again afterwards."""
        with (self.out / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")


def parse(words: Sequence[str]) -> Options:
    """Return the options that the study's process passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.gpu")
    parser.add_argument("step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path)
    given = parser.parse_args(words)
    return Options(given.step, given.device, time.monotonic() + given.seconds, given.out, given.quick, given.data)
