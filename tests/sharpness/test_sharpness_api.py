"""The names of ``samopt.sharpness`` are the ones listed here, explain themselves, and are explained in the docs."""

from __future__ import annotations

import inspect
import re

import pytest

from samopt import sharpness
from samopt.sharpness.cli.command import main
from tests.helpers.pages import REPOSITORY, read

MEASURES = [
    "active_units",
    "average_case",
    "fgsm",
    "forgetting",
    "gauss_newton_eigenvalues",
    "hessian_eigenvalues",
    "hessian_trace",
    "interpolate",
    "intrinsic_dimension",
    "label_sharpness",
    "landscape",
    "per_layer",
    "preconditioned_eigenvalues",
    "quantization",
    "spectral_density",
    "weight_noise",
    "worst_case",
]
RESULTS = [
    "ActiveUnits",
    "AverageCase",
    "Eigenvalues",
    "Forgetting",
    "Interpolation",
    "IntrinsicDimension",
    "LabelSharpness",
    "Landscape",
    "PerLayer",
    "Result",
    "Robustness",
    "SpectralDensity",
    "Trace",
    "WorstCase",
]
OTHERS = [
    "Comparison",
    "RhoSearch",
    "SharpnessMonitor",
    "WarmStart",
    "compare",
    "find_rho",
    "accuracy",
    "cross_entropy",
    "hf_loss",
    "normalize_logits",
]


def test_the_public_names_are_the_listed_ones():
    assert sorted(sharpness.__all__) == sorted(MEASURES + RESULTS + OTHERS)


@pytest.mark.parametrize("name", MEASURES + RESULTS + OTHERS)
def test_every_name_is_in_the_reference(name):
    page = (REPOSITORY / "docs" / "api" / "sharpness.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: samopt\.sharpness\.{name}$", page, flags=re.MULTILINE)


@pytest.mark.parametrize("name", MEASURES)
def test_the_guide_shows_every_measure_and_its_docstring_says_where_it_misleads(name):
    examples = [block.source for block in read(REPOSITORY / "docs" / "sharpness.md") if block.language == "python"]
    assert any(f"sharpness.{name}(" in source for source in examples)
    docstring = inspect.getdoc(getattr(sharpness, name)) or ""
    assert re.search(r"^Misleads: ", docstring, flags=re.MULTILINE)
    assert re.search(r"``[^`]*[=*(^|<][^`]*``", docstring), "no equation"


def test_the_page_gives_the_cost_of_every_measure():
    lines = (REPOSITORY / "docs" / "sharpness.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| [`")]
    costs = {name: row.split("|")[3].strip() for row in rows for name in re.findall(r"\[`(\w+)`\]", row)}
    assert sorted(costs) == MEASURES
    assert all(costs.values())


@pytest.mark.parametrize("name", [*MEASURES, "SharpnessMonitor"])
def test_a_docstring_describes_every_argument_and_the_cost(name):
    public = getattr(sharpness, name)
    docstring = inspect.getdoc(public) or ""
    described = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \(.+\))?:", docstring, flags=re.MULTILINE))
    assert set(inspect.signature(public).parameters) <= described
    assert ">>> " in docstring
    if name in MEASURES:
        assert re.search(r"^Cost(?: and memory)?: ", docstring, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("intrinsic_dimension", "label_sharpness")])
def test_measures_of_models_share_their_first_arguments(name):
    parameters = list(inspect.signature(getattr(sharpness, name)).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["model", "loss_fn", "batches"]


@pytest.mark.parametrize("page", ["sharpness", "compare-models", "choose-rho"])
def test_a_page_uses_only_options_that_the_command_has(page, capsys):
    blocks = [block.source for block in read(REPOSITORY / "docs" / f"{page}.md")]
    commands = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "-m samopt.sharpness" in line
    ]
    assert commands
    for command in commands:
        with pytest.raises(SystemExit):
            main([command.split("-m samopt.sharpness")[1].split()[0], "--help"])
        known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[\w.-]+", command)) <= known
