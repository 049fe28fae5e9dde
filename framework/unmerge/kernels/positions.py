"""Arithmetic on many small matrices at once, as long vectors: the position is the last axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Positions that are worked on at once: enough to make the price of a call small against its work,
# few enough to stay near the processor.
BLOCK = 2048

# What their number is filled up to, so that no position is in the remainder of a vector loop: its
# bits do not depend on how many others there are.
_PADDED = 64


def positions_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy `(a, b, W)` of `(P, a, b)`, zeros from P on, W the next multiple of 64.

    Every operation is then one on long vectors, and none has a remainder that is done otherwise.
    """
    positions, rows, columns = tensor.shape
    flat = tensor.reshape(positions, rows * columns).t()
    missing = -positions % _PADDED
    wide = torch.nn.functional.pad(flat, (0, missing)) if missing else flat.contiguous()
    return wide.view(rows, columns, positions + missing)


def positions_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return `(P, a, b)` for `(a, b, P)`, contiguous."""
    rows, columns, positions = tensor.shape
    flat = tensor.reshape(rows * columns, positions).t()
    return flat.contiguous().view(positions, rows, columns)


def total(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the rows, one after the other: an order that no shape or device changes."""
    result = rows[0].clone()
    for row in rows[1:]:
        result += row
    return result


def dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `Σ_i left_i · right_i`, entry by entry and in this order."""
    result = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        result.addcmul_(a, b)
    return result


def orthonormalise(vectors: torch.Tensor) -> torch.Tensor:
    """Make `vectors (n, size, W)` orthonormal in place; return where none of them was lost."""
    kept = torch.ones_like(vectors[0, 0], dtype=torch.bool)
    done: list[tuple[torch.Tensor, ...]] = []
    for column in range(vectors.shape[1]):
        vector = vectors[:, column]
        rows = vector.unbind(0)
        length = dot(rows, rows).sqrt_()
        vector /= length
        # A zero vector has no direction; one whose length overflows has lost it.
        kept &= (length > 0) & (length < math.inf)
        for other in done:
            along = dot(other, rows)
            for row, direction in zip(rows, other, strict=True):
                row.addcmul_(direction, along, value=-1)
        if done:
            length = dot(rows, rows).sqrt_()
            vector /= length
            kept &= length > 0.5
        done.append(rows)
    return kept
