"""``RngState`` against ``get_state`` and ``set_state`` of NumPy and of Python."""

import random

import numpy as np
import pytest
import torch

from samopt._replay.random_state import RngState

_DRAWS = {
    "nothing": lambda: None,
    "one normal number, whose pair is kept": np.random.standard_normal,
    "two normal numbers": lambda: np.random.standard_normal(2),
    "uniform numbers": lambda: np.random.random(3),
    "a permutation": lambda: np.random.permutation(700),
    "python": random.random,
    "python, whose pair is kept": lambda: random.gauss(0, 1),
    "torch": lambda: torch.rand(3),
    "seeded": lambda: np.random.seed(5),
}


@pytest.fixture(autouse=True)
def _streams_put_back():
    numpy, python = np.random.get_state(), random.getstate()
    yield
    np.random.set_state(numpy)
    random.setstate(python)


def _next_numbers():
    """What the streams give next, one normal number first: it tells whether the pair of the last is still kept."""
    first = np.random.standard_normal(), random.gauss(0, 1), *np.random.random(3), random.random()
    return [float(each) for each in (*first, *torch.rand(2, dtype=torch.float64))]


@pytest.mark.parametrize("seed", range(40))
def test_streams_go_on_from_every_captured_state_in_any_order(seed):
    choices = random.Random(seed)
    captured = []
    for _ in range(6):
        _DRAWS[choices.choice(list(_DRAWS))]()
        state = RngState.capture()
        numpy, python, own = np.random.get_state(), random.getstate(), torch.get_rng_state()
        expected = _next_numbers()
        np.random.set_state(numpy)
        random.setstate(python)
        torch.set_rng_state(own)
        captured.append((state, expected))
    for _ in range(12):
        _DRAWS[choices.choice(list(_DRAWS))]()
        state, expected = choices.choice(captured)
        state.restore()
        if choices.random() < 0.5:  # a state read right after belongs to the same numbers
            assert RngState.capture().numpy["has_gauss"] == state.numpy["has_gauss"]
        assert _next_numbers() == expected


def test_another_generator_of_numpy_is_read_and_set_as_a_whole():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RngState.capture()
        expected = np.random.random(4).tolist()
        state.restore()
        assert np.random.random(4).tolist() == expected
    finally:
        np.random.set_bit_generator(before)


def test_a_stream_that_was_not_drawn_from_is_not_read_again(monkeypatch):
    np.random.seed(0)
    state = RngState.capture()
    monkeypatch.setattr(np.random, "get_state", lambda: pytest.fail("read"))
    monkeypatch.setattr(np.random, "set_state", lambda state: pytest.fail("set"))
    assert RngState.capture().numpy is state.numpy
    state.restore()
