"""LoRE on adapters, in core space, against the same iterations on dense matrices."""

from __future__ import annotations

import torch
from tests.benchmarks.adapters import adapters, stacked
from tests.benchmarks.row import Row, cpu_seconds

from unmerge import FactorsEncoding
from unmerge_strategies.lore import Lore

SIZE, COUNT, RANK, MU, ITERATIONS = 1024, 8, 16, 0.01, 3


def dense_lore(thetas: list[torch.Tensor]) -> torch.Tensor:
    """Return `θ_0 + Σ δ_i` after Algorithm 1 as printed: one SVD per model and iteration."""
    deltas = [torch.zeros_like(theta) for theta in thetas]
    base = torch.zeros_like(thetas[0])
    for _ in range(ITERATIONS):
        rests = [theta - delta for theta, delta in zip(thetas, deltas, strict=True)]
        base = torch.stack(rests).mean(dim=0)
        for n, theta in enumerate(thetas):
            U, S, Vh = torch.linalg.svd(theta - base, full_matrices=False)
            deltas[n] = (U * (S - MU).clamp(min=0)) @ Vh
    return base + torch.stack(deltas).sum(dim=0)


def benchmarks() -> list[Row]:
    """Merge 8 adapters of rank 16 on one 1024 × 1024 module, 3 iterations on either side."""
    factors = adapters(SIZE, COUNT, RANK)
    stack, context = stacked(factors)
    merger = Lore(mu=MU, max_iterations=ITERATIONS, tolerance=0.0)
    ours_s, [encoding] = cpu_seconds(lambda: merger.merge(stack, context), repeats=5)
    assert isinstance(encoding, FactorsEncoding)
    ours = encoding.B @ encoding.A

    # Of one run each: a run takes seconds and repeats to a few per cent.
    wide_s, wide = cpu_seconds(
        lambda: dense_lore([f.B.double() @ f.A.double() for f in factors.values()]), repeats=1
    )
    narrow_s, narrow = cpu_seconds(
        lambda: dense_lore([f.B @ f.A for f in factors.values()]), repeats=1
    )
    what = (
        f"lore, one {SIZE} × {SIZE} module, {COUNT} adapters of rank {RANK}, "
        f"{ITERATIONS} iterations"
    )
    difference = float((ours - wide).norm() / wide.norm())
    return [
        Row(
            what=what,
            peer="Algorithm 1 on the dense deltas, float64: the same numbers",
            ours_s=ours_s,
            peer_s=wide_s,
            difference=difference,
            target=100.0,
        ),
        Row(
            what=what,
            peer="Algorithm 1 on the dense deltas, float32",
            ours_s=ours_s,
            peer_s=narrow_s,
            difference=difference,
            peer_difference=float((narrow.double() - wide).norm() / wide.norm()),
        ),
    ]
