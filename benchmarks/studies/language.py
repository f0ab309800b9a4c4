"""Language models: a GPT over bytes, sharpness-aware late in pre-training, and SmolLM2-135M with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.figure import Figure

from benchmarks.harness.errors import choose
from benchmarks.harness.language import ByteRuns, LoraRuns, Pretrained
from benchmarks.harness.report import Table, figure, machines, publish
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.statistics import gain, over
from benchmarks.harness.texts import DEBIAN_NOVELS, read_texts
from benchmarks.harness.tuning import Method, Place, compare, name_of, thirds
from benchmarks.harness.wordnet import DEBIAN_FOLDER
from samopt.trust_region import EMA, InputNoise

_BASE = Method("adamw", "the base")
_NOISE = 0.0136  # a tenth of the root mean square of SmolLM2's token embeddings
METHODS = {
    "bytes": (
        _BASE,
        Method("adamw-more", "the base, its last phase twice as long", compute=2.0),
        Method("sam", "SAM", "sam", thirds(0.1)),
        Method("sam-wide", "SAM, larger radii", "sam", thirds(1.0)),
        Method("functional-sam", "Functional SAM", "functional-sam", thirds(0.3)),
        Method("preconditioned-sam", "SAM in Adam's geometry", "preconditioned-sam", thirds(0.01)),
        Method("momentum-ahead", "ahead along the momentum", "momentum-sam", thirds(0.3)),
        Method("tram", "TRAM, previous step", "tram", thirds(100.0), setting="scale"),
        Method("sam-norm", "SAM, normalisation layers only", "sam", thirds(0.3), options={"only": "norm"}),
    ),
    "lora": (
        _BASE,
        Method("adamw-more", "the base with twice the steps", compute=2.0),
        Method("adamw-slow", "the base with a third of its learning rate", values=(1 / 3,)),
        Method("sam", "SAM", "sam", thirds(0.1)),
        Method("functional-sam", "Functional SAM", "functional-sam", thirds(0.1)),
        Method("momentum-ahead", "ahead along the momentum", "momentum-sam", thirds(0.1)),
        Method("tram", "TRAM, pretrained weights", "tram", thirds(1.0), setting="scale",
               options={"trust_region": "pretrained"}),
    ),
    "regions": (
        _BASE,
        Method("adamw-thrice", "the base with three times the steps", compute=3.0),
        Method("adamw-slow", "the base with a third of its learning rate", values=(1 / 3,)),
        Method("sam", "SAM", "sam", thirds(0.1)),
        Method("asam", "ASAM", "asam", thirds(0.3)),
        Method("momentum-ahead", "ahead along the momentum", "momentum-sam", thirds(0.3)),
        Method("r3f", "noise on the inputs, divergence in the loss", "benchmarks.harness.r3f:R3F", (0.1, 1.0, 10.0),
               setting="weight", options={"std": _NOISE}),
        *(
            Method(f"tram-{name}", f"TRAM, {name}", "tram", values, setting="scale", options={"trust_region": region})
            for name, region, values in (
                ("previous", "previous", thirds(100.0)),
                ("ema", partial(EMA, decay=0.95), thirds(10.0)),
                ("pretrained", "pretrained", thirds(1.0)),
                ("noise", partial(InputNoise, std=_NOISE), thirds(100.0)),
            )
        ),
    ),
}  # fmt: skip
"""By part, the base first; "regions" has TRAM's trust regions, in a fine-tune twice as long as that of "lora"."""

_RATES = {"bytes": (1e-3, 2e-3, 4e-3), "lora": (3e-4, 1e-3, 3e-3), "regions": (3e-4, 1e-3, 3e-3)}
_TABLES = {
    "GPT over bytes, pre-trained on Austen: loss, and after rounding the weights": (
        "bytes",
        ("loss", "Austen"),
        ("loss_8_bits", "8 bits"),
        ("loss_4_bits", "4 bits"),
        ("loss_3_bits", "3 bits"),
        ("rise_3_bits", "3 bits, rise"),
    ),
    "The same, fine-tuned on WordNet's definitions": (
        "bytes",
        ("glosses", "Definitions"),
        ("austen", "Austen"),
        ("forgotten", "Austen, rise"),
    ),
    "SmolLM2-135M with LoRA, fine-tuned on Austen": (
        "lora",
        ("loss", "Austen"),
        ("glosses", "Definitions"),
        ("python", "Python"),
    ),
    "SmolLM2-135M with LoRA, twice as long": (
        "regions",
        ("loss", "Austen"),
        ("glosses", "Definitions"),
        ("python", "Python"),
    ),
}
"""The part, and metrics with their headings, by the title of a table."""


def study(
    novels: Path = DEBIAN_NOVELS,
    wordnet: Path = DEBIAN_FOLDER,
    model: Path | None = None,
    parts: list[str] = list(METHODS),
    seeds: list[NonNegativeInt] = [0, 1, 2, 3, 4],
    steps: PositiveInt = 480,
    fine_tune_steps: PositiveInt = 60,
    lora_steps: PositiveInt = 16,
    threads: PositiveInt = 1,
    output: Path = Path("results/language"),
    quick: bool = False,
) -> None:
    """Choose every method's radius on validation data, then test it from every seed.

    Args:
        novels: Austen's novels: data/Rdata.rdb of the R package janeaustenr.
        wordnet: Folder of WordNet's database.
        model: Folder of a causal language model for the parts lora and regions; SmolLM2-135M by default.
        parts: Comma-separated, of bytes, lora and regions.
        seeds: Of the tests, comma-separated.
        steps: Of pre-training the GPT; the last quarter is sharpness-aware.
        fine_tune_steps: Of the GPT, on definitions, with AdamW for all methods.
        lora_steps: Of the LoRA fine-tune; twice as many for the part regions.
        threads: CPU threads.
        output: Folder, continued.
        quick: A few steps of every method, nothing chosen.
    """
    torch.set_num_threads(threads)
    if quick:
        seeds, steps, fine_tune_steps, lora_steps = [0], 8, 2, 2
    texts = read_texts(novels, wordnet)
    log = open_log(output, restart=quick)
    wanted = {"bytes": (steps, fine_tune_steps), "lora": (lora_steps, None), "regions": (2 * lora_steps, None)}
    log.check(
        "(steps, fine-tune steps)",
        lambda row: (row.settings["steps"], row.settings.get("fine_tune_steps")),
        lambda row: wanted[row.task],
    )
    for part in parts:
        methods = choose("part", part, METHODS)
        runs: ByteRuns | LoraRuns
        if part == "bytes":
            runs = ByteRuns(texts, steps, fine_tune_steps)
        else:
            runs = LoraRuns(texts, wanted[part][0], Pretrained(model), held_out=2 if quick else 16)
        compare(
            log,
            [Place(part, "adamw", _RATES[part], base_settings={"weight_decay": 0.1})],
            methods,
            seeds,
            runs.train,
            settings=runs.settings,
            tune=not quick,
            metric="loss",
            sign=-1,
        )
    render(output)


def render(folder: Path, output: Path | None = None) -> None:
    """Write tables and the figure from a folder's rows."""
    rows = [_with_rise(row) for row in Log(folder / "runs.jsonl", must_exist=True).rows]
    parts: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.evaluated_on == "test":
            parts.setdefault(row.task, {}).setdefault(name_of(row.optimizer), []).append(row)
    made = []
    for title, (part, *measured) in _TABLES.items():
        if part in parts:
            headings = ("Method", "Cost, x AdamW", "Chosen", "n", *(heading for _, heading in measured))
            made.append(Table(title, headings, _lines(parts[part], [name for name, _ in measured]), text_columns=(2,)))
    notes = [
        "losses in nats a byte (GPT) or a token, on text that no run trained on: the base's mean ± sample standard "
        "deviation over n seeds; for the others the difference from the base, paired by seed, with its 95% confidence "
        "interval; below 0 is better",
        "cost: processor time of all training steps over the base's, without the fine-tune on definitions",
        "every method chose one of three settings by the validation loss of one run with a seed of its own: the base "
        "its learning rate, which the others take, and they their radius; adamw-more chose its learning rate too, "
        "adamw-slow nothing",
        *machines([row for row in rows if row.evaluated_on == "test"]),
    ]
    publish(output or folder, [*made, *_trials(rows)], notes, {"language.png": _plot(parts)} if parts else None)


def _with_rise(row: Row) -> Row:
    if "loss_3_bits" not in row.metrics:
        return row
    return replace(row, metrics=row.metrics | {"rise_3_bits": row.metrics["loss_3_bits"] - row.metrics["loss"]})


def _lines(methods: dict[str, list[Row]], measured: Sequence[str]) -> list[tuple[str, ...]]:
    base, lines = methods["adamw"], []
    if f"{measured[0]}_before" in base[0].metrics:
        before = (f"{base[0].metrics[f'{name}_before']:.4f}" for name in measured)
        lines.append(("before", "0.00", "", "", *before))
    for name, runs in methods.items():
        if name == "adamw":
            cells = [over(runs, metric).spread(".4f") for metric in measured]
        else:
            cells = [won.interval("+.4f", 1) if (won := gain(runs, base, metric)) else "" for metric in measured]
        cost = gain(runs, base, "seconds", lambda value, other: value / other)
        chosen = runs[0].optimizer.partition(":")[2]
        lines.append((name, f"{cost.mean:.2f}" if cost else "", chosen, str(len(runs)), *cells))
    return lines


def _trials(rows: Sequence[Row]) -> list[Table]:
    """Return a table of what each setting gave on validation data, whatever was chosen."""
    columns = {"loss": "Loss", "loss_3_bits": "3 bits", "rise_3_bits": "3 bits, rise", "forgotten": "Fine-tuned, rise"}
    cells = [
        (row.optimizer, row.task, *(f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in columns))
        for row in rows
        if row.evaluated_on == "validation"
    ]
    headings = ("Trial", "Part", *columns.values())
    return [Table("Validation losses of all trials", headings, cells, text_columns=(1,))] if cells else []


def _plot(parts: dict[str, dict[str, list[Row]]]) -> Figure:
    """Return the difference from the base of every loss, with its interval: a line for each method of a part."""
    shown = [(title, part, measured) for title, (part, *measured) in _TABLES.items() if part in parts]
    drawn, axes = figure(len(shown), max(len(measured) for *_, measured in shown), width=2.4, height=2.6)
    for panels, (title, part, measured) in zip(axes, shown, strict=True):
        names = [name for name in parts[part] if name != "adamw"]
        panels[0].set_title(" ")  # room for the title, which is wider than its panel
        panels[0].text(0, 1.05, title, transform=panels[0].transAxes, fontsize="large").set_in_layout(False)
        for ax in panels[len(measured) :]:
            ax.remove()
        for ax, (metric, label) in zip(panels, measured, strict=False):
            for line, name in enumerate(names):
                won = gain(parts[part][name], parts[part]["adamw"], metric)
                if won is not None:
                    wide = 0.0 if won.n < 2 else won.half_width()
                    ax.errorbar(won.mean, line, xerr=wide, fmt="o", color="black" if abs(won.mean) > wide else "0.65")
            ax.axvline(0, color="black", linewidth=0.8)
            ax.set_yticks(range(len(names)), names if ax is panels[0] else [])
            ax.invert_yaxis()
            ax.locator_params(axis="x", nbins=4)
            ax.set_xlabel(f"{label}, nats")
    drawn.suptitle("loss less AdamW's (left is better); grey: the 95 % interval contains 0", fontsize=11)
    return drawn
