"""LoRA-LEGO's rank-one units and what makes a clustering of them one of k-means.

k-means has many local optima, so there is no single right answer to compare with: the oracle gives
the units, the objective, and the two conditions that every answer of Lloyd's iteration meets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from oracles.common import Matrix, Part, sign

Labels = npt.NDArray[np.int64]


def units(parts: Sequence[Part]) -> Matrix:
    """Return the minimal semantic units of all adapters, one per row: `[B[:, j], A[j, :]]`.

    The scaling is inside, its sign and that of a negative weight on B, and column and row of a unit
    have equal norms, so that a unit does not depend on how a scale is spread over its two halves
    (our reading; arXiv 2409.16167, section 3, takes rows and columns as they come).
    """
    rows = []
    for A, B, scaling, weight in parts:
        for j in range(np.shape(A)[0]):
            column = sign(weight) * float(scaling) * np.asarray(B, np.float64)[:, j]
            row = np.asarray(A, np.float64)[j]
            norm_b, norm_a = float(np.linalg.norm(column)), float(np.linalg.norm(row))
            root = math.sqrt(norm_a * norm_b)
            halves = (
                column * (root / norm_b if norm_b else 0.0),
                row * (root / norm_a if norm_a else 0.0),
            )
            rows.append(np.concatenate(halves))
    return np.stack(rows)


def nearest(points: Matrix, centroids: Matrix) -> Labels:
    """Return the index of every point's nearest centroid, the first of equally near ones."""
    return np.array(
        [int(np.argmin([np.linalg.norm(point - c) for c in centroids])) for point in points]
    )


def means(
    points: Matrix, labels: Labels, clusters: int, weights: Sequence[float] | None = None
) -> Matrix:
    """Return the (weighted) mean of every cluster; zero for an empty one."""
    shares = np.ones(len(points)) if weights is None else np.asarray(weights)
    result = np.zeros((clusters, points.shape[1]))
    for cluster in range(clusters):
        members = labels == cluster
        if members.any():
            total = (shares[members, None] * points[members]).sum(axis=0)
            result[cluster] = total / shares[members].sum()
    return result


def reweighted(
    points: Matrix, labels: Labels, centroids: Matrix, d_out: int, rank: float
) -> Matrix:
    """Return `√(r / k) Σ_c ρ_c² b_c a_cᵀ`, with `ρ_c = mean ‖u‖ / ‖c‖` over a cluster's members.

    LoRA-LEGO's dual reweighting: a centroid is shorter than its members, and k units are not r.
    """
    total = np.zeros((d_out, points.shape[1] - d_out))
    for cluster, centroid in enumerate(centroids):
        members = points[labels == cluster]
        mean_norm = float(np.linalg.norm(members, axis=1).mean())
        factor = mean_norm / float(np.linalg.norm(centroid))
        total += factor**2 * np.outer(centroid[:d_out], centroid[d_out:])
    return math.sqrt(rank / len(centroids)) * total


def inertia(points: Matrix, centroids: Matrix) -> float:
    """Return `Σ min_c ‖x − c‖²`, the objective of k-means."""
    return sum(min(float(np.linalg.norm(p - c)) ** 2 for c in centroids) for p in points)


def lloyd(points: Matrix, clusters: int, *, seed: int, iterations: int = 100) -> Matrix:
    """Return centroids after Lloyd's iteration from `clusters` random points."""
    start = np.random.default_rng(seed).permutation(len(points))[:clusters]
    centroids = points[start]
    for _ in range(iterations):
        labels = nearest(points, centroids)
        moved = means(points, labels, clusters)
        for cluster in range(clusters):
            if not (labels == cluster).any():
                moved[cluster] = centroids[cluster]
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids
