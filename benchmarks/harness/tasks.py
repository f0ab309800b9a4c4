"""The image tasks: scikit-learn's digits and Fashion-MNIST, each with its model."""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.data import Pool
from benchmarks.harness.errors import BenchmarkError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_HOW_TO_GET = (
    "On Debian: apt-get install dataset-fashion-mnist (found without --data). Elsewhere: put the four files, .gz or "
    "unpacked, into a folder and pass --data FOLDER; they are at https://github.com/zalandoresearch/fashion-mnist, and "
    "torchvision keeps them in FashionMNIST/raw"
)


@dataclass(frozen=True)
class Task:
    """Data and a model to train on it.

    Attributes:
        name: Its name at the command line.
        summary: One line about it.
        classes: Number of classes.
        epochs: Default number of epochs.
        batch_size: Default batch size.
        train_size: Default number of training examples; None for all there are.
        load: Reads the data: called with the folder that ``--data`` names, or None.
        build_model: Makes a model, initialised from torch's global random stream.
    """

    name: str
    summary: str
    classes: int
    epochs: int
    batch_size: int
    train_size: int | None
    load: Callable[[Path | None], Pool]
    build_model: Callable[[], nn.Module]


def conv_net(image_size: int, classes: int, width: int = 8, stride: int = 1) -> nn.Sequential:
    """Return three 3x3 convolutions with BatchNorm and ReLU, two halvings of the image, and a linear layer."""

    def block(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *block(1, width, stride),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * (image_size // stride // 4) ** 2, classes),
    )


class VisionTransformer(nn.Module):
    """A small vision transformer: a linear embedding of patches, pre-norm encoder layers, the mean of the tokens.

    Args:
        image_size: Height and width of the one-channel input, divisible by ``patch``.
        classes: Number of outputs.
        patch: Height and width of a patch.
        width: Features of a token.
        depth: Number of layers.
        heads: Attention heads; they divide ``width``.
    """

    def __init__(
        self, image_size: int, classes: int, patch: int = 4, width: int = 32, depth: int = 2, heads: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        layer = functools.partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True, dropout=0.0)
        # GELU as a module, one for each layer: a measure of its outputs can find it.
        self.layers = nn.Sequential(*(layer(width, heads, 2 * width, activation=nn.GELU()) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape ``(n, classes)``, of images, shape ``(n, 1, image_size, image_size)``."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits


def folder_for(task: Task, data: Path | None) -> Path | None:
    """Return the folder to load a task from, where a study of several tasks was given one: digits need none."""
    return None if task.load is load_digits_pool else data


@functools.cache
def load_digits_pool(data: Path | None = None) -> Pool:
    """Return scikit-learn's 1,797 digits, pixels in [0, 1]."""
    if data is not None:
        raise BenchmarkError(
            f"--data is not used for digits, got {str(data)!r}; leave it out: scikit-learn brings these images"
        )
    from sklearn.datasets import load_digits  # the study gpu runs without scikit-learn

    images, labels = load_digits(return_X_y=True)
    return Pool(torch.from_numpy(images).float().div(16).reshape(-1, 1, 8, 8), torch.from_numpy(labels).long())


@functools.cache
def load_fashion(data: Path | None = None) -> Pool:
    """Return Fashion-MNIST from four IDX files, plain or gzipped; pixels in [0, 1]."""
    folder = DEBIAN_FOLDER if data is None else data
    if not folder.is_dir():
        found = "a file, not a folder" if folder.exists() else "no such folder"
        raise BenchmarkError(f"fashion_mnist looks for its images in {folder}; found {found}. {_HOW_TO_GET}")
    there = {name: next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None) for name in _FILES}
    files = [path for path in there.values() if path is not None]
    if len(files) < len(_FILES):
        missing = ", ".join(name for name, path in there.items() if path is None)
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"
        raise BenchmarkError(
            f"fashion_mnist misses {missing} (or with .gz) in {folder}; found {present}. {_HOW_TO_GET}"
        )
    arrays = [read_idx(path) for path in files]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1:
            raise BenchmarkError(
                f"the files in {folder} are not Fashion-MNIST's: expected n images of 28 x 28 and n labels, found "
                f"shapes {list(images.shape)} and {list(labels.shape)}. {_HOW_TO_GET}"
            )
    images, labels, test_images, test_labels = map(torch.from_numpy, arrays)
    return Pool(
        images.float().div(255).unsqueeze(1),
        labels.long(),
        test_images.float().div(255).unsqueeze(1),
        test_labels.long(),
    )


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes in an IDX file, the format of MNIST and its relatives, plain or gzipped.

    The file starts with 0, 0, 8 (for bytes), the number of dimensions, and each dimension as a big-endian 32-bit
    integer; the elements follow, the last index running fastest.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}; get the file again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        start = content[:4].hex(" ") or "(none)"
        raise BenchmarkError(f"{path} is not an IDX file: it starts with the bytes {start}; get the file again")
    begin = 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:begin].ljust(begin - 4, b"\0"), dtype=">u4")]
    expected = begin + math.prod(shape)
    if len(content) != expected:
        raise BenchmarkError(
            f"{path} is {'truncated' if len(content) < expected else 'too long'}: expected {expected} bytes for sizes "
            f"{shape}, found {len(content)}; get the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=begin).reshape(shape).copy()


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            "1,797 8x8 images from scikit-learn; a new stratified test fifth for each seed; a ConvNet with BatchNorm",
            classes=10, epochs=30, batch_size=64, train_size=None, load=load_digits_pool,
            build_model=functools.partial(conv_net, image_size=8, classes=10),
        ),
        Task(
            "digits_vit", "the same images; a vision transformer of two layers, for AdamW",
            classes=10, epochs=30, batch_size=64, train_size=None, load=load_digits_pool,
            build_model=functools.partial(VisionTransformer, image_size=8, classes=10),
        ),
        Task(
            "fashion_mnist",
            "Fashion-MNIST: 4,000 of the 60,000 training images drawn by seed, all 10,000 test images; a ConvNet",
            classes=10, epochs=15, batch_size=64, train_size=4000, load=load_fashion,
            build_model=functools.partial(conv_net, image_size=28, classes=10),
        ),
        Task(
            "fashion_small", "the same with 1,000 training images and a ConvNet that halves the image at once",
            classes=10, epochs=10, batch_size=64, train_size=1000, load=load_fashion,
            build_model=functools.partial(conv_net, image_size=28, classes=10, stride=2),
        ),
    )
}  # fmt: skip
"""By name."""
