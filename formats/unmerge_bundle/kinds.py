"""What sort of layer a module is, in one word: how its delta is laid out in the base weight."""

from __future__ import annotations

import math
import re

__all__ = ["EMBEDDING", "LINEAR", "check_kernel", "check_kind", "kernel_of"]

LINEAR = "linear"
"""The kind of modules that say nothing else."""

EMBEDDING = "embedding"
"""The kind of modules whose weight has one row per token."""

_CONVOLUTION = re.compile(r"conv([123])d:([1-9][0-9]{0,3}(?:x[1-9][0-9]{0,3}){0,2})")


def check_kind(kind: str) -> str:
    """Return `kind` if it is one there is.

    * `linear`: the weight is `(d_out, d_in)`;
    * `embedding`: the weight is `(d_in, d_out)`, one row per token, and gets the delta transposed;
    * `conv2d:3x3` (likewise `conv1d:…`, `conv3d:…`): the weight is `(d_out, channels, 3, 3)`, of
      which the delta is the row-major matrix: `d_in = channels · 3 · 3`.

    Raises:
        ValueError: There is no such kind.
    """
    match = _CONVOLUTION.fullmatch(kind)
    if kind in (LINEAR, EMBEDDING) or (match and len(kernel_of(kind)) == int(match[1])):
        return kind
    raise ValueError(
        f"kind {kind!r}: expected linear, embedding, or a convolution with its kernel such as "
        "conv2d:3x3"
    )


def kernel_of(kind: str) -> tuple[int, ...]:
    """Return the kernel's size of a convolution, `()` for every other kind."""
    match = _CONVOLUTION.fullmatch(kind)
    return tuple(int(size) for size in match[2].split("x")) if match else ()


def check_kernel(kind: str, d_in: int) -> None:
    """Check that rows of `d_in` numbers are whole kernels, one per channel.

    Raises:
        ValueError: They are not, or there is no such kind.
    """
    size = math.prod(kernel_of(check_kind(kind)))
    if d_in % size:
        raise ValueError(
            f"kind {kind} needs a d_in that its kernel's size {size} divides, got {d_in}"
        )
