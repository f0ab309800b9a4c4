"""What holds for every test: global settings are afterwards as before."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch


@pytest.fixture(autouse=True)
def global_settings_stay() -> Generator[None]:
    """Fail a test that leaves gradients off or another default dtype behind: the next one would suffer."""
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    yield
    after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    assert after == before
