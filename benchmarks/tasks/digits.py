"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn

from benchmarks.data import Pool
from benchmarks.errors import BenchmarkError
from benchmarks.models import VisionTransformer, conv_net
from benchmarks.registry import TASKS, Task

__all__ = ["DIGITS", "DIGITS_VIT"]


def _load(data: str | None) -> Pool:
    if data is not None:
        raise BenchmarkError(
            f"--data is not used for digits, got {data!r}; leave it out: scikit-learn brings these images"
        )
    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().div(16).reshape(-1, 1, 8, 8)
    return Pool(inputs, torch.from_numpy(labels).long())


def _build_model() -> nn.Module:
    return conv_net(image_size=8, classes=10)


def _build_vit() -> nn.Module:
    return VisionTransformer(image_size=8, classes=10)


DIGITS = TASKS.add(
    Task(
        name="digits",
        summary="1,797 real 8x8 images from scikit-learn, no download; a new stratified test fifth for each seed; "
        "a ConvNet with BatchNorm",
        classes=10,
        epochs=30,
        batch_size=64,
        train_size=None,
        load=_load,
        build_model=_build_model,
    )
)
DIGITS_VIT = TASKS.add(
    Task(
        name="digits_vit",
        summary="the same images; a vision transformer of 2 layers, for AdamW",
        classes=10,
        epochs=30,
        batch_size=64,
        train_size=None,
        load=_load,
        build_model=_build_vit,
    )
)
