"""Fashion-MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, from IDX files or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data import Pool
from benchmarks.errors import BenchmarkError
from benchmarks.idx import read_idx
from benchmarks.models import conv_net
from benchmarks.registry import TASKS, Task

__all__ = ["FASHION_MNIST", "FASHION_SMALL", "find_files"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_HOW_TO_GET = (
    "On Debian: apt-get install dataset-fashion-mnist (found without --data). Elsewhere: put the four files, .gz or "
    "unpacked, into a folder and pass --data FOLDER; they are at https://github.com/zalandoresearch/fashion-mnist. Or "
    "download through the Hugging Face hub: python -m pip install datasets, and --data hub"
)


def find_files(folder: Path) -> list[Path]:
    """Return the four files of a folder, each plain or with ``.gz``, in the order of ``_FILES``.

    Args:
        folder: Where they are.

    Raises:
        BenchmarkError: If the folder or a file is missing; says what was found and how to get them.
    """
    if not folder.is_dir():
        found = "a file, not a folder" if folder.exists() else "no such folder"
        raise BenchmarkError(f"fashion_mnist looks for its images in {folder}; found {found}. {_HOW_TO_GET}")
    candidates = {name: [folder / name, folder / f"{name}.gz"] for name in _FILES}
    files = {name: next((path for path in paths if path.is_file()), None) for name, paths in candidates.items()}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        present = sorted(path.name for path in folder.iterdir())
        found = f"{', '.join(present[:8])}{', ...' if len(present) > 8 else ''}" if present else "an empty folder"
        raise BenchmarkError(
            f"fashion_mnist needs four IDX files in {folder}, of which {', '.join(missing)} (or with .gz) "
            f"{'is' if len(missing) == 1 else 'are'} missing; found {found}. {_HOW_TO_GET}"
        )
    return [path for path in files.values() if path is not None]


def _load(data: str | None) -> Pool:
    if data == "hub":
        return _load_from_hub()
    files = find_files(DEBIAN_FOLDER if data is None else Path(data))
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in files)
    _check(files[0], train_images, train_labels)
    _check(files[2], test_images, test_labels)
    return Pool(_inputs(train_images), _labels(train_labels), _inputs(test_images), _labels(test_labels))


def _load_from_hub() -> Pool:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]  # optional, and only for --data hub
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            "--data hub needs the package datasets, which is not installed; install it with: python -m pip install "
            f"datasets. Without it: {_HOW_TO_GET}"
        ) from error
    try:
        parts = load_dataset("fashion_mnist")
    except Exception as error:  # the library raises its own and several network packages' errors
        raise BenchmarkError(
            f"--data hub could not load fashion_mnist: {type(error).__name__}: {error}; check the network. Without "
            f"one: {_HOW_TO_GET}"
        ) from error
    return Pool(*_from_hub(parts["train"]), *_from_hub(parts["test"]))


def _from_hub(part: Any) -> tuple[Tensor, Tensor]:
    images = np.stack([np.asarray(image, dtype=np.uint8) for image in part["image"]])
    return _inputs(images), _labels(np.asarray(part["label"]))


def _check(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1:
        raise BenchmarkError(
            f"{path} and its labels do not belong to Fashion-MNIST: expected n images of 28 x 28 and n labels, found "
            f"shapes {list(images.shape)} and {list(labels.shape)}. {_HOW_TO_GET}"
        )


def _inputs(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float().div(255).unsqueeze(1)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels).long()


def _build_model() -> nn.Module:
    return conv_net(image_size=28, classes=10)


def _build_small_model() -> nn.Module:
    return conv_net(image_size=28, classes=10, stride=2)


FASHION_MNIST = TASKS.add(
    Task(
        name="fashion_mnist",
        summary="Fashion-MNIST, 28x28 images: 4,000 of the 60,000 training images drawn by seed (--train-size changes "
        "that), all 10,000 test images; a ConvNet with BatchNorm",
        classes=10,
        epochs=15,
        batch_size=64,
        train_size=4000,
        load=_load,
        build_model=_build_model,
    )
)
FASHION_SMALL = TASKS.add(
    Task(
        name="fashion_small",
        summary="the same with 1,000 training images and a ConvNet that halves the image at once, for many runs",
        classes=10,
        epochs=10,
        batch_size=64,
        train_size=1000,
        load=_load,
        build_model=_build_small_model,
    )
)
