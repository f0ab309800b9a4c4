"""ResNet, ViT and Mixer on Fashion-MNIST: what the study measures, and its quick form."""

import pytest
import torch
from torch import nn

from benchmarks.harness.cli import main
from benchmarks.harness.data import Split
from benchmarks.harness.networks import Mixer, small_resnet
from benchmarks.harness.rows import Log, open_log
from benchmarks.harness.vision import CORRUPTIONS, corrupt, measure
from benchmarks.studies import vision as study


def test_each_corruption_is_what_its_name_says():
    images = torch.rand(4, 1, 28, 28)
    shifted = corrupt(images, "shift", 0)
    assert torch.equal(shifted[:, :, 2:, 2:], images[:, :, :-2, :-2])
    assert shifted[:, :, :2].count_nonzero() == shifted[..., :2].count_nonzero() == 0
    flat = corrupt(images, "contrast", 0)
    torch.testing.assert_close(flat.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(flat.std((1, 2, 3)), 0.4 * images.std((1, 2, 3)))
    blurred = corrupt(images, "blur", 0)
    torch.testing.assert_close(blurred[0, 0, 5, 7], images[0, 0, 4:7, 6:9].mean())
    grey = torch.full((4, 1, 28, 28), 0.5)
    noise = corrupt(grey, "noise", 0) - grey
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(0.15, rel=0.05)
    assert torch.equal(corrupt(grey, "noise", 0) - grey, noise)


def test_the_measures_are_those_of_a_linear_classifier_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 12, bias=False), nn.ReLU(), nn.Linear(12, 10, bias=False))
    images, labels = torch.rand(300, 1, 28, 28), torch.randint(10, (300,))
    metrics, curves = measure(model, Split(images, labels, labels, images, labels, 0), seed=0)
    with torch.no_grad():
        hidden = images.flatten(1) @ model[1].weight.T
        moved = corrupt(images, "contrast", 0)
        right = (model(moved).argmax(1) == labels).float().mean()
    share = (hidden > 0).float().mean()
    assert metrics["active"] == pytest.approx(float(share), abs=1e-6)
    assert curves == {"active": [metrics["active"]]}
    assert metrics["contrast"] == pytest.approx(float(right), abs=1e-6)
    assert metrics["corrupted"] == pytest.approx(sum(metrics[name] for name in CORRUPTIONS) / 4)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)
    attacked = model((images + 0.03 * slope.sign()).clamp(0, 1)).argmax(1)
    assert metrics["fgsm 0.03"] == pytest.approx(float((attacked == labels).float().mean()), abs=1e-6)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat):
        first, second = flat[:9408].view(12, 784), flat[9408:].view(10, 12)
        return nn.functional.cross_entropy((images.flatten(1) @ first.T).relu() @ second.T, labels)

    vector = torch.randn_like(weights)
    for _ in range(60):  # the power iteration
        (product,) = torch.autograd.functional.hvp(loss, weights, vector / vector.norm())[1:]
        vector = product
    assert metrics["lambda_max"] == pytest.approx(float(vector.norm()), rel=0.02)


@pytest.mark.parametrize("build", study._MODELS.values(), ids=study._MODELS)
def test_activations_are_counted_in_every_layer_of_every_model(build):
    torch.manual_seed(0)
    model = build()
    images, labels = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    _, curves = measure(model, Split(images, labels, labels, images, labels, 0), seed=0)
    kinds = [type(module).__name__ for module in model.modules()]
    assert len(curves["active"]) == sum(kind in ("ReLU", "GELU", "Residual") for kind in kinds) >= 2
    assert all(0 < share < 1 for share in curves["active"])


def test_the_resnet_and_the_mixer_have_the_shapes_that_they_are_asked_for():
    images = torch.rand(2, 1, 28, 28)
    resnet = small_resnet(8, ((8, 16, 2), (16, 32, 2)), stride=2)
    shapes = [tuple(part(images).shape[1:]) for part in (resnet[:3], resnet[:4], resnet[:5], resnet)]
    assert shapes == [(8, 14, 14), (16, 7, 7), (32, 4, 4), (10,)]
    mixer = Mixer(width=32, depth=2, patch=7)
    assert [layer.across[0].in_features for layer in mixer.layers] == [16, 16]
    shuffled = images.unflatten(2, (4, 7)).flip(2).flatten(2, 3)  # other places of the same patches
    assert not torch.allclose(mixer(images), mixer(shuffled), atol=1e-4)


@pytest.mark.slow
def test_the_quick_form_of_the_command_and_its_continuation(fashion_folder, tmp_path, capsys):
    arguments = ["vision", "--data", str(fashion_folder), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--quick"]) == 0
    rows = Log(tmp_path / "out" / "runs.jsonl").rows
    assert [(row.task, row.optimizer) for row in rows] == [
        (place.task, f"{name}={value:g}")
        for place in study.PLACES.values()
        for name, value in ((f"{place.base}:lr", place.learning_rates[1]), ("sam:rho", 0.1 * place.scale))
    ]
    assert rows[0].examples == {"train": 96, "randomised": 0, "test": 50}
    for row in rows:
        assert row.metrics["lambda_max"] > 0 and all(0 < share < 1 for share in row.curves["active"])
        assert row.curves["train_loss"][0] < 3.5
        corrupted = sum(row.metrics[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
        assert row.metrics["corrupted"] == pytest.approx(corrupted)
    assert [row.settings["lr"] for row in rows] == [0.1, 0.1, 0.003, 0.003, 0.003, 0.003]
    assert (tmp_path / "out" / "vision.png").stat().st_size > 0
    assert main([*arguments, "--epochs", "3"]) == 2
    assert "(epochs, training images, label noise) = (1, 96, 0.0), and (3, 5000, 0.0)" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_are_randomised_on_request(fashion_folder, tmp_path, capsys):
    arguments = ["vision", "--data", str(fashion_folder), "--models", "vit", "--output", str(tmp_path)]
    assert main([*arguments, "--label-noise", "0.5", "--quick"]) == 0
    rows = Log(tmp_path / "runs.jsonl").rows
    assert {(row.label_noise, row.examples["train"]) for row in rows} == {(0.5, 96)}
    assert all(30 < row.examples["randomised"] <= 48 for row in rows)
    assert "96 training images, 50% random labels, 1 epochs" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert main([*arguments, "--epochs", "1", "--train-size", "96"]) == 2
    assert "(1, 96, 0.5), and (1, 96, 0.0) is asked for" in capsys.readouterr().err


def test_the_table_has_differences_from_the_base_and_from_twice_its_epochs(tmp_path, make_row):
    log = open_log(tmp_path)
    accuracies = {"adamw:lr=0.003": (0.80, 0.82), "base-twice:lr=0.003": (0.81, 0.83), "sam:rho=0.1": (0.84, 0.86)}
    for label, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            metrics = {
                "accuracy": accuracy, "train_loss": 0.1, "lambda_max": 5.0, "fgsm 0.01": 0.6, "fgsm 0.03": 0.4,
                "corrupted": 0.5, "active": 0.2, "seconds_per_step": 2.0 if label.startswith("sam") else 1.0,
            }  # fmt: skip
            settings = {"epochs": 15} | ({"compute": 2.0} if label.startswith("base") else {})
            log.add(make_row(label, seed, base="adamw", task="fashion_vit", metrics=metrics, settings=settings,
                             curves={"active": [0.1, 0.3 + 0.1 * seed]}))  # fmt: skip
    study.render(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| sam:rho=0.1 | 2 | 2.00 | 85.0 ± 1.4 | +4.0 [+4.0, +4.0] | +3.0 [+3.0, +3.0] |" in text
    assert "| base-twice:lr=0.003 | 2 | 2.00 | 82.0 ± 1.4 | +1.0 [+1.0, +1.0] |  |" in text
    assert "| sam | 10.0 ± 0.0 | 35.0 ± 7.1 |" in text
