"""Sign election: the sign of a sum over adapters, entry by entry, in one pass over a block."""

from __future__ import annotations

import torch


def elected_signs(values: torch.Tensor, *, by_count: bool = False) -> torch.Tensor:
    """Return the sign of `Σ_n values[n]`, or of `Σ_n sign(values[n])`: −1, 0 or 1.

    Args:
        values: `(N, …)`, finite.
        by_count: Sum signs instead of values.

    Returns:
        `(…)`, of the dtype of `values`.

    Numerics: values are summed one after the other in their own dtype, so that the vote of an
        entry depends on nothing but its values and their order. One scratch array.
    Source: arXiv 2306.01708, section 4.2 (`value`); PEFT's `majority_sign_method="frequency"`.
    """
    total = torch.zeros_like(values[0])
    for each in values:
        total += each.sign() if by_count else each
    return total.sign_()
