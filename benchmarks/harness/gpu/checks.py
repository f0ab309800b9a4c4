"""Steps (b) and (c): the tests of the kernels, several processes at once, and a few of them under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.harness.gpu.step import Options

_FILE = "tests/kernels/test_triton_gpu.py"
_ROOT = Path(__file__).parents[3]
_GROUPS = ("float32", "bfloat16", "float16 and not bfloat16", "not float")
"""What each process runs: kernels are compiled for each dtype, which takes most of the time."""
_SUBSET = "(reference and sam-l2 and float32) or one_pass"
_QUICK = "(reference and asam-l2 and bfloat16) or (bucket and one-pass)"
_RESULT = re.compile(r"^(\S*::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)
_SHOWN = 20_000  # characters of each process's output that go to the log
_FOUND = 86  # exit code of compute-sanitizer


def find_sanitizer() -> str | None:
    """Return where compute-sanitizer is, or None."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run(options: Options) -> None:
    """Run the tests, or the few that compute-sanitizer repeats, and write a row for each process."""
    python = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", _FILE, "-k"]
    if options.step == "tests":
        groups = (_QUICK,) if options.quick else _GROUPS
        _run_all(options, {group: [*python, group] for group in groups}, {})
        return
    tool = find_sanitizer()
    if tool is None or options.device != "cuda":
        reason = "compute-sanitizer is not installed" if tool is None else "compute-sanitizer needs a CUDA device"
        options.write(skipped=reason)
        return
    prefix = [tool, "--tool", options.step, "--error-exitcode", str(_FOUND)]
    _run_all(options, {_SUBSET: [*prefix, *python, _SUBSET]}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _run_all(options: Options, commands: dict[str, list[str]], variables: dict[str, str]) -> None:
    """Run processes at once until the time is over, and write what each of them did."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, (name, command) in enumerate(commands.items()):
            path = Path(folder) / f"{number}.txt"
            with path.open("w") as file:
                process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            running.append((name, path, process))
        for name, path, process in running:
            try:
                process.wait(max(options.left - 3, 1))
            except subprocess.TimeoutExpired:
                process.kill()  # the study's process ends those that it has started
                process.wait()
            text = path.read_text(encoding="utf-8", errors="replace")
            print(f"--- {name}\n{text[-_SHOWN:]}", flush=True)
            results = _RESULT.findall(text)
            bad = [test.rpartition("::")[2] for test, result in results if result in ("FAILED", "ERROR", "XPASS")]
            counts = Counter(result.lower() for _, result in results)
            errors = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
            options.write(
                group=name, code=process.returncode, counts=counts, failed=bad, summary=errors[-1] if errors else None
            )
