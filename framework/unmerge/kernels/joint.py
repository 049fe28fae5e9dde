"""Joint decompositions of several small matrices: shared bases, or shared rank-one directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Relative cut-off of the least-squares steps; normal equations square the condition number.
_GRAM_CUTOFF = 1e-13
_CUTOFF = 1e-12


@dataclass(frozen=True, slots=True)
class Joint:
    """`M_i ≈ left @ core_i @ rightᵀ`, the cores being whatever fits best.

    Attributes:
        left: `(a, k_left)`.
        right: `(b, k_right)`.
        iterations: How many were made.
        converged: Whether the last one lowered the error by no more than the tolerance.
    """

    left: torch.Tensor
    right: torch.Tensor
    iterations: int
    converged: bool


def joint_bases(
    matrices: torch.Tensor, rank: int, *, tolerance: float, max_iterations: int
) -> Joint:
    """Return orthonormal bases that lower `Σ ‖M_i − X Xᵀ M_i Y Yᵀ‖²` until neither can alone.

    Args:
        matrices: `(N, a, b)` float64, finite.
        rank: Size of the bases, ≥ 1, cut to a and b.
        tolerance: Stop once the error falls by at most this fraction of `Σ ‖M_i‖²`.
        max_iterations: At least 1.

    Numerics: for fixed Y the best X are the leading left singular vectors of `[M_1 Y … M_N Y]`,
        and the other way round; Y starts as the leading right singular vectors of all M_i. SVDs
        of triangular factors, not Gram matrices: bases of matrices that need no more than `rank`
        directions reproduce them to rounding. A local optimum; O(N a b (a + b)) an iteration.
    Source: arXiv 2407.00066, section 3 (JD-Full).
    """
    a, b = matrices.shape[1:]
    energy = float(matrices.square().sum())
    Y = _leading(_side_by_side(matrices.mT), min(rank, b))
    captured = 0.0
    for iteration in range(1, max_iterations + 1):
        X = _leading(_side_by_side(matrices @ Y), min(rank, a))
        Y = _leading(_side_by_side(matrices.mT @ X), min(rank, b))
        before, captured = captured, float((X.T @ matrices @ Y).square().sum())
        converged = captured - before <= tolerance * energy
        # Nothing is cut off: the first iteration is exact.
        if converged or (X.shape[1] == a and Y.shape[1] == b):
            return Joint(left=X, right=Y, iterations=iteration, converged=True)
    return Joint(left=X, right=Y, iterations=iteration, converged=False)


def _side_by_side(matrices: torch.Tensor) -> torch.Tensor:
    """Return `(N, a, b)` as `(a, N b)`."""
    return matrices.permute(1, 0, 2).reshape(matrices.shape[1], -1)


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of `(a, m)`, completed to `rank` ≤ a columns."""
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.T).R.T
    U: torch.Tensor = torch.linalg.svd(matrix, full_matrices=True).U
    return U[:, :rank]


def joint_rank_ones(
    matrices: torch.Tensor, rank: int, *, tolerance: float, max_iterations: int
) -> Joint:
    """Return rank-one directions `x_j y_jᵀ` that lower `Σ ‖M_i − X diag(c_i) Yᵀ‖²` over all c_i.

    Args:
        matrices: `(N, a, b)` float64, finite.
        rank: Number of directions, ≥ 1, at most `N min(a, b)`.
        tolerance: Stop once the error falls by at most this fraction of `Σ ‖M_i‖²`.
        max_iterations: At least 1.

    Returns:
        `left (a, rank)` and `right (b, rank)` with columns of length 1, not orthogonal.

    Numerics: starts from singular directions of the matrices, each the one that lowers the error
        most given those before it (pivoted Cholesky), so that as many as the matrices have
        together reproduce them; then least squares for c, X and Y in turn, columns rescaled to
        length 1. A local optimum; O(N a b k) an iteration.
    Source: arXiv 2407.00066, section 3 (JD-Diag); a canonical polyadic decomposition.
    """
    X, Y = _pivoted_directions(matrices, rank)
    energy = float(matrices.square().sum())
    error = float("inf")
    for iteration in range(1, max_iterations + 1):
        cores = diagonal_cores(matrices, X, Y)
        before, error = error, _error(matrices, X, Y, cores)
        converged = before - error <= tolerance * energy
        if converged or error <= torch.finfo(matrices.dtype).eps ** 2 * matrices.numel() * energy:
            return Joint(left=X, right=Y, iterations=iteration, converged=True)
        if iteration < max_iterations:
            X = _unit(_factor(matrices, Y, cores), X)
            Y = _unit(_factor(matrices.mT, X, diagonal_cores(matrices, X, Y)), Y)
    return Joint(left=X, right=Y, iterations=max_iterations, converged=False)


def diagonal_cores(matrices: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Return the `c (N, k)` that minimise `Σ ‖M_i − X diag(c_i) Yᵀ‖²`, the shortest if several.

    Args:
        matrices: `(N, a, b)` float64, finite.
        X: `(a, k)`, columns of length 1.
        Y: `(b, k)`, columns of length 1.
    """
    products = (X[:, None, :] * Y[None, :, :]).reshape(-1, X.shape[1])  # (a b, k)
    basis, triangle = torch.linalg.qr(products)
    inverse = torch.linalg.pinv(triangle, rtol=_CUTOFF)
    solved: torch.Tensor = (matrices.reshape(matrices.shape[0], -1) @ basis) @ inverse.T
    return solved


def _factor(matrices: torch.Tensor, Y: torch.Tensor, cores: torch.Tensor) -> torch.Tensor:
    """Return the `X (a, k)` that minimises `Σ ‖M_i − X diag(c_i) Yᵀ‖²`."""
    gram = (cores.T @ cores) * (Y.T @ Y)
    right = ((matrices @ Y) * cores[:, None, :]).sum(dim=0)
    solved: torch.Tensor = right @ torch.linalg.pinv(gram, rtol=_GRAM_CUTOFF, hermitian=True)
    return solved


def _unit(columns: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the columns at length 1; one that vanished stays what it was."""
    lengths = torch.linalg.vector_norm(columns, dim=0)
    return torch.where(lengths > 0, columns / torch.where(lengths > 0, lengths, 1.0), before)


def _error(matrices: torch.Tensor, X: torch.Tensor, Y: torch.Tensor, cores: torch.Tensor) -> float:
    return float((matrices - (X * cores[:, None, :]) @ Y.T).square().sum())


def _pivoted_directions(matrices: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    X, Y = _side_by_side(U), _side_by_side(Vh.mT)  # (a, candidates), (b, candidates)
    sigma = S.reshape(-1)
    left = sigma.square()  # the diagonal of the Gram matrix of σ_c x_c y_cᵀ
    rows: list[torch.Tensor] = []
    chosen: list[int] = []
    for _ in range(rank):
        pivot = int(left.argmax())
        chosen.append(pivot)
        # Its row of the Gram matrix alone: the whole has a row for every candidate.
        row = (X.T @ X[:, pivot]) * (Y.T @ Y[:, pivot]) * (sigma * sigma[pivot])
        for previous in rows:
            row -= previous[pivot] * previous
        if left[pivot] > 0:
            rows.append(row / left[pivot].sqrt())
            left = left - rows[-1].square()
        left[chosen] = float("-inf")
    return X[:, chosen], Y[:, chosen]
