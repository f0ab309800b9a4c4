"""Does a learning rate transfer across widths: muP against the NTK parametrisation, with the curvature."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.data import stream
from benchmarks.harness.environment import describe, now
from benchmarks.harness.errors import choose
from benchmarks.harness.parametrisation import Parametrisation, Perceptron, Transformer
from benchmarks.harness.report import Table, band, figure, legend, machines, publish, say
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import Estimate, estimate, over
from benchmarks.harness.tasks import load_digits_pool
from benchmarks.harness.training import build_model, rounded
from samopt import sharpness

_BUILD = {"mlp": Perceptron, "vit": Transformer}
WIDTHS = {"mlp": (32, 64, 128, 256, 512), "vit": (8, 16, 32, 64, 128)}
"""By model; the narrowest is the base width."""
_STEPS = {"mlp": 100, "vit": 80}
_IMAGES = {"mlp": 256, "vit": 128}
PARAMETRISATIONS = ("ntk", "mup")
RATES = (4.0, 5.7, 8.0, 11.3, 16.0, 22.6)
"""Learning rates at the base width, half an octave apart."""
_WATCHED = RATES[0]  # the learning rate at which curvature is measured along training: no width diverges
_MEASUREMENTS, _LAST = 8, 10


def study(
    models: list[str] = list(_BUILD),
    seeds: list[NonNegativeInt] = [0, 1, 2],
    threads: PositiveInt = 1,
    output: Path = Path("results/width"),
    quick: bool = False,
) -> None:
    """Train every width in both parametrisations with every learning rate, by full-batch gradient descent.

    Args:
        models: Comma-separated: mlp, vit.
        seeds: Comma-separated; each draws weights and images.
        threads: CPU threads.
        output: Folder, continued.
        quick: Two widths of the perceptron, two learning rates, one seed.
    """
    torch.set_num_threads(threads)
    names = ["mlp"] if quick else [model for model in models if choose("model", model, _BUILD)]
    log = open_log(output, restart=quick)
    for seed in [0] if quick else seeds:
        for model in names:
            for width in WIDTHS[model][:4:3] if quick else WIDTHS[model]:
                for name in PARAMETRISATIONS:
                    for lr in RATES[:3:2] if quick else RATES:
                        label = f"{name}:width={width}:lr={lr:g}"
                        if log.find(task=f"digits_{model}", optimizer=label, seed=seed) is None:
                            log.add(train(model, Parametrisation(name, width, WIDTHS[model][0]), lr, seed, label))
                            say(f"[{len(log.rows)}] {model}, seed {seed}: {label}: {log.rows[-1].metrics['loss']:.4f}")
    render(output)


def train(model_name: str, parametrisation: Parametrisation, lr: float, seed: int, label: str) -> Row:
    """Return the row of one run; its loss is nan where it diverged."""
    images, targets = _data(_IMAGES[model_name], seed)
    model = build_model(lambda: _BUILD[model_name](parametrisation), seed)
    sgd_lr = parametrisation.learning_rate(lr)
    optimizer = torch.optim.SGD(model.parameters(), lr=sgd_lr)
    steps, start = _STEPS[model_name], sharpness.WarmStart()
    losses: list[float] = []
    edge: list[float] = []
    for step in range(steps):
        if lr == _WATCHED and step % (steps // _MEASUREMENTS) == 0:
            found = sharpness.hessian_eigenvalues(
                model, squared_error, [(images, targets)], tolerance=0.02, start=start, progress=False
            )
            edge.append(sgd_lr * found.value)
        optimizer.zero_grad()
        loss = squared_error(model, (images, targets))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] < 100 * losses[0]:
            break
    ended = len(losses) == steps and math.isfinite(losses[-1])
    return Row(
        task=f"digits_{model_name}", optimizer=label, base="sgd", seed=seed, label_noise=0.0, evaluated_on="train",
        settings={"lr": lr, "sgd_lr": sgd_lr, "width": parametrisation.width, "steps": steps,
                  "parametrisation": parametrisation.name},
        examples={"train": len(images)},
        metrics={"loss": statistics.fmean(losses[-_LAST:]) if ended else math.nan},
        curves=rounded({"loss": losses, "edge": edge}),
        warnings=[], environment=describe(), timestamp=now(),
    )  # fmt: skip


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return half the squared error, summed over classes, averaged over examples."""
    images, targets = batch
    return (model(images) - targets).square().sum(1).mean() / 2


def _data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return standardised digits and one-hot targets."""
    pool = load_digits_pool()
    drawn = torch.randperm(len(pool.labels), generator=stream(seed, "images"))[:count]
    images = (pool.inputs - pool.inputs.mean()) / pool.inputs.std()
    return images[drawn], functional.one_hot(pool.labels[drawn], 10).float()


class Sweep:
    """The runs of one model in one parametrisation: over seeds, widths and learning rates.

    Args:
        rows: Of that model and parametrisation.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._runs = {(row.seed, row.settings["width"], row.settings["lr"]): row for row in rows}
        self.widths = sorted({width for _, width, _ in self._runs})
        self.rates = sorted({lr for _, _, lr in self._runs})
        keys = [(width, lr) for width in self.widths for lr in self.rates]
        found = sorted({seed for seed, _, _ in self._runs})
        self.seeds = [seed for seed in found if all((seed, *key) in self._runs for key in keys)]

    def loss(self, seed: int, width: int, lr: float) -> float:
        """Return a run's loss, infinite where it diverged."""
        loss = self._runs[seed, width, lr].metrics["loss"]
        return math.inf if math.isnan(loss) else loss

    def best(self, seed: int, width: int) -> float:
        """Return the learning rate, at the base width's scale, with the smallest loss."""
        return min(self.rates, key=lambda lr: self.loss(seed, width, lr))

    def octaves(self, width: int) -> Estimate:
        """Return log2 of the best learning rate over the base width's, seed by seed."""
        base = self.widths[0]
        return estimate(math.log2(self.best(seed, width) / self.best(seed, base)) for seed in self.seeds)

    def price(self, width: int) -> str:
        """Return the loss with the base width's best learning rate over that with the width's own, and who diverged."""
        chosen = [(seed, self.best(seed, self.widths[0]), self.best(seed, width)) for seed in self.seeds]
        ratios = [self.loss(seed, width, base) / self.loss(seed, width, own) for seed, base, own in chosen]
        ended = [ratio for ratio in ratios if math.isfinite(ratio)]
        lost = f"{len(ratios) - len(ended)} of {len(ratios)} diverged" if len(ended) < len(ratios) else ""
        return ", ".join(filter(None, [estimate(ended).spread(".2f") if ended else "", lost]))

    def edge(self, seed: int, width: int) -> list[float]:
        """Return learning rate times curvature along training."""
        return self._runs[seed, width, _WATCHED].curves["edge"]

    def late_edge(self, seed: int, width: int) -> float:
        """Return the mean of that over the second half of training."""
        curve = self.edge(seed, width)
        return statistics.fmean(curve[len(curve) // 2 :])

    def losses(self, width: int, lr: float) -> Estimate:
        """Return the loss over the seeds."""
        return over([self._runs[seed, width, lr] for seed in self.seeds], "loss")


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = Log(folder / "runs.jsonl", must_exist=True).rows
    sweeps: dict[tuple[str, str], Sweep] = {}
    for row in rows:
        key = (row.task, row.settings["parametrisation"])
        if key not in sweeps:
            sweeps[key] = Sweep([r for r in rows if (r.task, r.settings["parametrisation"]) == key])
    tables = []
    for (task, name), sweep in sweeps.items():
        cells = []
        for width in sweep.widths:
            best = [sweep.best(seed, width) for seed in sweep.seeds]
            own = estimate(sweep.loss(seed, width, lr) for seed, lr in zip(sweep.seeds, best, strict=True))
            edges = [sweep.late_edge(seed, width) for seed in sweep.seeds]
            rise = [
                edge - sweep.late_edge(seed, sweep.widths[0]) for seed, edge in zip(sweep.seeds, edges, strict=True)
            ]
            differences = [sweep.octaves(width), estimate(rise)]
            moved, risen = [each.interval("+.2f", 1) if width > sweep.widths[0] else "" for each in differences]
            cells.append((
                str(width), ", ".join(f"{lr:g}" for lr in best), moved, own.spread(".4f"),
                sweep.price(width), estimate(edges).spread(".2f"), risen,
            ))  # fmt: skip
        headings = (
            "Width", "Best learning rate, by seed", "Octaves from the base width's", "Loss with it",
            "Loss with the base width's, times that", "lr x lambda_max", "Less the base width's",
        )  # fmt: skip
        tables.append(Table(f"{task}, {name}", headings, cells))
    notes = [
        "full-batch gradient descent; loss: half the squared error, mean of the last 10 steps; a diverged run counts "
        "as infinite",
        f"learning rates are those at the base width, of {', '.join(f'{lr:g}' for lr in RATES)}; muP multiplies them "
        "by width / base width",
        f"lr x lambda_max: at learning rate {_WATCHED:g}, the mean over the second half of training; gradient descent "
        "is stable below 2",
        "± is the sample standard deviation over seeds, brackets are 95% confidence intervals by Student's t",
        *machines(rows),
    ]
    publish(output or folder, tables, notes, {"width.png": _plot(sweeps)})


def _plot(sweeps: dict[tuple[str, str], Sweep]) -> Figure:
    """Return a row for each model: loss by learning rate, and curvature along training, in each parametrisation."""
    tasks = list(dict.fromkeys(task for task, _ in sweeps))
    drawn, axes = figure(len(tasks), 4, width=3.0, height=2.8)
    for (task, name), sweep in sweeps.items():
        row, column = axes[tasks.index(task)], PARAMETRISATIONS.index(name)
        for index, width in enumerate(sweep.widths):
            label = ("narrowest", "x 2", "x 4", "x 8", "x 16")[round(math.log2(width / sweep.widths[0]))]
            means = [sweep.losses(width, lr).mean for lr in sweep.rates]
            row[column].plot(sweep.rates, means, "o-", color=f"C{index}", label=label)
            curves = [sweep.edge(seed, width) for seed in sweep.seeds]
            steps = _STEPS[task.removeprefix("digits_")] // _MEASUREMENTS
            band(row[2 + column], [steps * place for place in range(len(curves[0]))], curves, label, index)
        row[column].set(title=f"{task}, {name}", xscale="log", ylim=(0, None), xlabel="learning rate", ylabel="loss")
        row[column].set_xticks(sweep.rates, [f"{lr:g}" for lr in sweep.rates], minor=False)
        row[column].minorticks_off()
        row[2 + column].axhline(2, color="black", linewidth=0.8, linestyle=":")
        row[2 + column].set(title=f"{task}, {name}", xlabel="step", ylabel="learning rate x lambda_max")
    legend(drawn)
    return drawn
