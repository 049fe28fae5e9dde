"""How many singular values a rank, an energy or an error bound keeps, by hand."""

from __future__ import annotations

import pytest
import torch

from unmerge.kernels.truncation import RankChoice

# Squares 64, 16, 16, 4 of 100: tails 36, 20, 4 and 0 %.
SPECTRUM = torch.tensor([8.0, 4.0, 4.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (RankChoice(rank=1), 1),
        (RankChoice(rank=4), 4),
        (RankChoice(rank=9), 4),
        (RankChoice(energy=0.63), 1),
        (RankChoice(energy=0.64), 1),
        (RankChoice(energy=0.65), 2),
        (RankChoice(energy=0.8), 2),
        (RankChoice(energy=0.81), 3),
        (RankChoice(energy=0.96), 3),
        (RankChoice(energy=0.97), 4),
        (RankChoice(energy=1.0), 4),
        (RankChoice(error=0.99), 1),
        (RankChoice(error=0.61), 1),
        (RankChoice(error=0.6), 1),
        (RankChoice(error=0.59), 2),
        (RankChoice(error=0.21), 3),
        (RankChoice(error=0.2), 3),
        (RankChoice(error=0.19), 4),
        (RankChoice(error=0.0), 4),
        (RankChoice(), 4),
    ],
    ids=str,
)
def test_by_hand(choice: RankChoice, expected: int) -> None:
    assert choice.keep(SPECTRUM, dimension=10) == expected


@pytest.mark.parametrize("choice", [RankChoice(error=0.0), RankChoice(energy=1.0), RankChoice()])
def test_rounding_noise_is_kept_by_a_rank_only(choice: RankChoice) -> None:
    noisy = torch.tensor([1.0, 1e-12, 1e-17, 0.0], dtype=torch.float64)
    assert choice.keep(noisy, dimension=10) == 2
    assert RankChoice(rank=4).keep(noisy, dimension=10) == 4


@pytest.mark.parametrize("choice", [RankChoice(error=0.3), RankChoice(energy=0.5), RankChoice()])
def test_one_value_is_kept_of_nothing(choice: RankChoice) -> None:
    assert choice.keep(torch.zeros(3, dtype=torch.float64), dimension=3) == 1


def test_a_bound_far_below_the_rounding_of_a_sum_is_honoured() -> None:
    # 1 − 1e-20 is 1 in float64: only a tail summed for itself can tell.
    spectrum = torch.tensor([1.0, 1e-9, 1e-10], dtype=torch.float64)
    assert RankChoice(error=2e-10).keep(spectrum, dimension=3) == 2
    assert RankChoice(error=2e-9).keep(spectrum, dimension=3) == 1


def test_noise_counts_as_cut_off() -> None:
    # The tail of two values is 20 %; with 1 % of noise it no longer fits into 20.5 %.
    assert RankChoice(energy=0.795).keep(SPECTRUM, dimension=4) == 2
    assert RankChoice(energy=0.795).keep(SPECTRUM, dimension=4, noise=0.01) == 3
    # Nothing is left to cut: all are kept whatever the noise.
    assert RankChoice(error=0.0).keep(SPECTRUM, dimension=4, noise=0.5) == 4


@pytest.mark.parametrize(
    ("rank", "energy", "error"),
    [(1, 0.5, None), (1, None, 0.5), (None, 0.5, 0.5), (1, 0.5, 0.5)],
)
def test_alternatives_are_not_given_together(
    rank: int | None, energy: float | None, error: float | None
) -> None:
    with pytest.raises(ValueError, match="give at most one"):
        RankChoice(rank=rank, energy=energy, error=error)
