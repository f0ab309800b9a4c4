"""Runs the interpreted tests of the Triton backend, and says what it refuses without the interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sysconfig

import pytest
import torch

import samopt
from samopt.kernels.triton import availability
from tests.helpers.apart import run_apart

LAYOUTS = "triton and (agree_with_fp64 or every_bit_back)"
SOME_TYPES = "(float32 or (bfloat16 and tiny))"  # each layout in one type, and one layout with rounding


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/kernels/test_triton_interpreted.py"],
        pytest.param(["tests/kernels/test_triton_memory.py"], marks=pytest.mark.slow),
        ["tests/kernels/test_triton_graphs.py"],
        ["tests/kernels/test_kernels.py", "-k", f"{LAYOUTS} and {SOME_TYPES}"],
        pytest.param(
            ["tests/kernels/test_kernels.py", "-k", f"{LAYOUTS} and not {SOME_TYPES}"], marks=pytest.mark.slow
        ),
        ["tests/kernels/test_kernels.py", "-k", "triton and not agree_with_fp64 and not every_bit_back"],
    ],
    ids=["steps", "memory", "graphs", "layouts", "other-types", "edges"],
)
def test_in_the_interpreter(arguments, monkeypatch):
    pytest.importorskip("triton", minversion="3.5")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if (lack := availability.missing()) is not None:
        pytest.skip(lack)
    run_apart(*arguments, TRITON_INTERPRET="1")


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


@pytest.fixture
def interpreter(monkeypatch):
    """Return a function that pretends to the interpreter of a version of Triton, beside a version of NumPy or none."""

    def pretend(triton, numpy):
        def version(_):
            if numpy is None:
                raise importlib.metadata.PackageNotFoundError
            return numpy

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(availability, "_version", lambda: triton)

    availability._unfit_numpy.cache_clear()
    yield pretend
    availability._unfit_numpy.cache_clear()


@pytest.mark.parametrize(
    ("numpy", "lack"),
    [
        ("2.4.6", 'the interpreter of triton 3.6 cannot run with NumPy 2.4.6 .*"numpy<2.4", or "triton>=3.7"'),
        ("3.0.0rc1", "the interpreter of triton 3.6 cannot run with NumPy 3.0.0rc1"),
        (None, "triton's interpreter needs NumPy, which is not installed"),
    ],
    ids=str,
)
def test_an_interpreter_that_cannot_run_with_this_numpy_says_so(numpy, lack, interpreter):
    interpreter((3, 6), numpy)
    assert re.match(lack, availability.unavailable(torch.device("cpu")))
    with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: {lack}.*use backend="auto"'):
        samopt.SAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, backend="triton")


@pytest.mark.parametrize(("triton", "numpy"), [((3, 5), "1.26.4"), ((3, 6), "2.3.5"), ((3, 7), "2.5.2")], ids=str)
def test_an_interpreter_that_runs_with_this_numpy_is_used(triton, numpy, interpreter):
    interpreter(triton, numpy)
    assert availability.missing() is None and availability.unavailable(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("owner", "name", "answer", "lack"),
    [
        (shutil, "which", lambda program: None, r"triton finds no C compiler, .*\(install gcc, or name one in CC\)"),
        (sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"}, "triton finds no Python.h in /nowhere"),
    ],
    ids=["compiler", "headers"],
)
def test_a_gpu_whose_launches_cannot_be_built_is_left_to_other_backends(owner, name, answer, lack, monkeypatch):
    pytest.importorskip("triton", minversion="3.5")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(owner, name, answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for cached in (availability._unbuildable, availability._is_recent):
        cached.cache_clear()
    try:
        assert re.match(lack, availability.missing()) and availability.unavailable(torch.device("cuda", 7)) is not None
        with pytest.raises(RuntimeError, match=f'backend="triton" cannot run here: {lack}.*use backend="auto"'):
            samopt.SAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, backend="triton")
    finally:
        for cached in (availability._unbuildable, availability._is_recent):
            cached.cache_clear()
