"""The command line, run as a person runs it: what it loads, what it writes, and what it says to bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from samopt import sharpness
from samopt.sharpness.cli import measures as cli_measures
from samopt.sharpness.cli.command import main

PROJECT = """
    import torch
    from torch import nn

    NUMBER = 3


    class Classifier(nn.Sequential):
        def __init__(self, width=12):
            torch.manual_seed(0)
            super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


    def build():
        return Classifier()


    MODEL = Classifier()


    def batches(size=16):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


    def others():
        return [(-x, y) for x, y in [next(batches())]]


    LIST = [next(batches())]


    def loss(model, batch):
        return model(batch[0]).square().mean()


    def broken(model, batch):
        raise ValueError("my own mistake")


    def nothing():
        return None


    def empty():
        return []


    def pair():
        return next(batches())


    def mapping():
        return dict(zip(("inputs", "labels"), pair()))


    def data_set():
        return torch.utils.data.TensorDataset(*pair())
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a module, and weights in every form that people save."""
    (tmp_path / "sharpness_project.py").write_text(textwrap.dedent(PROJECT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sharpness_project", raising=False)
    import sharpness_project
    from safetensors.torch import save_file

    model = sharpness_project.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    state = model.state_dict()
    save_file(state, "weights.safetensors")
    torch.save(state, "weights.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, "checkpoint.pt")
    torch.save({"epoch": 3, "model": {f"_orig_mod.{k}": v for k, v in state.items()}, "path": Path("x")}, "train.pth")
    torch.save({f"net.inner.{k}": v for k, v in state.items()} | {"metric.total": torch.zeros(1)}, "prefixed.pt")
    torch.save({"model": state, "ema": {k: v * 0.5 for k, v in state.items()}}, "two.pt")
    torch.save(model, "whole.pt")
    torch.save({"2.weight": torch.zeros(3, 12)}, "half.pt")
    torch.save({k: v[:2] for k, v in state.items()}, "shapes.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"optimizer_states": [{"state": {}, "param_groups": []}] * 2}, "two_states.pt")
    torch.save({k: v * 0.1 for k, v in state.items()}, "other.pt")
    (tmp_path / "text.safetensors").write_text("not at all")
    (tmp_path / "text.pt").write_text("not at all")
    (tmp_path / "empty.pt").write_text("")
    (tmp_path / "folder").mkdir()
    return model


COMMON = ["--model", "sharpness_project:build", "--data", "sharpness_project:batches", "--batches", "2"]
QUICK = ["--measures", "worst_case", "--worst_case.steps", "3", "--plots", "false"]


def run(command, *arguments):
    return main([command, *COMMON, *arguments])


def results(folder="results/sharpness", file="results.json"):
    with open(f"{folder}/{file}", encoding="utf-8") as opened:
        return json.load(opened)


def data(count=2):
    import sharpness_project

    return list(islice(sharpness_project.batches(), count))


def test_help_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "samopt.sharpness", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "measure" in done.stdout and "compare" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "samopt.sharpness", "measure", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("--model", "--weights", "--data", "--config", "--print_config", "--hessian_eigenvalues.k"):
        assert word in done.stdout


SAME = ["weights.safetensors", "weights.pt", "checkpoint.pt", "train.pth", "prefixed.pt", "whole.pt"]


@pytest.mark.parametrize("weights", SAME)
def test_it_measures_what_was_saved(project, weights, capsys):
    assert run("measure", "--weights", weights, *QUICK, "--worst_case.adaptive", "true") == 0
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3, adaptive=True)
    (report,) = results()["results"].values()
    assert report["worst_case"]["value"] == expected.value
    assert report["worst_case"]["per_batch"] == list(expected.per_batch)
    assert f"{expected.value:.6g}" in capsys.readouterr().out


def test_a_key_chooses_among_several_weights(project):
    assert run("measure", "--weights", "two.pt", "--key", "ema", *QUICK) == 0
    with torch.no_grad():
        for parameter in project.parameters():
            parameter.mul_(0.5)
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3)
    assert results()["results"]["two"]["worst_case"]["value"] == expected.value


def modules(state):
    """A checkpoint of a module that holds two networks of the same shape, the second one all zeros."""
    student = {f"student.{name}": tensor for name, tensor in state.items()}
    return {"state_dict": student | {f"teacher.{name}": tensor * 0 for name, tensor in state.items()}}


def test_a_prefix_chooses_among_several_networks(project, capsys):
    """The shorter prefix was taken, and nothing said so."""
    torch.save(modules(project.state_dict()), "distilled.ckpt")
    assert run("measure", "--weights", "distilled.ckpt", *QUICK) == 2
    places = "2 sets of weights that fit, at state_dict.student, state_dict.teacher; choose with --key"
    assert places in capsys.readouterr().err
    assert run("measure", "--weights", "distilled.ckpt", "--key", "state_dict.student", *QUICK) == 0
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3)
    assert results()["results"]["distilled"]["worst_case"]["value"] == expected.value
    assert run("measure", "--weights", "distilled.ckpt", "--key", "state_dict.absent", *QUICK) == 2
    assert "has no 'state_dict.absent'; it has the keys student.0.weight" in capsys.readouterr().err


def test_of_prefixes_those_count_whose_shapes_fit_and_equal_weights_are_one(project):
    state = project.state_dict()
    wider = {f"backbone.{name}": torch.zeros(5, 5) for name in state}
    alias = {f"{name}.{key}": tensor for name in ("net", "module.net") for key, tensor in state.items()}
    torch.save({"state_dict": wider | alias}, "aliases.ckpt")
    assert run("measure", "--weights", "aliases.ckpt", *QUICK) == 0
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3)
    assert results()["results"]["aliases"]["worst_case"]["value"] == expected.value


def test_a_whole_pickled_model_has_buffers_that_no_state_dict_has(project):
    project.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(project, "scratch.pt")
    assert run("measure", "--weights", "scratch.pt", *QUICK) == 0
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3)
    assert results()["results"]["scratch"]["worst_case"]["value"] == expected.value


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: (tensor * 100).to(torch.int8), "torch.int8"),
        (lambda tensor: tensor.to(torch.complex64) * 1j, "torch.complex64"),
    ],
)
def test_numbers_that_a_copy_would_change_are_refused(project, capsys, change, found):
    torch.save({name: change(tensor) for name, tensor in project.state_dict().items()}, "codes.pt")
    assert run("measure", "--weights", "codes.pt", *QUICK) == 2
    assert f"'0.weight' holds {found} numbers, and the model's are torch.float32. Give deq" in capsys.readouterr().err


def test_files_of_one_folder_that_disagree_are_refused(project, capsys):
    from safetensors.torch import save_file

    state = project.state_dict()
    save_file(state, "folder/model.safetensors")
    save_file({"0.bias": state["0.bias"], "0.weight": state["0.weight"]}, "folder/model-00001-of-00002.safetensors")
    assert run("measure", "--weights", "folder", *QUICK) == 0
    save_file({"0.bias": state["0.bias"] + 1}, "folder/model-00001-of-00002.safetensors")
    assert run("measure", "--weights", "folder", *QUICK) == 2
    assert "the files of the folder 'folder' hold different weights under 0.bias" in capsys.readouterr().err


@pytest.mark.lightning
def test_a_checkpoint_of_lightning(project):
    import sharpness_project
    from pytorch_lightning import LightningModule, Trainer

    class Lit(LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"where": Path("x")})
            self.net = sharpness_project.build()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=3, enable_checkpointing=False, **options)
    module = Lit()
    trainer.fit(module, torch.utils.data.DataLoader(data(3), batch_size=None))
    trainer.save_checkpoint("lit.ckpt")
    adam = ["--optimizer", "AdamW", "--optimizer_args.lr", "0.01", "--optimizer_state", "lit.ckpt"]
    assert run("measure", "--weights", "lit.ckpt", "--measures", "worst_case", "preconditioned_eigenvalues", *adam) == 0
    net = module.net.cpu()
    expected = sharpness.worst_case(net, sharpness.cross_entropy, data()).value
    found = results()["results"]["lit"]
    assert found["worst_case"]["value"] == expected
    edge = sharpness.preconditioned_eigenvalues(net, sharpness.cross_entropy, data(), trainer.optimizers[0])
    assert found["preconditioned_eigenvalues"]["value"] == pytest.approx(edge.value)
    assert found["preconditioned_eigenvalues"]["threshold"] == pytest.approx(edge.threshold)


TRANSFORMERS = """
    import torch

    def text():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 50, (4, 7), generator=generator)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}]

    def images():
        generator = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 1, 0])}]
"""


@pytest.mark.hf
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_folder_of_transformers(tmp_path, monkeypatch, kind):
    import transformers

    (tmp_path / "hf_project.py").write_text(textwrap.dedent(TRANSFORMERS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hf_project", raising=False)
    import hf_project

    torch.manual_seed(0)
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_labels": 2,
    }
    if kind == "text":
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **small)
        model = transformers.BertForSequenceClassification(config)
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **small))
    model.eval().save_pretrained("saved")
    arguments = ["--data", f"hf_project:{kind}", *QUICK]
    expected = sharpness.worst_case(model, sharpness.hf_loss, getattr(hf_project, kind)(), steps=3).value
    for where in (["--weights", "saved"], ["--model", "saved"], ["--model", "saved", "--weights", "saved"]):
        assert main(["measure", *where, *arguments]) == 0
        assert results()["results"]["saved"]["worst_case"]["value"] == pytest.approx(expected, rel=1e-6)
    if kind == "text":
        assert main(["measure", "--weights", "saved", "--model_args", "{dtype: float64}", *arguments]) == 0
        wide = sharpness.worst_case(model.double(), sharpness.hf_loss, hf_project.text(), steps=3).value
        assert results()["results"]["saved"]["worst_case"]["value"] == wide != expected
        model.float()
    assert main(["measure", "--weights", "saved", "--model_args", "{widths: 3}", *arguments]) == 2
    torch.save({"state_dict": {f"model.{k}": v * 0 for k, v in model.state_dict().items()}}, "zero.ckpt")
    assert main(["measure", "--model", "saved", "--weights", "zero.ckpt", *arguments]) == 0
    os.remove("saved/model.safetensors")
    state = model.state_dict()
    torch.save({k: v for k, v in state.items() if "classifier" not in k}, "saved/pytorch_model.bin")
    assert main(["measure", "--weights", "saved", *arguments]) == 2  # its head would be random


@pytest.mark.hf
def test_language_models_are_compared_without_an_accuracy_which_their_labels_do_not_have(tmp_path, monkeypatch, capsys):
    import transformers

    (tmp_path / "language_project.py").write_text(
        "import torch\n\ntokens = torch.arange(48).view(4, 12) % 20\n"
        "batches = [{'input_ids': tokens, 'labels': tokens}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = transformers.GPT2Config(vocab_size=20, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    for name in ("one", "two"):
        transformers.GPT2LMHeadModel(config).save_pretrained(name)
    chosen = ["--data", "language_project:batches", "--measures", "average_case", "--output", "out"]
    assert main(["compare", "--weights", "one", "two", *chosen]) == 0
    assert list(results("out", "comparison.json")["results"]) == ["loss", "average_case"]
    chosen[3] = "quantization"
    assert main(["measure", "--weights", "one", *chosen]) == 0
    assert results("out")["results"]["one"]["quantization"]["accuracies"] is None


def test_every_measure_can_be_asked_for(project, tmp_path):
    chosen = [name for name in cli_measures.MEASURES if name != "interpolate"]
    options = ["--hessian_trace.samples", "2", "--spectral_density.steps", "3", "--landscape.points", "3"]
    options += [
        "--per_layer.measure",
        "average_case",
        "--per_layer.options.samples",
        "1",
    ]
    options += ["--optimizer", "SGD", "--optimizer_args.lr", "0.1", "--elsewhere", "sharpness_project:others"]
    options += ["--intrinsic_dimension.neighbours", "5", "--output", "out"]
    assert run("measure", "--weights", "weights.pt", "--measures", *chosen, *options) == 0
    report = results("out")
    of_data = {"label_sharpness", "intrinsic_dimension"}
    assert list(report["results"]["weights"]) == [name for name in chosen if name not in of_data]
    assert set(report["results"]["data"]) == of_data
    assert list(report["results"]["weights"]["per_layer"]["layers"]) == ["0", "2"]
    assert report["results"]["weights"]["quantization"]["accuracies"] is not None
    assert report["environment"]["torch"] == torch.__version__
    figures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert figures == sorted([*(f"{name}.png" for name in chosen), "results.json"])
    assert (tmp_path / "out" / "worst_case.png").read_bytes().startswith(b"\x89PNG")


def test_several_weights_are_measured_side_by_side(project):
    chosen = ["--measures", "interpolate", "worst_case", "--interpolate.points", "3"]
    assert run("measure", "--weights", "weights.pt", "other.pt", *chosen) == 0
    report = results()["results"]
    assert list(report) == ["weights to other", "weights", "other"]
    assert report["weights to other"]["interpolate"]["accuracies"] is not None
    files = sorted(path.name for path in Path("results/sharpness").glob("*.png"))
    assert files == ["other-worst_case.png", "weights-to-other-interpolate.png", "weights-worst_case.png"]


def test_one_measure_may_be_asked_for_with_several_options(project):
    twice = ["--measures", "worst_case", "{worst_case: {rho: 0.5, adaptive: true}}", "--worst_case.steps", "2"]
    assert run("measure", "--weights", "weights.pt", *twice) == 0
    found = results()["results"]["weights"]
    assert list(found) == ["worst_case", "worst_case rho=0.5 adaptive=True"]
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), rho=0.5, adaptive=True, steps=2)
    assert found["worst_case rho=0.5 adaptive=True"]["value"] == expected.value


def test_a_printed_config_runs_again(project, capsys):
    arguments = ["--weights", "weights.pt", *QUICK]
    assert run("measure", *arguments) == 0
    expected = results()["results"]["weights"]["worst_case"]["value"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("measure", *arguments, "--print_config")
    Path("run.yaml").write_text(capsys.readouterr().out)
    assert main(["measure", "--config", "run.yaml", "--output", "again"]) == 0
    assert results("again")["results"]["weights"]["worst_case"]["value"] == expected


def test_compare_writes_a_table_a_verdict_and_a_plot(project, capsys):
    chosen = ["--measures", "worst_case", "{lambda_max: {tolerance: 0.1}}", "--output", "out"]
    assert run("compare", "--weights", "weights.pt", "other.pt", "--names", "large", "small", *chosen) == 0
    report = results("out", "comparison.json")
    assert report["models"] == ["large", "small"]
    assert list(report["results"]) == ["loss", "accuracy", "worst_case", "lambda_max"]
    assert report["verdict"] in capsys.readouterr().out
    assert report["verdict"] in Path("out/comparison.txt").read_text()
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_find_rho_writes_what_it_chose_from(project, capsys):
    import sharpness_project

    short = ["--radii", "[0.05, 0.5]", "--steps", "5", "--batches", "8", "--output", "out"]
    base = ["--optimizer", "SGD", "--optimizer_args.lr", "0.1"]
    assert run("find_rho", "--as_built", "true", *base, *short) == 0
    model = sharpness_project.build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = sharpness.find_rho(model, sharpness.cross_entropy, data(8), optimizer=sgd, radii=[0.05, 0.5], steps=5)
    report = results("out", "find_rho.json")
    assert report["gains"] == list(expected.gains) and report["rho"] == expected.rho
    assert expected.advice in capsys.readouterr().out
    assert Path("out/find_rho.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "sharpness_project:Classifier", "--weights", "weights.pt"],
        ["--model", "sharpness_project:MODEL", "--weights", "weights.pt"],
        ["--model", "sharpness_project:Classifier", "--model_args.width", "12", "--weights", "weights.pt"],
        ["--model", "sharpness_project:build", "--as_built", "true"],
        ["--data", "sharpness_project:LIST", "--weights", "weights.pt"],
        ["--data", "sharpness_project:batches", "--data_args.size", "4", "--weights", "weights.pt"],
        ["--loss", "sharpness_project:loss", "--weights", "weights.pt"],
        ["--loss", "torch.nn:CrossEntropyLoss", "--weights", "weights.pt"],
        ["--loss", "torch.nn.functional:cross_entropy", "--weights", "weights.pt"],
    ],
)
def test_models_data_and_losses_by_name(project, arguments):
    assert run("measure", *QUICK, *arguments) == 0


def test_a_loss_of_ones_own(project):
    assert run("measure", "--weights", "weights.pt", "--loss", "sharpness_project:loss", *QUICK) == 0
    import sharpness_project

    expected = sharpness.worst_case(project, sharpness_project.loss, data(), steps=3).value
    assert results()["results"]["weights"]["worst_case"]["value"] == expected


ADAM = ["--measures", "preconditioned_eigenvalues", "--optimizer", "Adam", "--optimizer_state"]
BAD = [
    (["--weights", "weights.pth"], "there is no file 'weights.pth'"),
    (["--weights", "weights.pt", "weights.pt"], "the same weights are given twice"),
    (["--weights", "list.pt"], "holds no state dict, but an object of type list"),
    (["--weights", "two.pt"], "2 sets of weights that fit, at model, ema; choose with --key"),
    (["--weights", "weights.pt", "--key", "model"], "has no 'model'; it has the keys 0.weight"),
    (["--weights", "half.pt"], r"'half.pt' does not fit Classifier: it lacks 0.weight, 0.bias, 2.bias\. Check that"),
    (["--weights", "shapes.pt"], r"'shapes.pt' does not fit Classifier: .*size mismatch"),
    (["--weights", "prefixed.pt", "--model_args.width", "4", "--model", "sharpness_project:Classifier"], "not fit"),
    (["--weights", "text.safetensors"], "'text.safetensors' is no valid safetensors file"),
    (["--weights", "text.pt"], "'text.pt' is no file of weights that torch.save wrote"),
    (["--weights", "empty.pt"], "'empty.pt' is no file of weights that torch.save wrote"),
    (["--weights", "folder"], "the folder 'folder' holds neither safetensors nor .bin files"),
    (["--weights", "x" * 5000], "cannot be read: File name too long|there is no file"),
    ([], "there are no weights to measure; give --weights FILE, or --as_built true"),
    (["--weights", "weights.pt", "--as_built", "true"], "give one of the two"),
    (["--as_built", "true", "--model", "sharpness_project"], "--model must be module:name, got 'sharpness_project'"),
    (["--as_built", "true", "--model", "no_such_module:build"], "'no_such_module', which cannot be found from"),
    (["--as_built", "true", "--model", ".:build"], "names no module|cannot be found"),
    (["--as_built", "true", "--model", "sharpness_project:make"], "names 'make' in 'sharpness_project', which has no"),
    (["--as_built", "true", "--model", "sharpness_project:NUMBER"], "must be a class or a function, got int"),
    (["--as_built", "true", "--model", "sharpness_project:nothing"], "must return a torch.nn.Module, got NoneType"),
    (["--as_built", "true", "--model_args.depth", "3"], "cannot be called: .*depth.*; give its arguments with"),
    (["--weights", "weights.pt", "--names", "a", "b"], "--names must be 1 different names"),
    (
        ["--weights", "weights.pt", "--data", "sharpness_project:nothing"],
        "must return an iterable of batches, got None",
    ),
    (["--weights", "weights.pt", "--data", "sharpness_project:empty"], "gave no batch"),
    (
        ["--weights", "weights.pt", "--data", "sharpness_project:pair"],
        "got a single batch .tensors.; put it into a list",
    ),
    (["--weights", "weights.pt", "--data", "sharpness_project:mapping"], "got a single batch .dict.; put it into"),
    (["--weights", "weights.pt", "--data", "sharpness_project:data_set"], "got the data set TensorDataset, whose entr"),
    (
        ["--weights", "weights.pt", "--data", "sharpness_project:LIST", "--data_args.size", "3"],
        "--data sharpness_project:LIST is list, no function, so --data_args would do nothing",
    ),
    (
        ["--weights", "weights.pt", "--model", "sharpness_project:MODEL", "--model_args.width", "3"],
        "is a Classifier that is built already, so --model_args would do nothing",
    ),
    (["--weights", "weights.pt", *ADAM, "two_states.pt"], "'two_states.pt' holds 2 state dicts of an optimizer"),
    (["--weights", "weights.pt", *ADAM, "weights.pt"], "'weights.pt' holds no state dict of an optimizer"),
    (["--weights", "weights.pt", "--measures", "worst_cas"], "unknown measure 'worst_cas'; did you mean 'worst_case'"),
    (["--weights", "weights.pt", "--measures", "{worst_case: {step: 3}}"], "unknown argument .*did you mean 'steps'"),
    (["--weights", "weights.pt", "--measures", "{worst_case: {steps: x}}"], "worst_case: .*steps.*[Ee]xpected"),
    (["--weights", "weights.pt", "--measures", "{worst_case: 3}"], "a measure is a name, or a name with options"),
    (["--weights", "weights.pt", "--measures", "worst_case", "worst_case"], "asked for twice"),
    (["--weights", "weights.pt", "--worst_case.step", "3"], "step"),
    (["--weights", "weights.pt", "--worst_case.rho", "-1"], "worst_case: rho must be >= 0 and finite, got -1"),
    (["--weights", "weights.pt", "--worst_case.rho", "nan"], "worst_case.rho"),
    (["--weights", "weights.pt", "--worst_case.rho", "inf"], "worst_case.rho"),
    (["--weights", "weights.pt", "--worst_case.rho", "much"], "worst_case.rho"),
    (["--weights", "weights.pt", "--worst_case.steps", "inf"], "worst_case.steps"),
    (["--weights", "weights.pt", "--worst_case.steps", "0"], "steps must be at least 1, got 0"),
    (["--weights", "weights.pt", "--hessian_eigenvalues.k", "nan"], "hessian_eigenvalues.k"),
    (["--weights", "weights.pt", "--worst_case.seed", "x"], "worst_case.seed"),
    (["--weights", "weights.pt", "--worst_case.norm", "l3"], 'norm must be "l2" or "linf"'),
    (["--weights", "weights.pt", "--worst_case.m", "0"], "m must be at least 1"),
    (["--weights", "weights.pt", "--worst_case.parameters", "nowhere"], "selects none of the"),
    (["--weights", "weights.pt", "--mode", "test"], "mode must be"),
    (["--weights", "weights.pt", "--measures", "per_layer", "--per_layer.measure", "x"], "unknown measure 'x'"),
    (["--weights", "weights.pt", "--measures", "interpolate"], "goes from one model to another; give two --weights"),
    (["--weights", "weights.pt", "--measures", "forgetting"], "name it with --elsewhere"),
    (["--weights", "weights.pt", "--measures", "preconditioned_eigenvalues"], "name it with --optimizer SGD"),
    (["--weights", "weights.pt", "--optimizer", "Nadamax"], "is none of torch.optim's"),
    (["--weights", "weights.pt", "--batches", "0"], "--batches must be at least 1, got 0"),
    (["--weights", "weights.pt", "--batches", "many"], "batches"),
    (["--weights", "weights.pt", "--loss", "mse"], "--loss must be module:name, got 'mse'"),
    (
        ["--weights", "weights.pt", "--loss", "sharpness_project:NUMBER"],
        "--loss sharpness_project:NUMBER: loss_fn must",
    ),
    (["--weights", "weights.pt", "--device", "no-device"], "--device 'no-device' cannot be used"),
    (["--weights", "weights.pt", "--device", "meta"], "--device meta holds no numbers"),
    (["--weights", "weights.pt", "--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
    (["--weights", "weights.pt", "--output", "weights.pt"], "--output 'weights.pt' cannot be made"),
    (["--weights", "weights.pt", "--output", "weights.pt/below"], "--output 'weights.pt/below' cannot be made"),
    (["--weights", "weights.pt", "--output", "x" * 5000], "cannot be made: File name too long"),
    (["--weights", "weights.pt", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--weights", "weights.pt", "--unknown", "3"], "unknown"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_one_line(project, capsys, arguments, message):
    quick = [] if any(word in ("--measures", "--hessian_eigenvalues.k") for word in arguments) else QUICK[:2]
    assert run("measure", "--plots", "false", *quick, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert re.search(message, captured.err), captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["see"], "invalid choice: 'see'"),
        (["measure"], "data"),
        (["compare", *COMMON, "--weights", "weights.pt"], "needs at least 2 --weights, got 1"),
        (["find_rho", *COMMON, "--weights", "weights.pt"], "optimizer"),
        (
            ["find_rho", *COMMON, "--weights", "weights.pt", "--optimizer", "SGD", "--optimizer_args.l", "1"],
            "SGD cannot",
        ),
        (["find_rho", *COMMON, "--weights", "weights.pt", "--optimizer", "SGD", "--mode", "train"], "mode"),
        (["find_rho", *COMMON, "--weights", "weights.pt", "--optimizer", "SGD", "--elsewhere", "x:y"], "elsewhere"),
        (["compare", *COMMON, "--weights", "weights.pt", "other.pt", "--measures", "x"], "a measure must be one of"),
        (["compare", *COMMON, "--weights", "weights.pt", "other.pt", "--measures", "trace", "trace"], "twice"),
    ],
)
def test_bad_commands_are_one_line(project, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert re.search(message, captured.err), captured.err


def test_a_mistake_in_ones_own_code_keeps_its_traceback(project):
    with pytest.raises(ValueError, match="my own mistake"):
        run("measure", "--weights", "weights.pt", "--loss", "sharpness_project:broken", *QUICK)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_loading_runs_no_code_from_the_file(project, tmp_path, legacy):
    state = project.state_dict()
    ran = str(tmp_path / "ran")
    content = {"state_dict": state, "hyper_parameters": Payload(ran), "callbacks": [Payload(ran)]}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=not legacy)
    assert run("measure", "--weights", "evil.pt", *QUICK) == 0
    assert not Path(ran).exists()
    expected = sharpness.worst_case(project, sharpness.cross_entropy, data(), steps=3).value
    assert results()["results"]["evil"]["worst_case"]["value"] == expected


def test_an_interrupt_keeps_what_was_measured(project, monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli_measures.MEASURES, "hessian_trace", stopped)
    stopped.__signature__ = __import__("inspect").signature(sharpness.hessian_trace)
    assert run("measure", "--weights", "weights.pt", "--measures", "worst_case", "hessian_trace") == 130
    assert list(results()["results"]["weights"]) == ["worst_case"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(project, monkeypatch, capsys, kind):
    assert run("measure", "--weights", "weights.pt", *QUICK) == 0
    before = Path("results/sharpness/results.json").read_bytes()

    def fail(*arguments):
        raise kind

    monkeypatch.setattr(os, "fsync", fail)
    assert run("measure", "--weights", "other.pt", *QUICK) == (2 if isinstance(kind, OSError) else 130)
    assert Path("results/sharpness/results.json").read_bytes() == before
    assert [path.name for path in Path("results/sharpness").iterdir()] == ["results.json"]


def test_without_jsonargparse_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["--help"]) == 2
    assert re.search(r"needs jsonargparse.*samopt\[sharpness\]", capsys.readouterr().err)
