"""LoRA-LEGO's rank-one units and what makes a clustering of them one of k-means.

k-means has many local optima, so there is no single right answer to compare with: the oracle gives
the units, the objective, and the two conditions that every answer of Lloyd's iteration meets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from oracles.common import Matrix, Part

Labels = npt.NDArray[np.int64]


def units(parts: Sequence[Part]) -> Matrix:
    """Return the minimal semantic units of all adapters, one per row: `[B[:, j], A[j, :]]`.

    The scaling is inside, its sign on B, and column and row of a unit have equal norms, so that a
    unit does not depend on how a scale is spread over its two halves (our reading; arXiv
    2409.16167, section 3, takes rows and columns as they come).
    """
    rows = []
    for A, B, scaling, _ in parts:
        for j in range(np.shape(A)[0]):
            column = float(scaling) * np.asarray(B, np.float64)[:, j]
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


def means(points: Matrix, labels: Labels, clusters: int) -> Matrix:
    """Return the mean of every cluster; zero for an empty one."""
    result = np.zeros((clusters, points.shape[1]))
    for cluster in range(clusters):
        if (labels == cluster).any():
            result[cluster] = points[labels == cluster].mean(axis=0)
    return result


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
