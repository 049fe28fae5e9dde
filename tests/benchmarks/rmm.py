"""RMM through batched small eigenproblems against one batched SVD of the same positions."""

from __future__ import annotations

import torch
from tests.benchmarks.adapters import adapters, stacked
from tests.benchmarks.row import Row, cpu_seconds

from unmerge import AffineBasisEncoding
from unmerge_strategies import Rmm

SIZE, RANK, BASIS = 1024, 16, 3
COUNTS = (8, 32)
"""Fewer adapters than the rank, and more: either can be the side of the smaller Gram matrix."""
TARGET = 2.5


def _svd(points: torch.Tensor) -> torch.Tensor:
    """Return all points `(P, N, r)` restored from their best affine subspaces, float64."""
    wide = points.double()
    mean = wide.mean(1, keepdim=True)
    basis = torch.linalg.svd(wide - mean, full_matrices=False).Vh[:, :BASIS]
    restored: torch.Tensor = mean + (wide - mean) @ basis.transpose(1, 2) @ basis
    return restored


def _benchmark(count: int) -> Row:
    """Fit 3 basis adapters to `count` adapters of rank 16 on one 1024 × 1024 module."""
    factors = adapters(SIZE, count, RANK)
    stack, context = stacked(factors)
    ours_s, [encoding] = cpu_seconds(lambda: Rmm(basis_size=BASIS).merge(stack, context), repeats=9)
    assert isinstance(encoding, AffineBasisEncoding)

    columns = torch.stack([f.A.T for f in factors.values()], dim=1)  # (d_in, N, r)
    rows = torch.stack([f.B for f in factors.values()], dim=1)  # (d_out, N, r)
    peer_s, theirs = cpu_seconds(lambda: torch.cat([_svd(columns), _svd(rows)]), repeats=9)

    A = encoding.mean_A + torch.einsum("npj,prj->nrj", encoding.coefficients_A, encoding.basis_A)
    B = encoding.mean_B + torch.einsum("npi,pir->nir", encoding.coefficients_B, encoding.basis_B)
    ours = torch.cat([A.permute(2, 0, 1), B.permute(1, 0, 2)])
    return Row(
        what=f"rmm, one {SIZE} × {SIZE} module, {count} adapters of rank {RANK}, p = {BASIS}",
        peer="batched torch.linalg.svd in float64",
        ours_s=ours_s,
        peer_s=peer_s,
        difference=float((ours - theirs).norm() / theirs.norm()),
        target=TARGET,
    )


def benchmarks() -> list[Row]:
    """Return one row per number of adapters."""
    return [_benchmark(count) for count in COUNTS]
