"""Best affine subspaces for many small point sets at once: the closed form behind RMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AffineBasis:
    """For each of P positions, the affine subspace of dimension p nearest to N points.

    Attributes:
        mean: `(P, r)`.
        basis: `(P, p, r)`, rows orthonormal.
        coefficients: `(P, N, p)`; point n is `mean + coefficients[n] @ basis`.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    coefficients: torch.Tensor


def affine_basis(points: torch.Tensor, size: int) -> AffineBasis:
    """Return the least-squares affine subspace of dimension `size` at every position.

    Args:
        points: `(P, N, r)`: at each position N points of dimension r.
        size: Dimension p, 0 ≤ p ≤ min(N − 1, r).

    Returns:
        Float64 tensors on the device of `points`. Where the points span fewer than p directions,
        the rest of the basis is arbitrary (and deterministic), with coefficients of rounding size.

    Numerics: float64. The top right singular vectors of the centred points come from the
        eigenvectors of the smaller Gram matrix, r × r or (N − 1) × (N − 1). The latter is that of
        N − 1 orthonormal contrasts, so that the direction that centring removes cannot mix with
        small ones, and its vectors are orthonormalised by QR, so that p = min(N − 1, r) returns
        the points to rounding however small a singular value is. Each basis vector's entry of
        largest magnitude is positive. O(P N r min(N, r)).
    Source: "Towards Reversible Model Merging for Low-rank Weights", section 5.1 and Theorem 1.
        Algorithm 1 line 7 prints the mean without 1/N; the text has it, and so does this.
    """
    wide = points.to(torch.float64)
    mean = wide.mean(dim=1)
    centred = wide - mean[:, None]
    positions, count, dimension = wide.shape
    if size == 0:
        basis = wide.new_zeros(positions, 0, dimension)
    elif count <= dimension:
        contrasts = _helmert(count, wide.device) @ centred  # (P, N − 1, r)
        left = _leading_eigenvectors(contrasts @ contrasts.transpose(1, 2), size)
        directions = contrasts.transpose(1, 2) @ left  # (P, r, p), lengths descending
        basis = torch.linalg.qr(directions).Q.transpose(1, 2)
    else:
        gram = centred.transpose(1, 2) @ centred
        basis = _leading_eigenvectors(gram, size).transpose(1, 2)
    basis = basis * _row_signs(basis)[:, :, None]
    return AffineBasis(mean=mean, basis=basis, coefficients=centred @ basis.transpose(1, 2))


def _helmert(count: int, device: torch.device) -> torch.Tensor:
    """Return `count − 1` orthonormal rows that are orthogonal to the vector of ones."""
    rows = torch.tril(torch.ones(count, count, dtype=torch.float64, device=device), -1)[1:]
    index = torch.arange(1, count, dtype=torch.float64, device=device)
    rows[torch.arange(count - 1), torch.arange(1, count)] = -index
    return rows / (index * (index + 1)).sqrt()[:, None]


def _leading_eigenvectors(gram: torch.Tensor, size: int) -> torch.Tensor:
    """Return the eigenvectors of the `size` largest eigenvalues, largest first, as columns."""
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :size]


def _row_signs(basis: torch.Tensor) -> torch.Tensor:
    if basis.numel() == 0:
        return basis.new_ones(basis.shape[:2])
    peaks = basis.gather(2, basis.abs().argmax(dim=2, keepdim=True))[..., 0]
    return torch.where(peaks < 0, -1.0, 1.0).to(basis.dtype)
