"""What direct merging adds: cross terms `B_i A_j`, measured and compared with Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unmerge.adapter import Factors
from unmerge.errors import ConfigError, IncompatibleAdaptersError, NonFiniteError
from unmerge.kernels.counter import counter_uniform, stream_key
from unmerge.kernels.lowrank import orthonormal_core

__all__ = [
    "DirectMergeInterference",
    "MatchedNoise",
    "direct_merge_interference",
    "interference_term",
]

# Steps of the integral over the spectrum of noise: its error is far below what any size up to
# millions of rows can resolve.
_QUADRATURE_STEPS = 8192


@dataclass(frozen=True, slots=True)
class MatchedNoise:
    """Gaussian noise with the mean and standard deviation of a matrix of cross terms.

    Attributes:
        shape: `(d_out, d_in)`.
        mean: Of every entry.
        std: Of every entry.
        seed: Key of the numbers, together with `module`.
        module: Module path; different modules get different noise.
    """

    shape: tuple[int, int]
    mean: float
    std: float
    seed: int = 0
    module: str = ""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows `start:stop` of the noise, `(stop - start, d_in)` float64, on the CPU.

        An entry is a function of seed, module and its row-major index alone, so it is the same
        in whatever blocks the matrix is asked for: `mean + std · Φ⁻¹(u)`, Φ the normal
        distribution, u a counter-based uniform number moved by half a step off 0.

        Raises:
            ConfigError: Not 0 ≤ start ≤ stop ≤ d_out.
        """
        rows, cols = self.shape
        if not 0 <= start <= stop <= rows:
            raise ConfigError(f"rows {start}:{stop} of noise that has {rows} rows")
        key = stream_key(self.seed, "matched noise", self.module)
        uniform = counter_uniform(key, torch.arange(start * cols, stop * cols)) + 2.0**-54
        values: torch.Tensor = self.mean + self.std * torch.special.ndtri(uniform)
        return values.reshape(stop - start, cols)

    @property
    def stable_rank(self) -> float:
        """`‖N‖_F² / ‖N‖_2²` as it is for large matrices: `d_out d_in / (√d_out + √d_in)²`.

        Of noise about 0: the mean, tiny beside the deviation in practice, is left out.
        """
        rows, cols = self.shape
        return rows * cols / (math.sqrt(rows) + math.sqrt(cols)) ** 2

    def top_energy(self, rank: int) -> float:
        """Return the share of `‖N‖_F²` in the `rank` leading singular directions.

        Of large matrices of noise about 0: from the Marchenko–Pastur distribution.

        Raises:
            ConfigError: `rank` is negative.
        """
        if rank < 0:
            raise ConfigError(f"rank is {rank}, expected at least 0")
        small, large = sorted(self.shape)
        if rank >= small:
            return 1.0
        # With eigenvalues x = 1 + γ − 2 √γ cos θ the density of θ is 2 sin²θ / (π x), and the
        # energy of all eigenvalues above that of θ is 1 − (θ − sin θ cos θ) / π.
        gamma = small / large
        step = math.pi / _QUADRATURE_STEPS
        theta = (torch.arange(_QUADRATURE_STEPS, dtype=torch.float64) + 0.5) * step
        density = 2 * theta.sin() ** 2 / (1 + gamma - 2 * math.sqrt(gamma) * theta.cos())
        above = density.flip(0).cumsum(0)
        above /= above[-1].clone()  # so that it reaches 1 in spite of rounding
        reached = int(torch.searchsorted(above, rank / small))
        before = float(above[reached - 1]) if reached else 0.0
        part = (rank / small - before) / (float(above[reached]) - before)
        edge = math.pi - (reached + part) * step
        return 1 - (edge - math.sin(edge) * math.cos(edge)) / math.pi


@dataclass(frozen=True, slots=True)
class DirectMergeInterference:
    """The interference term `M = L_DM − L_MM` of one module, in numbers.

    Attributes:
        shape: `(d_out, d_in)`.
        rank: Rank r of every adapter.
        norm: `‖M‖`, Frobenius, as are all norms here.
        multiplied_norm: `‖L_MM‖`, `L_MM = Σ w_i Δ_i`.
        direct_norm: `‖L_DM‖`.
        truncation: `‖L_MM − SVD_r(L_MM)‖`: what the best rank-r approximation loses; never more
            than `norm` (equation 7).
        alignment: Cosine between M and L_MM; 0 where one of them is zero.
        mean: Mean of the entries of M.
        std: Their standard deviation (of the population: divided by d_out · d_in).
        spectrum: Singular values of M, descending.
        noise_share: Root of the expected share of the energy of matched noise (about 0) that lies
            in the joint column space and row space of the adapters. All of M lies there.
    """

    shape: tuple[int, int]
    rank: int
    norm: float
    multiplied_norm: float
    direct_norm: float
    truncation: float
    alignment: float
    mean: float
    std: float
    spectrum: tuple[float, ...]
    noise_share: float

    @property
    def relative(self) -> float:
        """`‖M‖ / ‖L_MM‖`; 0 where M is zero, infinite where only L_MM is."""
        if self.norm == 0:
            return 0.0
        return self.norm / self.multiplied_norm if self.multiplied_norm else math.inf

    @property
    def stable_rank(self) -> float:
        """`‖M‖_F² / ‖M‖_2²`, at least 1; 0 for a zero M."""
        return (self.norm / self.spectrum[0]) ** 2 if self.norm else 0.0

    @property
    def top_energy(self) -> float:
        """Share of `‖M‖²` in its r leading singular directions; 0 for a zero M."""
        if not self.norm:
            return 0.0
        return min((math.hypot(*self.spectrum[: self.rank]) / self.norm) ** 2, 1.0)

    def noise(self, *, seed: int = 0, module: str = "") -> MatchedNoise:
        """Return the noise that the paper adds to L_MM in place of M."""
        return MatchedNoise(self.shape, self.mean, self.std, seed=seed, module=module)


def interference_term(
    factors: Sequence[Factors], weights: Sequence[float] | None = None
) -> Factors:
    """Return `M = Σ_{i≠j} B_i A_j = L_DM − L_MM` as factors of rank N r.

    Args:
        factors: One per adapter, of one `(d_out, d_in)` and one rank.
        weights: One per adapter, 1 unless given.

    Returns:
        Float64 factors with scaling 1.

    Raises:
        ConfigError: No factors, or not one finite weight for each.
        IncompatibleAdaptersError: Shapes or ranks differ: `Σ B_i` and `Σ A_i` do not exist.

    Numerics: M is `Σ_i B_i (Σ_{j≠i} A_j)`, never a difference of two nearly equal matrices. Each
        factor carries `√|w_i scaling_i|`, and A the sign, as merging in factor space does, so that
        the terms with i = j are `w_i Δ_i` exactly; the paper's equations have neither.
    Source: "LoRA Merging with SVD" (ICML 2025 R2-FM workshop), section 3.3, equation 3.
    """
    A, B = _direct_factors(factors, weights)
    others = A.sum(dim=0) - A  # (N, r, d_in)
    return Factors(A=others.flatten(0, 1), B=_side_by_side(B), scaling=1.0)


def direct_merge_interference(
    factors: Sequence[Factors], weights: Sequence[float] | None = None, *, cutoff: float = 1e-7
) -> DirectMergeInterference:
    """Measure the interference term of merging one module's factors directly.

    Args:
        factors: As `interference_term`.
        weights: Likewise.
        cutoff: Relative singular value below which a direction counts for no dimension of the
            adapters' joint spaces (`noise_share`).

    Raises:
        ConfigError: As `interference_term`.
        IncompatibleAdaptersError: Likewise.
        NonFiniteError: A factor holds NaN or infinity.

    Numerics: exact in factor space, in float64: QR of `[B_1 … B_N, 1]` and `[A_1ᵀ … A_Nᵀ, 1]`
        gives cores of L_MM, L_DM, M and of the matrix of ones, from which the mean and the
        deviation follow without cancellation. O((d_out + d_in) R² + R³), R = N r.
    Source: "LoRA Merging with SVD", sections 3.3, 3.4 and 4.2 ("Interference Impact"). The paper
        compares the accuracy of L_MM + noise with that of L_DM; the comparison of spectra is ours.
    """
    A, B = _direct_factors(factors, weights)
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NonFiniteError("the factors hold NaN or infinity")
    (count, rank, d_in), d_out = A.shape, B.shape[1]
    total = count * rank
    columns = _side_by_side(B)
    rows = A.flatten(0, 1).T
    left = orthonormal_core(torch.cat([columns, columns.new_ones(d_out, 1)], dim=1)).core
    right = orthonormal_core(torch.cat([rows, rows.new_ones(d_in, 1)], dim=1)).core
    b, a = left[:, :total], right[:, :total]
    parts = a.reshape(-1, count, rank)
    summed = parts.sum(dim=1)  # (k, r): the core of (Σ A_i)ᵀ
    term = b @ (summed[:, None] - parts).reshape(-1, total).T
    multiplied = b @ a.T
    direct = b.reshape(-1, count, rank).sum(dim=1) @ summed.T
    ones = torch.outer(left[:, total], right[:, total])
    mean = float((ones * term).sum()) / (d_out * d_in)
    spectrum = torch.linalg.svdvals(term)[: min(d_out, d_in, total)]
    norm, multiplied_norm = _norm(term), _norm(multiplied)
    alignment = 0.0
    if norm and multiplied_norm:
        alignment = float((term / norm * (multiplied / multiplied_norm)).sum())
    used = _dimensions(b, cutoff) * _dimensions(a, cutoff)
    return DirectMergeInterference(
        shape=(d_out, d_in),
        rank=rank,
        norm=norm,
        multiplied_norm=multiplied_norm,
        direct_norm=_norm(direct),
        truncation=_norm(torch.linalg.svdvals(multiplied)[rank:]),
        alignment=max(-1.0, min(1.0, alignment)),
        mean=mean,
        std=_norm(term - mean * ones) / math.sqrt(d_out * d_in),
        spectrum=tuple(spectrum.tolist()),
        noise_share=math.sqrt(used / (d_out * d_in)),
    )


def _direct_factors(
    factors: Sequence[Factors], weights: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A (N, r, d_in)` and `B (N, d_out, r)` as direct merging adds them up."""
    if not factors:
        raise ConfigError("there is nothing to merge directly; give the factors of at least one")
    chosen = [1.0] * len(factors) if weights is None else list(weights)
    if len(chosen) != len(factors) or not all(math.isfinite(weight) for weight in chosen):
        raise ConfigError(f"weights are {chosen}, expected {len(factors)} finite numbers")
    shapes = {(f.d_out, f.d_in, f.rank) for f in factors}
    if len(shapes) > 1:
        raise IncompatibleAdaptersError(
            f"(d_out, d_in, rank) differ: {sorted(shapes)}; factors can only be added up where "
            "they agree"
        )
    products = [weight * f.scaling for weight, f in zip(chosen, factors, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(r, product) for r, product in zip(roots, products, strict=True)]
    A = torch.stack([f.A.to(torch.float64) * r for f, r in zip(factors, signed, strict=True)])
    B = torch.stack([f.B.to(torch.float64) * r for f, r in zip(factors, roots, strict=True)])
    return A, B


def _side_by_side(B: torch.Tensor) -> torch.Tensor:
    """Return `[B_1 … B_N]`, `(d_out, N r)`, of `(N, d_out, r)`."""
    return B.transpose(0, 1).flatten(1, 2)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _dimensions(core: torch.Tensor, cutoff: float) -> int:
    values = torch.linalg.svdvals(core)
    return int((values > cutoff * values[0]).sum())
