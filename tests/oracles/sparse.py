"""Trimming, sign election and random dropping: magnitude pruning, TIES and DARE.

A rule sees `Tensors`: the matrices that one scope covers, each a mapping from adapter name to that
adapter's matrix. For a scope of one module the list has one element; for a scope of the whole model
it has one per module, in the order of the module paths (in factor space A, then B, of each). An
adapter that lacks a module is not in its mapping. `Weights` has the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from oracles.common import Matrix, Rule
from oracles.linear import sum_rule

Tensors = Sequence[Mapping[str, Matrix]]
Weights = Sequence[Mapping[str, float]]
Mask = npt.NDArray[np.bool_]


def _names(tensors: Tensors) -> list[str]:
    return sorted({name for tensor in tensors for name in tensor})


def _gather(tensors: Tensors, name: str) -> Matrix:
    """Return one adapter's task vector: all its matrices, row by row, one after the other."""
    return np.concatenate([tensor[name].reshape(-1) for tensor in tensors if name in tensor])


def _scatter(vectors: Mapping[str, Matrix], tensors: Tensors) -> list[dict[str, Matrix]]:
    """Undo `_gather` for all adapters."""
    start = dict.fromkeys(vectors, 0)
    scattered: list[dict[str, Matrix]] = []
    for tensor in tensors:
        scattered.append({})
        for name in sorted(tensor):
            stop = start[name] + tensor[name].size
            scattered[-1][name] = vectors[name][start[name] : stop].reshape(tensor[name].shape)
            start[name] = stop
    return scattered


def trim_vector(vector: Matrix, density: float) -> Matrix:
    """Keep the `int(density · numel)` entries of largest magnitude; of equal ones the first."""
    count = int(density * vector.size)
    order = sorted(range(vector.size), key=lambda j: (-abs(vector[j]), j))
    kept = np.zeros_like(vector)
    for j in order[:count]:
        kept[j] = vector[j]
    return kept


def trim(tensors: Tensors, density: float) -> list[dict[str, Matrix]]:
    """Trim every adapter's task vector over everything the scope covers."""
    vectors = {name: trim_vector(_gather(tensors, name), density) for name in _names(tensors)}
    return _scatter(vectors, tensors)


def magnitude_prune(
    tensors: Tensors, weights: Weights, *, density: float, scale: float = 1.0
) -> list[Matrix]:
    """Return `λ Σ w_i trim(τ_i)` per matrix (PEFT's `magnitude_prune`)."""
    merged = []
    for tensor, weight in zip(trim(tensors, density), weights, strict=True):
        names = sorted(tensor)
        total = sum_rule([tensor[name] for name in names], [weight[name] for name in names])
        merged.append(scale * total)
    return merged


def ties(
    tensors: Tensors,
    weights: Weights,
    *,
    density: float,
    scale: float = 1.0,
    vote: Literal["value", "count"] = "value",
    weigh_votes: bool = False,
    zero_vote: Literal["drop", "positive", "majority"] = "drop",
    reduce: Literal["mean", "sum", "max"] = "mean",
) -> list[Matrix]:
    """Trim, elect, merge (TIES-Merging, arXiv 2306.01708, Algorithm 1), entry by entry.

    Weights enter after the election, as in PEFT: `λ / #agree · Σ_{agree} w_i τ_i`; `weigh_votes`
    elects on `w_i τ_i` and divides by `Σ_{agree} w_i`, as mergekit does. An entry whose vote is 0
    keeps nothing (the paper's `sgn(0)`), the positive values (PEFT, mergekit), or those of the sign
    that won most entries of the scope, the negative ones if none did (KnOTS, FusionBench).
    """
    trimmed = trim(tensors, density)
    votes = []
    for tensor, weight in zip(trimmed, weights, strict=True):
        total = np.zeros_like(next(iter(tensor.values())))
        for name in sorted(tensor):
            cast = weight[name] * tensor[name] if weigh_votes else tensor[name]
            total += np.sign(cast) if vote == "count" else cast
        votes.append(total)
    majority = np.sign(sum(float(np.sign(total).sum()) for total in votes))
    winner_of_a_draw = {"drop": 0.0, "positive": 1.0, "majority": float(majority) or -1.0}[
        zero_vote
    ]

    merged = []
    for tensor, weight, total in zip(trimmed, weights, votes, strict=True):
        result = np.zeros_like(total)
        for entry in np.ndindex(*total.shape):
            elected = float(np.sign(total[entry])) or winner_of_a_draw
            values, divisor = [], 0.0
            for name in sorted(tensor):
                value = float(tensor[name][entry])
                if elected * value * (weight[name] if weigh_votes else 1.0) > 0:
                    values.append(weight[name] * value)
                    divisor += weight[name] if weigh_votes else 1.0
            if not values:
                continue
            if reduce == "max":
                result[entry] = max(values, key=abs)
            elif reduce == "sum":
                result[entry] = sum(values)
            else:
                result[entry] = sum(values) / divisor
        merged.append(scale * result)
    return merged


def contested(
    tensors: Tensors,
    weights: Weights,
    *,
    density: float,
    tolerance: float,
    vote: Literal["value", "count"] = "value",
    weigh_votes: bool = False,
) -> list[Mask]:
    """Return, per matrix, the entries whose trim or vote another rounding could decide otherwise.

    `tolerance` is relative to the largest magnitude of an adapter's task vector. A trim is
    contested where an entry within it lies on the other side of the cut; a vote by value where its
    total is within it. Exact zeros contest nothing.
    """
    doubtful = {}
    for name in _names(tensors):
        vector = np.abs(_gather(tensors, name))
        count = int(density * vector.size)
        kept = trim_vector(vector, density) > 0
        margin = tolerance * vector.max()
        doubtful[name] = np.zeros(vector.shape)
        if 0 < count < vector.size and margin > 0:
            descending = np.sort(vector)[::-1]
            near_the_cut = np.where(
                kept,
                vector <= descending[count] + margin,
                vector >= descending[count - 1] - margin,
            )
            # Kept or not, an exact zero adds nothing.
            doubtful[name] = (near_the_cut & (vector > 0)).astype(np.float64)
    in_doubt = _scatter(doubtful, tensors)
    masks = []
    for tensor, weight, doubt in zip(trim(tensors, density), weights, in_doubt, strict=True):
        mask = np.zeros(next(iter(tensor.values())).shape, dtype=bool)
        total, spread, voted = np.zeros(mask.shape), np.zeros(mask.shape), mask.copy()
        for name in sorted(tensor):
            mask |= doubt[name] > 0
            share = weight[name] if weigh_votes else 1.0
            total += share * tensor[name]
            spread += tolerance * abs(share) * np.abs(tensor[name]).max(initial=0.0)
            voted |= share * tensor[name] != 0
        if vote == "value":
            mask |= voted & (np.abs(total) <= spread)
        masks.append(mask)
    return masks


def dare(
    tensors: Tensors,
    masks: Sequence[Mapping[str, Mask]],
    *,
    density: float,
    rescale: Literal["density", "norm", "none"] = "density",
) -> list[dict[str, Matrix]]:
    """Drop the entries a mask does not keep and rescale the rest (DARE, arXiv 2311.03099).

    `"density"` divides by the fraction kept, the paper's `1 / (1 − p)`; `"norm"` keeps
    `Σ|τ|` of every adapter's matrix (mergekit); `"none"` leaves the survivors as they are.
    """
    dropped: list[dict[str, Matrix]] = []
    for tensor, mask in zip(tensors, masks, strict=True):
        dropped.append({})
        for name in sorted(tensor):
            survivors = np.where(mask[name], tensor[name], 0.0)
            before, after = float(np.abs(tensor[name]).sum()), float(np.abs(survivors).sum())
            factor = {
                "density": 1.0 / density,
                "norm": before / after if after else 0.0,
                "none": 1.0,
            }[rescale]
            dropped[-1][name] = factor * survivors
    return dropped


def ties_rule(
    *, density: float, scale: float = 1.0, reduce: Literal["mean", "sum"] = "mean"
) -> Rule:
    """Return TIES over one matrix as a rule for any space."""

    def rule(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        names = [f"{n:04}" for n in range(len(matrices))]
        tensors = [dict(zip(names, matrices, strict=True))]
        shares = [dict(zip(names, weights, strict=True))]
        return ties(tensors, shares, density=density, scale=scale, reduce=reduce)[0]

    return rule
