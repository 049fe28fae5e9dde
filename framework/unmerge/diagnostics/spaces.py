"""How deltas lie to each other: inner products, principal angles, shares; never a dense matrix.

Every delta is brought to its singular value form `U diag(S) Vᵀ` once; all comparisons are then
functions of the small blocks `U_iᵀ U_j` and `V_iᵀ V_j`. They depend on the deltas alone, not on how
they are factored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.adapter import Factors
from unmerge.errors import ConfigError, IncompatibleAdaptersError, NonFiniteError
from unmerge.kernels.lowrank import orthonormal_core, svd_of_product

__all__ = [
    "DeltaSpaces",
    "PairwiseGeometry",
    "SubspaceGeometry",
    "compare_deltas",
    "cosine",
    "delta_spaces",
    "principal_angles",
]

CUTOFF = 1e-7
"""Singular values below this fraction of the largest are taken for rounding of float32 factors."""

_RIGHT_ANGLE = math.pi / 2


@dataclass(frozen=True, slots=True, eq=False)
class DeltaSpaces:
    """One delta in singular value form, `U diag(S) Vᵀ`, with its numerical rank k.

    Attributes:
        U: `(d_out, k)` float64, orthonormal: the column space, what the delta writes to.
        S: `(k,)`, descending, positive.
        V: `(d_in, k)`, orthonormal: the row space, what the delta reads.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    @property
    def rank(self) -> int:
        """Numerical rank of the delta; 0 for a zero one."""
        return self.S.shape[0]

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta, without the directions that were cut off."""
        return float(torch.linalg.vector_norm(self.S))


def delta_spaces(factors: Factors, *, cutoff: float = CUTOFF) -> DeltaSpaces:
    """Return the singular value form of one delta.

    Args:
        factors: Any finite factors.
        cutoff: Directions whose singular value is at most this fraction of the largest are left
            out. Factors in a store are float32 or narrower, so what lies below 1e-7 is rounding.

    Raises:
        ConfigError: `cutoff` is not in [0, 1).
        NonFiniteError: The delta is not finite.

    Numerics: float64 QR of both factors and the SVD of a core of rank × rank;
        O((d_out + d_in) r² + r³).
    """
    _check_cutoff(cutoff)
    B = factors.B.to(torch.float64) * factors.scaling
    A = factors.A.to(torch.float64)
    # Checked here, because LAPACK may not return from a QR of infinities.
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NonFiniteError("the factors of a delta hold NaN or infinity")
    svd = svd_of_product(B, A, factors.rank)
    kept = _numerical_rank(svd.S, cutoff)
    return DeltaSpaces(U=svd.U[:, :kept], S=svd.S[:kept], V=svd.Vh[:kept].T)


@dataclass(frozen=True, slots=True, eq=False)
class SubspaceGeometry:
    """How the column spaces, or the row spaces, of N deltas of one module lie to each other.

    Two spaces of dimensions p and q have min(p, q) principal angles, 0 for each common direction,
    π/2 for a right angle. The space of a zero delta is taken to be at right angles to every space,
    itself included, so that no entry is undefined.

    Attributes:
        smallest: `(N, N)` float64, the smallest principal angle, in radians.
        largest: `(N, N)`, the largest one.
        overlap: `(N, N)`, mean squared cosine of the angles: 1 where the smaller space lies in the
            larger one, 0 at right angles; k/d is what two random spaces of dimension k have.
    """

    smallest: torch.Tensor
    largest: torch.Tensor
    overlap: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PairwiseGeometry:
    """How N deltas of one module lie to each other.

    `P_i` and `Q_i` are the orthogonal projections on the column space and on the row space of Δ_i.
    Whatever is divided by the norm of a zero delta is 0.

    Attributes:
        ranks: Numerical ranks of the deltas.
        norms: `(N,)` float64 Frobenius norms.
        inner: `(N, N)` Frobenius inner products `⟨Δ_i, Δ_j⟩`, symmetric.
        inside: `(N, N)`; entry (i, j) is `‖P_j Δ_i Q_j‖`: how much of delta i reads what delta j
            reads and writes where delta j writes.
        disturbance: `(N,)`; entry i is `‖P_i (Σ_{j≠i} Δ_j) Q_i‖`: what the sum of the others adds
            where delta i acts.
        columns: Angles between the column spaces (of B, where A and B have full rank).
        rows: Angles between the row spaces (of A, likewise).
    """

    ranks: tuple[int, ...]
    norms: torch.Tensor
    inner: torch.Tensor
    inside: torch.Tensor
    disturbance: torch.Tensor
    columns: SubspaceGeometry
    rows: SubspaceGeometry

    @property
    def cosines(self) -> torch.Tensor:
        """`(N, N)` cosines `⟨Δ_i, Δ_j⟩ / (‖Δ_i‖ ‖Δ_j‖)`, in [−1, 1]."""
        return cosines_of(self.inner, self.norms)

    @property
    def shares(self) -> torch.Tensor:
        """`(N, N)` `‖P_j Δ_i Q_j‖ / ‖Δ_i‖` in [0, 1]; not symmetric."""
        return ratio(self.inside, self.norms[:, None]).clamp(max=1.0)

    @property
    def interference(self) -> torch.Tensor:
        """`(N,)` `‖P_i (Σ_{j≠i} Δ_j) Q_i‖ / ‖Δ_i‖`, 0 where nobody disturbs adapter i."""
        return ratio(self.disturbance, self.norms)


def compare_deltas(factors: Sequence[Factors], *, cutoff: float = CUTOFF) -> PairwiseGeometry:
    """Compare the deltas of one module with each other.

    Args:
        factors: One per adapter, of one `(d_out, d_in)`; ranks may differ.
        cutoff: See `delta_spaces`.

    Raises:
        ConfigError: No factors, or `cutoff` is not in [0, 1).
        IncompatibleAdaptersError: Their shapes differ.
        NonFiniteError: A delta is not finite.

    Numerics: float64. Inner products are accurate to a few units of rounding of `‖Δ_i‖ ‖Δ_j‖`
        whatever the factoring, angles to a few units of rounding of a right angle, small ones too.
        O(N (d_out + d_in) r² + N² (d_out + d_in) r² + N² r³) for N deltas of rank r, and memory
        for one module's factors in float64 and N r² numbers.
    """
    if not factors:
        raise ConfigError("there are no deltas to compare; give the factors of at least one")
    shapes = {(f.d_out, f.d_in) for f in factors}
    if len(shapes) > 1:
        raise IncompatibleAdaptersError(
            f"deltas of shapes {sorted(shapes)} cannot be compared; expected one (d_out, d_in)"
        )
    spaces = [delta_spaces(f, cutoff=cutoff) for f in factors]
    count, depth = len(spaces), max(max(space.rank for space in spaces), 1)
    device = factors[0].A.device
    # Zero columns past a delta's own rank contribute nothing to any product below.
    U = torch.zeros(count, factors[0].d_out, depth, dtype=torch.float64, device=device)
    V = torch.zeros(count, factors[0].d_in, depth, dtype=torch.float64, device=device)
    S = torch.zeros(count, depth, dtype=torch.float64, device=device)
    for n, space in enumerate(spaces):
        U[n, :, : space.rank], V[n, :, : space.rank] = space.U, space.V
        S[n, : space.rank] = space.S
    square = torch.zeros(count, count, dtype=torch.float64, device=device)
    inner, inside = square, square.clone()
    disturbance = square.new_zeros(count)
    columns = _AngleTable(spaces, [space.U for space in spaces], square)
    rows = _AngleTable(spaces, [space.V for space in spaces], square)
    for i in range(count):
        left, right = U[i].T @ U, V[i].T @ V  # (N, k, k): U_iᵀ U_j, V_iᵀ V_j
        seen = (left * S[:, None, :]) @ right.mT  # (N, k, k): U_iᵀ Δ_j V_i
        inner[i] = (seen.diagonal(dim1=1, dim2=2) * S[i]).sum(dim=1)
        inside[:, i] = torch.linalg.vector_norm(seen, dim=(1, 2))
        others = seen[:i].sum(dim=0) + seen[i + 1 :].sum(dim=0)
        disturbance[i] = torch.linalg.vector_norm(others)
        columns.fill(i, left)
        rows.fill(i, right)
    return PairwiseGeometry(
        ranks=tuple(space.rank for space in spaces),
        # Of the inner products, not of S: what rounding did to U and V then cancels in a cosine.
        norms=inner.diagonal().sqrt(),
        inner=inner.triu() + inner.triu(1).T,
        inside=inside,
        disturbance=disturbance,
        columns=columns.geometry(),
        rows=rows.geometry(),
    )


def cosine(first: Factors, second: Factors) -> float:
    """Return `⟨Δ_1, Δ_2⟩ / (‖Δ_1‖ ‖Δ_2‖)`, in [−1, 1]; 0 where one of them is zero.

    Raises:
        IncompatibleAdaptersError: Their shapes differ.
        NonFiniteError: A delta is not finite.
    """
    return float(compare_deltas([first, second]).cosines[0, 1])


def principal_angles(
    first: torch.Tensor, second: torch.Tensor, *, cutoff: float = CUTOFF
) -> torch.Tensor:
    """Return the principal angles between two column spaces, ascending, in radians.

    For the row spaces of factors give `f.A.T`, for the column spaces `f.B`.

    Args:
        first: `(d, p)`, any columns.
        second: `(d, q)`, likewise.
        cutoff: Directions of at most this fraction of a matrix's largest singular value are left
            out of its space.

    Returns:
        Float64, as many as the smaller space has dimensions; none where that is 0.

    Raises:
        ConfigError: The matrices do not have equally many rows, or `cutoff` is not in [0, 1).
        NonFiniteError: A matrix holds NaN or infinity.

    Numerics: cosines and sines are computed apart, so that both small angles and nearly right
        ones are accurate to rounding. O(d (p + q)²).
    Source: Björck and Golub, "Numerical Methods for Computing Angles Between Linear Subspaces",
        Mathematics of Computation 27 (1973).
    """
    _check_cutoff(cutoff)
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        raise ConfigError(
            f"principal angles need two matrices with equally many rows, got shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    return _angles(_orthonormal(first, cutoff), _orthonormal(second, cutoff))


def cosines_of(inner: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return the cosines that belong to `(N, N)` inner products and their `(N,)` norms."""
    cosines = ratio(inner, torch.outer(norms, norms)).clamp(min=-1.0, max=1.0)
    # To the bit, though the root of a square rarely is.
    cosines.diagonal().copy_(norms != 0)
    return cosines


def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return `part / whole`, and 0 where the whole is 0: a zero delta has no share of anything."""
    return torch.where(whole == 0, 0.0, part / torch.where(whole == 0, 1.0, whole))


class _AngleTable:
    """Collects the angles of all pairs, a row of pairs at a time."""

    def __init__(
        self, spaces: Sequence[DeltaSpaces], bases: Sequence[torch.Tensor], square: torch.Tensor
    ) -> None:
        self._bases = bases
        self._ranks = torch.tensor([space.rank for space in spaces], device=square.device)
        self._smallest = torch.full_like(square, _RIGHT_ANGLE)
        self._largest = torch.full_like(square, _RIGHT_ANGLE)
        self._overlap = torch.zeros_like(square)

    def fill(self, i: int, blocks: torch.Tensor) -> None:
        """Enter the pairs of i with itself and all later ones; `blocks (N, k, k)`."""
        shared = torch.minimum(self._ranks[i], self._ranks)
        if shared[i] == 0:
            return
        self._smallest[i, i] = self._largest[i, i] = 0.0
        self._overlap[i, i] = 1.0
        later = slice(i + 1, None)
        if not blocks[later].shape[0]:
            return
        squares = blocks[later].square().sum(dim=(1, 2))
        self._overlap[i, later] = ratio(squares, shared[later].to(squares.dtype)).clamp(max=1.0)
        cosines = torch.linalg.svdvals(blocks[later])
        last = (shared[later] - 1).clamp(min=0)
        # Of cosines alone, which serves where no angle is below 45°; a zero delta gets π/2.
        self._smallest[i, later] = torch.acos(cosines[:, 0].clamp(max=1.0))
        self._largest[i, later] = torch.acos(cosines.gather(1, last[:, None])[:, 0].clamp(max=1.0))
        for offset in torch.nonzero(cosines[:, 0] > math.sqrt(0.5))[:, 0].tolist():
            j = i + 1 + offset
            angles = _angles(self._bases[i], self._bases[j])
            self._smallest[i, j], self._largest[i, j] = angles[0], angles[-1]

    def geometry(self) -> SubspaceGeometry:
        """Return the table, its lower half mirrored from the upper one."""
        smallest, largest, overlap = (
            table.triu() + table.triu(1).T
            for table in (self._smallest, self._largest, self._overlap)
        )
        return SubspaceGeometry(smallest=smallest, largest=largest, overlap=overlap)


def _angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the principal angles between the spans of orthonormal columns, ascending."""
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    if second.shape[1] == 0:
        return second.new_zeros(0)
    overlap = first.T @ second
    cosines = torch.linalg.svdvals(overlap)  # descending: ascending angles
    # What the larger space leaves of the smaller one has the sines as singular values.
    sines = torch.linalg.svdvals(second - first @ overlap).flip(0)
    return torch.atan2(sines, cosines)


def _orthonormal(matrix: torch.Tensor, cutoff: float) -> torch.Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError("a matrix whose column space is asked for holds NaN or infinity")
    basis = orthonormal_core(matrix)
    U, S, _ = torch.linalg.svd(basis.core, full_matrices=False)
    return basis.apply(U[:, : _numerical_rank(S, cutoff)])


def _numerical_rank(singular_values: torch.Tensor, cutoff: float) -> int:
    # Not >=: an all-zero matrix must give rank 0.
    if singular_values.shape[0] == 0:
        return 0
    return int((singular_values > cutoff * singular_values[0]).sum())


def _check_cutoff(cutoff: float) -> None:
    if not 0 <= cutoff < 1:
        raise ConfigError(f"cutoff is {cutoff}, expected a fraction in [0, 1)")
