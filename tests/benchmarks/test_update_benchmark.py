"""The benchmark of updates: its contenders, its memory count, its clock, its ratios, and the whole command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import samopt
from benchmarks.cli import main
from benchmarks.errors import BenchmarkError
from benchmarks.updates import alone, contenders, measure
from benchmarks.updates.alone import measure_alone
from benchmarks.updates.cases import CASES, Case, growth
from benchmarks.updates.contenders import CONTENDERS, ETA, RHO
from benchmarks.updates.measure import Measurement, measure_steps, measure_updates, read_measurements
from benchmarks.updates.memory import Memory
from benchmarks.updates.report import Spread, bytes_at_copy_rate, markdown, relative
from samopt.kernels import BACKENDS
from tests.helpers.pages import REPOSITORY

CPU = torch.device("cpu")
RUNNABLE = [
    "textbook",
    "script",
    *(f"samopt-{name}" for name in BACKENDS if not name.startswith("triton")),
    "samopt-lean",
]


def shapes_of(name: str) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in CASES[name].build().parameters()]


def test_the_networks_have_the_published_sizes() -> None:
    sizes = {name: sum(int(np.prod(shape)) for shape in shapes_of(name)) for name in CASES}
    assert sizes["resnet18"] == 11_689_512  # torchvision's
    assert len(shapes_of("resnet18")) == 62
    assert sizes["bert_base"] == pytest.approx(109_482_240, rel=1e-3)  # transformers' BertModel
    assert len(shapes_of("bert_base")) == pytest.approx(199, abs=2)
    assert sizes["vit_s"] == pytest.approx(22_050_664, rel=1e-2)  # timm's vit_small_patch16_224
    assert sizes["tiny500"] == 500_000
    assert sizes["decoder_1b"] > 1e9 and CASES["decoder_1b"].needs_gpu


def test_growth_changes_one_thing() -> None:
    grown = {kind: [case.build() for case in cases] for kind, cases in growth(quick=True).items()}
    counts = {kind: [len(list(m.parameters())) for m in modules] for kind, modules in grown.items()}
    sizes = {kind: [sum(p.numel() for p in m.parameters()) for m in modules] for kind, modules in grown.items()}
    assert counts == {"parameters": [64, 64], "tensors": [1, 16]}
    assert sizes == {"parameters": [64_000, 640_000], "tensors": [2**16, 2**16]}


def fp64_step(weights, first, second, metric: str, eta: float = ETA, least: int = 2):
    """Return where the ascent leads, and where AdamW's first step leads from weights that never moved."""
    stretch = [(w.abs() + eta if metric == "asam" and w.dim() >= least else torch.ones_like(w)) for w in weights]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(stretch, first, strict=True)))
    perturbed = [w + RHO * t**2 * g / norm for w, t, g in zip(weights, stretch, first, strict=True)]
    stepped = [w * (1 - 1e-4 * 1e-2) - 1e-4 * g / (g.abs() + 1e-8) for w, g in zip(weights, second, strict=True)]
    return perturbed, stepped


@pytest.mark.parametrize("metric", ["sam", "asam"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_contender_makes_the_same_update(name: str, metric: str) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2, 2))]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    weights, first, second = ([t.detach().double() for t in ts] for ts in (parameters, *gradients))
    perturbed, stepped = fp64_step(weights, first, second, metric, *((0.0, 0) if name == "script" else ()))
    update = CONTENDERS[name].build(parameters, metric)
    set_gradients(parameters, gradients[0])
    update.ascend()
    assert_at(parameters, perturbed)
    set_gradients(parameters, gradients[1])
    update.descend()
    assert_at(parameters, stepped)


def set_gradients(parameters, gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


def assert_at(parameters, weights) -> None:
    for parameter, expected in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_the_closure_form_makes_the_same_update_in_its_second_half() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    weights, first, second = ([t.detach().double() for t in ts] for ts in (parameters, *gradients))
    update = contenders._OursInOneCall("cpu", parameters, "asam")
    set_gradients(parameters, gradients[0])
    update.ascend()
    assert_at(parameters, weights)
    set_gradients(parameters, gradients[1])
    update.descend()
    assert_at(parameters, fp64_step(weights, first, second, "asam")[1])


@pytest.mark.parametrize("name", ["textbook", "script"])
def test_the_loops_restore_every_bit(name: str) -> None:
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in parameters]
    update = CONTENDERS[name].build(parameters, "sam")
    update.base.param_groups[0].update(lr=0.0, weight_decay=0.0)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        update.ascend()
        assert not torch.equal(parameters[0], before[0])
        update.descend()
    for parameter, weight in zip(parameters, before, strict=True):
        assert torch.equal(parameter, weight)


def test_the_packages_sam_takes_the_same_steps_as_the_textbook() -> None:
    pytest.importorskip("pytorch_optimizer")
    results = []
    for name in ("textbook", "pytorch_optimizer"):
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
        update = CONTENDERS[name].build(parameters, "sam")
        for half in (update.ascend, update.descend):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            half()
        results.append([p.detach().clone() for p in parameters])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_memory_counts_bytes_that_are_alive_at_once() -> None:
    known = torch.zeros(1000)
    with Memory([known]) as memory:
        view = known[:10] + 0  # 40 bytes
        first = torch.ones(100)  # 400
        del first
        second = torch.ones(50, dtype=torch.float64)  # 400
        second.view(5, 10).add_(1)
        assert memory.alive() == 440
    assert memory.peak == 440
    del view, second
    assert memory.alive() == 0


def bench_case(sizes: tuple[int, ...] = (30, 20)) -> Case:
    return Case(
        "small",
        "",
        lambda: nn.Sequential(nn.Linear(*sizes), nn.BatchNorm1d(sizes[1])),
        lambda n: torch.randn(8 * n, 30),
    )


def test_updates_are_timed_in_turns_and_their_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    timed = measure.Bench.time_step
    monkeypatch.setattr(
        measure.Bench, "time_step", lambda self, name, *how: (order.append(name), timed(self, name, *how))[1]
    )
    names = ["base", "textbook", "samopt-cpu"]
    rows = measure_updates("update", bench_case(), "sam", names, rounds=3, device=CPU, clock="wall", note=pytest.fail)
    assert [row.contender for row in rows] == names
    assert [order[i : i + 3] for i in range(0, 12, 3)] == [
        names, [*names[1:], names[0]], [*names[2:], *names[:2]], names
    ]  # fmt: skip
    for row in rows:
        assert len(row.milliseconds) == len(row.copy_rate) == 3 and min(row.milliseconds) > 0
        assert (row.elements, row.tensors) == (30 * 20 + 3 * 20, 4)
    base, textbook, ours = rows
    assert base.peak == base.retained == textbook.retained == 0
    assert textbook.peak >= 4 * 660  # the copies of the weights
    assert 4 * 660 <= ours.peak < 4 * 660 + 200 and ours.retained < 100  # one copy, and scalars


def test_a_contender_that_cannot_run_is_left_out_with_the_reason() -> None:
    notes: list[str] = []
    rows = measure_updates(
        "update", bench_case(), "sam", ["base", "samopt-triton"], rounds=1, device=CPU, clock="wall", note=notes.append
    )
    assert [row.contender for row in rows] == ["base"]
    assert re.match("samopt-triton is left out: .*CUDA", notes[0])


def test_a_missing_package_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    notes: list[str] = []
    measure_updates(
        "update",
        bench_case(),
        "sam",
        ["base", "pytorch_optimizer"],
        rounds=1,
        device=CPU,
        clock="wall",
        note=notes.append,
    )
    assert notes == ["pytorch_optimizer is left out: import of pytorch_optimizer halted; None in sys.modules"]


def test_whole_steps_include_the_passes_each_form_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    case = bench_case()
    loss = Case.loss
    monkeypatch.setattr(Case, "loss", lambda self, module, x: (passes.append("pass"), loss(self, module, x))[1])
    rows = measure_steps(case, "sam", ["base", "textbook"], rounds=2, device=CPU, clock="wall", note=pytest.fail)
    assert [row.contender for row in rows] == ["base", "textbook"]
    assert len(passes) == 3 * (1 + 2)
    assert all(row.peak is None for row in rows)


def test_one_pass_and_the_base_take_turns_in_processes_of_their_own() -> None:
    how = {"rounds": 1, "device": CPU, "clock": "wall"}
    rows = measure_alone(CASES["resnet18"], "asam", 2, ["samopt-one-pass"], **how)
    assert [(row.kind, row.case, row.metric, row.contender) for row in rows] == [
        ("batch", "resnet18 x 2", "asam", name) for name in ("base", "samopt-one-pass")
    ]
    assert all(len(row.milliseconds) == len(row.copy_rate) == 2 and min(row.milliseconds) > 0 for row in rows)
    assert {row.elements for row in rows} == {11_689_512}


def test_a_process_that_dies_is_named() -> None:
    with (
        pytest.raises(BenchmarkError, match="the process that ran base ended"),
        alone._Runner("no such case", "sam", 1, "base", CPU, "wall") as runner,
    ):
        runner.step()


def measurement(
    contender: str, *milliseconds: float, metric: str = "sam", kind: str = "update", case: str = "tiny500"
) -> Measurement:
    environment = dict.fromkeys(("device", "threads", "torch", "python", "samopt", "commit", "clock"), "?")
    rates = [8e9] * len(milliseconds)
    return Measurement(kind, case, metric, contender, 500_000, 500, milliseconds, rates, 2_000_000, 0, environment)


def test_ratios_are_of_the_same_round() -> None:
    base, textbook, ours = (
        measurement("base", 1, 2, 3),
        measurement("textbook", 5, 10, 15),
        measurement("samopt-cpu", 2, 4, 9),
    )
    assert relative(ours, textbook, base) == Spread.of([1 / 4, 2 / 8, 6 / 12])
    assert Spread.of([1, 2, 3, 4, 5, 6]) == Spread(2.0, 3.5, 5.0)
    assert bytes_at_copy_rate(ours, base).median == pytest.approx(2e-3 * 8e9 / 500_000)


def test_the_table_shows_ratios_bytes_and_what_was_left_out() -> None:
    times = {"base": 1, "textbook": 5, "script": 6, "samopt-cpu": 2}
    rows = [measurement(name, *[time] * 3) for name, time in times.items()]
    text = markdown(rows, ["samopt-triton is left out: no GPU"])
    assert "**Update alone, tiny500, SAM: 500,000 parameters in 500 tensors**" in text
    assert (
        "| samopt-cpu | 3 | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | 0.25 (0.25 to 0.25) | 0.20 (0.20 to 0.20) "
        "| 16.0 | 11.0 | 4.00 |" in text
    )
    assert text.endswith("- samopt-triton is left out: no GPU\n")


def test_one_pass_on_larger_batches_is_one_table_in_order_of_size() -> None:
    rows = [
        measurement(name, *times, kind="batch", case=f"{case} x {factor}")
        for case, factor, times in [("b", 16, (9.0,)), ("a", 4, (8.0,)), ("b", 2, (8.0,))]
        for name, times in [("base", (8.0,)), ("samopt-one-pass", times)]
    ]
    text = markdown(rows, [])
    lines = [line for line in text.splitlines() if line.startswith(("| a", "| b"))]
    assert lines == [
        "| a x 4 | 1 | 8.0 (8.0 to 8.0) | 1.000 (1.000 to 1.000) |  |",
        "| b x 2 | 1 | 8.0 (8.0 to 8.0) | 1.000 (1.000 to 1.000) |  |",
        "| b x 16 | 1 | 8.0 (8.0 to 8.0) | 1.125 (1.125 to 1.125) |  |",
    ]


def test_the_quick_form_of_the_command_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "optimizer", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_measurements(tmp_path / "updates.jsonl")
    groups = [(row.kind, row.case) for row in rows if row.contender == "textbook"]
    assert groups == [
        ("update", "resnet18"), ("parameters", "64x1000"), ("parameters", "64x10000"),
        ("tensors", "1x65536"), ("tensors", "16x4096"), ("step", "resnet18"),
    ]  # fmt: skip
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("\n| samopt-cpu |") == 2


def test_measured_cases_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["optimizer", "--cases", "tiny500", "--contenders", "textbook", "--metrics", "asam", "--rounds", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    rows = read_measurements(tmp_path / "updates.jsonl")
    assert [row.contender for row in rows] == ["base", "textbook"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert read_measurements(tmp_path / "updates.jsonl") == rows
    assert main(["optimizer", "--clock", "sun", "--output", str(tmp_path)]) == 2
    assert "--clock must be one of wall, cpu, got 'sun'" in capsys.readouterr().err
    assert main(["optimizer", "--cases", "resnet81"]) == 2
    assert "unknown case 'resnet81'; did you mean 'resnet18'?" in capsys.readouterr().err


def test_contenders_cover_every_backend() -> None:
    assert {name for name in CONTENDERS if name.startswith("samopt-")} == {f"samopt-{n}" for n in BACKENDS} | {
        "samopt-lean",
    }
    parameters = [nn.Parameter(torch.randn(3))]
    assert isinstance(CONTENDERS["samopt-cpu"].build(parameters, "asam")._optimizer, samopt.ASAM)
