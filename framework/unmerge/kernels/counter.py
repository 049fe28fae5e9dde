"""Counter-based randomness: a number is a function of its key and index, never of call order.

SplitMix64 (Steele, Lea, Flood 2014) evaluated at arbitrary positions in integer tensor
operations, which wrap modulo 2⁶⁴ on every device. The key of a stream is a hash of seed, adapter
name, module path and part, so a mask is the same whatever the chunking, the device, the order of
the adapters or the number of processes. Test vectors: `docs/concepts.md`.
"""

from __future__ import annotations

import hashlib

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, *labels: str) -> int:
    """Return the 64-bit key of the stream that `seed` and `labels` name.

    The first eight bytes, little-endian, of the BLAKE2b hash of the decimal seed and the labels,
    each preceded by its length in bytes as eight little-endian bytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for label in (str(seed), *labels):
        data = label.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def counter_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return output `index` of the stream, 64 bits as int64, per entry of `index` (int64)."""
    state = (index + 1) * _signed(_GAMMA) + _signed(key)
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX_2)
    return state ^ _shift_right(state, 31)


def counter_uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return a uniform float64 in [0, 1) per entry of `index`: its top 53 bits over 2⁵³."""
    return _shift_right(counter_bits(key, index), 11).to(torch.float64) * 2.0**-53


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts copy the sign bit; a logical shift must not.
    return (value >> bits) & ((1 << (64 - bits)) - 1)
