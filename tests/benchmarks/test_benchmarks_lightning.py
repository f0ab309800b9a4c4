"""The Lightning benchmark: its runs, its files, and the whole command on a few images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.cli import main
from benchmarks.data import Pool, make_split
from benchmarks.errors import BenchmarkError
from benchmarks.lightning import comparison
from benchmarks.lightning.comparison import Comparison, Plan
from benchmarks.lightning.measures import MEASURES
from benchmarks.lightning.methods import METHODS
from benchmarks.lightning.training import train
from benchmarks.registry import OPTIMIZERS, TASKS
from benchmarks.rows import read_rows
from benchmarks.seeds import stream_seed
from benchmarks.training import build_model, epoch_order
from samopt import SAM, sharpness

pytestmark = pytest.mark.lightning


def pool(count: int = 120) -> Pool:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 28, 28, generator=generator)
    labels = torch.arange(count) % 10
    images[torch.arange(count), 0, labels, labels] += 3.0
    return Pool(images, labels, images[:50], labels[:50])


def plan(**changes: object) -> Plan:
    settings: dict[str, object] = {
        "methods": ("sgd", "sgd+sam"),
        "seeds": (0,),
        "label_noise": (0.4,),
        "epochs": 2,
        "train_size": 64,
        "batch_size": 16,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]  # as typed as a test needs


def make_comparison(folder: Path, **changes: object) -> Comparison:
    return Comparison(plan(**changes), TASKS["fashion_small"], pool(), folder, lambda text: None)


def test_a_run_is_the_loop_in_plain_torch() -> None:
    """The numbers of a row are those of a hand-written loop, and of the measures on its first four batches."""
    split = make_split(pool(), 3, classes=10, train_size=64)
    settings = OPTIMIZERS["sgd"].defaults
    make = TASKS["fashion_small"].build_model
    outcome = train(METHODS["sgd+sam"], split, make, settings, 3, epochs=2, batch_size=16)

    net = build_model(make, 3)
    base = OPTIMIZERS["sgd"].build(net, settings)
    optimizer = SAM(base, rho=0.05, model=net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, 8)
    torch.manual_seed(stream_seed(3, "training"))
    sample = []
    for epoch in range(2):
        losses = []
        net.train()
        for part in torch.split(epoch_order(64, 3, epoch), 16):
            batch = split.inputs[part], split.labels[part]
            sample += [batch] if epoch == 0 else []
            losses.append(_step(net, optimizer, batch))
            schedule.step()
        assert outcome.curves["train_loss"][epoch] == pytest.approx(sum(losses) / 4, rel=1e-5)
        for name in ("worst_case", "average_case"):
            measure = getattr(sharpness, name)
            expected = measure(net, sharpness.cross_entropy, sample, adaptive=True, **MEASURES[name]).value
            assert outcome.curves[name][epoch] == pytest.approx(expected, rel=1e-4)
        net.eval()
        with torch.no_grad():
            right = net(split.test_inputs).argmax(1) == split.test_labels
        assert outcome.curves["accuracy"][epoch] == pytest.approx(float(right.float().mean()))
    assert outcome.tested == 50
    assert outcome.warnings == []
    assert 0 < outcome.monitor_share < 1


def _step(net: nn.Module, optimizer: SAM, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return loss

    return float(optimizer.step(closure))


def test_rows_are_kept_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_comparison(tmp_path)
    first.run()
    assert [row.optimizer for row in first.rows] == ["sgd", "sgd+sam"]
    assert [row.examples for row in first.rows] == 2 * [{"train": 64, "randomised": 26, "test": 50}]
    assert first.rows[1].settings["rho"] == 0.05
    assert all(math.isfinite(value) for row in first.rows for value in row.metrics.values())
    assert (tmp_path / "monitor.png").stat().st_size > 0
    asked: list[str] = []
    monkeypatch.setattr(comparison, "train", lambda method, *args, **options: asked.append(method.name))
    make_comparison(tmp_path).run()
    assert asked == []
    with pytest.raises(BenchmarkError, match=r"holds runs with .*= \(2, 16, 64\), and \(3, 16, 64\) is asked for"):
        make_comparison(tmp_path, epochs=3)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = TASKS["fashion_small"]
    monkeypatch.setitem(TASKS._items, task.name, type(task)(**(vars(task) | {"load": lambda data: pool(200)})))
    threads = torch.get_num_threads()
    try:
        assert main(["lightning", "--quick", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(read_rows(tmp_path / "runs.jsonl")) == 2
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| 40% random labels | sgd+sam | 1 |" in table
    assert "128 training images, 50 test images, 2 epochs, batches of 32" in table
    assert (tmp_path / "lightning.png").stat().st_size > 0
    assert "Fashion-MNIST in Lightning" in capsys.readouterr().out
    assert main(["lightning", "--methods", "sgd,lion"]) == 2
    assert "unknown method 'lion'" in capsys.readouterr().err
