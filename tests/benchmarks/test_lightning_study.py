"""The Lightning study: a run is the loop in plain torch, rows are kept, and the whole command on a few images."""

import math

import pytest
import torch
from torch.nn import functional

from benchmarks.harness.cli import main
from benchmarks.harness.data import make_split, stream_seed
from benchmarks.harness.optimizers import parse_choice
from benchmarks.harness.rows import Log
from benchmarks.harness.tasks import TASKS
from benchmarks.harness.training import build_model, epoch_order
from samopt import SAM, sharpness

trainer = pytest.importorskip("benchmarks.harness.trainer", reason="needs Lightning", exc_type=Exception)
pytestmark = pytest.mark.lightning


def test_a_run_is_the_loop_in_plain_torch(fashion_folder):
    """The numbers of a row are those of a hand-written loop, and of the measures on its first four batches."""
    task = TASKS["fashion_small"]
    split = make_split(task.load(fashion_folder), 3, classes=10, train_size=64)
    row = trainer.train("sgd+sam", split, 3, 0.0, epochs=2, batch_size=16)

    net = build_model(task.build_model, 3)
    base = parse_choice("sgd").build(net)
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

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(batch[0]), batch[1])
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert row.curves["train_loss"][epoch] == pytest.approx(sum(losses) / 4, rel=1e-5)
        for name in ("worst_case", "average_case"):
            measure = getattr(sharpness, name)
            options = trainer.MEASURES[name]
            expected = measure(net, sharpness.cross_entropy, sample, adaptive=True, **options).value
            assert row.curves[name][epoch] == pytest.approx(expected, rel=1e-4)
        net.eval()
        with torch.no_grad():
            right = net(split.test_inputs).argmax(1) == split.test_labels
        assert row.curves["accuracy"][epoch] == pytest.approx(float(right.float().mean()))
    assert row.examples == {"train": 64, "randomised": 0, "test": 50}
    assert row.warnings == []
    assert 0 < row.metrics["monitor_share"] < 1


@pytest.mark.slow
def test_the_command_continues_and_its_table(fashion_folder, monkeypatch, capsys):
    output = fashion_folder / "out"
    arguments = ["lightning", "--data", str(fashion_folder), "--output", str(output)]
    assert main([*arguments, "--quick"]) == 0
    rows = Log(output / "runs.jsonl").rows
    assert [row.optimizer for row in rows] == ["sgd", "sgd+sam"]
    assert rows[1].settings["rho"] == 0.05
    assert all(math.isfinite(value) for row in rows for value in row.metrics.values())
    table = (output / "table.md").read_text(encoding="utf-8")
    assert "| 40% random labels | sgd+sam | 1 |" in table
    assert "128 training images, 50 test images, 2 epochs, batches of 32" in table
    assert (output / "lightning.png").stat().st_size > 0 and (output / "monitor.png").stat().st_size > 0
    monkeypatch.setattr("benchmarks.studies.lightning.train", pytest.fail)
    same = ["--methods", "sgd,sgd+sam", "--seeds", "0", "--label-noise", "0.4", "--train-size", "128"]
    assert main([*arguments, *same, "--batch-size", "32", "--epochs", "2"]) == 0
    assert main([*arguments, *same, "--batch-size", "32", "--epochs", "3"]) == 2
    assert "= (2, 32, 128), and (3, 32, 128) is asked for" in capsys.readouterr().err
