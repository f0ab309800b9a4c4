"""Runs ``tests/helpers/accelerated.py``, whose accelerator is made up and stays with its process."""

from __future__ import annotations

import pytest
import torch.utils.backend_registration as registration

from tests.helpers.apart import run_apart


@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)
def test_on_an_accelerator_that_is_made_up():
    run_apart("tests/helpers/accelerated.py")
