"""How much memory the measures take beside the model, as the peak of a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from Linux's /proc"),
]

PROGRAM = """
    import torch
    from torch import nn
    from samopt import sharpness

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(*[nn.Linear({width}, {width}, bias=False) for _ in range({layers})])
    batch = torch.randn(2, {width}), torch.randint({width}, (2,))
    torch.autograd.grad(sharpness.cross_entropy(model, batch), model[{layers} - 1].weight)
    before = int(open("/proc/self/statm").read().split()[1]) * 4096
    sharpness.{call}
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) * 1024  # ru_maxrss would begin with what the parent had
    print((peak - before) / (4 * sum(parameter.numel() for parameter in model.parameters())))
"""


@pytest.mark.parametrize(
    ("call", "copies"),
    [
        ("worst_case(model, sharpness.cross_entropy, [batch], steps=4)", 3),
        ("worst_case(model, sharpness.cross_entropy, [batch], steps=3, adaptive=True, restarts=2)", 3),
        ("worst_case(model, sharpness.cross_entropy, [batch], steps=3, adaptive=True, norm='linf')", 3),
        ("average_case(model, sharpness.cross_entropy, [batch], samples=1, adaptive=True)", 1),
        ("hessian_trace(model, sharpness.cross_entropy, [batch], samples=1)", 3),
        ("hessian_trace(model, sharpness.cross_entropy, [batch], samples=1, matrix='gauss_newton')", 3),
        ("landscape(model, sharpness.cross_entropy, [batch], points=3)", 2),
    ],
)
def test_the_peak_is_as_documented(call, copies):
    assert peak(call, width=1024, layers=40) < copies + 0.5  # temporaries of a tensor, 1/40 copy each, and late code


def test_a_hundred_million_parameters_take_three_copies():
    call = "worst_case(model, sharpness.cross_entropy, [batch], steps=3, adaptive=True)"
    assert peak(call, width=2048, layers=24) < 3.5


def peak(call, width, layers):
    """The most memory that a call takes beside the model, in copies of its weights."""
    # With a fixed threshold the allocator hands freed tensors back to the system instead of keeping them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    program = textwrap.dedent(PROGRAM).format(call=call, width=width, layers=layers)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
