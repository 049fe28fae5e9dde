"""The published SplitMix64 generator, in exact Python integers."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """Return the first outputs of the published SplitMix64 generator, in exact Python integers."""
    state, outputs = seed & _MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        outputs.append(z ^ (z >> 31))
    return outputs
