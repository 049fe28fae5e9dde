"""KnOTS in factors against the dense algorithm: one SVD of all deltas side by side."""

from __future__ import annotations

import torch
from tests.benchmarks.adapters import adapters, stacked
from tests.benchmarks.row import Row, cpu_seconds

from unmerge import Factors, FactorsEncoding
from unmerge_strategies import Knots, Ties

SIZE, COUNT, RANK, DENSITY = 2048, 8, 16, 0.2


def dense_knots(factors: list[Factors]) -> torch.Tensor:
    """Return `U · ties({Σ V_iᵀ})` of the dense deltas, with the authors' absolute cut-off."""
    deltas = [f.B.double() @ f.A.double() for f in factors]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    supported = S > 1e-5
    blocks = (S[supported, None] * Vh[supported]).split(SIZE, dim=1)
    trimmed = []
    for block in blocks:
        order = block.abs().reshape(-1).topk(int(DENSITY * block.numel())).indices
        mask = torch.zeros(block.numel(), dtype=block.dtype)
        mask[order] = 1
        trimmed.append(block * mask.view_as(block))
    stacked = torch.stack(trimmed)
    agreeing = stacked * (stacked.sign() == stacked.sum(dim=0).sign())
    merged = agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
    return U[:, supported] @ merged


def benchmarks() -> list[Row]:
    """Merge 8 adapters of rank 16 on one 2048 × 2048 module."""
    factors = adapters(SIZE, COUNT, RANK)
    stack, context = stacked(factors)
    merger = Knots(inner=Ties(density=DENSITY))
    ours_s, [encoding] = cpu_seconds(lambda: merger.merge(stack, context), repeats=5)
    assert isinstance(encoding, FactorsEncoding)
    # One run: it takes more than a minute.
    peer_s, expected = cpu_seconds(lambda: dense_knots(list(factors.values())), repeats=1)
    got = encoding.B.float().double() @ encoding.A.float().double()
    return [
        Row(
            what=f"knots over ties, one {SIZE} × {SIZE} module, {COUNT} adapters of rank {RANK}",
            peer="the algorithm on dense deltas in float64",
            ours_s=ours_s,
            peer_s=peer_s,
            difference=float((got - expected).norm() / expected.norm()),
            target=300.0,
        )
    ]
