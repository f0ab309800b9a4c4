"""What results offer beside their value, and which packages they need."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap

import pytest

from samopt import sharpness
from samopt.sharpness._measuring.results import mean_and_error
from tests.helpers.cases import batch, mlp
from tests.sharpness.test_sharpness_model import MEASURES, conv_net, images


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


def test_the_error_of_values_whose_squares_overflow_is_a_number():
    assert mean_and_error([0.0, 2e200]) == pytest.approx((1e200, 1e200))
