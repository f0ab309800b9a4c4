"""The command line, run as a person runs it; and what results offer beside their value."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from itertools import islice

import pytest
import torch

from samopt import sharpness
from samopt.sharpness._measuring.results import mean_and_error
from samopt.sharpness.cli.command import main
from tests.helpers.cases import batch, mlp
from tests.sharpness.test_sharpness_model import MEASURES, conv_net, images

PROJECT = """
    import torch
    from torch import nn

    NUMBER = 3


    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


    def batches():
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


    def loss(model, batch):
        return model(batch[0]).square().mean()


    def broken(model, batch):
        raise ValueError("my own mistake")


    def nothing():
        return None
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
    save_file(model.state_dict(), "weights.safetensors")
    torch.save(model.state_dict(), "weights.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "checkpoint.pt")
    torch.save(model, "whole.pt")
    torch.save({"2.weight": torch.zeros(3, 12)}, "half.pt")
    (tmp_path / "text.safetensors").write_text("not at all")
    return model


def run(*arguments):
    return main(["--model", "sharpness_project:build", "--data", "sharpness_project:batches", *arguments])


def results(folder="results/sharpness"):
    with open(f"{folder}/results.json", encoding="utf-8") as file:
        return json.load(file)


def test_help_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "samopt.sharpness", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--model", "--weights", "--data", "worst_case", "hessian_eigenvalues", "interpolate"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "weights",
    [
        ["--weights", "weights.safetensors"],
        ["--weights", "weights.pt"],
        ["--weights", "checkpoint.pt", "--key", "state_dict"],
    ],
)
def test_it_measures_what_was_saved(project, weights, capsys):
    assert run(*weights, "--batches", "2", "--measure", "worst_case:rho=0.1:steps=3:adaptive=true", "--no-plots") == 0

    import sharpness_project

    expected = sharpness.worst_case(
        project, sharpness.cross_entropy, islice(sharpness_project.batches(), 2), rho=0.1, steps=3, adaptive=True
    )
    report = results()["results"]["worst_case:rho=0.1:steps=3:adaptive=true"]
    assert report["value"] == expected.value
    assert report["per_batch"] == list(expected.per_batch)
    assert f"{expected.value:.6g}" in capsys.readouterr().out


def test_it_writes_json_and_a_figure_for_each_measure(project, tmp_path):
    measures = ["hessian_trace:samples=2", "per_layer:measure=average_case:samples=1", "interpolate:points=3"]
    chosen = [word for measure in measures for word in ("--measure", measure)]
    assert run(*chosen, "--batches", "1", "--output", "out", "--end", "weights.pt") == 0
    report = results("out")
    assert list(report["results"]) == measures
    assert report["results"]["interpolate:points=3"]["accuracies"] is not None
    assert list(report["results"]["per_layer:measure=average_case:samples=1"]["layers"]) == ["0", "2"]
    assert report["environment"]["torch"] == torch.__version__
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == [
        "hessian_trace-samples-2.png",
        "interpolate-points-3.png",
        "per_layer-measure-average_case-samples-1.png",
    ]
    assert (tmp_path / "out" / figures[0]).read_bytes().startswith(b"\x89PNG")


def test_a_loss_of_ones_own(project):
    assert run("--loss", "sharpness_project:loss", "--measure", "worst_case:steps=1", "--no-plots") == 0
    import sharpness_project

    batches = [next(sharpness_project.batches())]
    assert (
        run("--loss", "sharpness_project:loss", "--measure", "worst_case:steps=1", "--no-plots", "--batches", "1") == 0
    )
    expected = sharpness.worst_case(sharpness_project.build(), sharpness_project.loss, batches, steps=1).value
    assert results()["results"]["worst_case:steps=1"]["value"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "weights.pth"], "there is no file 'weights.pth'"),
        (
            ["--weights", "whole.pt"],
            r"'whole.pt' holds more than tensors .* torch.save\(model.state_dict",
        ),
        (["--weights", "checkpoint.pt"], "holds no state dict at that place, but the keys state_dict; say where"),
        (["--weights", "weights.pt", "--key", "model"], "has no 'model'; it has the keys 0.weight"),
        (["--weights", "half.pt"], r"half.pt does not fit Sequential: .*Missing key.*Check that --model builds"),
        (["--weights", "text.safetensors"], "'text.safetensors' is no valid safetensors file"),
        (["--weights", "sharpness_project.py"], "'sharpness_project.py' "),
        (["--model", "sharpness_project"], "--model must be module:function, got 'sharpness_project'"),
        (["--model", "no_such_module:build"], "--model names the module 'no_such_module', which cannot be found from"),
        (["--model", "sharpness_project:make"], "--model must name a function .* but 'make' is no such name"),
        (["--model", "sharpness_project:NUMBER"], "but 'NUMBER' is int"),
        (["--model", "sharpness_project:nothing"], "must return a torch.nn.Module, got NoneType"),
        (["--data", "sharpness_project:nothing"], "must return an iterable of batches, got NoneType"),
        (["--measure", "worst_cas"], "unknown measure 'worst_cas'; did you mean 'worst_case'"),
        (["--measure", "worst_case:step=3"], "unknown argument of worst_case 'step'; did you mean 'steps'"),
        (["--measure", "worst_case:rho"], "'rho' in 'worst_case:rho' is no argument; write worst_case:rho=VALUE"),
        (["--measure", "worst_case:rho=-1"], "worst_case:rho=-1: rho must be >= 0 and finite, got -1"),
        (["--measure", "per_layer:measure=x"], "unknown measure 'x'"),
        (["--measure", "interpolate"], "interpolate needs the weights to go to; give them with --end FILE"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--loss", "mse"], "--loss must be module:function, got 'mse'"),
        (["--device", "no-device"], "--device 'no-device' cannot be used"),
    ],
)
def test_bad_input_is_explained(project, capsys, arguments, message):
    assert run("--no-plots", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(message, captured.err, flags=re.DOTALL), captured.err


def test_a_mistake_in_ones_own_code_keeps_its_traceback(project):
    with pytest.raises(ValueError, match="my own mistake"):
        run("--loss", "sharpness_project:broken", "--no-plots")


def test_loading_runs_no_code_from_the_file(project, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"0.weight": Payload()}, "evil.pt")
    assert run("--weights", "evil.pt") == 2
    assert not (tmp_path / "ran").exists()
    assert "loading it could run code" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(project, monkeypatch, capsys):
    from samopt.sharpness.cli import requests

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(requests.MEASURES, "hessian_trace", stopped)
    chosen = ["--measure", "worst_case:steps=1", "--measure", "hessian_trace", "--no-plots"]
    assert run(*chosen) == 130
    assert list(results()["results"]) == ["worst_case:steps=1"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("name", MEASURES)
def test_results_go_through_json_and_draw_themselves(name):
    result = MEASURES[name](conv_net(), sharpness.cross_entropy, images())
    content = result.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["measure"] == result.measure
    assert isinstance(content["value"], float)
    figure = result.plot()
    (axes, *_) = figure.get_axes()
    assert axes.has_data()
    assert axes.get_xlabel()
    with pytest.raises(AttributeError):
        result.value = 1.0  # frozen


def test_label_sharpness_draws_itself():
    result = sharpness.label_sharpness(*batch())
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.plot().get_axes()[0].has_data()


def test_drawing_leaves_pyplot_alone():
    code = """
        import sys, torch
        from samopt import sharpness
        model = torch.nn.Linear(2, 2)
        data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
        sharpness.worst_case(model, sharpness.cross_entropy, data, steps=2).plot()
        print("matplotlib.pyplot" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_importing_the_measures_loads_neither_scipy_nor_matplotlib():
    code = """
        import sys, torch
        before = set(sys.modules)
        from samopt import sharpness
        sharpness.worst_case
        extra = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(extra & {"scipy", "matplotlib", "tqdm", "transformers", "safetensors", "pandas"}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("scipy", lambda: sharpness.hessian_eigenvalues(mlp(), sharpness.cross_entropy, [batch()])),
        ("scipy", lambda: sharpness.spectral_density(mlp(), sharpness.cross_entropy, [batch()])),
        ("matplotlib", lambda: sharpness.label_sharpness(*batch()).plot()),
        ("tqdm", lambda: sharpness.worst_case(mlp(), sharpness.cross_entropy, [batch()], progress=True)),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, package, use):
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, which is not installed.*samopt\[sharpness\]"):
        use()


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert sharpness.worst_case(mlp(), sharpness.cross_entropy, [batch()]).value > 0


@pytest.mark.parametrize("measure", ["worst_case", "hessian_eigenvalues"])
def test_a_bar_is_shown_where_asked_for(capsys, measure):
    MEASURES[measure](conv_net(), sharpness.cross_entropy, images(), progress=True)
    assert measure.replace("_", " ").split()[-1] in capsys.readouterr().err.replace("-", " ")
    MEASURES[measure](conv_net(), sharpness.cross_entropy, images(), progress=None)
    assert capsys.readouterr().err == ""  # no terminal


def test_means_and_their_errors():
    assert mean_and_error([2.0]) == (2.0, None)
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    mean, error = mean_and_error([1e8 + 1, 1e8 + 2, 1e8 + 3])
    assert (mean, error) == (1e8 + 2, pytest.approx(math.sqrt(1 / 3)))
