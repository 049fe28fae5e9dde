"""Diagnostics against dense numpy, cases worked out by hand, and the edges where 0/0 lurks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import make_adapter
from stacks import random_factors
from unmerge import Adapter, AdapterStore, Factors
from unmerge.diagnostics import (
    MatchedNoise,
    analyze,
    compare_deltas,
    cosine,
    delta_spaces,
    direct_merge_interference,
    interference_term,
    interpolate,
    mode_connectivity,
    principal_angles,
)
from unmerge.errors import (
    AdapterNotInStoreError,
    ConfigError,
    IncompatibleAdaptersError,
    ModuleNotInAdapterError,
    NonFiniteError,
)


def factors(A: list[list[float]], B: list[list[float]], scaling: float = 1.0) -> Factors:
    return Factors(
        torch.tensor(A, dtype=torch.float64), torch.tensor(B, dtype=torch.float64), scaling
    )


def dense(f: Factors) -> np.ndarray:
    return f.scaling * (f.B.double().numpy() @ f.A.double().numpy())


def projectors(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the orthogonal projections on the column space and on the row space."""
    U, S, Vt = np.linalg.svd(delta)
    cut = 1e-9 * max(S[0], 1e-300)
    rank = len([value for value in S if value > cut])
    return U[:, :rank] @ U[:, :rank].T, Vt[:rank].T @ Vt[:rank]


def random_deltas(count: int = 4, *, d_out: int = 14, d_in: int = 11) -> list[Factors]:
    ranks = (4, 2, 3, 1, 4, 4)
    return [
        random_factors(
            seed, rank=ranks[seed], d_out=d_out, d_in=d_in, scaling=1.5 - seed, spectrum="decaying"
        )
        for seed in range(count)
    ]


# --- Cosines, angles, shares --------------------------------------------------------------------


def test_a_pair_worked_out_by_hand() -> None:
    first = factors([[1, 0]], [[1], [0]], scaling=2.0)  # [[2, 0], [0, 0]]
    second = factors([[1, 0]], [[1], [1]])  # [[1, 0], [1, 0]]
    found = compare_deltas([first, second])
    half = math.sqrt(0.5)
    assert found.ranks == (1, 1)
    assert torch.allclose(found.norms, torch.tensor([2.0, math.sqrt(2)]).double(), atol=1e-15)
    assert torch.allclose(found.inner, torch.tensor([[4.0, 2], [2, 2]]).double(), atol=1e-14)
    assert torch.allclose(found.cosines, torch.tensor([[1, half], [half, 1]]).double(), atol=1e-7)
    # P_2 Δ_1 Q_2 = [[1, 0], [1, 0]] and P_1 Δ_2 Q_1 = [[1, 0], [0, 0]].
    assert torch.allclose(
        found.inside, torch.tensor([[2, math.sqrt(2)], [1, math.sqrt(2)]]).double(), atol=1e-7
    )
    assert torch.allclose(found.shares, torch.tensor([[1, half], [half, 1]]).double(), atol=1e-7)
    assert torch.allclose(found.interference, torch.tensor([0.5, 1.0]).double(), atol=1e-15)
    assert found.columns.smallest[0, 1] == pytest.approx(math.pi / 4, abs=1e-15)
    assert found.columns.largest[0, 1] == pytest.approx(math.pi / 4, abs=1e-15)
    assert found.columns.overlap[0, 1] == pytest.approx(0.5)
    assert found.rows.smallest[0, 1] == pytest.approx(0, abs=1e-15)
    assert found.rows.overlap[0, 1] == pytest.approx(1)
    assert cosine(first, second) == pytest.approx(half)


@pytest.mark.parametrize(("d_out", "d_in"), [(14, 11), (3, 11), (14, 2), (40, 30)])
def test_everything_equals_the_dense_computation(d_out: int, d_in: int) -> None:
    having = random_deltas(6, d_out=d_out, d_in=d_in)
    found = compare_deltas(having)
    deltas = [dense(f) for f in having]
    spaces = [projectors(delta) for delta in deltas]
    for i, first in enumerate(deltas):
        norm = np.linalg.norm(first)
        assert found.norms[i] == pytest.approx(norm, rel=1e-12)
        others = sum((d for j, d in enumerate(deltas) if j != i), np.zeros_like(first))
        P, Q = spaces[i]
        expected = np.linalg.norm(P @ others @ Q) / norm
        assert found.interference[i] == pytest.approx(expected, rel=1e-9)
        for j, second in enumerate(deltas):
            assert found.inner[i, j] == pytest.approx(
                float((first * second).sum()), rel=1e-10, abs=1e-12 * norm
            )
            P, Q = spaces[j]
            expected = np.linalg.norm(P @ first @ Q) / norm
            assert found.shares[i, j] == pytest.approx(expected, rel=1e-9)
            for side, geometry in ((0, found.columns), (1, found.rows)):
                ranks = sorted(round(np.trace(spaces[n][side])) for n in (i, j))
                cosines = np.linalg.svd(spaces[i][side] @ spaces[j][side])[1][: ranks[0]]
                assert geometry.overlap[i, j] == pytest.approx(np.mean(cosines**2), rel=1e-9)
                assert math.cos(geometry.smallest[i, j]) == pytest.approx(cosines[0], abs=1e-9)
                assert math.cos(geometry.largest[i, j]) == pytest.approx(cosines[-1], abs=1e-9)


def test_the_tables_are_symmetric_to_the_bit_and_within_their_range() -> None:
    having = random_deltas(5)
    found = compare_deltas([*having, having[0], replace(having[1], scaling=-3.0)])
    symmetric = (found.inner, found.cosines, found.columns.smallest, found.rows.largest)
    for table in (*symmetric, found.columns.overlap):
        assert torch.equal(table, table.T)
    assert bool((found.cosines.abs() <= 1).all())
    assert bool((found.shares <= 1).all())
    assert bool((found.shares >= 0).all())
    assert found.cosines.diagonal().tolist() == [1.0] * 7
    assert found.cosines[0, 5] == pytest.approx(1, abs=1e-15)
    assert found.cosines[1, 6] == pytest.approx(-float(np.sign(having[1].scaling)), abs=1e-15)


def test_identical_adapters_have_no_angle_and_lie_inside_each_other() -> None:
    f = random_deltas()[0]
    found = compare_deltas([f, f, f])
    assert torch.allclose(found.cosines, torch.ones(3, 3).double(), atol=1e-15)
    assert torch.allclose(found.shares, torch.ones(3, 3).double(), atol=1e-14)
    assert torch.allclose(found.interference, torch.full((3,), 2.0).double(), atol=1e-13)
    for geometry in (found.columns, found.rows):
        assert float(geometry.largest.max()) < 1e-14
        assert torch.allclose(geometry.overlap, torch.ones(3, 3).double(), atol=1e-14)


def test_orthogonal_adapters_have_nothing_in_common() -> None:
    found = compare_deltas([factors([[1, 0]], [[1], [0]]), factors([[0, 1]], [[0], [1]])])
    assert torch.equal(found.cosines, torch.eye(2).double())
    assert torch.equal(found.shares, torch.eye(2).double())
    assert torch.equal(found.interference, torch.zeros(2).double())
    assert found.columns.smallest[0, 1] == pytest.approx(math.pi / 2)
    assert float(found.columns.overlap[0, 1]) == 0


def test_a_shared_column_space_alone_is_no_interference() -> None:
    found = compare_deltas([factors([[1, 0]], [[1], [0]]), factors([[0, 1]], [[1], [0]])])
    assert float(found.columns.largest[0, 1]) == 0
    assert torch.equal(found.interference, torch.zeros(2).double())
    assert torch.equal(found.shares, torch.eye(2).double())


def test_a_zero_adapter_gives_zeros_and_right_angles_not_nan() -> None:
    f = random_deltas()[0]
    zero = replace(f, B=torch.zeros_like(f.B))
    for pair in ([f, zero], [zero, f], [zero, zero], [f, replace(f, scaling=0.0)]):
        found = compare_deltas(pair)
        n = 1 if pair[0] is f else 0
        for table in (found.cosines, found.shares, found.columns.overlap, found.rows.overlap):
            assert not bool(table.isnan().any())
            assert not table[n].any()
        assert not found.interference.any()
        assert bool((found.rows.smallest[n] == math.pi / 2).all())
        assert bool((found.columns.largest[n] == math.pi / 2).all())
        assert found.ranks[n] == 0


def test_one_adapter_is_alone() -> None:
    found = compare_deltas([random_deltas()[0]])
    assert found.cosines.tolist() == [[pytest.approx(1)]]
    assert found.interference.tolist() == [0.0]
    assert found.rows.largest.tolist() == [[0.0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5))
def test_equal_deltas_compare_equal_however_they_are_factored(seed: int, rank: int) -> None:
    first = random_factors(seed, rank=rank, d_out=9, d_in=7)
    second = random_factors(seed + 1, rank=3, d_out=9, d_in=7)
    gauge = torch.diag(10.0 ** torch.linspace(-3, 3, rank, dtype=torch.float64))
    gauge = gauge @ torch.linalg.qr(gauge + random_factors(seed, rank=rank, d_out=1, d_in=rank).A).Q
    other = Factors(2 * torch.linalg.solve(gauge, first.A), first.B @ gauge, first.scaling / 2)
    found, expected = compare_deltas([other, second]), compare_deltas([first, second])
    for name in ("cosines", "shares", "interference"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-9), name
    assert torch.allclose(found.columns.smallest, expected.columns.smallest, atol=1e-8)


def test_a_cosine_near_one_is_right_to_the_last_digits() -> None:
    first = random_factors(3, rank=4, d_out=30, d_in=20)
    second = replace(first, A=first.A + 1e-6 * random_factors(4, rank=4, d_out=1, d_in=20).A)
    wide = [
        np.longdouble(f.scaling) * (f.B.numpy().astype(np.longdouble) @ f.A.numpy())
        for f in (first, second)
    ]
    expected = (wide[0] * wide[1]).sum() / np.sqrt((wide[0] ** 2).sum() * (wide[1] ** 2).sum())
    assert 1e-14 < float(1 - expected) < 1e-11
    found = cosine(first, second)
    assert found <= 1
    assert abs(float(np.longdouble(found) - expected)) < 2e-15


def test_duplicates_have_cosine_one_but_for_one_rounding() -> None:
    for seed in range(20):
        f = random_factors(seed, rank=16, d_out=64, d_in=48)
        assert cosine(f, f) == pytest.approx(1, abs=3e-16)


def test_numerical_rank_leaves_out_padding_and_rounding() -> None:
    f = random_factors(1, rank=2, d_out=6, d_in=5)
    padded = Factors(
        torch.cat([f.A, torch.zeros(2, 5).double(), 1e-9 * torch.ones(1, 5).double()]),
        torch.cat([f.B, torch.ones(6, 3).double()], dim=1),
        f.scaling,
    )
    spaces = delta_spaces(padded)
    assert spaces.rank == 2
    assert delta_spaces(padded, cutoff=1e-12).rank == 3
    assert spaces.norm == pytest.approx(np.linalg.norm(dense(f)), rel=1e-6)
    rebuilt = (spaces.U * spaces.S) @ spaces.V.T
    assert np.allclose(rebuilt.numpy(), dense(f), atol=1e-7)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.7, 0.8, 1.5, math.pi / 2 - 1e-9])
def test_principal_angles_are_accurate_at_both_ends(angle: float) -> None:
    first = torch.eye(6, 2, dtype=torch.float64)
    second = torch.zeros(6, 3, dtype=torch.float64)
    second[0, 0], second[2, 0] = math.cos(angle), math.sin(angle)
    second[1, 1], second[3, 1] = math.cos(2e-3), math.sin(2e-3)
    second[4, 2] = 1.0
    mixed = second @ torch.tensor([[2.0, 1, 0], [0, 1, 3], [1, 0, 1]]).double()
    for pair in ((first, mixed), (mixed, first)):
        found = principal_angles(*pair)
        assert found.tolist() == pytest.approx(sorted([angle, 2e-3]), rel=1e-13, abs=3e-15)


def test_tiny_angles_in_the_table_are_those_of_the_function() -> None:
    first = random_factors(1, rank=3, d_out=12, d_in=10)
    turned = first.B + 1e-8 * random_factors(2, rank=3, d_out=12, d_in=10).B
    second = replace(random_factors(5, rank=3, d_out=12, d_in=10), B=turned)
    found = compare_deltas([first, second])
    angles = principal_angles(first.B, second.B)
    assert 1e-10 < float(angles[0]) < 1e-6
    assert float(found.columns.smallest[0, 1]) == pytest.approx(float(angles[0]), rel=1e-5)
    assert float(found.columns.largest[0, 1]) == pytest.approx(float(angles[-1]), rel=1e-5)
    rows = principal_angles(first.A.T, second.A.T)
    assert float(found.rows.smallest[0, 1]) == pytest.approx(float(rows[0]), rel=1e-12)


def test_spaces_without_a_direction_have_no_angles() -> None:
    assert principal_angles(torch.zeros(4, 2), torch.eye(4)).shape == (0,)
    assert principal_angles(torch.zeros(4, 0), torch.eye(4)).shape == (0,)


def test_what_cannot_be_compared_is_refused() -> None:
    f = random_deltas()[0]
    with pytest.raises(ConfigError, match="no deltas"):
        compare_deltas([])
    with pytest.raises(IncompatibleAdaptersError, match=r"\(5, 4\)"):
        compare_deltas([f, random_factors(1, rank=1, d_out=5, d_in=4)])
    with pytest.raises(NonFiniteError):
        compare_deltas([replace(f, A=f.A * math.inf)])
    with pytest.raises(ConfigError, match="cutoff is 1"):
        compare_deltas([f], cutoff=1)
    with pytest.raises(ConfigError, match=r"\(3, 1\)"):
        principal_angles(torch.ones(2, 1), torch.ones(3, 1))
    with pytest.raises(NonFiniteError):
        principal_angles(torch.full((2, 1), math.nan), torch.ones(2, 1))


# --- The interference term of direct merging ----------------------------------------------------


def test_cross_terms_worked_out_by_hand() -> None:
    pair = [factors([[1, 0]], [[1], [0]]), factors([[0, 1]], [[0], [1]])]
    assert np.allclose(dense(interference_term(pair)), [[0, 1], [1, 0]])
    found = direct_merge_interference(pair)  # L_MM is the identity, L_DM all ones
    assert (found.norm, found.multiplied_norm) == pytest.approx((math.sqrt(2), math.sqrt(2)))
    assert (found.direct_norm, found.truncation, found.relative) == pytest.approx((2, 1, 1))
    assert (found.mean, found.std, found.alignment) == pytest.approx((0.5, 0.5, 0))
    assert found.spectrum == pytest.approx((1, 1))
    assert (found.stable_rank, found.top_energy, found.noise_share) == pytest.approx((2, 0.5, 1))


def test_scalings_and_weights_enter_once_with_their_signs() -> None:
    pair = [factors([[1, 0]], [[1], [0]], scaling=4.0), factors([[0, 1]], [[0], [1]], scaling=-1.0)]
    # √(4 · 9) = 6 and A_2 carries the sign: B_1 A_2 = -6, B_2 A_1 = 6.
    assert np.allclose(dense(interference_term(pair, [1.0, 9.0])), [[0, -6], [6, 0]])
    found = direct_merge_interference(pair, [1.0, 9.0])
    assert found.multiplied_norm == pytest.approx(math.hypot(4, 9))
    assert found.direct_norm == pytest.approx(math.sqrt(16 + 81 + 36 + 36))


@pytest.mark.parametrize(("d_out", "d_in"), [(14, 11), (3, 11), (14, 2), (40, 30)])
@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]])
def test_the_term_equals_the_dense_difference(
    d_out: int, d_in: int, weights: list[float] | None
) -> None:
    having = [
        random_factors(seed, rank=3, d_out=d_out, d_in=d_in, scaling=0.5 + seed, spectrum=spectrum)
        for seed, spectrum in enumerate(("flat", "decaying", "flat"))
    ]
    products = [w * f.scaling for w, f in zip(weights or [1.0] * 3, having, strict=True)]
    multiplied = sum(p * (f.B @ f.A).numpy() for p, f in zip(products, having, strict=True))
    sum_B = sum(abs(p) ** 0.5 * f.B.numpy() for p, f in zip(products, having, strict=True))
    sum_A = sum(
        math.copysign(abs(p) ** 0.5, p) * f.A.numpy() for p, f in zip(products, having, strict=True)
    )
    M = sum_B @ sum_A - multiplied
    assert np.allclose(dense(interference_term(having, weights)), M, atol=1e-11)
    found = direct_merge_interference(having, weights)
    spectrum = np.linalg.svd(M)[1]
    tail = np.linalg.svd(multiplied)[1][3:]
    assert found.norm == pytest.approx(np.linalg.norm(M), rel=1e-12)
    assert found.multiplied_norm == pytest.approx(np.linalg.norm(multiplied), rel=1e-12)
    assert found.direct_norm == pytest.approx(np.linalg.norm(sum_B @ sum_A), rel=1e-12)
    assert found.relative == pytest.approx(found.norm / found.multiplied_norm)
    assert found.truncation == pytest.approx(np.linalg.norm(tail), rel=1e-10, abs=1e-12)
    assert found.mean == pytest.approx(M.mean(), rel=1e-9, abs=1e-13)
    assert found.std == pytest.approx(M.std(), rel=1e-12)
    cosine_of_both = (M * multiplied).sum() / np.linalg.norm(M) / np.linalg.norm(multiplied)
    assert found.alignment == pytest.approx(cosine_of_both, abs=1e-12)
    assert found.spectrum == pytest.approx(spectrum[: len(found.spectrum)], abs=1e-11)
    assert spectrum[len(found.spectrum) :] == pytest.approx(0, abs=1e-11)
    assert found.stable_rank == pytest.approx((spectrum**2).sum() / spectrum[0] ** 2)
    assert found.top_energy == pytest.approx((spectrum[:3] ** 2).sum() / (spectrum**2).sum())
    joint = min(9, d_out) * min(9, d_in)
    assert found.noise_share == pytest.approx(math.sqrt(joint / (d_out * d_in)))
    assert found.truncation <= found.norm * (1 + 1e-12)  # equation 7


def test_the_deviation_is_exact_where_the_mean_dwarfs_it() -> None:
    # M = 2 · 1e6 + a ripple of 1e-3: the difference of squares would lose the ripple.
    ones = [[1.0]] * 4
    pair = [factors([[1, 1, 1, 1]], ones), factors([[1, 1, 1, 1]], ones)]
    ripple = torch.tensor([[1e-9], [-1e-9], [1e-9], [-1e-9]], dtype=torch.float64)
    pair = [replace(f, B=1e6 * (f.B + ripple)) for f in pair]
    found = direct_merge_interference(pair)
    assert found.mean == pytest.approx(2e6)
    assert found.std == pytest.approx(2e-3, rel=1e-5)


def test_nothing_to_interfere_with() -> None:
    f = random_deltas()[0]
    zero = replace(f, B=torch.zeros_like(f.B))
    alone = direct_merge_interference([f])
    assert (alone.norm, alone.relative, alone.stable_rank, alone.top_energy) == (0, 0, 0, 0)
    assert alone.truncation == pytest.approx(0, abs=1e-12)
    none = direct_merge_interference([zero, zero])
    assert (none.relative, none.alignment, none.std) == (0, 0, 0)
    opposed = [factors([[1, 0]], [[1], [1]]), factors([[1, 0]], [[-1], [-1]])]
    assert direct_merge_interference(opposed).relative == 0  # (B − B)(A + A) is zero too
    # The deltas cancel, the cross terms do not.
    crossed = [
        factors([[1, 0], [0, 1]], [[1, 0], [0, 1]]),
        factors([[0.5, 0], [0, 1]], [[-2, 0], [0, -1]]),
    ]
    found = direct_merge_interference(crossed)
    assert (found.norm, found.multiplied_norm, found.relative) == (1.5, 0, math.inf)


def test_factors_that_cannot_be_added_up_are_refused() -> None:
    first, second = random_deltas()[:2]
    with pytest.raises(IncompatibleAdaptersError, match="rank"):
        direct_merge_interference([first, second])
    with pytest.raises(ConfigError, match="nothing to merge"):
        interference_term([])
    for weights in ([1.0], [1.0, math.nan]):
        with pytest.raises(ConfigError, match="2 finite numbers"):
            interference_term([first, first], weights)
    with pytest.raises(NonFiniteError):
        direct_merge_interference([replace(first, A=first.A * math.nan)])


def test_matched_noise_is_the_same_in_any_blocks_and_has_the_moments() -> None:
    noise = MatchedNoise((301, 203), mean=0.25, std=2.0, seed=7, module="layer.0")
    whole = noise.rows(0, 301)
    blocks = torch.cat([noise.rows(s, min(s + 50, 301)) for s in range(0, 301, 50)])
    assert torch.equal(blocks, whole)
    assert torch.equal(torch.cat([noise.rows(n, n + 1) for n in range(301)]), whole)
    assert noise.rows(5, 5).shape == (0, 203)
    error = 2.0 / math.sqrt(whole.numel())
    assert float(whole.mean()) == pytest.approx(0.25, abs=4 * error)
    assert float(whole.std()) == pytest.approx(2.0, abs=4 * error)
    standard = (whole - 0.25) / 2
    assert float((standard**3).mean()) == pytest.approx(0, abs=0.05)
    assert float((standard**4).mean()) == pytest.approx(3, abs=0.12)
    assert not torch.equal(replace(noise, seed=8).rows(0, 2), whole[:2])
    assert not torch.equal(replace(noise, module="layer.1").rows(0, 2), whole[:2])
    with pytest.raises(ConfigError, match="301 rows"):
        noise.rows(300, 302)


@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (256, 256)])
def test_the_predicted_spectrum_of_noise_is_that_of_a_sample(shape: tuple[int, int]) -> None:
    noise = MatchedNoise(shape, mean=0.0, std=0.1, seed=1)
    energy = torch.linalg.svdvals(noise.rows(0, shape[0])) ** 2
    assert noise.stable_rank == pytest.approx(float(energy.sum() / energy[0]), rel=0.05)
    for rank in (1, 8, 40, 150):
        expected = float(energy[:rank].sum() / energy.sum())
        assert noise.top_energy(rank) == pytest.approx(expected, rel=0.04)
    assert noise.top_energy(0) == 0
    assert noise.top_energy(min(shape)) == 1
    below = [noise.top_energy(rank) for rank in range(min(shape) + 1)]
    assert all(low < high for low, high in pairwise(below))
    with pytest.raises(ConfigError, match="rank is -1"):
        noise.top_energy(-1)


def test_the_noise_of_a_term_has_its_mean_deviation_and_norm() -> None:
    having = [random_factors(seed, rank=4, d_out=120, d_in=150) for seed in range(5)]
    found = direct_merge_interference(having)
    sample = found.noise(seed=3, module="m").rows(0, 120)
    assert float(torch.linalg.vector_norm(sample)) == pytest.approx(found.norm, rel=0.02)
    assert found.noise(seed=3, module="m") == MatchedNoise(
        (120, 150), found.mean, found.std, seed=3, module="m"
    )
    # The cross terms are of low rank, the noise is not.
    assert found.top_energy > 3 * found.noise().top_energy(4)


# --- Linear mode connectivity -------------------------------------------------------------------


def number(A: float, B: float, scaling: float = 1.0) -> dict[str, Factors]:
    return {"m": factors([[A]], [[B]], scaling)}


def value(adapter: Mapping[str, Factors]) -> float:
    return float(adapter["m"].scaling * (adapter["m"].B @ adapter["m"].A))


def test_a_barrier_worked_out_by_hand() -> None:
    start, end = number(1, 1), number(3, 1)
    found = mode_connectivity(lambda a: 1 - (value(a) - 2) ** 2, start, end, 5)
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    assert found.losses == pytest.approx((0, 0.75, 1, 0.75, 0))
    assert found.chord == (0, 0, 0, 0, 0)
    assert (found.barrier, found.barrier_at) == pytest.approx((1, 0.5))
    assert not found.connected
    assert found.to_data()["barrier"] == found.barrier
    json.dumps(found.to_data(), allow_nan=False)


def test_the_line_between_unequal_ends_is_taken_off() -> None:
    tilted = mode_connectivity(lambda a: 5 * value(a), number(1, 1), number(3, 1))
    assert len(tilted.losses) == 11
    assert tilted.excess == pytest.approx([0] * 11, abs=1e-13)
    bowl = mode_connectivity(lambda a: (value(a) - 1) ** 2, number(1, 1), number(3, 1))
    assert bowl.connected
    assert (bowl.barrier, bowl.barrier_at) == (0, 0)
    assert min(bowl.excess) == pytest.approx(-1)


def test_direct_interpolation_takes_another_way_between_the_same_ends() -> None:
    start, end = number(2, 1), number(-2, -1)  # both are 2, their factors are opposed
    losses = {
        way: mode_connectivity(lambda a: -value(a), start, end, 3, interpolation=way).losses
        for way in ("multiplied", "direct")
    }
    assert losses["multiplied"] == pytest.approx((-2, -2, -2))
    assert losses["direct"] == pytest.approx((-2, 0, -2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
def test_interpolated_deltas_and_factors_equal_dense_ones(alpha: float) -> None:
    start = {"m": random_factors(1, rank=3, d_out=6, d_in=5, scaling=-2.0)}
    end = {"m": random_factors(2, rank=3, d_out=6, d_in=5, scaling=0.5)}
    multiplied = dense(interpolate(start, end, alpha)["m"])
    expected = (1 - alpha) * dense(start["m"]) + alpha * dense(end["m"])
    assert np.allclose(multiplied, expected, atol=1e-12)
    direct = dense(interpolate(start, end, alpha, interpolation="direct")["m"])
    ends = [(start["m"], 1 - alpha), (end["m"], alpha)]
    B = sum(part * abs(f.scaling) ** 0.5 * f.B.numpy() for f, part in ends)
    A = sum(part * np.sign(f.scaling) * abs(f.scaling) ** 0.5 * f.A.numpy() for f, part in ends)
    assert np.allclose(direct, B @ A, atol=1e-12)


def test_the_ends_are_the_adapters_themselves_and_a_missing_module_counts_as_zero() -> None:
    start = {**number(1, 2), "only": factors([[4]], [[1]])}
    end = number(5, 1)
    assert interpolate(start, end, 0)["m"] is start["m"]
    assert interpolate(start, end, 1.0) == end
    between = interpolate(start, end, 0.75)
    assert list(between) == ["m", "only"]
    assert dense(between["only"]) == pytest.approx(0.25 * 4)
    assert dense(interpolate(start, end, 0.5, interpolation="direct")["only"]) == pytest.approx(1)


def test_interpolation_refuses_what_it_cannot_do() -> None:
    f = random_deltas()
    with pytest.raises(ConfigError, match="steps is 2"):
        mode_connectivity(value, number(1, 1), number(2, 1), 2)
    with pytest.raises(NonFiniteError, match=r"alpha = 0\.5"):
        mode_connectivity(
            lambda a: math.nan if value(a) == 1.5 else 0.0, number(1, 1), number(2, 1), 3
        )
    with pytest.raises(IncompatibleAdaptersError, match="m: the ranks are 4 and 2"):
        interpolate({"m": f[0]}, {"m": f[1]}, 0.5, interpolation="direct")
    assert interpolate({"m": f[0]}, {"m": f[1]}, 0.5)["m"].rank == 6
    with pytest.raises(IncompatibleAdaptersError, match="m: the shapes"):
        interpolate({"m": f[0]}, number(1, 1), 0.5)
    with pytest.raises(ConfigError, match="interpolation"):
        interpolate(number(1, 1), number(1, 1), 0.5, interpolation="spherical")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alpha"):
        interpolate(number(1, 1), number(1, 1), math.nan)


# --- A whole store ------------------------------------------------------------------------------


def store_of(folder: Path, adapters: list[Adapter]) -> AdapterStore:
    store = AdapterStore.create(folder / "zoo")
    for adapter in adapters:
        store.add(adapter, allow_duplicates=True)
    store.commit("all")
    return store


SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (20, 8), "layers.1.q": (12, 8)}


def block_diagonal(adapter: Adapter) -> np.ndarray:
    whole = np.zeros((44, 24))
    row = 0
    for column, (path, (d_out, d_in)) in enumerate(sorted(SHAPES.items())):
        if path in adapter.modules:
            block = dense(adapter.modules[path])
            whole[row : row + d_out, d_in * column : d_in * (column + 1)] = block
        row += d_out
    return whole


def mixed_adapters() -> list[Adapter]:
    """Three adapters: one lacks a module, ranks differ in another."""
    full = make_adapter("full", seed=1, modules=SHAPES, ranks={"layers.0.up": 2})
    lacking = make_adapter(
        "lacking", seed=2, modules={p: SHAPES[p] for p in ("layers.0.q", "layers.0.up")}
    )
    half = make_adapter("half", seed=3, modules=SHAPES, dtype=torch.bfloat16)
    return [full, lacking, half]


def test_a_whole_store_is_the_block_diagonal_model(tmp_path: Path) -> None:
    adapters = sorted(mixed_adapters(), key=lambda adapter: adapter.name)
    seen: list[tuple[str, int, int]] = []
    store = store_of(tmp_path, adapters)
    found = analyze(store, progress=lambda *step: seen.append(step))
    assert found.adapters == ("full", "half", "lacking")
    assert (found.store, found.version) == (str(Path(store.address)), store.version)
    assert seen == [("analyze", done, 3) for done in range(4)]
    whole = [block_diagonal(adapter) for adapter in adapters]
    spaces = [projectors(delta) for delta in whole]
    for i, first in enumerate(whole):
        norm = np.linalg.norm(first)
        assert found.norms[i] == pytest.approx(norm, rel=1e-12)
        for j, second in enumerate(whole):
            expected = (first * second).sum() / norm / np.linalg.norm(second)
            assert found.cosines[i, j] == pytest.approx(expected, abs=1e-12)
            # Per module, so that P_j and Q_j do not mix modules: what a block diagonal does itself.
            P, Q = spaces[j]
            expected = np.linalg.norm(P @ first @ Q) / norm
            assert found.shares[i, j] == pytest.approx(expected, rel=1e-9)
        P, Q = spaces[i]
        expected = np.linalg.norm(P @ (sum(whole) - first) @ Q) / norm
        assert found.interference[i] == pytest.approx(expected, rel=1e-9)


def test_modules_say_what_is_missing_and_why(tmp_path: Path) -> None:
    found = analyze(store_of(tmp_path, mixed_adapters()))
    by_path = {module.path: module for module in found.modules}
    assert list(by_path) == sorted(SHAPES)
    assert by_path["layers.1.q"].adapters == ("full", "half")
    assert by_path["layers.0.up"].ranks == (2, 4, 4)
    assert by_path["layers.0.up"].direct is None
    assert "ranks 2, 4 differ" in by_path["layers.0.up"].no_direct
    direct = by_path["layers.0.q"].direct
    assert direct is not None
    assert not by_path["layers.0.q"].no_direct
    matrix = found.interference_matrix()
    assert matrix.shape == (3, 3)
    assert torch.equal(matrix.isnan(), torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1]]).bool())
    other = by_path["layers.1.q"].direct
    assert other is not None
    assert found.direct_relative == pytest.approx(
        math.hypot(direct.norm, other.norm)
        / math.hypot(direct.multiplied_norm, other.multiplied_norm)
    )


def test_the_analysis_is_plain_data_and_the_same_every_time(tmp_path: Path) -> None:
    store = store_of(tmp_path, mixed_adapters())
    text = json.dumps(analyze(store).to_data(), allow_nan=False)
    assert json.dumps(analyze(store).to_data()) == text
    data = json.loads(text)
    assert data["modules"][1]["direct_merge"] is None
    assert "differ" in data["modules"][1]["no_direct_merge"]
    assert data["modules"][0]["no_direct_merge"] is None
    assert data["modules"][0]["direct_merge"]["noise"]["top_energy"] < 1
    assert data["modules"][0]["columns"]["overlap"][0][0] == 1


def test_a_selection_of_adapters_and_modules(tmp_path: Path) -> None:
    store = store_of(tmp_path, mixed_adapters())
    found = analyze(store, ["half", "full"], ["*.q"])
    assert found.adapters == ("full", "half")
    assert [module.path for module in found.modules] == ["layers.0.q", "layers.1.q"]
    alone = analyze(store, ["half"])
    assert alone.cosines.tolist() == [[pytest.approx(1)]]
    assert alone.direct_relative == 0
    ranks_differ = analyze(store, modules=["*.up"])
    assert ranks_differ.direct_relative is None
    # "lacking" has none of these modules; it is there, and it is zero.
    without = analyze(store, modules=["layers.1.*"])
    assert without.norms[2] == 0
    assert not without.cosines[2].any()


def test_zero_adapters_in_a_store(tmp_path: Path) -> None:
    zero = make_adapter("zero", seed=5, modules=SHAPES)
    modules = {p: replace(f, B=torch.zeros_like(f.B)) for p, f in zero.modules.items()}
    zero = replace(zero, modules=modules)
    found = analyze(store_of(tmp_path, [zero, replace(zero, name="nought")]))
    assert not found.cosines.any()
    assert not found.shares.any()
    assert not found.interference.any()
    assert found.direct_relative == 0
    json.dumps(found.to_data(), allow_nan=False)


def test_an_infinite_ratio_is_null_in_plain_data(tmp_path: Path) -> None:
    eye = torch.eye(2)
    half = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    opposed = [
        Adapter("a", {"m": Factors(eye, eye, 1.0)}),
        Adapter("b", {"m": Factors(half, -torch.linalg.inv(half), 1.0)}),
    ]
    found = analyze(store_of(tmp_path, opposed))
    assert found.direct_relative == math.inf
    data = json.loads(json.dumps(found.to_data(), allow_nan=False))
    assert data["direct_merge_relative"] is None
    assert data["modules"][0]["direct_merge"]["relative"] is None


def test_selections_that_name_nothing_are_refused(tmp_path: Path) -> None:
    empty = AdapterStore.create(tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds no adapters"):
        analyze(empty)
    store = store_of(tmp_path, mixed_adapters())
    with pytest.raises(AdapterNotInStoreError, match="sql"):
        analyze(store, ["sql"])
    with pytest.raises(ConfigError, match="twice"):
        analyze(store, ["full", "full"])
    with pytest.raises(ConfigError, match="list of adapters is empty"):
        analyze(store, [])
    with pytest.raises(ModuleNotInAdapterError, match=r"\*\.nothing"):
        analyze(store, modules=["*.q", "*.nothing"])
