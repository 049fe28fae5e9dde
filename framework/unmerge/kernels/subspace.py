"""Best affine subspaces for many small point sets at once: the closed form behind RMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AffineBasis:
    """For each of P positions, the affine subspace of dimension p nearest to N points.

    Attributes:
        mean: `(P, r)`.
        basis: `(P, p, r)`; rows orthonormal, or zero where the points span fewer directions.
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
        Float64 tensors on the device of `points`.

    Numerics: float64. The top right singular vectors of the centred points come from the
        eigenvectors of the smaller Gram matrix, N × N or r × r. For N ≤ r the fit is the
        projection `u uᵀ X` in the space of the adapters, so p = min(N − 1, r) returns the points
        to the rounding of float64 however small a singular value is. Each basis vector's entry of
        largest magnitude is positive. O(P N r min(N, r)).
    Source: "Towards Reversible Model Merging for Low-rank Weights", section 5.1 and Theorem 1.
        Algorithm 1 line 7 prints the mean without 1/N; the text has it, and so does this.
    """
    wide = points.to(torch.float64)
    mean = wide.mean(dim=1)
    centred = wide - mean[:, None]
    count, dimension = wide.shape[1], wide.shape[2]
    if count <= dimension:
        gram = centred @ centred.transpose(1, 2)
        left = _leading_eigenvectors(gram, size)  # (P, N, p)
        scaled = left.transpose(1, 2) @ centred  # (P, p, r): σ_k times the basis vector
        lengths = torch.linalg.vector_norm(scaled, dim=2, keepdim=True)
        # Not a relative cut-off: any length keeps `left · scaled` exact, only 0 has no direction.
        basis = torch.where(lengths > 0, scaled / lengths, 0.0)
        coefficients = left * lengths.transpose(1, 2)
    else:
        gram = centred.transpose(1, 2) @ centred
        basis = _leading_eigenvectors(gram, size).transpose(1, 2)
        coefficients = centred @ basis.transpose(1, 2)
    signs = _row_signs(basis)  # (P, p)
    return AffineBasis(
        mean=mean, basis=basis * signs[:, :, None], coefficients=coefficients * signs[:, None, :]
    )


def _leading_eigenvectors(gram: torch.Tensor, size: int) -> torch.Tensor:
    """Return the eigenvectors of the `size` largest eigenvalues, largest first, as columns."""
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)[..., :size]


def _row_signs(basis: torch.Tensor) -> torch.Tensor:
    if basis.numel() == 0:
        return basis.new_ones(basis.shape[:2])
    peaks = basis.gather(2, basis.abs().argmax(dim=2, keepdim=True))[..., 0]
    return torch.where(peaks < 0, -1.0, 1.0).to(basis.dtype)
