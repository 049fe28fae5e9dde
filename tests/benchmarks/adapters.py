"""The adapters that the comparisons merge: Gaussian, of one rank, on one square module."""

from __future__ import annotations

import torch

from unmerge import Factors, FactorStack, MergeContext


def adapters(size: int, count: int, rank: int = 16) -> dict[str, Factors]:
    """Return `count` adapters of a `size × size` module by name, deltas of norm about √rank."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"adapter{n:02d}": Factors(
            A=torch.randn(rank, size, generator=generator) / size**0.5,
            B=torch.randn(size, rank, generator=generator) / size**0.5,
            scaling=1.0,
        )
        for n in range(count)
    }


def stacked(factors: dict[str, Factors]) -> tuple[FactorStack, MergeContext]:
    """Return them as the stack and context of a merge, every weight 1."""
    stack = FactorStack.build([("m", list(factors.items()))], list(factors))
    return stack, MergeContext(weights=dict.fromkeys(factors, 1.0))
