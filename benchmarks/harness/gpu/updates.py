"""Step (d): the update alone, every contender in turns, beside the rate of a copy in the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import nn

from benchmarks.harness.environment import select_device
from benchmarks.harness.gpu.step import Options
from benchmarks.harness.measure import measure_updates
from benchmarks.harness.networks import CASES, Case
from benchmarks.harness.timing import Copy, in_turns, seconds
from benchmarks.harness.updates import BASE_MOVES, ETA, MOVED, RHO
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt.parts.geometry import Euclidean

_CASES = ("bert_base", "resnet18", "vit_s", "tiny500", "decoder_1b")
_CONTENDERS = ("base", "textbook", "script", "samopt-foreach", "samopt-triton", "samopt-lean", "displaced")


def small_case() -> Case:
    """Return a case of a few parameters, for ``--quick``."""
    return Case("small", lambda: nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)), lambda n: torch.randn(8 * n, 30))


def run(options: Options) -> None:
    """Write a row for each contender of each case, and one for the restore alone."""
    device = select_device(options.device)
    cases = [small_case()] if options.quick else [CASES[name] for name in _CASES]
    cases = [case for case in cases if device.type == "cuda" or not case.needs_gpu]
    rounds = 2 if options.quick else 15
    for case in cases:
        for geometry in ("sam", "asam"):
            if options.left < 5:
                options.write(case=case.name, geometry=geometry, skipped="no time was left")
                continue
            _measure(options, case, geometry, rounds, device)
        _measure_restore(options, case, rounds, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(options: Options, case: Case, geometry: str, rounds: int, device: torch.device) -> None:
    launched: dict[str, int | None] = {}

    def watch(name: str, action: Callable[[], object]) -> None:
        launched[name] = launches(device, action)

    for row in measure_updates("update", case, geometry, _CONTENDERS, rounds, device, "wall", watch):
        name = row.contender
        count = launched[name]
        handed_out = row.tensors * (1 if name == "base" else 2)  # copies of the gradients, which are not its own
        known = MOVED.get("samopt-triton" if name == "samopt-lean" else name)
        row = replace(row, milliseconds=[round(value, 5) for value in row.milliseconds])
        options.write(
            **asdict(row),
            moved=None if known is None else known[geometry == "asam"],
            base_moves=BASE_MOVES,
            launches=None if count is None else count - handed_out,
        )


def _measure_restore(options: Options, case: Case, rounds: int, device: torch.device) -> None:
    """Write how long the restore takes by itself: all that folding it into the base's step could save."""
    with device:
        weights = [p for p in case.build().parameters() if p.requires_grad]
        directions = [torch.randn_like(p) for p in weights]
    memory = ScratchPool()

    def take(_: str) -> float:
        perturbation = Perturbation([Targets(Region(RHO, ETA, 1), weights, directions)], Euclidean())
        backup = perturbation.backup(memory)
        perturbation.move(None, backup)
        return seconds(device, "wall", backup.restore)

    times, rates = in_turns(["restore"], rounds, take, Copy(device, "wall"))
    elements = sum(p.numel() for p in weights)
    options.write(
        case=case.name, contender="restore", elements=elements, milliseconds=times["restore"], copy_rate=rates
    )


def launches(device: torch.device, action: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills an action runs on a GPU; None where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith("Optimizer.") for event in events) or None  # torch annotates the base's step
