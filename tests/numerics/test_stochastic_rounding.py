"""The numbers of stochastic rounding: keys for kernels against the published generator, streams against each other."""

from __future__ import annotations

from samopt._numerics.stochastic_rounding import Noise, _mixed

_GAMMA = 0x9E3779B97F4A7C15


def test_bits_are_mixed_as_splitmix64_does():
    # The first five outputs of the published generator (Steele et al. 2014) from the state 1234567.
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [_mixed(1234567 + index * _GAMMA) for index in range(5)] == published


def test_keys_differ_between_calls_streams_and_seeds():
    keys = [source.on_stream(stream).key() for source in (Noise(0), Noise(1), Noise(0)) for stream in (1, 2, 1)]
    again = Noise(0).on_stream(1)
    assert keys[0] == again.key() and keys[2] == again.key()
    assert len(set(keys[:6])) == 6 and keys[6:] == keys[:3]
    assert all(0 <= key < 2**64 for key in keys)
