"""Sign election: the sign of a sum over adapters, entry by entry, in one pass over a block."""

from __future__ import annotations

import torch

from unmerge.errors import NonFiniteError


def elected_signs(values: torch.Tensor, *, by_count: bool = False) -> torch.Tensor:
    """Return the sign of `Σ_n values[n]`, or of `Σ_n sign(values[n])`: −1, 0 or 1.

    Args:
        values: `(N, …)`.
        by_count: Sum signs instead of values.

    Returns:
        `(…)`, of the dtype of `values`.

    Raises:
        NonFiniteError: A value, or a sum of values, is NaN or infinite: that is no vote.

    Numerics: values are summed one after the other in their own dtype, so that the vote of an
        entry depends on nothing but its values and their order. One scratch array.
    Source: arXiv 2306.01708, section 4.2 (`value`); PEFT's `majority_sign_method="frequency"`.
    """
    total = torch.zeros_like(values[0])
    for each in values:
        total += each.sign() if by_count else each
    # What is not finite stays so in a sum, but has a sign; times 0 it is NaN, all else is 0.
    if float((0 * (values if by_count else total)).sum()) != 0:
        raise NonFiniteError("deltas hold NaN or infinity, which is no vote; check the scalings")
    return total.sign_()
