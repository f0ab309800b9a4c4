"""The l2 norm against ``math.hypot``."""

from __future__ import annotations

import math

import pytest
import torch

from samopt._numerics.vector_norm import vector_norm

CASES = [
    (torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e-42), (torch.float64, 1e200),
    (torch.float64, 1e-200), (torch.bfloat16, 1e30), (torch.float16, 1e4), (torch.float32, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_norms_of_huge_and_tiny_values(dtype, size):
    values = (torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64) * size).to(dtype)
    norm = vector_norm(values)
    assert norm.dim() == 0 and norm.dtype is torch.float64
    assert float(norm) == pytest.approx(math.hypot(*values.tolist()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_norms_of_complex_values(dtype):
    values = torch.tensor([3 + 4j, 12j], dtype=dtype) * 1e30
    assert float(vector_norm(values)) == pytest.approx(13e30, rel=1e-6)


def test_nothing_has_norm_zero_and_what_is_not_finite_shows():
    assert float(vector_norm(torch.zeros(0, 3))) == 0.0
    for value in (math.inf, -math.inf, math.nan):
        for dtype in (torch.float32, torch.float64):
            assert not math.isfinite(vector_norm(torch.tensor([1.0, value], dtype=dtype)))
