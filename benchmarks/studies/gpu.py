"""Check and measure everything on a GPU in a few minutes: tests, updates, whole steps, a training.

It needs torch, numpy, triton and pytest, nothing of samopt installed, and no network. Every step is a process with a
time limit, and the next one runs in any case. On the CPU, ``--device cpu --quick`` runs the same path in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.harness.gpu import report
from benchmarks.harness.gpu.step import ROWS

_ROOT = Path(__file__).parents[2]
_CLOSING = 10  # seconds kept for the report and for processes to end
_OWN_FILES = (ROWS, "runs.jsonl", "log.txt", "report.md")
_LOG_LIMIT = 8 * 2**20  # bytes; no file that comes back may be larger than 16 MiB


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: Of the step, in the log and the report.
        share: Of all the time, at most; 0 for what is left.
        what: What it does.
    """

    name: str
    share: float
    what: str


PLAN = (
    Step("environment", 0.05, "versions, device, what is installed"),
    Step("tests", 0.25, "tests/kernels/test_triton_gpu.py and the others marked gpu, five processes at once"),
    Step("memcheck", 0.08, "a few of them under compute-sanitizer --tool memcheck"),
    Step("racecheck", 0.08, "a few of them under compute-sanitizer --tool racecheck"),
    Step("updates", 0.18, "the update alone: five sets of parameters, SAM and ASAM, seven contenders"),
    Step("steps", 0.18, "whole steps with bf16 autocast: six models, with and without a CUDA graph"),
    Step("training", 0.0, "ViT, Mixer and ResNet on Fashion-MNIST: AdamW, SAM, one pass; five seeds at once"),
)


def command(words: Sequence[str]) -> int:
    """Run the steps and write the report.

    Returns:
        The exit code: 0; 1 where a step or a test failed.
    """
    given = _parse(words)
    if given.dry_run:
        print(plan(60 * given.minutes))
        return 0
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in _OWN_FILES:
        (out / name).unlink(missing_ok=True)
    end = time.monotonic() + 60 * given.minutes - _CLOSING
    done: list[dict[str, Any]] = []
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for step in PLAN:
            if given.steps and step.name not in given.steps:
                continue
            left = end - time.monotonic()
            limit = min(left, step.share * 60 * given.minutes or left)
            done.append(_run(step, limit, given, out, log))
            print("{name}: {ended} after {seconds:.1f} s of {limit:.0f}".format(**done[-1]), flush=True)
            _report(out, done)
            _shorten(out / "log.txt")
    print(_report(out, done))
    return int(any(step["ended"] != "done" for step in done) or _has_failures(out))


def plan(seconds: float) -> str:
    """Return the steps with their time limits, which no step can exceed."""
    rest = seconds * (1 - sum(step.share for step in PLAN)) - _CLOSING
    lines = [f"{step.name:<12} {seconds * step.share or rest:5.0f} s  {step.what}" for step in PLAN]
    lines[-1] += "; also the time that others did not need"
    return "\n".join([*lines, f"{'report':<12} {_CLOSING:5.0f} s  report.md, {ROWS}, runs.jsonl, log.txt"])


def _report(out: Path, done: list[dict[str, Any]]) -> str:
    """Write the report; a mistake in it must not cost the steps that are still to run."""
    try:
        return report.write(out, done)
    except Exception:
        traceback.print_exc()
        return f"no report; the rows are in {out}"


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="Time for everything.")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="Folder of the results.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="Where to run.")
    parser.add_argument("--data", type=Path, help="File of images that benchmarks.harness.gpu.pack has made.")
    parser.add_argument("--commit", help="Written into rows where the checkout has no history.")
    parser.add_argument("--steps", nargs="+", choices=[s.name for s in PLAN], help="Only these, in the plan's order.")
    parser.add_argument("--quick", action="store_true", help="Only what finds a mistake in the code; no training data.")
    parser.add_argument("--dry-run", action="store_true", help="Print the steps with their time limits.")
    given = parser.parse_args(words)
    if given.minutes <= 0:
        parser.error(f"--minutes must be positive, got {given.minutes:g}; 8 is enough for everything")
    if given.data is not None and not given.data.is_file():
        parser.error(f"--data {given.data} is no file; make it with python -m benchmarks.harness.gpu.pack FILE")
    return given


def _run(step: Step, limit: float, given: argparse.Namespace, out: Path, log: IO[str]) -> dict[str, Any]:
    """Run a step until it ends or its limit is over, and return what became of it."""
    start = time.monotonic()
    result: dict[str, Any] = {"name": step.name, "limit": max(limit, 0.0), "seconds": 0.0}
    if limit < 2:
        return {**result, "ended": "left out: no time was left"}
    words = [step.name, "--device", given.device, "--seconds", f"{max(limit - 3, 1):.1f}", "--out", str(out)]
    words += ["--quick"] if given.quick else []
    words += ["--data", str(given.data.resolve())] if given.data is not None else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    if given.commit:
        environment["BENCHMARKS_COMMIT"] = given.commit
    if given.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    log.write(f"===== {step.name}\n")
    log.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.harness.gpu", *words], cwd=_ROOT, env=environment, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"failed with exit code {code}; see log.txt"
    except subprocess.TimeoutExpired:
        ended = "stopped at its limit"
    finally:
        _end(process)
    return {**result, "seconds": time.monotonic() - start, "ended": ended}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step's process and those it has started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        pass
    process.wait()


def _has_failures(out: Path) -> bool:
    """Return whether a test failed, or compute-sanitizer found something."""
    path = out / ROWS
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return any(row.get("failed") or row.get("code") for row in rows)


def _shorten(path: Path) -> None:
    """Keep the end of a log that has grown too long."""
    if path.stat().st_size > _LOG_LIMIT:
        content = path.read_bytes()
        path.write_bytes(content[-_LOG_LIMIT // 2 :])
