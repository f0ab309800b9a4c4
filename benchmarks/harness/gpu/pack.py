"""Makes the one file of Fashion-MNIST that is carried to a GPU: all test images, and training images in their order.

``python -m benchmarks.harness.gpu.pack fashion.npy.xz`` reads the files of Debian's dataset-fashion-mnist, or those in
the folder that --data names. With 32,000 training images the file is smaller than 16 MiB.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.data import Pool
from benchmarks.harness.errors import BenchmarkError

_PARTS = ("inputs", "labels", "test_inputs", "test_labels")


def pack(pool: Pool, path: Path, train_size: int) -> None:
    """Write a pool's images as bytes, and their labels."""
    with lzma.open(path, "wb") as file:
        for name in _PARTS:
            values = getattr(pool, name)[: None if name.startswith("test") else train_size]
            scaled = (values * 255).round() if values.is_floating_point() else values
            np.save(file, scaled.to(torch.uint8).numpy())


def unpack(path: Path | None) -> Pool:
    """Return the pool in a file that ``pack`` made; pixels in [0, 1]."""
    if path is None:
        raise BenchmarkError("no images; make a file with python -m benchmarks.harness.gpu.pack, and pass --data FILE")
    try:
        with lzma.open(path, "rb") as file:
            images, labels, test_images, test_labels = (torch.from_numpy(np.load(file)) for _ in _PARTS)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise BenchmarkError(
            f"{path} cannot be read: {error}; make it with python -m benchmarks.harness.gpu.pack"
        ) from error
    return Pool(images.float().div(255), labels.long(), test_images.float().div(255), test_labels.long())


def made_up(_: Path | None = None) -> Pool:
    """Return 64 training and 32 test images of noise in which a bright row shows the label, for ``--quick``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(96, 1, 28, 28, generator=generator).mul_(0.5)
    labels = torch.arange(96) % 10
    images[torch.arange(96), 0, 2 * labels] = 1.0
    return Pool(images[:64], labels[:64], images[64:], labels[64:])


if __name__ == "__main__":
    from benchmarks.harness.tasks import load_fashion

    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.gpu.pack")
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, help="folder with the four files; by default where Debian puts it")
    parser.add_argument("--train-size", type=int, default=32_000)
    given = parser.parse_args()
    pack(load_fashion(given.data), given.file, given.train_size)
    print(f"wrote {given.file}: {given.file.stat().st_size / 2**20:.2f} MiB")
