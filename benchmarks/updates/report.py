"""Measurements as tables and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.plot import COLOURS
from benchmarks.updates.alone import ONE_PASS, parse_name
from benchmarks.updates.contenders import CONTENDERS
from benchmarks.updates.measure import Measurement

__all__ = ["Spread", "beyond_base", "bytes_at_copy_rate", "markdown", "plot", "relative"]

_DPI = 115
_LOOPS = ("textbook", "script")
_ADDED = ("bytes/element at copy rate", "GB/s", "peak, B")
_UPDATE = ("Contender", "n", "ms", "beyond the base, ms", *(f"x {loop}" for loop in _LOOPS), *_ADDED)
_STEP = ("Contender", "n", "ms", "x base", "x textbook")
_BATCH = ("Batch", "n", "base, ms", *(f"{name}, x base" for name in ONE_PASS))


@dataclass(frozen=True)
class Spread:
    """A median over rounds with its 20% and 80% quantiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Return the quantiles of some values.

        Args:
            values: One for each round.
        """
        return cls(*np.quantile(np.asarray(values), (0.2, 0.5, 0.8)).tolist())

    def text(self, style: str) -> str:
        """Return "median (low to high)".

        Args:
            style: Format of each number.
        """
        return f"{self.median:{style}} ({self.low:{style}} to {self.high:{style}})"


def beyond_base(one: Measurement, base: Measurement) -> np.ndarray:
    """Return the milliseconds that a contender adds to the base's step, round by round.

    Args:
        one: The contender's.
        base: The base's, of the same case and metric.
    """
    return np.subtract(one.milliseconds, base.milliseconds)


def relative(one: Measurement, other: Measurement, base: Measurement) -> Spread:
    """Return what a contender adds to the base's step as a fraction of what another adds.

    Args:
        one: The contender's.
        other: The other's.
        base: The base's.
    """
    return Spread.of(beyond_base(one, base) / beyond_base(other, base))


def bytes_at_copy_rate(one: Measurement, base: Measurement) -> Spread:
    """Return how many bytes for each element a copy moves in the time that a contender adds to the base's step.

    Args:
        one: The contender's.
        base: The base's.
    """
    return Spread.of(beyond_base(one, base) / 1000 * np.asarray(one.copy_rate) / one.elements)


def markdown(measurements: Sequence[Measurement], notes: Sequence[str]) -> str:
    """Return every table in Markdown.

    Args:
        measurements: What was measured.
        notes: What was left out.
    """
    parts = []
    for (kind, case, metric), group in _groups(measurements).items():
        title = f"{case}, {metric.upper()}: {group[0].elements:,} parameters in {group[0].tensors:,} tensors"
        if kind == "step":
            parts += [f"**Whole step, {title}**", _grid(_STEP, _step_rows(group))]
        elif kind == "update":
            parts += [f"**Update alone, {title}**", _grid(_UPDATE, _update_rows(group))]
    for metric, groups in _batches(measurements).items():
        parts += [
            f"**Whole step in one pass, by batch, {metric.upper()}**",
            _grid(_BATCH, [_batch_row(g) for g in groups]),
        ]
    e = measurements[0].environment
    commits = dict.fromkeys(str(one.environment["commit"]) for one in measurements)
    rate = Spread.of([rate / 1e9 for one in measurements for rate in one.copy_rate])
    lines = [
        "ms: median over n rounds (20% to 80% quantiles), in which everyone takes one turn; ratios are of the same "
        "round.",
        "Beyond the base: the time less that of the base alone, fused AdamW. Bytes at copy rate: what a copy moves for "
        "each element in that time; GB/s: of the bytes that are known to be moved, base included.",
        "In one pass: everyone in a process of its own, in turns.",
        "Peak: most bytes alive for each element beyond weights, one set of gradients and the base's state.",
        f"A copy of 256 MiB moved {rate.text('.1f')} GB/s, read and written bytes counted.",
        f"Measured on {e['device']}, threads: {e['threads']}, clock: {e['clock']}, torch {e['torch']}, python "
        f"{e['python']}, samopt {e['samopt']} at commit {' and '.join(commits)}.",
        *notes,
    ]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n"


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Write a figure: what SAM adds to the base's step, by case and by numbers of parameters and tensors; one pass.

    Args:
        measurements: What was measured.
        path: A PNG file.
    """
    figure = Figure(figsize=(20, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    chosen = [one for one in measurements if one.metric == "sam"]
    groups = _groups(chosen)
    cases = {case: group for (kind, case, _), group in groups.items() if kind == "update"}
    _draw(axes[0], list(cases.values()), lambda index, one: index, "case")
    axes[0].set_xticks(range(len(cases)), list(cases))
    for ax, kind in zip(axes[1:3], ("parameters", "tensors"), strict=True):
        grown = [group for (found, _, _), group in groups.items() if found == kind]
        size: Callable[[int, Measurement], float] = (
            (lambda index, one: one.elements) if kind == "parameters" else (lambda index, one: one.tensors)
        )
        _draw(ax, grown, size, f"number of {kind}")
        ax.set_xscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle("milliseconds that SAM adds to the base's step: median, 20% to 80% quantiles", fontsize=12)
    _draw_batches(axes[3], _batches(chosen).get("sam", []))
    figure.savefig(path, dpi=_DPI)


def _draw(
    ax: Axes, groups: Sequence[Sequence[Measurement]], place: Callable[[int, Measurement], float], label: str
) -> None:
    present = {one.contender for group in groups for one in group}
    names = [name for name in CONTENDERS if name in present and name != "base"]
    for colour, name in zip(COLOURS, names, strict=False):
        points = [
            (place(index, one), Spread.of(beyond_base(one, _named(group, "base"))))
            for index, group in enumerate(groups)
            for one in group
            if one.contender == name
        ]
        low, middle, high = (np.array([getattr(s, part) for _, s in points]) for part in ("low", "median", "high"))
        ax.errorbar([x for x, _ in points], middle, [middle - low, high - middle], color=colour, marker="o", label=name)
    ax.set_yscale("log")
    ax.set_xlabel(label, fontsize=11)
    ax.set_ylabel("ms", fontsize=11)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_batches(ax: Axes, groups: Sequence[Sequence[Measurement]]) -> None:
    lines: dict[tuple[str, str], list[tuple[int, Spread]]] = {}
    for group in groups:
        case, times = parse_name(group[0].case)
        for one in group:
            if one.contender in ONE_PASS:
                lines.setdefault((case, one.contender), []).append((times, _ratio(one, _named(group, "base"))))
    cases = list(dict.fromkeys(case for case, _ in lines))
    for (case, _), points in lines.items():
        colour = COLOURS[cases.index(case)]
        low, middle, high = (np.array([getattr(s, part) for _, s in points]) for part in ("low", "median", "high"))
        spread = [middle - low, high - middle]
        ax.errorbar([x for x, _ in points], middle, spread, color=colour, marker="o", label=case)
    ax.axhline(1.0, color="0.6", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("batch, in small ones", fontsize=11)
    ax.set_ylabel("one pass: whole step over the base's", fontsize=11)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if lines:
        ax.legend(frameon=False, fontsize=9)


def _batches(measurements: Sequence[Measurement]) -> dict[str, list[list[Measurement]]]:
    """Return the groups of whole steps on larger batches, by metric, each case's together."""
    by_metric: dict[str, list[list[Measurement]]] = {}
    for (kind, _, metric), group in _groups(measurements).items():
        if kind == "batch":
            by_metric.setdefault(metric, []).append(group)
    for groups in by_metric.values():
        groups.sort(key=lambda group: parse_name(group[0].case))
    return by_metric


def _groups(measurements: Sequence[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.kind, one.case, one.metric), []).append(one)
    return groups


def _update_rows(group: Sequence[Measurement]) -> list[tuple[str, ...]]:
    base = _named(group, "base")
    loops = [next((one for one in group if one.contender == name), None) for name in _LOOPS]
    rows = []
    for one in group:
        added = one is not base
        rows.append(
            (
                one.contender,
                str(len(one.milliseconds)),
                Spread.of(one.milliseconds).text(".2f"),
                Spread.of(beyond_base(one, base)).text(".2f") if added else "",
                *(relative(one, loop, base).text(".2f") if added and loop is not None else "" for loop in loops),
                f"{bytes_at_copy_rate(one, base).median:.1f}" if added else "",
                _achieved(one),
                "" if one.peak is None else f"{one.peak / one.elements:.2f}",
            )
        )
    return rows


def _step_rows(group: Sequence[Measurement]) -> list[tuple[str, ...]]:
    base = _named(group, "base")
    textbook = next((one for one in group if one.contender == "textbook"), None)
    return [
        (
            one.contender,
            str(len(one.milliseconds)),
            Spread.of(one.milliseconds).text(".1f"),
            _ratio(one, base).text(".3f"),
            ""
            if textbook is None or one is base
            else Spread.of(np.divide(one.milliseconds, textbook.milliseconds)).text(".3f"),
        )
        for one in group
    ]


def _batch_row(group: Sequence[Measurement]) -> tuple[str, ...]:
    base = _named(group, "base")
    found = {one.contender: _ratio(one, base).text(".3f") for one in group}
    milliseconds = Spread.of(base.milliseconds).text(".1f")
    return base.case, str(len(base.milliseconds)), milliseconds, *(found.get(name, "") for name in ONE_PASS)


def _ratio(one: Measurement, base: Measurement) -> Spread:
    return Spread.of(np.divide(one.milliseconds, base.milliseconds))


def _achieved(one: Measurement) -> str:
    """Return the known bytes over the time: 28 for each element by fused AdamW, and what the contender adds."""
    moved = CONTENDERS[one.contender].moved
    if moved is None:
        return ""
    total = (28 + moved[one.metric == "asam"]) * one.elements
    return f"{Spread.of(total / np.asarray(one.milliseconds) / 1e6).median:.1f}"


def _named(group: Sequence[Measurement], name: str) -> Measurement:
    return next(one for one in group if one.contender == name)


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
