"""One page in Markdown, from the rows alone; it imports neither torch nor samopt, so that it is written in any case."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.gpu.step import ROWS

Rows = list[dict[str, Any]]
_STEP_GOAL, _UPDATE_GOAL = 2.0, 15.0
"""Per cent of a whole step, or of the update, that a fused restore would have to save to come back."""


def write(out: Path, steps: Rows) -> str:
    """Write report.md and return it.

    Args:
        out: Folder of the results.
        steps: What became of each step: "name", "limit", "seconds", "ended".
    """
    rows = _read(out / ROWS)
    runs = _read(out / "runs.jsonl")
    parts = ["# samopt on a GPU", _environment(rows), _steps(steps), _tests(rows), _updates(rows), _restore(rows)]
    text = "\n\n".join(part for part in [*parts, _whole_steps(rows), _training(rows, runs)] if part) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _read(path: Path) -> Rows:
    """Return a file's rows; a process that was killed may have left half a line at the end."""
    rows: Rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _of(rows: Rows, step: str) -> Rows:
    return [row for row in rows if row["step"] == step]


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def _grid(corner: str, rows: Rows, line: str, column: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table with a line for each value of one key and a column for each value of another."""
    names, cases = (list(dict.fromkeys(row[key] for row in rows)) for key in (line, column))
    found = {(row[line], row[column]): cell(row) for row in rows}
    return _table([corner, *cases], [[name, *(found.get((name, case), "") for case in cases)] for name in names])


def _left_out(rows: Rows) -> str:
    """Return a line for each row that says why something was left out."""
    keys = ("case", "geometry", "form", "graph")
    lines = []
    for row in rows:
        if "skipped" in row:
            what = ", ".join(f"{key} {row[key]}" for key in keys if row.get(key) not in (None, False))
            lines.append(f"- left out{f' ({what})' if what else ''}: {row['skipped']}")
    return "\n".join(lines)


def _section(title: str, *parts: str) -> str:
    filled = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *filled]) if filled else ""


def _environment(rows: Rows) -> str:
    found = _of(rows, "environment")
    if not found:
        return "The environment is unknown: that step left no row."
    row = found[0]
    names = ("device", "capability", "memory_gib", "driver", "cuda", "torch", "triton", "python", "samopt", "commit",
             "cpus", "integrations", "sanitizer", "triton_lacks")  # fmt: skip
    return "; ".join(f"{name}: {row[name]}" for name in names if row.get(name) is not None) + "."


def _steps(steps: Rows) -> str:
    lines = [[s["name"], f"{s['limit']:.0f}", f"{s['seconds']:.1f}", s["ended"]] for s in steps]
    return _table(["step", "limit, s", "took, s", "ended"], lines)


def _tests(rows: Rows) -> str:
    lines = []
    for row in (row for name in ("tests", "memcheck", "racecheck") for row in _of(rows, name)):
        if "skipped" in row:
            lines.append(f"- {row['step']}: left out, {row['skipped']}")
            continue
        counts = ", ".join(f"{count} {name}" for name, count in row["counts"].items()) or "nothing was reported"
        failed = f"; failed: {', '.join(row['failed'])}" if row["failed"] else ""
        summary = f"; {row['summary']}" if row["summary"] else ""
        lines.append(f"- {row['step']} ({row['group']}): {counts}; exit code {row['code']}{failed}{summary}")
    return _section("Tests", "\n".join(lines))


def _updates(rows: Rows) -> str:
    found = _of(rows, "updates")
    measured = [row for row in found if "kind" in row]
    bases = {(row["case"], row["geometry"]): row for row in measured if row["contender"] == "base"}
    parts = []
    for geometry in ("sam", "asam"):
        some = [row for row in measured if row["geometry"] == geometry]

        def cell(row: dict[str, Any]) -> str:
            """Milliseconds beyond the base; times what a copy needs for its bytes; all its bytes a second."""
            total = statistics.median(row["milliseconds"])
            rate = statistics.median(row["copy_rate"])
            speed = ""
            if row["moved"] is not None:
                moved = (row["base_moves"] + row["moved"]) * row["elements"]
                speed = f", {moved / total / 1e6:.0f} GB/s"
            if row["contender"] == "base":
                return f"{total:.3f}{speed}"
            base = bases[row["case"], row["geometry"]]
            beyond = statistics.median(a - b for a, b in zip(row["milliseconds"], base["milliseconds"], strict=True))
            ratio = ""
            if row["moved"]:
                ratio = f" ({beyond / (1000 * row['moved'] * row['elements'] / rate):.2f})"
            return f"{beyond:.3f}{ratio}{speed}"

        if some:
            parts.append(f"{geometry.upper()}:\n\n" + _grid("update", some, "contender", "case", cell))
    if not parts:
        return _section("The update alone", _left_out(found))
    sam = [row for row in measured if row["geometry"] == "sam"]

    def cost(row: dict[str, Any]) -> str:
        launches = "?" if row["launches"] is None else f"{row['launches']:,}"
        return f"{launches}; {row['peak'] / row['elements']:.1f}"

    rate = statistics.median(rate for row in measured for rate in row["copy_rate"]) / 1e9
    notes = (
        "Milliseconds, medians; the base's own, and what the others add to it. In brackets: times what a copy needs "
        "for the bytes that are known to be moved (the goal is 1.25). GB/s: of all these bytes, the base's included; a "
        f"copy of 256 MiB moved {rate:.0f}, bytes read and written."
    )
    table = _grid("launches; peak, bytes an element", sam, "contender", "case", cost)
    return _section("The update alone", notes, *parts, table, _left_out(found))


def _restore(rows: Rows) -> str:
    """Return what folding the restore into the base's step could save at most."""
    lines = []
    for row in (row for row in _of(rows, "updates") if row.get("contender") == "restore"):
        restore = statistics.median(row["milliseconds"])
        update, step = (
            next(
                (r for r in some if r.get("case") == row["case"] and all(r.get(k) == v for k, v in keys.items())), None
            )
            for some, keys in (
                (_of(rows, "updates"), {"geometry": "sam", "contender": "samopt-triton"}),
                (_of(rows, "steps"), {"form": "sam", "graph": False}),
            )
        )
        shares = [
            ""
            if found is None or "skipped" in found
            else f"{100 * restore / statistics.median(found['milliseconds']):.1f}"
            for found in (update, step)
        ]
        lines.append([row["case"], f"{restore:.3f}", *shares])
    if not lines:
        return ""
    note = (
        f"A fused restore could save this much at most. It comes back from {_STEP_GOAL:g} % of a whole step or "
        f"{_UPDATE_GOAL:g} % of the update on."
    )
    return _section("The restore", note, _table(["case", "ms", "% of the update", "% of a whole step"], lines))


def _whole_steps(rows: Rows) -> str:
    found = _of(rows, "steps")
    measured = [{**row, "line": row["form"] + (", graph" if row["graph"] else "")} for row in found if "peak" in row]
    medians = {(row["case"], row["line"]): statistics.median(row["milliseconds"]) for row in measured}

    def cell(row: dict[str, Any]) -> str:
        """Milliseconds, times the base, times two passes, peak beyond the weights."""
        own, suffix = statistics.median(row["milliseconds"]), ", graph" if row["graph"] else ""
        ratios = [
            f"{own / medians[row['case'], name + suffix]:.3f}"
            for name in ("base", "two passes")
            if (row["case"], name + suffix) in medians
        ]
        notes = "; ".join([*ratios, f"{row['peak'] / 2**30:.2f} GiB"])
        return f"{own:.2f} ({notes})"

    note = (
        "bf16 autocast, fused AdamW. Milliseconds, medians (times the base; times two passes and the base's step, of "
        "the same kind; peak memory beyond weights and inputs, the base's state included)."
    )
    table = _grid("step", measured, "line", "case", cell) if measured else ""
    return _section("Whole steps", note if table else "", table, _left_out(found))


def _training(rows: Rows, runs: Rows) -> str:
    found = _of(rows, "training")
    groups: dict[tuple[str, str], Rows] = {}
    for run in runs:
        groups.setdefault((run["task"], run["optimizer"]), []).append(run)
    lines = []
    for (task, name), members in groups.items():
        accuracies = {run["seed"]: 100 * (run["metrics"]["accuracy"] or 0.0) for run in members}
        bases = {run["seed"]: run["metrics"]["accuracy"] for run in groups.get((task, members[0]["base"]), [])}
        gains = [value - 100 * bases[seed] for seed, value in accuracies.items() if bases.get(seed) is not None]
        seconds = statistics.median(run["metrics"]["seconds_per_step"] for run in members)
        gain = "" if name == members[0]["base"] else _spread(gains, "+.2f")
        epochs, accuracy = f"{members[0]['settings']['epochs']:g}", _spread(accuracies.values(), ".2f")
        lines.append([f"{task}, {name}", str(len(members)), epochs, accuracy, gain, f"{1000 * seconds:.2f}"])
    notes = [f"{row['epochs']} epochs with {row['seeds']} seeds at once." for row in found if "epochs" in row]
    headings = ["task, optimizer", "seeds", "epochs", "test accuracy, %", "gain over the base, same seed", "ms a step"]
    return _section("Training", *notes, _table(headings, lines) if lines else "", _left_out(found))


def _spread(values: Iterable[float], style: str) -> str:
    """Return mean and standard deviation."""
    values = list(values)
    if not values:
        return ""
    mean = format(statistics.mean(values), style)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
