"""What holds for every test: random numbers are the same in every run, and global settings are afterwards as before."""

from __future__ import annotations

import random
from collections.abc import Generator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def the_same_random_numbers() -> None:
    """Seed every global stream, so that a test that draws without a seed of its own fails always or never."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def global_settings_stay() -> Generator[None]:
    """Fail a test that leaves gradients off or another default dtype behind: the next one would suffer."""
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    yield
    after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    assert after == before
