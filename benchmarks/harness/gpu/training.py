"""Step (f): ViT, Mixer and ResNet on Fashion-MNIST; every seed is a process, and all of them train at once.

The processes first time a few steps of everything, all at once. The slowest of them decides how many epochs fit, and
all train that many, so that the runs of all seeds can be compared. Rows are those of the study ``train``.
"""

from __future__ import annotations

import math
import os
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import torch
from torch import nn

from benchmarks.harness.environment import select_device
from benchmarks.harness.gpu.pack import made_up, unpack
from benchmarks.harness.gpu.step import Options
from benchmarks.harness.networks import Mixer, small_resnet
from benchmarks.harness.optimizers import parse_choices
from benchmarks.harness.rows import Log, Row, open_log
from benchmarks.harness.tasks import Task, VisionTransformer
from benchmarks.harness.training import Experiment, Run, run_experiment

SEEDS = 5
OPTIMIZERS = ["adamw", "adamw+sam", "adamw+momentum-sam"]
_WARM_UP, _TIMED = 3, 12  # steps
_MARGIN = 0.75  # of the time that is left: measuring takes time, too, and the machine is shared by all seeds


def _resnet() -> nn.Module:
    return small_resnet(16, ((16, 16, 1), (16, 32, 2), (32, 64, 2)))


def _vit() -> nn.Module:
    return VisionTransformer(28, 10, patch=4, width=64, depth=4, heads=4)


TASKS = [
    Task(
        name, f"Fashion-MNIST, a {name.removeprefix('fashion_')} for a GPU", classes=10, epochs=10, batch_size=256,
        train_size=None, load=unpack, build_model=build,
    )
    for name, build in (("fashion_vit", _vit), ("fashion_mixer", Mixer), ("fashion_resnet", _resnet))
]  # fmt: skip


def run(options: Options) -> None:
    """Train every seed in a process of its own, and write rows as they come."""
    if options.data is None and not options.quick:
        options.write(skipped="no --data FILE; python -m benchmarks.harness.gpu.pack makes one")
        return
    seeds = range(1 if options.quick else SEEDS)
    log: Log[Row] = open_log(options.out)
    spawn = get_context("spawn")
    pipes: list[Connection] = []
    workers = []
    for seed in seeds:
        here, there = spawn.Pipe()
        worker = spawn.Process(target=_train, args=(there, options, seed), daemon=True)
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    try:
        seconds = {pipe: answer for pipe in pipes if (answer := _answer(pipe)) is not None}
        if len(seconds) < len(pipes):
            options.write(skipped=f"{len(pipes) - len(seconds)} of {len(pipes)} seeds failed; see log.txt")
        pipes, slowest = list(seconds), max(seconds.values())
        epochs = 1 if options.quick else max(1, math.floor(_MARGIN * options.left / slowest))
        options.write(seconds_per_epoch=round(slowest, 3), epochs=epochs, seeds=len(seeds))
        for pipe in pipes:
            pipe.send(epochs)
        while pipes and options.left > 1:
            for pipe in wait(pipes, options.left):
                try:
                    row: Row = pipe.recv()
                    log.add(row)
                    print(
                        f"{row.task}, {row.optimizer}, seed {row.seed}: {100 * row.metrics['accuracy']:.2f} %",
                        flush=True,
                    )
                except EOFError:
                    pipes.remove(pipe)
        if pipes:
            options.write(skipped=f"the time was over before {len(pipes)} of {len(seeds)} seeds had trained everything")
    finally:
        for worker in workers:
            if options.left < 1:
                worker.terminate()
            worker.join(5)


def _answer(pipe: Connection) -> float | None:
    """Return what a process has measured, or None where it has failed."""
    try:
        return float(pipe.recv())
    except EOFError:
        return None


def _train(pipe: Connection, options: Options, seed: int) -> None:
    """Send the seconds of an epoch of everything, receive the number of epochs, then send a row for each run."""
    torch.set_num_threads(1 if options.quick else max(1, (os.cpu_count() or 1) // SEEDS))
    torch.set_float32_matmul_precision("high")
    experiments = [_experiment(task, options, seed, epochs=1) for task in TASKS]
    pipe.send(sum(map(_seconds_per_epoch, experiments)))
    epochs = int(pipe.recv())
    for task in TASKS:
        for row, _ in run_experiment(_experiment(task, options, seed, epochs)):
            pipe.send(row)
    pipe.close()


def _experiment(task: Task, options: Options, seed: int, epochs: int) -> Experiment:
    if options.quick:
        task = Task(**{**vars(task), "load": made_up, "batch_size": 32})
    device = select_device(options.device)
    return Experiment(
        task, parse_choices(OPTIMIZERS), seed, 0.0, epochs, task.batch_size, data=options.data, device=device
    )


def _seconds_per_epoch(experiment: Experiment) -> float:
    """Return what an epoch of every optimizer takes."""
    split = experiment.split()
    count = len(split.labels) // experiment.batch_size
    total = 0.0
    for choice in experiment.choices:
        steps = Run(experiment, choice, split).steps()
        timed = min(_TIMED, count - 1)
        for _ in range(min(_WARM_UP, count - timed)):
            next(steps)
        start = time.perf_counter()
        for _ in range(timed):
            next(steps)
        total += (time.perf_counter() - start) / timed * count
    return total
