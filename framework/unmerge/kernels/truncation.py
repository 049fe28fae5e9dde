"""How many singular values to keep: a rank, a fraction of the energy, or an error bound."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import torch


@dataclass(frozen=True, slots=True)
class RankChoice:
    """Where a spectrum is cut off: after `rank` values, or where energy or error allows it.

    At most one of the three is given; with none, everything that is no rounding noise is kept.

    Attributes:
        rank: Values kept, ≥ 1; fewer where there are fewer.
        energy: The fewest values whose squares sum to at least this fraction of all, in (0, 1].
        error: The fewest values that leave at most this relative Frobenius error, in [0, 1).
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        choices = {"rank": self.rank, "energy": self.energy, "error": self.error}
        given = [f"{name} {value}" for name, value in choices.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are alternatives; give at most one")

    @property
    def tail(self) -> float | None:
        """The fraction of the squared norm that may be cut off; `None` where `rank` decides."""
        if self.rank is not None:
            return None
        if self.energy is not None:
            # Of the decimal that was typed: 1 − 0.8 in binary is less than 0.2.
            return float(1 - Decimal(repr(self.energy)))
        return self.error**2 if self.error is not None else 0.0

    def keep(self, spectrum: torch.Tensor, *, dimension: int, noise: float = 0.0) -> int:
        """Return how many values of a spectrum are kept, at least 1.

        Args:
            spectrum: `(n,)` singular values, float64, descending, n ≥ 1.
            dimension: The larger dimension of the matrix; what is not above
                `dimension · 2⁻⁵² · spectrum[0]` is rounding noise and kept by `rank` only.
            noise: By how much, relative to the squared norm, tails of the spectrum may be too
                small; counted as cut off, so that the bound holds all the same.

        Numerics: tails are summed from the smallest value up, so that a bound far below 10⁻⁸ is
            honoured. O(n).
        """
        count = spectrum.shape[0]
        if self.rank is not None:
            return min(self.rank, count)
        squares = spectrum.square()
        # tails[k] is what keeping k values cuts off.
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        floor = dimension * torch.finfo(torch.float64).eps * spectrum[0]
        genuine = int((spectrum > floor).sum())
        tail = self.tail or 0.0
        fits = tails + noise * tails[0] <= tail * tails[0]
        # The last entry cuts off nothing: it fits whatever the noise.
        fits[-1] = True
        return max(1, min(int(fits.to(torch.uint8).argmax()), genuine))
