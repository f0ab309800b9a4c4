"""Milliseconds and memory of the update alone and of whole steps: loops by hand, another package, samopt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.environment import select_device
from benchmarks.harness.errors import choose
from benchmarks.harness.measure import Measurement, measure_steps, measure_updates, name_at
from benchmarks.harness.networks import CASES, growth
from benchmarks.harness.report import Table, colour, few_ticks, figure, legend, publish, say
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.timing import Clock
from benchmarks.harness.updates import BAREST, BASE_MOVES, MOVED, STEPS, UPDATES, WITHOUT_MODEL

_FORMS = dict.fromkeys(STEPS)


@dataclass(frozen=True)
class Spread:
    """A median over rounds with its 20% and 80% quantiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Return the quantiles of some values."""
        return cls(*np.quantile(np.asarray(values), (0.2, 0.5, 0.8)).tolist())

    def text(self, style: str) -> str:
        """Return "median (low to high)"."""
        return f"{self.median:{style}} ({self.low:{style}} to {self.high:{style}})"


def study(
    cases: list[str] = list(CASES),
    contenders: list[str] = list(UPDATES),
    forms: list[str] = list(STEPS),
    geometries: list[Literal["sam", "asam"]] = ["sam", "asam"],
    rounds: PositiveInt = 15,
    step_rounds: PositiveInt = 7,
    device: str = "cpu",
    threads: PositiveInt = 1,
    clock: Clock = "wall",
    output: Path = Path("results/optimizer"),
    quick: bool = False,
) -> None:
    """Measure updates and whole steps, everything in turns in one process.

    Args:
        cases: Comma-separated; those that the device cannot hold are left out.
        contenders: Of the update alone, comma-separated; the base is always among them.
        forms: Of whole steps, comma-separated; the base is always among them.
        geometries: Comma-separated.
        rounds: Turns of each update.
        step_rounds: Turns of each whole step; 300 for the digits.
        device: As torch names it.
        threads: CPU threads.
        clock: Seconds that pass, or of this process for a machine that is busy with other work.
        output: Folder, continued.
        quick: Two cases, a few contenders, two rounds.
    """
    torch.set_num_threads(threads)
    if quick:
        cases, contenders, forms = (
            ["digits", "resnet18"],
            ["textbook", "samopt-cpu"],
            ["sam-closure", BAREST, "one-pass"],
        )
        geometries, rounds, step_rounds = ["sam"], 2, 1
    where = select_device(device)
    chosen = [choose("case", name, CASES) for name in cases]
    chosen = [case for case in chosen if where.type == "cuda" or not case.needs_gpu]
    names, steps = ["base"], ["base"]
    for kind, given, known, taken in (("contender", contenders, UPDATES, names), ("form", forms, _FORMS, steps)):
        for name in given:
            choose(kind, name, known)
        taken += [name for name in known if name in given and name != "base"]
    log = open_log(output, "updates.jsonl", Measurement, restart=quick)
    groups: list[tuple[str, str, str, Callable[[], Iterator[Measurement]]]] = []
    for geometry in geometries:
        for kind, members in ({"update": chosen} | (growth(quick) if geometry == "sam" else {})).items():
            for case in members:
                measure = partial(measure_updates, kind, case, geometry, names, rounds, where, clock)
                groups.append((kind, case.name, geometry, measure))
        for case in chosen:
            turns = case.rounds if case.rounds and not quick else step_rounds
            for times in case.times if case.batch is not None else ():
                measure = partial(measure_steps, case, times, geometry, steps, turns, where, clock)
                groups.append(("step", name_at(case, times), geometry, measure))
    for kind, name, geometry, measure in groups:
        if log.find(kind=kind, case=name, geometry=geometry) is None:
            rows = list(measure())
            for row in rows:
                log.add(row)
            say(f"{kind}: {name}, {geometry}: {len(rows)} contenders")
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "updates.jsonl", Measurement, must_exist=True).rows
    notes = [
        "ms: median over n rounds (20% to 80% quantiles), in which everything takes one turn; ratios are of the same "
        "round",
        "update alone: without passes; beyond the base: the time less that of the base's own step. Bytes at copy rate: "
        "what a copy moves for each element in that time; GB/s: of the bytes known to be moved, base included. Peak: "
        "most bytes alive for each element beyond weights, one set of gradients and the base's state",
        "whole step: the model's passes too. Peak: most bytes of tensors alive beyond the base's step, as a multiple "
        "of the weights' size",
        "state: what keeping the model's state and random numbers costs, the time with model= less that without",
    ]
    if rates := [rate / 1e9 for row in rows for rate in row.copy_rate]:
        notes.append(f"a copy of 256 MiB moved {Spread.of(rates).text('.1f')} GB/s, read and written bytes counted")
    environments = {tuple(sorted(row.environment.items())): row.environment for row in rows}
    notes += [
        f"measured on {e['device']}, threads: {e['threads']}, clock: {e['clock']}, torch {e['torch']}, python "
        f"{e['python']}, samopt {e['samopt']} at commit {e['commit']}"
        for e in environments.values()
    ]
    publish(output or folder, tables(rows), notes, {"updates.png": _plot(rows)})


def tables(rows: Sequence[Measurement]) -> list[Table]:
    """Return a table for each case of updates and of whole steps."""
    made = []
    for (kind, case, geometry), group in _groups(rows).items():
        title = f"{case}, {geometry.upper()}: {group[0].elements:,} parameters in {group[0].tensors:,} tensors"
        if kind == "update":
            headings = (
                "Contender", "n", "ms", "beyond the base, ms", "x textbook", "x script", "bytes/element at copy rate",
                "GB/s", "peak, B",
            )  # fmt: skip
            made.append(Table(f"Update alone, {title}", headings, [_update_cells(row, group) for row in group]))
        elif kind in ("step", "batch"):
            headings = ("Form", "n", "ms", "x base", "x script", "x barest one pass", "state, x base", "peak, weights")
            made.append(Table(f"Whole step, {title}", headings, [_step_cells(row, group) for row in group]))
    return made


def _update_cells(row: Measurement, group: Sequence[Measurement]) -> tuple[str, ...]:
    base = _named(group, "base")
    peak = "" if row.peak is None else f"{row.peak / row.elements:.2f}"
    cells = [row.contender, str(len(row.milliseconds)), Spread.of(row.milliseconds).text(".2f")]
    moved = MOVED.get(row.contender)
    total = 0 if moved is None else (BASE_MOVES + moved[row.geometry == "asam"]) * row.elements
    achieved = f"{Spread.of(total / np.asarray(row.milliseconds) / 1e6).median:.1f}" if total else ""
    if row is base:
        return (*cells, "", "", "", "", achieved, peak)
    beyond = np.subtract(row.milliseconds, base.milliseconds)
    for name in ("textbook", "script"):
        loop = _named(group, name)
        added = None if loop is None else np.subtract(loop.milliseconds, base.milliseconds)
        cells.append("" if added is None else Spread.of(beyond / added).text(".2f"))
    at_copy_rate = Spread.of(beyond / 1000 * np.asarray(row.copy_rate) / row.elements)
    return (*cells[:3], Spread.of(beyond).text(".2f"), *cells[3:], f"{at_copy_rate.median:.1f}", achieved, peak)


def _step_cells(row: Measurement, group: Sequence[Measurement]) -> tuple[str, ...]:
    cells = [row.contender, str(len(row.milliseconds)), Spread.of(row.milliseconds).text(".2f")]
    for name in ("base", "script", BAREST):
        other = _named(group, name)
        shown = other is not None and (name == "base" or row.contender.startswith("one-pass") == (name == BAREST))
        cells.append(_ratio(row, other).text(".3f") if shown and row.contender != "base" else "")
    base, without = _named(group, "base"), _named(group, WITHOUT_MODEL)
    kept = row.contender == "sam-perturbed" and without is not None
    difference = np.subtract(row.milliseconds, without.milliseconds) / base.milliseconds if kept else ()
    cells.append(Spread.of(difference).text(".3f") if kept else "")
    known = row.peak is not None and base.peak is not None
    return (*cells, f"{(row.peak - base.peak) / (4 * row.elements):.2f}" if known else "")


def _plot(rows: Sequence[Measurement]) -> Figure:
    """Return what SAM adds to the base's step, by case and by numbers of parameters and tensors; and whole steps."""
    drawn, axes = figure(1, 4, width=5.0, height=4.6)
    groups = {key: group for key, group in _groups(rows).items() if key[2] == "sam"}
    every = list(dict.fromkeys(row.contender for group in groups.values() for row in group if row.contender != "base"))
    for ax, kind in zip(axes[0], ("update", "parameters", "tensors", "step"), strict=True):
        members = [group for (found, _, _), group in groups.items() if found == kind]
        names = list(dict.fromkeys(row.contender for group in members for row in group if row.contender != "base"))
        for index, name in enumerate(names):
            points = []
            for place, group in enumerate(members):
                row, base = _named(group, name), _named(group, "base")
                if row is not None:
                    # Cases are categories: the contenders of one stand beside each other, and no line joins two cases.
                    beside = place + 0.7 * ((index + 0.5) / len(names) - 0.5)
                    x = {"parameters": row.elements, "tensors": row.tensors}.get(kind, beside)
                    difference = np.subtract(row.milliseconds, base.milliseconds)
                    points.append((x, _ratio(row, base) if kind == "step" else Spread.of(difference)))
            _draw(ax, points, name, every.index(name), joined=kind in ("parameters", "tensors"))
        ax.set(
            title=f"by {kind}"
            if kind in ("parameters", "tensors")
            else {"update": "update alone", "step": "whole step"}[kind]
        )
        if kind in ("update", "step"):
            ax.set_xticks(range(len(members)), [group[0].case for group in members], rotation=30)
        else:
            ax.set(xscale="log", xlabel=f"number of {kind}")
        ax.set_ylabel("time (multiples of the base's)" if kind == "step" else "time beyond the base's (ms)")
        ax.set_yscale("linear" if kind == "step" else "log")
        if kind != "step":
            few_ticks(ax.yaxis)
    drawn.suptitle("what SAM adds to a step: median, 20% to 80% quantiles")
    legend(drawn)
    return drawn


def _draw(ax: Axes, points: Sequence[tuple[float, Spread]], name: str, index: int, *, joined: bool) -> None:
    low, middle, high = (
        np.array([getattr(spread, part) for _, spread in points]) for part in ("low", "median", "high")
    )
    ax.errorbar(
        [x for x, _ in points],
        middle,
        [middle - low, high - middle],
        color=colour(index),
        marker="os"[index // 9 % 2],  # the colours come again after nine
        linestyle="-" if joined else "none",
        label=name,
    )


def _groups(rows: Sequence[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.case, row.geometry), []).append(row)
    return groups


def _named(group: Sequence[Measurement], name: str) -> Measurement:
    return next((row for row in group if row.contender == name), None)


def _ratio(row: Measurement, base: Measurement) -> Spread:
    return Spread.of(np.divide(row.milliseconds, base.milliseconds))
