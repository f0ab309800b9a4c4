"""muP and the NTK parametrisation: against stock layers, across widths, and the study's quick form."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness.cli import main
from benchmarks.harness.parametrisation import Parametrisation, Perceptron, Transformer
from benchmarks.harness.rows import Log, open_log
from benchmarks.studies import width as study


def gradient_descent(model, rates, images, targets, steps=5):
    """The stock loop; the outputs after it."""
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)])
    for _ in range(steps):
        optimizer.zero_grad()
        study.squared_error(model, (images, targets)).backward()
        optimizer.step()
    return model(images).detach()


@pytest.mark.parametrize("name", ["mup", "ntk"])
def test_it_is_the_table_of_learning_rates_for_stock_layers(name):
    torch.manual_seed(0)
    width, base, lr = 64, 16, 0.3
    parametrisation = Parametrisation(name, width, base)
    ours = Perceptron(parametrisation).double()
    ours[5].weight.data.normal_()  # so that every layer has a gradient at once
    first, hidden, head = (nn.Linear(*shape, bias=False) for shape in ((64, width), (width, width), (width, 10)))
    stock = nn.Sequential(nn.Flatten(), first, nn.ReLU(), hidden, nn.ReLU(), head).double()
    m = width / base
    last = 1 / math.sqrt(m) if name == "mup" else 1.0
    scales = [1 / 8, math.sqrt(2 / width), last * math.sqrt(2 / width)]
    for layer, scale in zip((1, 3, 5), scales, strict=True):
        stock[layer].weight.data = scale * ours[layer].weight.data
    images, targets = torch.randn(32, 1, 8, 8).double(), torch.randn(32, 10).double()
    if name == "mup":  # first layer times m, hidden layer the same at every width, last layer over m
        rates = [lr * m / 64, 2 * lr / base, (2 * lr / base) / m]
    else:
        rates = [lr / 64, 2 * lr / width, 2 * lr / width]
    expected = gradient_descent(stock, rates, images, targets)
    found = gradient_descent(ours, [parametrisation.learning_rate(lr)] * 3, images, targets)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [Perceptron, Transformer])
def test_both_are_one_network_at_the_base_width(build):
    images = torch.randn(4, 1, 8, 8)
    outputs = []
    for name in ("mup", "ntk"):
        torch.manual_seed(0)
        parametrisation = Parametrisation(name, 16, 16)
        model = build(parametrisation)
        assert parametrisation.learning_rate(0.5) == 0.5
        with torch.no_grad():
            (model.head if build is Transformer else model[5]).weight.normal_()
        outputs.append(model(images))
    assert torch.equal(*outputs)


def moved(build, name, width):
    """How far features move in four steps, a root mean square over units, in seeds."""
    distances = []
    for seed in range(3):
        torch.manual_seed(seed)
        images, targets = torch.randn(64, 1, 8, 8).double(), functional.one_hot(torch.arange(64) % 10, 10).double()
        parametrisation = Parametrisation(name, width, 64)
        model = build(parametrisation).double()
        seen = []
        part = model.layers if build is Transformer else model[3]
        part.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.detach()))
        model(images)
        rates = [parametrisation.learning_rate(0.1)] * len(list(model.parameters()))
        gradient_descent(model, rates, images, targets, steps=4)
        distances.append(float((seen[-1] - seen[0]).square().mean().sqrt()))
    return sum(distances) / len(distances)


@pytest.mark.parametrize("build", [Perceptron, Transformer])
def test_features_move_alike_at_every_width_in_mup_and_less_in_wider_networks_otherwise(build):
    ratios = {name: moved(build, name, 256) / moved(build, name, 64) for name in ("mup", "ntk")}
    assert ratios["mup"] == pytest.approx(1.0, rel=0.1)
    assert ratios["ntk"] == pytest.approx(1 / 4, rel=0.1)  # at a small learning rate, from a last layer of zeros


def test_the_table_names_the_best_rate_of_each_seed_and_what_the_base_widths_costs(tmp_path, make_row):
    log = open_log(tmp_path)
    losses = {
        (32, 4.0): 0.3,
        (32, 8.0): 0.2,
        (32, 16.0): 0.4,
        (512, 4.0): 0.1,
        (512, 8.0): 0.2,
        (512, 16.0): math.nan,
        (64, 4.0): 0.2,
        (64, 8.0): 0.5,
        (64, 16.0): 0.1,
    }
    for seed in (0, 1):
        for (width, lr), loss in losses.items():
            settings = {"lr": lr, "width": width, "parametrisation": "ntk"}
            loss = math.nan if (width, lr, seed) == (64, 8.0, 1) else loss
            curves = {"loss": [loss], "edge": [1.0, 1.0, 2.0, 2.0 + seed] if lr == 4 else []}
            log.add(make_row(f"ntk:width={width}:lr={lr:g}", seed, task="digits_mlp", settings=settings,
                             metrics={"loss": loss}, curves=curves))  # fmt: skip
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        "| 512 | 4, 4 | -1.00 [-1.00, -1.00] | 0.1000 ± 0.0000 | 2.00 ± 0.00 | 2.25 ± 0.35 | +0.00 [+0.00, +0.00] |"
        in text
    )
    assert "| 32 | 8, 8 |  | 0.2000 ± 0.0000 | 1.00 ± 0.00 | 2.25 ± 0.35 |  |" in text
    assert "| 64 | 16, 16 | +1.00 [+1.00, +1.00] | 0.1000 ± 0.0000 | 5.00, 1 of 2 diverged |" in text
    assert (tmp_path / "width.png").stat().st_size > 0


@pytest.mark.slow
def test_the_quick_form_shows_that_only_mup_keeps_its_curvature_across_widths(tmp_path):
    assert main(["width", "--quick", "--output", str(tmp_path)]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    assert [row.optimizer for row in rows] == [
        f"{name}:width={width}:lr={lr}" for width in (32, 256) for name in ("ntk", "mup") for lr in (4, 8)
    ]
    edges = [row.curves["edge"] for row in rows if row.settings["lr"] == 4]
    late = [sum(edge[4:8]) / len(edge[4:8]) for edge in edges]
    assert late[0] == late[1]  # one network at the base width
    assert late[2] < 1.6 < late[3]  # the edge of stability is at 2
    assert [row.settings["sgd_lr"] for row in rows[-2:]] == [32, 64]
