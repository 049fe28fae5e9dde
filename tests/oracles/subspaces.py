"""Rules in aligned coordinates: KnOTS and core space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from oracles.common import Matrix, Part, Rule, canonical_signs, dense, numerical_rank


class Aligned(NamedTuple):
    """Deltas in common coordinates: `Δ_i = left @ blocks[i] @ right`."""

    left: Matrix
    blocks: list[Matrix]
    right: Matrix

    def restore(self, block: Matrix) -> Matrix:
        """Return the delta that `block` stands for."""
        delta: Matrix = self.left @ block @ self.right
        return delta


def _cleaned(block: Matrix) -> Matrix:
    """Set to zero what is zero but for rounding, so that it takes no part in a trim or a vote."""
    return np.where(np.abs(block) > 1e-13 * np.abs(block).max(), block, 0.0)


def knots_blocks(
    parts: Sequence[Part], *, axis: Literal["output", "input"] = "output", cutoff: float = 1e-7
) -> Aligned:
    """Return the blocks `Σ V_iᵀ` of `[Δ_1 … Δ_N] = U Σ [V_1ᵀ … V_Nᵀ]` (arXiv 2410.19735, eq. 4).

    `axis="input"` does the same to `Δᵀ`; a block then is `(V_i Σ)`, `(d_out, k)`, and the shared
    factor stands on the right. The cut-off is relative (the authors' code: 1e-5 absolute).
    """
    deltas = [dense(part) for part in parts]
    if axis == "input":
        deltas = [delta.T for delta in deltas]
    U, S, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    U = U[:, : numerical_rank(S, cutoff)]
    U = U * canonical_signs(U)
    width = deltas[0].shape[1]
    # `Uᵀ Δ_i` is `Σ V_iᵀ`, and exactly zero for a zero adapter.
    blocks = [_cleaned(U.T @ delta) for delta in deltas]
    if axis == "input":
        return Aligned(np.eye(width), [block.T for block in blocks], U.T)
    return Aligned(U, blocks, np.eye(width))


def core_blocks(parts: Sequence[Part], *, balance: bool = True, cutoff: float = 1e-7) -> Aligned:
    """Return the cores `U_Bᵀ Δ_i V_A` of Core Space merging (arXiv 2509.17786, section 3).

    `U_B` are the left singular vectors of `[B_1 … B_N]`, `V_A` the right ones of the stacked A.
    `balance` first brings every adapter to its SVD form `B = U √Σ`, `A = √Σ Vᵀ`, scaling included,
    so that the bases depend on the deltas only; the authors take the factors as they come (here the
    scaling, which their code leaves out, then is a part of B).
    """
    As, Bs = [], []
    for A, B, scaling, weight in parts:
        if balance:
            U, S, Vt = np.linalg.svd(dense((A, B, scaling, weight)), full_matrices=False)
            rank = min(np.shape(A)[0], S.size)
            roots = np.sqrt(S[:rank])
            Bs.append(U[:, :rank] * roots)
            As.append(roots[:, None] * Vt[:rank])
        else:
            Bs.append(float(scaling) * np.asarray(B, np.float64))
            As.append(np.asarray(A, np.float64))
    U, S, _ = np.linalg.svd(np.concatenate(Bs, axis=1), full_matrices=False)
    U = U[:, : numerical_rank(S, cutoff)]
    _, S, Vt = np.linalg.svd(np.concatenate(As, axis=0), full_matrices=False)
    Vt = Vt[: numerical_rank(S, cutoff)]
    U, Vt = U * canonical_signs(U), Vt * canonical_signs(Vt.T)[:, None]
    return Aligned(U, [_cleaned(U.T @ dense(part) @ Vt.T) for part in parts], Vt)


def knots(
    parts: Sequence[Part],
    inner: Rule,
    *,
    axis: Literal["output", "input"] = "output",
    cutoff: float = 1e-7,
) -> Matrix:
    """Return `U · inner({Σ V_iᵀ})`."""
    aligned = knots_blocks(parts, axis=axis, cutoff=cutoff)
    return aligned.restore(inner(aligned.blocks, [float(part[3]) for part in parts]))


def core_space(
    parts: Sequence[Part], inner: Rule, *, balance: bool = True, cutoff: float = 1e-7
) -> Matrix:
    """Return `U_B · inner({U_Bᵀ Δ_i V_A}) · V_Aᵀ`."""
    aligned = core_blocks(parts, balance=balance, cutoff=cutoff)
    return aligned.restore(inner(aligned.blocks, [float(part[3]) for part in parts]))
