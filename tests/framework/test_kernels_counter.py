"""Counter-based randomness against the published generator, and what makes it counter-based."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

import oracles
from unmerge.kernels.counter import counter_bits, counter_uniform, stream_key

# The generator's published outputs for seed 1234567.
REFERENCE = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def unsigned(bits: torch.Tensor) -> list[int]:
    return [value % 2**64 for value in bits.tolist()]


def test_the_published_outputs() -> None:
    assert unsigned(counter_bits(1234567, torch.arange(5))) == REFERENCE
    assert oracles.splitmix64(1234567, 5) == REFERENCE


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_every_key_gives_its_own_published_stream(key: int) -> None:
    assert unsigned(counter_bits(key, torch.arange(200))) == oracles.splitmix64(key, 200)


@pytest.mark.parametrize("far", [2**31, 2**32 + 7, 2**40, 2**62])
def test_a_far_index_is_reached_without_the_ones_before(far: int) -> None:
    """Output `far + i` of a seed is output `i` of the seed advanced by `far` increments."""
    advanced = (1234567 + far * 0x9E3779B97F4A7C15) % 2**64
    bits = counter_bits(1234567, torch.arange(4) + far)
    assert unsigned(bits) == oracles.splitmix64(advanced, 4)


def test_the_shape_of_the_index_is_kept_and_its_order_is_free() -> None:
    index = torch.arange(24)
    whole = counter_bits(5, index)
    assert torch.equal(counter_bits(5, index.reshape(2, 3, 4)), whole.reshape(2, 3, 4))
    assert torch.equal(counter_bits(5, index.flip(0)), whole.flip(0))
    parts = [counter_bits(5, part) for part in torch.split(index, 7)]
    assert torch.equal(torch.cat(parts), whole)


def test_uniform_is_the_top_53_bits() -> None:
    draws = counter_uniform(1234567, torch.arange(5))
    assert draws.dtype == torch.float64
    assert draws.tolist() == [(bits >> 11) / 2**53 for bits in REFERENCE]


def test_uniform_is_uniform() -> None:
    count = 2**16
    draws = counter_uniform(stream_key(0, "mask", "a", "m"), torch.arange(count)).numpy()
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * count)
    assert abs(draws.var() - 1 / 12) < 5 / np.sqrt(180 * count)
    for bins in (16, 256):
        observed = np.histogram(draws, bins=bins, range=(0, 1))[0]
        chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum()
        assert abs(chi_square - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))


def test_neighbours_and_streams_are_uncorrelated() -> None:
    count = 2**15
    streams = np.stack(
        [
            counter_uniform(stream_key(seed, name, module), torch.arange(count)).numpy()
            for seed, name, module in ((0, "a", "m"), (1, "a", "m"), (0, "b", "m"), (0, "a", "n"))
        ]
    )
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 5 / np.sqrt(count)
    lagged = np.corrcoef(streams[0, 1:], streams[0, :-1])[0, 1]
    assert abs(lagged) < 5 / np.sqrt(count)


def test_the_largest_draw_stays_below_one() -> None:
    """Index found by inverting the mixer: an output of all ones is the largest double below 1."""
    mask = 2**64 - 1

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(64 // bits + 1):
            result = value ^ (result >> bits)
        return result

    state = unshift(mask, 31)
    state = unshift(state * pow(0x94D049BB133111EB, -1, 2**64) & mask, 27)
    state = unshift(state * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask, 30)
    key = (state - 0x9E3779B97F4A7C15) & mask
    assert unsigned(counter_bits(key, torch.tensor([0]))) == [mask]
    assert counter_uniform(key, torch.tensor([0])).item() == 1 - 2.0**-53


def test_a_stream_key_hashes_length_prefixed_labels() -> None:
    message = b"\x02" + bytes(7) + b"12" + b"\x03" + bytes(7) + b"sql" + bytes(8)
    expected = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    assert stream_key(12, "sql", "") == expected


def test_stream_keys_tell_labels_apart() -> None:
    keys = {
        stream_key(0),
        stream_key(1),
        stream_key(0, "ab", "c"),
        stream_key(0, "a", "bc"),
        stream_key(0, "abc"),
        stream_key(0, "c", "ab"),
        stream_key(0, "ab", "c", ""),
        stream_key(0, "ab", "ç"),
        stream_key(-1),
    }
    assert len(keys) == 9
    assert all(0 <= key < 2**64 for key in keys)
