"""Plots have a title with the model's name, labelled axes, and as many colours as lines."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from samopt import sharpness
from samopt.sharpness._measuring.style import colors, new_figure
from tests.sharpness.test_sharpness_model import MEASURES, conv_net, images


@pytest.mark.parametrize("name", MEASURES)
def test_a_plot_has_a_title_with_the_models_name_and_labelled_axes(name):
    figure = MEASURES[name](conv_net(), sharpness.cross_entropy, images()).plot()
    axes = figure.axes[0]
    assert axes.get_title().endswith(": Sequential")
    assert axes.get_xlabel() and (axes.get_ylabel() or [t.get_text() for t in axes.get_yticklabels()])
    figure.canvas.draw()


def test_a_plot_takes_a_title():
    result = sharpness.worst_case(conv_net(), sharpness.cross_entropy, images(), steps=2)
    assert result.plot("two epochs").axes[0].get_title() == "two epochs"


def test_eigenvalues_are_marks_on_an_axis_and_no_block():
    figure = sharpness.hessian_eigenvalues(conv_net(), sharpness.cross_entropy, images(), k=3).plot()
    axes = figure.axes[0]
    assert not axes.patches
    marks = next(line for line in axes.lines if line.get_marker() == "|" and len(line.get_xdata()) == 3)
    assert "eigenvalue" in axes.get_xlabel() and list(marks.get_xdata()) == sorted(marks.get_xdata(), reverse=True)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 40])
def test_no_two_lines_share_a_colour(count):
    assert len(set(colors(count))) == count


def test_many_layers_have_as_many_colours():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    end = {name: -value for name, value in model.state_dict().items()}
    data = [(torch.randn(8, 4), torch.randint(4, (8,)))]
    result = sharpness.interpolate(model, nn.CrossEntropyLoss(), data, end, points=3, per_layer=True)
    lines = [line for line in result.plot().axes[0].lines if not line.get_label().startswith("_")]
    assert len(lines) >= 12 and len({line.get_color() for line in lines}) == len(lines)


OVERLAID = {
    "worst_case": partial(sharpness.worst_case, steps=3),
    "average_case": partial(sharpness.average_case, samples=2),
    "per_layer": partial(sharpness.per_layer, steps=1),
    "hessian_eigenvalues": sharpness.hessian_eigenvalues,
    "hessian_trace": partial(sharpness.hessian_trace, samples=3),
    "spectral_density": partial(sharpness.spectral_density, steps=3, samples=1),
    "landscape": partial(sharpness.landscape, points=3),
}


@pytest.mark.parametrize("name", OVERLAID)
def test_results_of_two_models_share_a_panel(name):
    figure, axes = new_figure()
    for label, color in zip(("first", "second"), colors(2), strict=True):
        OVERLAID[name](conv_net(), sharpness.cross_entropy, images()).draw(axes, label=label, color=color)
    figure.canvas.draw()
    named = [text for _, texts in [axes.get_legend_handles_labels()] for text in texts]
    named += [text.get_text() for text in axes.get_yticklabels()]
    assert any(text.startswith("first") for text in named) and any(text.startswith("second") for text in named)
