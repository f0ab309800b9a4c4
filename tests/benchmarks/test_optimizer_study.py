"""The cost of updates and of whole steps: the contenders, the memory count, the ratios, and the whole command."""

import copy
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.harness.cli import main
from benchmarks.harness.measure import Measurement, measure_steps, measure_updates
from benchmarks.harness.networks import CASES, Case, growth, loss_of
from benchmarks.harness.rows import Log
from benchmarks.harness.timing import Memory, in_turns
from benchmarks.harness.updates import BAREST, ETA, RHO, STEPS, UPDATES, make_step
from benchmarks.studies.optimizer import Spread, tables
from samopt.kernels import BACKENDS

CPU = torch.device("cpu")
RUNNABLE = ["textbook", "script", *(f"samopt-{n}" for n in BACKENDS if not n.startswith("triton")), "samopt-lean"]
ADAMW = CASES["resnet18"].base


def test_the_networks_have_the_published_sizes():
    shapes = {}
    for name, case in CASES.items():
        with torch.device("meta"):
            shapes[name] = [tuple(p.shape) for p in case.build().parameters()]
    sizes = {name: sum(int(np.prod(shape)) for shape in of) for name, of in shapes.items()}
    assert (sizes["resnet18"], len(shapes["resnet18"])) == (11_689_512, 62)  # torchvision's
    assert sizes["bert_base"] == pytest.approx(109_482_240, rel=1e-3)  # transformers' BertModel
    assert sizes["vit_s"] == pytest.approx(22_050_664, rel=1e-2)  # timm's vit_small_patch16_224
    assert sizes["tiny500"] == 500_000
    assert sizes["decoder_1b"] > 1e9 and CASES["decoder_1b"].needs_gpu
    for case in CASES.values():
        if case.batch is not None and case.name != "bert_base":
            assert loss_of(case.build(), case.batch(1)[:2]).isfinite()


def test_growth_changes_one_thing():
    grown = {kind: [case.build() for case in cases] for kind, cases in growth(quick=True).items()}
    counts = {kind: [len(list(m.parameters())) for m in modules] for kind, modules in grown.items()}
    sizes = {kind: [sum(p.numel() for p in m.parameters()) for m in modules] for kind, modules in grown.items()}
    assert counts == {"parameters": [64, 64], "tensors": [1, 16]}
    assert sizes == {"parameters": [64_000, 640_000], "tensors": [2**16, 2**16]}


def fp64_step(weights, first, second, geometry, eta=ETA, least=2):
    """Where the ascent leads, and where AdamW's first step leads from weights that never moved."""
    t = [(w.abs() + eta if geometry == "asam" and w.dim() >= least else torch.ones_like(w)) for w in weights]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(t, first, strict=True)))
    perturbed = [w + RHO * t**2 * g / norm for w, t, g in zip(weights, t, first, strict=True)]
    stepped = [w * (1 - 1e-4 * 1e-2) - 1e-4 * g / (g.abs() + 1e-8) for w, g in zip(weights, second, strict=True)]
    return perturbed, stepped


def assert_at(parameters, weights):
    for parameter, expected in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("geometry", ["sam", "asam"])
@pytest.mark.parametrize("name", [*RUNNABLE, "pytorch_optimizer"])
def test_every_contender_makes_the_same_update(name, geometry):
    if name == "pytorch_optimizer":
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2, 2))]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    weights, first, second = ([t.detach().double() for t in ts] for ts in (parameters, *gradients))
    plain = name in ("script", "pytorch_optimizer")  # no stabiliser, and biases are scaled too
    perturbed, stepped = fp64_step(weights, first, second, geometry, *((0.0, 0) if plain else ()))
    update = UPDATES[name](parameters, geometry, ADAMW)
    for half, given, expected in ((update.ascend, first, perturbed), (update.descend, second, stepped)):
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient.float()
        half()
        assert_at(parameters, expected)


@pytest.mark.parametrize("name", ["textbook", "script"])
def test_the_loops_restore_every_bit(name):
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in parameters]
    update = UPDATES[name](parameters, "sam", lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0))
    for _ in range(3):
        for half in (update.ascend, update.descend):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            half()
    assert all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))


def small_case(make_base=ADAMW):
    return Case(
        "small",
        lambda: nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)),
        lambda n: torch.randn(8 * n, 30),
        make_base,
        rounds=None,
    )


@pytest.mark.parametrize("make_base", [CASES["digits"].base, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("geometry", ["sam", "asam"])
@pytest.mark.parametrize("form", STEPS)
def test_every_form_of_a_whole_step_takes_the_step_of_a_loop_in_fp64(form, geometry, make_base):
    """Two steps of each form against the formula in double precision, with torch's own optimizer as the base."""
    eta, least = (0.0, 0) if form == "script" else (ETA, 2)  # which has no stabiliser, and scales biases too
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(8, 6)
    twin = copy.deepcopy(module).double()
    base, reference = make_base(module.parameters()), make_base(twin.parameters())
    for group in (*base.param_groups, *reference.param_groups):
        group.update(lr=0.01)
        if "fused" in group:
            group["fused"] = None
    for model, optimizer, data in ((module, base, inputs), (twin, reference, inputs.double())):
        loss_of(model, data).backward()  # gives the base a momentum
        optimizer.step()
        optimizer.zero_grad()
    step = make_step(form, module, inputs, base, geometry)
    parameters = list(twin.parameters())
    for _ in range(2):
        step()
        before = [p.detach().clone() for p in parameters]
        reference.zero_grad()
        if form != "base":
            if form in (BAREST, "one-pass"):
                states = [reference.state[p] for p in parameters]
                directions = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
            else:
                loss_of(twin, inputs.double()).backward()
                directions = [p.grad for p in parameters]
            t = [
                p.detach().abs() + eta if geometry == "asam" and p.dim() >= least else torch.ones_like(p)
                for p in parameters
            ]
            norm = torch.sqrt(sum(((a * d) ** 2).sum() for a, d in zip(t, directions, strict=True)))
            with torch.no_grad():
                for p, a, d in zip(parameters, t, directions, strict=True):
                    p.add_(RHO * a**2 * d / norm)
            reference.zero_grad()
        loss_of(twin, inputs.double()).backward()
        with torch.no_grad():
            for p, w in zip(parameters, before, strict=True):
                p.copy_(w)
        reference.step()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_memory_counts_bytes_that_are_alive_at_once():
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


def test_the_first_of_a_round_takes_turns():
    order = []
    times, rates = in_turns(["a", "b", "c"], 2, lambda name: order.append(name) or 0.001)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert times == {name: [1.0, 1.0] for name in "abc"} and rates == []


def test_updates_are_measured_and_their_memory_is_counted(capsys):
    names = ["base", "textbook", "samopt-cpu", "samopt-triton"]
    rows = list(measure_updates("update", small_case(), "sam", names, 3, CPU, "wall"))
    assert [row.contender for row in rows] == names[:3]
    assert re.search("samopt-triton is left out: .*CUDA", capsys.readouterr().out)
    for row in rows:
        assert len(row.milliseconds) == len(row.copy_rate) == 3 and min(row.milliseconds) > 0
        assert (row.elements, row.tensors) == (30 * 20 + 3 * 20, 4)
    base, textbook, ours = rows
    assert base.peak == base.retained == textbook.retained == 0
    assert textbook.peak >= 4 * 660  # the copies of the weights
    assert 4 * 660 <= ours.peak < 4 * 660 + 300 and ours.retained < 300  # one copy, and a dozen scalars


def test_a_missing_package_is_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    rows = list(measure_updates("update", small_case(), "sam", ["base", "pytorch_optimizer"], 1, CPU, "wall"))
    assert [row.contender for row in rows] == ["base"]
    assert "pytorch_optimizer is left out: import of pytorch_optimizer halted" in capsys.readouterr().out


def test_whole_steps_run_the_passes_that_each_form_needs_and_count_memory(monkeypatch):
    passes = []
    module = "benchmarks.harness.updates.loss_of"
    monkeypatch.setattr(module, lambda net, x: passes.append(len(x)) or loss_of(net, x))
    forms = ["base", "script", "sam-closure", BAREST, "one-pass"]
    rows = list(measure_steps(small_case(), 2, "sam", forms, 2, CPU, "wall"))
    assert [(row.kind, row.case, row.contender) for row in rows] == [("step", "small x 2", form) for form in forms]
    assert passes == [16] * (1 + (1 + 3) * (1 + 2 + 2 + 1 + 1))
    base, *others = rows
    for row in others:
        assert 1.0 <= (row.peak - base.peak) / (4 * row.elements) < 2.1, (
            f"{row.contender}: about one copy of the weights"
        )


def made_up(contender, *milliseconds, kind="update", case="tiny500"):
    environment = dict.fromkeys(("device", "threads", "torch", "python", "samopt", "commit", "clock"), "?")
    rates = [8e9] * len(milliseconds)
    return Measurement(kind, case, "sam", contender, 500_000, 500, list(milliseconds), rates, 2_000_000, 0, environment)


def test_the_table_shows_ratios_of_the_same_round():
    rows = [made_up("base", 1, 2, 3), made_up("textbook", 5, 10, 15), made_up("samopt-swap", 2, 4, 9)]
    (table,) = tables(rows)
    assert table.title == "Update alone, tiny500, SAM: 500,000 parameters in 500 tensors"
    ratio, bytes_moved = Spread.of([1 / 4, 2 / 8, 6 / 12]), 2e-3 * 8e9 / 500_000
    assert table.rows[2][3:] == (
        Spread.of([1, 2, 6]).text(".2f"), ratio.text(".2f"), "", f"{bytes_moved:.1f}", "5.5", "4.00",
    )  # fmt: skip
    assert Spread.of([1, 2, 3, 4, 5, 6]) == Spread(2.0, 3.5, 5.0)
    rows = [made_up(name, time, kind="step") for name, time in (("base", 8.0), (BAREST, 8.8), ("one-pass", 9.68))]
    (table,) = tables(rows)
    assert table.rows[2][3:6] == ("1.210 (1.210 to 1.210)", "", "1.100 (1.100 to 1.100)")


def test_the_quick_form_of_the_command_and_its_continuation(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "resnet18", small_case())
    monkeypatch.setitem(CASES, "digits", replace(CASES["digits"], rounds=None))
    assert main(["optimizer", "--quick", "--output", str(tmp_path)]) == 0
    rows = Log(tmp_path / "updates.jsonl", Measurement).rows
    assert [(row.kind, row.case) for row in rows if row.contender == "base"] == [
        ("update", "digits"), ("update", "small"), ("parameters", "64x1000"), ("parameters", "64x10000"),
        ("tensors", "1x65536"), ("tensors", "16x4096"), ("step", "digits x 1"), ("step", "small x 1"),
        ("step", "small x 4"),
    ]  # fmt: skip
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    arguments = ["optimizer", "--cases", "digits", "--contenders", "textbook", "--geometries", "asam", "--rounds", "1"]
    assert main([*arguments, "--step-rounds", "1", "--forms", BAREST, "--output", str(tmp_path)]) == 0
    more = Log(tmp_path / "updates.jsonl", Measurement).rows
    assert more[: len(rows)] == rows
    assert [(row.kind, row.contender) for row in more[len(rows) :]] == [
        ("update", "base"), ("update", "textbook"), ("step", "base"), ("step", BAREST),
    ]  # fmt: skip
    assert main([*arguments, "--forms", BAREST, "--output", str(tmp_path)]) == 0
    assert Log(tmp_path / "updates.jsonl", Measurement).rows == more, "what is measured is not measured again"
