"""The study that runs everything on a GPU: its quick form on the CPU, its plan, its file of images, and its report."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.harness.data import Pool
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.gpu import report
from benchmarks.harness.gpu.pack import pack, unpack
from benchmarks.harness.gpu.updates import launches
from benchmarks.harness.networks import Decoder, loss_of
from benchmarks.harness.rows import Log
from benchmarks.studies.gpu import PLAN, Step, command, plan

ABSENT = ("docstring_parser", "jsonargparse", "matplotlib", "rich", "scipy", "sklearn")


@pytest.fixture
def bare(tmp_path):
    """An environment in which torch, numpy, triton and pytest can be imported, and none of what [bench] brings."""
    for name in ABSENT:
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), "."]), "OMP_NUM_THREADS": "1"}
    variables.pop("PYTEST_ADDOPTS", None)
    return variables


def run(root, environment, *words):
    command = [sys.executable, "-m", "benchmarks", "gpu", *map(str, words)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_quick_form_runs_every_step_where_nothing_else_is_installed(bare, tmp_path, request):
    out = tmp_path / "out"
    done = run(request.config.rootpath, bare, "--device", "cpu", "--quick", "--minutes", 8, "--out", out)
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "report.md", "rows.jsonl", "runs.jsonl"]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(dict.fromkeys(row["step"] for row in rows)) == [step.name for step in PLAN]
    skipped = {row["step"] for row in rows if "skipped" in row}
    assert skipped == {"memcheck", "racecheck"}
    forms = {(row["form"], row["graph"]) for row in rows if row["step"] == "steps"}
    assert forms == {
        (form, graph)
        for form in ("base", "two passes", "script", "sam", "asam", "one pass", "tram")
        for graph in (False, True)
        if (form, graph) != ("script", True)
    }
    contenders = {row["contender"] for row in rows if row["step"] == "updates"}
    assert {"base", "textbook", "script", "samopt-foreach", "samopt-lean", "displaced", "restore"} <= contenders
    runs = Log(out / "runs.jsonl").rows  # rows of the study "train", in its own format
    assert [(row.task, row.optimizer) for row in runs] == [
        (f"fashion_{task}", optimizer)
        for task in ("vit", "mixer", "resnet")
        for optimizer in ("adamw", "adamw+sam", "adamw+momentum-sam")
    ]
    for section in ("Tests", "The update alone", "The restore", "Whole steps", "Training"):
        assert f"## {section}" in (out / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_step_that_fails_is_reported_and_the_next_one_runs(bare, tmp_path, request):
    steps = ("--steps", "updates", "racecheck")
    done = run(request.config.rootpath, bare, "--device", "cuda", "--quick", "--minutes", 2, "--out", tmp_path, *steps)
    assert done.returncode == 1
    assert "| updates | 22 |" in done.stdout and "failed with exit code 1; see log.txt" in done.stdout
    assert "- racecheck: left out" in done.stdout
    assert "--device 'cuda' cannot be used" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_step_is_stopped_at_its_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.studies.gpu.PLAN", (Step("updates", 0.1, "more than it has time for"),))
    start = time.monotonic()
    assert command(["--device", "cpu", "--minutes", "0.35", "--out", str(tmp_path)]) == 1  # 2.1 s: torch takes longer
    assert time.monotonic() - start < 20
    assert "stopped at its limit" in capsys.readouterr().out


def test_the_plan_fits_into_the_time(capsys):
    assert command(["--dry-run", "--minutes", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*(step.name for step in PLAN), "report"]
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(480, abs=4)
    assert plan(480).splitlines() == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minutes", "0"), "--minutes must be positive, got 0"),
        (("--data", "nowhere.xz"), "--data nowhere.xz is no file; make it with"),
        (("--steps", "update"), "invalid choice: 'update'"),
    ],
)
def test_mistakes_are_explained(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_file_of_images_gives_back_every_pixel(tmp_path):
    pixels = torch.arange(256).repeat(12)[: 3 * 28 * 28].reshape(3, 1, 28, 28).float().div(255)
    pool = Pool(pixels, torch.tensor([3, 1, 9]), pixels[:2].flip(0), torch.tensor([0, 7]))
    pack(pool, tmp_path / "images.xz", train_size=2)
    found = unpack(tmp_path / "images.xz")
    assert torch.equal(found.inputs, pool.inputs[:2]) and torch.equal(found.labels, pool.labels[:2])
    assert torch.equal(found.test_inputs, pool.test_inputs) and torch.equal(found.test_labels, pool.test_labels)
    (tmp_path / "images.xz").write_bytes(b"no images")
    with pytest.raises(BenchmarkError, match=r"images.xz cannot be read: .*; make it with"):
        unpack(tmp_path / "images.xz")


def test_the_report_shows_ratios_of_the_same_round_and_what_a_restore_costs(tmp_path):
    update = {"step": "updates", "kind": "update", "case": "big", "geometry": "sam", "elements": 1_000_000,
              "copy_rate": [4e12] * 3, "peak": 8_000_000, "base_moves": 28}  # fmt: skip
    rows = [
        {**update, "contender": "base", "milliseconds": [1.0, 2.0, 3.0], "moved": 0, "launches": 2},
        {**update, "contender": "samopt-triton", "milliseconds": [1.5, 2.014, 3.007], "moved": 28, "launches": 1234},
        {"step": "updates", "case": "big", "contender": "restore", "milliseconds": [0.2014, 0.3, 0.1]},
        {"step": "steps", "case": "big", "form": "base", "graph": False, "milliseconds": [10.0], "peak": 2**30},
        {"step": "steps", "case": "big", "form": "sam", "graph": False, "milliseconds": [20.14], "peak": 2**31},
        {"step": "steps", "case": "big", "form": "tram", "graph": True, "skipped": "OutOfMemoryError"},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": "st'  # a process that was killed left half a line
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    page = report.write(tmp_path, [])
    assert "| base | 2.000, 14 GB/s |" in page
    assert "| samopt-triton | 0.014 (2.00), 28 GB/s |" in page  # a copy takes 7 us for 28 bytes
    assert "| samopt-triton | 1,234; 8.0 |" in page
    assert "| big | 0.201 | 10.0 | 1.0 |" in page
    assert "| sam | 20.14 (2.014; 2.00 GiB) |" in page
    assert "- left out (case big, form tram, graph True): OutOfMemoryError" in page


def test_launches_are_unknown_on_the_cpu():
    assert launches(torch.device("cpu"), lambda: torch.ones(3) + 1) is None


def test_the_decoder_looks_back_only():
    torch.manual_seed(0)
    model = Decoder(vocabulary=11, width=8, heads=2, layers=2)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.tensor([[1, 2, 3, 4]])
    loss_of(model, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())
    model(torch.tensor([[1, 2, 3, 9]]))
    assert torch.equal(seen[0][:, :3], seen[1][:, :3]) and not torch.equal(seen[0][:, 3], seen[1][:, 3])
