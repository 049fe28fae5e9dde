"""TIES on deltas in row blocks, without sorting, against dense deltas that are argsorted."""

from __future__ import annotations

import sys

import torch
from tests.benchmarks.adapters import adapters, stacked
from tests.benchmarks.memory import extra_bytes, report
from tests.benchmarks.row import Row, cpu_seconds

from unmerge import DeltaEncoding, Factors
from unmerge.kernels import delta_rows
from unmerge_strategies import Ties

SIZE, COUNT, RANK, DENSITY = 4096, 8, 16, 0.2


def ours(factors: dict[str, Factors]) -> torch.Tensor:
    """Merge with equal weights before the vote, as mergekit's `ties` does."""
    stack, context = stacked(factors)
    merger = Ties(density=DENSITY, weigh_votes=True, zero_vote="positive")
    [encoding] = merger.merge(stack, context)
    assert isinstance(encoding, DeltaEncoding)
    return encoding.delta


def sorting(factors: dict[str, Factors]) -> torch.Tensor:
    """Merge as mergekit does: all deltas at once, each trimmed by the order of its magnitudes."""
    trimmed = []
    for f in factors.values():
        # Products in the same row grid: equal bits, so that both trim the same numbers.
        delta = delta_rows(f, 0, SIZE)
        order = torch.argsort(delta.abs().view(-1), descending=True)
        mask = torch.zeros_like(delta)
        mask.view(-1)[order[: int(DENSITY * delta.numel())]] = 1
        trimmed.append(delta * mask)
    deltas = torch.stack(trimmed)
    weights = torch.ones(COUNT, 1, 1)
    weighted = deltas * weights
    elected = (weighted.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
    agreeing = weighted.sign() == elected
    divisor = (weights * agreeing).sum(dim=0)
    divisor[divisor == 0] = 1
    return (weighted * agreeing).sum(dim=0) / divisor


def benchmarks() -> list[Row]:
    """Merge 8 adapters of rank 16 on one 4096 × 4096 module."""
    factors = adapters(SIZE, COUNT, RANK)
    ours_s, got = cpu_seconds(lambda: ours(factors))
    # One run: it takes half a minute.
    peer_s, expected = cpu_seconds(lambda: sorting(factors), repeats=1)
    difference = float((got.double() - expected).norm() / expected.double().norm())
    return [
        Row(
            what=f"ties, one {SIZE} × {SIZE} module, {COUNT} adapters of rank {RANK}",
            peer="dense deltas, argsort, as mergekit merges",
            ours_s=ours_s,
            peer_s=peer_s,
            difference=difference,
            target=6.0,
            ours_bytes=extra_bytes(__name__, "ours"),
            peer_bytes=extra_bytes(__name__, "sorting"),
            memory_target=0.25,
        )
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs, implementation = (
        adapters(SIZE, COUNT, RANK),
        {"ours": ours, "sorting": sorting}[sys.argv[1]],
    )
    report(lambda: implementation(inputs))
