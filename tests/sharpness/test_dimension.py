"""The intrinsic dimension, against loops over all pairs and clouds of known dimension."""

from __future__ import annotations

import math

import pytest
import torch

from samopt import sharpness


def cloud(dimension, count, space=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    frame, _ = torch.linalg.qr(torch.randn(space, dimension, generator=generator, dtype=torch.float64))
    return inner @ frame.T


def sorted_distances(points):
    return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i) for i, p in enumerate(points)]


def test_mle_is_the_formula_over_all_pairs():
    points = cloud(3, 60)
    k = 7
    inverse = [
        sum(math.log(row[k - 1] / row[j]) for j in range(k - 1)) / (k - 1) for row in sorted_distances(points.tolist())
    ]
    result = sharpness.intrinsic_dimension(points, neighbours=k)
    assert result.value == pytest.approx(60 / sum(inverse), rel=1e-9)
    assert sorted(result.per_point) == pytest.approx(sorted(inverse), rel=1e-9)


def test_twonn_is_the_line_through_all_pairs():
    points = cloud(2, 50)
    logs = sorted(math.log(row[1] / row[0]) for row in sorted_distances(points.tolist()))[:45]
    heights = [-math.log(1 - i / 50) for i in range(45)]
    slope = sum(a * b for a, b in zip(logs, heights, strict=True)) / sum(a * a for a in logs)
    assert sharpness.intrinsic_dimension(points, method="twonn").value == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("method", ["mle", "twonn"])
@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_a_cloud_has_its_dimension_in_any_space(method, dimension):
    result = sharpness.intrinsic_dimension(cloud(dimension, 2000), method=method)
    assert result.value == pytest.approx(dimension, rel=0.12)
    in_more = sharpness.intrinsic_dimension(cloud(dimension, 2000, space=200) * 1e-3 + 100, method=method)
    assert in_more.value == pytest.approx(dimension, rel=0.12)


def test_points_that_occur_twice_count_once():
    points = cloud(2, 100)
    twice = sharpness.intrinsic_dimension(torch.cat([points, points[:30]]))
    assert twice.value == pytest.approx(sharpness.intrinsic_dimension(points).value, rel=1e-9)
    assert twice.points == 100 and twice.settings["examples"] == 130


@pytest.mark.parametrize("method", ["mle", "twonn"])
def test_it_draws(method):
    figure = sharpness.intrinsic_dimension(cloud(2, 100), method=method).plot()
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("points", "options", "text"),
    [
        (torch.zeros(50, 3), {}, "different points"),
        (torch.rand(10, 3), {}, "different points"),
        (torch.rand(50, 3), {"method": "pca"}, "method"),
        (torch.rand(50, 3), {"neighbours": 1}, "neighbours"),
    ],
)
def test_what_has_no_dimension_is_refused(points, options, text):
    with pytest.raises(ValueError, match=text):
        sharpness.intrinsic_dimension(points, **options)
