"""What the tests of the benchmarks share: one thread, rows, a small Fashion-MNIST."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.harness.rows import Row


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_row():
    def row(optimizer="sgd", seed=0, label_noise=0.0, base="sgd", accuracy=0.5, seconds=0.25, **changes):
        values = {"accuracy": accuracy, "train_loss": 0.5, "sharpness": 0.125}
        return replace(
            Row(
                task="digits",
                optimizer=optimizer,
                base=base,
                seed=seed,
                label_noise=label_noise,
                evaluated_on="test",
                settings={"lr": 0.1, "epochs": 2, "batch_size": 64, "sharpness_rho": 0.05},
                examples={"train": 100, "randomised": round(100 * label_noise), "test": 50},
                metrics=values | {"seconds_per_step": seconds},
                curves={name: [value / 2, value] for name, value in values.items()},
                warnings=[],
                environment={"commit": "abc", "device": "a CPU", "threads": 1, "dtype": "float32"}
                | dict.fromkeys(("torch", "python", "samopt", "numpy"), "1.0"),
                timestamp="2026-01-01T00:00:00+00:00",
            ),
            **changes,
        )

    return row


def idx_bytes(array, magic=None):
    """An array as an IDX file."""
    header = struct.pack(">HBB", 0, 0x08, array.ndim) if magic is None else magic
    return header + b"".join(struct.pack(">I", size) for size in array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion_folder(tmp_path):
    """Fashion-MNIST in small: 200 training and 50 test images, whose labels show."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 50)):
        images, labels = generator.integers(0, 200, (count, 28, 28)), np.arange(count) % 10
        images[np.arange(count), labels, labels] = 255
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path
