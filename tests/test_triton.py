"""Runs the interpreted tests of the Triton backend, and says what it refuses without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samopt

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/test_triton_interpreted.py"],
        ["tests/test_triton_fused.py"],
        ["tests/test_triton_memory.py"],
        ["tests/test_triton_graphs.py"],
        ["tests/test_kernels.py", "-k", "triton and agree_with_fp64"],
        ["tests/test_kernels.py", "-k", "triton and not agree_with_fp64"],
    ],
    ids=["steps", "fused", "memory", "graphs", "layouts", "edges"],
)
def test_in_the_interpreter(arguments):
    pytest.importorskip("triton", minversion="3.5")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_a_named_triton_backend_says_why_it_cannot_run_on_the_cpu():
    weight = torch.nn.Parameter(torch.ones(3))
    refused = pytest.raises(
        RuntimeError, match=r'backend="triton" cannot run here: .*(not installed|no CUDA|is on cpu)'
    )
    if not torch.cuda.is_available():
        with refused:
            samopt.SAM([weight], torch.optim.SGD, lr=0.1, backend="triton")
        return
    optimizer = samopt.SAM([weight], torch.optim.SGD, lr=0.1, backend="triton")
    (weight**2).sum().backward()
    with refused:
        optimizer.ascend()
    assert torch.equal(weight, torch.ones(3))
