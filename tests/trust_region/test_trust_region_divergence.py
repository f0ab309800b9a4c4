"""Every divergence against a formula that does not share its code, and its memory against the promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from samopt.trust_region import DIVERGENCES, divergence
from samopt.trust_region.divergence import between, check_divergence
from tests.helpers.pages import REPOSITORY

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_kl_is_torch_distributions() -> None:
    reference, current = 3 * logits(5, 7), 3 * logits(5, 7, seed=1)
    p, q = Categorical(logits=reference), Categorical(logits=current)
    torch.testing.assert_close(between("kl", reference, current, None), kl_divergence(p, q), **EXACT)
    torch.testing.assert_close(between("reverse_kl", reference, current, None), kl_divergence(q, p), **EXACT)
    both = kl_divergence(p, q) + kl_divergence(q, p)
    torch.testing.assert_close(between("symmetric_kl", reference, current, None), both, **EXACT)


def test_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = log(2)/2 + log(2/3)/2 = log(4/3)/2.
    reference, current = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, 3.0]], dtype=torch.float64).log()
    assert between("kl", reference, current.clamp(min=0.0), None).item() == pytest.approx(numpy.log(4 / 3) / 2)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "symmetric_kl"])
def test_nearly_equal_outputs_keep_their_digits_in_fp32(name: str) -> None:
    reference = 5 * logits(16, 1000, dtype=torch.float32)
    current = reference + 1e-4 * logits(16, 1000, seed=1, dtype=torch.float32)
    exact = between(name, reference.double(), current.double(), None)
    assert exact.max() < 1e-7  # below what a plain sum of fp32 terms could tell from 0
    torch.testing.assert_close(between(name, reference, current, None).double(), exact, rtol=1e-2, atol=0.0)


def test_kl_with_classes_that_are_ruled_out() -> None:
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])
    current = torch.tensor([[0.5, 0.0, -torch.inf]])
    expected = between("kl", reference[:, :2], current[:, :2], None)
    torch.testing.assert_close(between("kl", reference, current, None), expected)
    assert between("kl", torch.zeros(1, 3), current, None).item() == torch.inf


def test_l2_is_the_norm_of_the_difference() -> None:
    reference, current = logits(4, 6, 3), logits(4, 6, 3, seed=1)
    expected = numpy.sqrt(((reference.numpy() - current.numpy()) ** 2).sum(-1))
    torch.testing.assert_close(between("l2", reference, current, None), torch.from_numpy(expected), **EXACT)


def mmd_by_definition(x: numpy.ndarray, y: numpy.ndarray) -> float:
    def kernel(a: numpy.ndarray, b: numpy.ndarray) -> float:
        return (1 + ((a - b) ** 2).sum() / a.size) ** -0.5

    def mean(first: numpy.ndarray, second: numpy.ndarray) -> float:
        return sum(kernel(a, b) for a in first for b in second) / (len(first) * len(second))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd_by_its_definition() -> None:
    reference, current = logits(6, 4), 1 + logits(6, 4, seed=1)
    expected = mmd_by_definition(reference.numpy(), current.numpy())
    assert expected > 0.1
    assert between("mmd", reference, current, None).item() == pytest.approx(expected, rel=1e-12)


def test_mmd_averages_the_positions_that_count_first() -> None:
    reference, current = logits(4, 3, 5), 1 + logits(4, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]]).bool()
    means = [numpy.stack([output[i][mask[i]].mean(0).numpy() for i in (0, 1, 3)]) for output in (reference, current)]
    expected = mmd_by_definition(*means)
    assert between("mmd", reference, current, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_outputs_have_no_distance(name: str, dtype: torch.dtype) -> None:
    outputs = 5 * logits(8, 3, 11, dtype=dtype)
    assert between(name, outputs, outputs.clone(), None).abs().max().item() == 0.0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_low_precision_outputs_are_compared_in_fp32(name: str) -> None:
    reference, current = (3 * logits(6, 5, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    distance = between(name, reference, current, None)
    assert distance.dtype is torch.float32
    torch.testing.assert_close(distance, between(name, reference.double(), current.double(), None).float())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "classes first"])
def test_chunks_do_not_show(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(seed: int) -> Tensor:
        whole = logits(3, 8, 7, seed=seed)
        if layout == "sliced":
            return torch.cat([whole, whole], 1)[:, :8]
        return whole if layout == "contiguous" else whole.movedim(-1, 1).contiguous().movedim(1, -1)

    reference, current = prepared(0), prepared(1)
    in_one_piece = between(name, reference, current, None)
    monkeypatch.setattr(divergence, "_CHUNK", 10)  # one row of seven at a time
    torch.testing.assert_close(between(name, reference, current, None), in_one_piece, **EXACT)


class LargestAllocation(TorchDispatchMode):
    """Remembers the most entries that any fp32 result had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype is torch.float32 and tensor._base is None:
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_fp32_copy_of_the_logits_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_CHUNK", 2**14)
    reference, current = (logits(4, 64, 512, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    with LargestAllocation() as largest:
        between(name, reference, current, torch.ones(4, 64, dtype=torch.bool))
    assert 0 < largest.entries <= 2**14 < reference.numel() / 4


COMPARE_LARGE_LOGITS = """
import math, pathlib, torch
from samopt.trust_region.divergence import between

def kibibytes(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

classes = 50_000
reference, current = (torch.zeros(8, 1024, classes, dtype=torch.bfloat16) for _ in range(2))
current[..., 0] = 1.0
for logits in (reference, current):
    logits.add_(0.0)  # zeros are not in memory before they are written
before = kibibytes("VmRSS")
distances = between("kl", reference, current, torch.ones(8, 1024, dtype=torch.bool))
expected = math.log1p((math.e - 1) / classes) - 1 / classes
assert abs(float(distances.mean()) / expected - 1) < 1e-2, (float(distances.mean()), expected)
print((kibibytes("VmHWM") - before) * 1024 / (4 * reference.numel()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_logits_of_a_large_vocabulary_need_a_fraction_of_an_fp32_copy() -> None:
    code = [sys.executable, "-c", COMPARE_LARGE_LOGITS]
    done = subprocess.run(code, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.25


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "symmetric_kl"])
def test_a_single_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r'shape \(4, 1\)\); use divergence="l2" for a regression'):
        between(name, torch.zeros(4, 1), torch.zeros(4, 1), None)


def test_a_callable_gives_positions_or_a_mean() -> None:
    reference, current = logits(4, 6, 3), logits(4, 6, 3, seed=1)
    largest = between(lambda a, b: (a - b).abs().amax(-1), reference, current, None)
    torch.testing.assert_close(largest, (reference - current).abs().amax(-1), **EXACT)
    mean = between(lambda a, b: (a - b).abs().mean(), reference, current, None)
    torch.testing.assert_close(mean, (reference - current).abs().mean(), **EXACT)
    with pytest.raises(ValueError, match=r"returned shape \(4, 3\) for outputs of shape \(4, 6, 3\); return one value"):
        between(lambda a, b: (a - b).sum(1), reference, current, None)


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"must be one of \['kl', .*'mmd'\], or a callable .* got 'js'"):
        check_divergence("js")
