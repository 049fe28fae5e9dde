"""Every oracle on numbers worked out by hand: what the strategies are compared with is right."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

import oracles


def part(
    A: list[list[float]], B: list[list[float]], scaling: float = 1.0, weight: float = 1.0
) -> oracles.Part:
    return np.array(A), np.array(B), scaling, weight


def of(delta: list[list[float]], weight: float = 1.0) -> oracles.Part:
    """Return a part whose delta is given: `A = I`, `B` the delta."""
    return np.eye(len(delta[0])), np.array(delta), 1.0, weight


def rows(**adapters: list[float]) -> dict[str, oracles.Matrix]:
    """Return 1 × n matrices by adapter name."""
    return {name: np.array([values]) for name, values in adapters.items()}


def equal(got: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


ONES = {"a": 1.0, "b": 1.0, "c": 1.0}


def test_linear() -> None:
    # a = 2·[1, 3]ᵀ[1, 2] = [[2, 4], [6, 12]] at weight 3; b = −0.5·[2, 0]ᵀ[4, 1] at weight −2.
    a = part([[1.0, 2.0]], [[1.0], [3.0]], scaling=2.0, weight=3.0)
    b = part([[4.0, 1.0]], [[2.0], [0.0]], scaling=-0.5, weight=-2.0)
    equal(oracles.dense(b), [[-4, -1], [0, 0]])
    # 3a − 2b = [[6 + 8, 12 + 2], [18, 36]].
    equal(oracles.task_arithmetic([a, b], scale=0.5), [[7, 7], [9, 18]])
    equal(oracles.in_deltas(oracles.sum_rule, [a, b]), [[14, 14], [18, 36]])
    # … and the weights sum to 1.
    equal(oracles.average([a, b]), [[14, 14], [18, 36]])
    equal(oracles.in_deltas(oracles.mean_rule, [a, b]), [[14, 14], [18, 36]])


def test_factor_space() -> None:
    # √(4·1) = 2 on each factor of a; √|1·−9| = 3 on each of b, the sign on A.
    a = part([[1.0, 2.0]], [[1.0], [0.0]], scaling=4.0)
    b = part([[1.0, 0.0]], [[0.0], [1.0]], weight=-9.0)
    # A = 2[1, 2] − 3[1, 0] = [−1, 4], B = 2[1, 0] + 3[0, 1] = [2, 3].
    equal(oracles.in_factors(oracles.sum_rule, [a, b]), [[-2, 8], [-3, 12]])
    # Weights of A are 1 and −3, of B 1 and 3: A = [−1, 4] / −2, B = [2, 3] / 4.
    equal(oracles.in_factors(oracles.mean_rule, [a, b]), [[0.25, -1], [0.375, -1.5]])
    # A negative scaling goes to A as well.
    equal(oracles.factor_matrices(part([[1.0]], [[1.0]], scaling=-4.0)), ([[-2]], [[2]]))


def test_direct_merge() -> None:
    a = part([[1.0, 2.0]], [[1.0], [0.0]], scaling=4.0)
    b = part([[1.0, 0.0]], [[0.0], [1.0]], weight=9.0)
    # (2[1, 0] + 3[0, 1])ᵀ (2[1, 2] + 3[1, 0]) = [2, 3]ᵀ[5, 4].
    equal(oracles.direct_merge([a, b]), [[10, 8], [15, 12]])


def test_renormalised() -> None:
    # Weights 1 and 3 of 1, 3 and 4 in all: the two stand for 8.
    parts = [of([[1.0]], 1.0), of([[1.0]], 3.0)]
    assert [p[3] for p in oracles.renormalised(parts, [1.0, 3.0, 4.0])] == [2.0, 6.0]


def test_canonical_signs_and_rank() -> None:
    # Of equally large entries the first decides.
    equal(oracles.canonical_signs(np.array([[1.0, 0.6, -1.0], [2.0, -0.8, 1.0]])), [1, -1, -1])
    assert oracles.numerical_rank(np.array([2.0, 0.2, 0.1]), 0.05) == 2
    assert oracles.numerical_rank(np.array([0.0, 0.0]), 0.05) == 0


def test_trim() -> None:
    # ⌊0.5·4⌋ = 2: both threes. ⌊0.75·4⌋ = 3 of four equal ones: the first three.
    equal(oracles.trim_vector(np.array([3.0, -1.0, 2.0, -3.0]), 0.5), [3, 0, 0, -3])
    equal(oracles.trim_vector(np.array([1.0, 1.0, -1.0, 1.0]), 0.75), [1, 1, -1, 0])
    equal(oracles.trim_vector(np.array([1.0, 2.0, 3.0]), 0.3), [0, 0, 0])


def test_trim_over_several_modules() -> None:
    # a's vector is 1, 4, 3, 2: two of four are kept wherever they are. b has the second only.
    tensors = [rows(a=[1.0, 4.0]), rows(a=[3.0, 2.0], b=[1.0, 2.0])]
    first, second = oracles.trim(tensors, 0.5)
    equal(first["a"], [[0, 4]])
    equal(second["a"], [[3, 0]])
    equal(second["b"], [[0, 2]])
    assert set(first) == {"a"}


def test_magnitude_prune() -> None:
    tensors = [rows(a=[3.0, -1.0], b=[1.0, 2.0])]
    # 0.5·(2·[3, 0] − 1·[0, 2]).
    [merged] = oracles.magnitude_prune(tensors, [{"a": 2.0, "b": -1.0}], density=0.5, scale=0.5)
    equal(merged, [[3, -1]])


TIES_INPUT = [rows(a=[4.0, -1.0, 2.0, 0.0], b=[-1.0, -2.0, -2.0, 0.0], c=[2.0, 5.0, 0.0, 0.0])]


def test_ties() -> None:
    # Votes by value 5, 2, 0, 0: (4 + 2)/2, 5, and a draw.
    equal(oracles.ties(TIES_INPUT, [ONES], density=1.0)[0], [[3, 5, 0, 0]])
    equal(oracles.ties(TIES_INPUT, [ONES], density=1.0, scale=2.0)[0], [[6, 10, 0, 0]])
    # By count 1, −1, 0, 0: (−1 − 2)/2 at the second.
    equal(oracles.ties(TIES_INPUT, [ONES], density=1.0, vote="count")[0], [[3, -1.5, 0, 0]])
    # Trimmed to two: a = 4, ., 2, .; b = ., −2, −2, .; c = 2, 5, ., ..
    equal(oracles.ties(TIES_INPUT, [ONES], density=0.5)[0], [[3, 5, 0, 0]])


def test_ties_zero_votes() -> None:
    # The third entry is drawn between 2 and −2; two entries are won by +, none by −.
    for zero_vote, third in {"drop": 0.0, "positive": 2.0, "majority": 2.0}.items():
        [merged] = oracles.ties(TIES_INPUT, [ONES], density=1.0, zero_vote=zero_vote)  # type: ignore[arg-type]
        equal(merged, [[3, 5, third, 0]])
    # With another module won by − three times, the majority over both is −.
    both = [*TIES_INPUT, rows(a=[-1.0, -1.0, -1.0])]
    merged, _ = oracles.ties(both, [ONES, ONES], density=1.0, zero_vote="majority")
    equal(merged, [[3, 5, -2, 0]])
    # Won twice by each: the negative value it is.
    both = [*TIES_INPUT, rows(a=[-1.0, -1.0])]
    merged, _ = oracles.ties(both, [ONES, ONES], density=1.0, zero_vote="majority")
    equal(merged, [[3, 5, -2, 0]])


def test_ties_weights() -> None:
    weights = [{"a": 1.0, "b": 3.0, "c": 1.0}]
    # After the vote: (4 + 2)/2; 5. At weight −1, c subtracts: (4 − 2)/2; −5.
    equal(oracles.ties(TIES_INPUT, weights, density=1.0)[0], [[3, 5, 0, 0]])
    negative = [{"a": 1.0, "b": 3.0, "c": -1.0}]
    equal(oracles.ties(TIES_INPUT, negative, density=1.0)[0], [[1, -5, 0, 0]])
    # Before: votes 3, −2, −4: (4 + 2)/2, (−1 − 6)/(1 + 3), −6/3.
    weighed = oracles.ties(TIES_INPUT, weights, density=1.0, weigh_votes=True)[0]
    equal(weighed, [[3, -1.75, -2, 0]])
    # A zero weight has no vote then, and c's −1 turns it: votes 4 − 2, −1 − 5, 2.
    weights = [{"a": 1.0, "b": 0.0, "c": -1.0}]
    weighed = oracles.ties(TIES_INPUT, weights, density=1.0, weigh_votes=True, reduce="sum")[0]
    equal(weighed, [[4, -6, 2, 0]])


def test_ties_reductions() -> None:
    weights = [{"a": 1.0, "b": 3.0, "c": 1.0}]
    total = oracles.ties(TIES_INPUT, weights, density=1.0, weigh_votes=True, reduce="sum")
    equal(total[0], [[6, -7, -6, 0]])
    largest = oracles.ties(TIES_INPUT, weights, density=1.0, weigh_votes=True, reduce="max")
    equal(largest[0], [[4, -6, -6, 0]])


def test_ties_rule() -> None:
    matrices = [TIES_INPUT[0][name] for name in "abc"]
    equal(oracles.ties_rule(density=1.0)(matrices, [1.0, 1.0, 1.0]), [[3, 5, 0, 0]])


def test_contested() -> None:
    # a keeps 4 and 3; 2.999 is within 0.001·4 of the cut, on the other side. b's vote leaves 3 − 3
    # = 0 at the second entry, and 4 − 1 elsewhere.
    tensors = [rows(a=[4.0, 3.0, 2.999, 0.5], b=[-1.0, -3.0, 0.0, 0.0])]
    [mask] = oracles.contested(tensors, [ONES], density=0.5, tolerance=1e-3)
    assert mask.tolist() == [[False, True, True, False]]
    [mask] = oracles.contested(tensors, [ONES], density=0.5, tolerance=1e-6)
    assert mask.tolist() == [[False, True, False, False]]
    # Nothing is cut at density 1; by count only trims are in doubt; zero adapters doubt nothing.
    [mask] = oracles.contested(tensors, [ONES], density=1.0, tolerance=1e-3, vote="count")
    assert not mask.any()
    zero = [rows(a=[0.0, 0.0], b=[0.0, 0.0])]
    assert not oracles.contested(zero, [ONES], density=0.5, tolerance=1e-3)[0].any()


def test_dare() -> None:
    tensors = [rows(a=[4.0, -2.0, 2.0], b=[1.0, 1.0, 0.0])]
    masks = [{"a": np.array([[True, False, True]]), "b": np.array([[False, False, True]])}]
    for rescale, factor in {"density": 2.0, "norm": 8 / 6, "none": 1.0}.items():
        [dropped] = oracles.dare(tensors, masks, density=0.5, rescale=rescale)  # type: ignore[arg-type]
        equal(dropped["a"], [[4 * factor, 0, 2 * factor]])
        equal(dropped["b"], [[0, 0, 0]])


def test_knots() -> None:
    # [Δ_1 Δ_2] = [0.6, 0.8]ᵀ [5, 1, −1, 10]: one direction, blocks [5, 1] and [−1, 10].
    parts = [of([[3.0, 0.6], [4.0, 0.8]]), of([[-0.6, 6.0], [-0.8, 8.0]])]
    aligned = oracles.knots_blocks(parts)
    equal(aligned.left, [[0.6], [0.8]])
    equal(aligned.blocks, [[[5, 1]], [[-1, 10]]])
    # TIES at density ½ keeps 5 and 10.
    equal(oracles.knots(parts, oracles.ties_rule(density=0.5)), [[3, 6], [4, 8]])
    # With Δᵀ: [Δ_1ᵀ Δ_2ᵀ] is [[3, 4, −.6, −.8], [.6, .8, 6, 8]], two orthogonal rows of norms
    # √25.… and √100.…: the sum is the sum in any basis.
    transposed = oracles.knots(parts, oracles.sum_rule, axis="input")
    equal(transposed, [[2.4, 6.6], [3.2, 8.8]])


def test_knots_along_the_input() -> None:
    # Δ_iᵀ of the case above: now the common direction is on the right.
    parts = [of([[3.0, 4.0], [0.6, 0.8]]), of([[-0.6, -0.8], [6.0, 8.0]])]
    aligned = oracles.knots_blocks(parts, axis="input")
    equal(aligned.right, [[0.6, 0.8]])
    equal(aligned.blocks, [[[5], [1]], [[-1], [10]]])
    merged = oracles.knots(parts, oracles.ties_rule(density=0.5), axis="input")
    equal(merged, [[3, 4], [6, 8]])


def test_core_space() -> None:
    # Balanced: B = [2, 0], [0, 3], likewise A. Singular values 3 then 2: the bases are (e₂, e₁).
    a, b = part([[0.5, 0.0]], [[8.0], [0.0]]), part([[0.0, 3.0]], [[0.0], [3.0]])
    aligned = oracles.core_blocks([a, b])
    equal(aligned.blocks, [[[0, 0], [0, 4]], [[9, 0], [0, 0]]])
    # As they come: B = [8, 0], [0, 3] gives (e₁, e₂), A = [½, 0], [0, 3] gives (e₂, e₁).
    aligned = oracles.core_blocks([a, b], balance=False)
    equal(aligned.blocks, [[[0, 4], [0, 0]], [[0, 0], [9, 0]]])
    # Trimming two of four entries keeps everything here.
    merged = oracles.core_space([a, b], oracles.ties_rule(density=0.5))
    equal(merged, [[4, 0], [0, 9]])


def test_mm_svd() -> None:
    # diag(3, 4): the leading direction is e₂.
    parts = [of([[3.0, 0.0], [0.0, 0.0]]), of([[0.0, 0.0], [0.0, 4.0]])]
    result = oracles.mm_svd(parts, 1)
    equal(result.delta, [[0, 0], [0, 4]])
    equal(np.abs(result.B), [[0], [1]])
    equal(np.abs(oracles.mm_svd(parts, 1, split="balanced").A), [[0, 2]])
    equal(oracles.mm_svd(parts, 1, inner="average").delta, [[0, 0], [0, 2]])


def test_rank_by_energy_and_error() -> None:
    # Squares 16 and 9 of 25: 64 % in one direction, 60 % error.
    matrix = np.diag([3.0, 4.0])
    assert [oracles.rank_for_energy(matrix, e) for e in (0.63, 0.65, 1.0)] == [1, 2, 2]
    assert [oracles.rank_for_error(matrix, e) for e in (0.61, 0.59, 0.0)] == [1, 2, 2]
    assert oracles.rank_for_error(np.zeros((2, 2)), 0.1) == 0


def test_truncate() -> None:
    one = part([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, -4.0]], scaling=2.0, weight=7.0)
    equal(oracles.truncate(one, 1), [[0, 0], [0, -8]])


def test_tsv() -> None:
    # ⌊2/2⌋ = 1 direction each: U = [e₁, (.6, .8)], Σ = (2, 3), V = I. The polar factor of a 2 × 2
    # matrix of positive determinant is M + cof M, normalised: [[1.8, .6], [−.6, 1.8]] / √3.6.
    parts = [of([[2.0, 0.0], [0.0, 0.0]]), of([[0.0, 1.8], [0.0, 2.4]])]
    equal(oracles.tsv(parts), np.array([[3.6, 1.8], [-1.2, 5.4]]) / math.sqrt(3.6))
    # One adapter is its own best approximation; k = 1 leaves it one direction.
    one = [of([[2.0, 0.0], [0.0, 1.0]])]
    equal(oracles.tsv(one), [[2, 0], [0, 1]])
    equal(oracles.tsv(one, rank=1, scale=3.0), [[6, 0], [0, 0]])
    equal(oracles.tsv([of([[2.0, 0.0], [0.0, 1.0]], weight=-2.0)], rank=1), [[-4, 0], [0, 0]])


def test_tsv_of_duplicates() -> None:
    # U = [e₁, e₁]: polar factor e₁[1, 1]/√2, likewise V; e₁ (½·2 + ½·2) e₁ᵀ.
    twice = [of([[2.0, 0.0], [0.0, 0.0]])] * 2
    equal(oracles.tsv(twice), [[2, 0], [0, 0]])
    equal(oracles.tsv([of([[0.0, 0.0], [0.0, 0.0]])]), np.zeros((2, 2)))


def test_iso_c() -> None:
    # diag(3, −1): mean 2, directions I and sign −. Rank 1: the mean over one direction.
    equal(oracles.iso_c([of([[3.0, 0.0], [0.0, -1.0]])]), [[2, 0], [0, -2]])
    equal(oracles.iso_c([of([[3.0, 0.0], [0.0, 0.0]])], scale=0.5), [[1.5, 0], [0, 0]])
    equal(oracles.iso_c([of([[3.0]], 1.0), of([[3.0]], -1.0)]), [[0]])


def test_singular_value_thresholding() -> None:
    equal(oracles.svt(np.diag([3.0, -1.0]), 2.0), [[1, 0], [0, 0]])
    equal(oracles.svt(np.diag([3.0, -1.0]), 0.5), [[2.5, 0], [0, -0.5]])


def test_lore() -> None:
    # θ = 0, 0, 6 at μ = 1. Round 1: θ₀ = 2, δ = −1, −1, 3. Round 2: θ₀ = (1 + 1 + 3)/3 = 5/3,
    # δ = −2/3, −2/3, 10/3.
    parts = [of([[0.0]]), of([[0.0]]), of([[6.0]])]
    estimate = oracles.low_rank_estimate([oracles.dense(p) for p in parts], 1.0, 2)
    equal(estimate.base, [[5 / 3]])
    equal(estimate.deltas, [[[-2 / 3]], [[-2 / 3]], [[10 / 3]]])
    # Sum: 5/3 + 2λ; mean: 5/3 + 2/3; TIES elects + and keeps 10/3.
    equal(oracles.lore(parts, mu=1.0, iterations=2, scale=0.5), [[8 / 3]])
    equal(oracles.lore(parts, mu=1.0, iterations=2, finish="mean"), [[7 / 3]])
    equal(oracles.lore(parts, mu=1.0, iterations=2, finish="ties"), [[5]])
    # ½(1 + 1 + 1) + μ(2/3 + 2/3 + 10/3): every residual is μ here.
    thetas = [oracles.dense(p) for p in parts]
    assert math.isclose(estimate.objective(thetas, 1.0), 1.5 + 14 / 3)


def test_lore_rank_cap() -> None:
    # θ = ±diag(3, 2), μ = 1: θ₀ = 0, δ = ±diag(2, 1); capped to ⌈½·2⌉ = 1 direction.
    thetas = [np.diag([3.0, 2.0]), -np.diag([3.0, 2.0])]
    capped = oracles.low_rank_estimate(thetas, 1.0, 1, rank_ratio=0.5)
    equal(capped.deltas[0], [[2, 0], [0, 0]])
    free = oracles.low_rank_estimate(thetas, 1.0, 1, rank_ratio=0.5, warmup=1)
    equal(free.deltas[1], [[-2, 0], [0, -1]])


def test_rmm() -> None:
    # Mean (2, 0), centred (∓2, 0), (0, ±1): the first direction is e₁, 1 + 1 is left out.
    position = oracles.rmm_position(np.array([[0.0, 0], [4, 0], [2, 1], [2, -1]]), 1)
    equal(position.mean, [2, 0])
    equal(position.restored, [[0, 0], [4, 0], [2, 0], [2, 0]])
    assert math.isclose(position.tail, 2.0)
    # The same as columns of A and rows of B, of four adapters with d_in = d_out = 1.
    As = [np.array([[x], [y]]) for x, y in ((0.0, 0), (4, 0), (2, 1), (2, -1))]
    restored = oracles.rmm_restore(As, [A.T for A in As], 1)
    equal(restored.A[2], [[2], [0]])
    equal(restored.B[1], [[4, 0]])
    assert math.isclose(restored.tail_A + restored.tail_B, 4.0)
    # 1 of rank 2 for 4 adapters: (1·(2 + 4) + 2) / 8.
    assert oracles.rmm_storage_ratio(4, 2, 1) == 1.0


def test_balanced_factors() -> None:
    # B A = −4 e₁e₁ᵀ: √4 on each, the sign on A, whatever the scaling.
    A, B = oracles.balanced_factors(part([[0.5, 0.0]], [[-8.0], [0.0]], scaling=9.0))
    equal(A, [[-2, 0]])
    equal(B, [[2], [0]])
    # Rank 2 of a 1 × 1 delta: one direction and a zero.
    A, B = oracles.balanced_factors(part([[1.0], [2.0]], [[1.0, 4.0]]))
    equal(A, [[3], [0]])
    equal(B, [[3, 0]])


def test_emr() -> None:
    # Sums 5, −3, 0: unified 4, −3, and nothing where the vote is drawn. a and b agree with both.
    tensors = [rows(a=[4.0, -1.0, 1.0], b=[2.0, -3.0, 0.0], c=[-1.0, 1.0, -1.0])]
    result = oracles.emr(tensors)
    equal(result.unified[0], [[4, -3, 0]])
    # λ_a = (4 + 1 + 1)/(4 + 3), λ_b = 5/7; c agrees nowhere.
    equal([result.rescalers[name] for name in "abc"], [6 / 7, 5 / 7, 0])
    equal(result.restore(0, "a"), [[24 / 7, -18 / 7, 0]])
    equal(result.restore(0, "c"), [[0, 0, 0]])
    # Over two modules: λ_a = (6 + 2)/(7 + 2); b lacks the second.
    assert math.isclose(oracles.emr([*tensors, rows(a=[2.0])]).rescalers["a"], 8 / 9)


def test_joint_diagonalisation() -> None:
    # diag(3, 1) and diag(2, 1): e₁ first; 1 + 1 is left out, nothing at k = 2.
    deltas = [np.diag([3.0, 1.0]), np.diag([2.0, 1.0])]
    joint = oracles.joint_full(deltas, 1, 3)
    equal(joint.cores, [[[3]], [[2]]])
    equal(joint.restore(0), [[3, 0], [0, 0]])
    assert math.isclose(joint.squared_error(deltas), 2.0)
    assert oracles.joint_full(deltas, 2, 1).squared_error(deltas) < 1e-24


def test_quantise() -> None:
    # Four bits, largest code 7: scale 1; 2.5 and 3.5 go to the even neighbour. A zero group.
    result = oracles.quantise(np.array([[7.0, 2.5, 3.5, -0.5, 0.0]]), 4, 4)
    assert result.codes.tolist() == [[7, 2, 4, 0, 0]]
    equal(result.scales, [[1, 0]])
    # Eight bits: −254 is 127 scales of 2.
    result = oracles.quantise(np.array([[-254.0, 3.0]]), 8, 64)
    assert result.codes.tolist() == [[-127, 2]]
    equal(result.values, [[-254, 4]])


def test_quantise_with_a_short_step() -> None:
    # 127/7 = 18.14… = 10010.0…₂; in two significant bits 16: 127/16 = 7.94, −40/16 = −2.5.
    result = oracles.quantise(np.array([[127.0, -40.0]]), 4, 2, step_bits=2)
    equal(result.scales, [[16]])
    equal(result.values, [[128, -32]])


def test_joint_diagonalisation_with_diagonal_cores() -> None:
    # diag(3, 1) and diag(2, −1) on the axes: exact, and a round keeps it so. Along e₁ only, 1 + 1
    # is left out.
    deltas = [np.diag([3.0, 1.0]), np.diag([2.0, -1.0])]
    axes, diagonals = np.eye(2), np.array([[3.0, 1.0], [2.0, -1.0]])
    assert oracles.diagonal_error(deltas, axes, axes, diagonals) == 0.0
    assert oracles.diagonal_error(
        deltas, *oracles.diagonal_round(deltas, axes, axes, diagonals)
    ) < (1e-24)
    one = oracles.diagonal_round(deltas, axes[:, :1], axes[:, :1], np.array([[1.0], [1.0]]))
    assert math.isclose(oracles.diagonal_error(deltas, *one), 2.0)
    equal((one[0] * one[2][0]) @ one[1].T, [[3, 0], [0, 0]])


def test_lego() -> None:
    # 4·[5, 0] and [3, 4] have norms 20 and 5: both become √100.
    one = part([[3.0, 4.0]], [[5.0], [0.0]], scaling=4.0)
    equal(oracles.units([one]), [[10, 0, 6, 8]])
    equal(oracles.units([part([[3.0, 4.0]], [[0.0], [0.0]])]), [[0, 0, 0, 0]])
    # 0, 2 and 10 around 1 and 10.
    points, centroids = np.array([[0.0], [2.0], [10.0]]), np.array([[1.0], [10.0]])
    labels = oracles.nearest(points, centroids)
    assert labels.tolist() == [0, 0, 1]
    equal(oracles.means(points, labels, 2), centroids)
    assert oracles.inertia(points, centroids) == 2.0
    # Weighted: 0 once and 2 three times.
    equal(oracles.means(points, labels, 2, [1.0, 3.0, 1.0]), [[1.5], [10]])
    # Units (b, a) = (1, 1), (1, −1), (2, 2): centroid (1, 0) of the first two has ρ = √2 and no a.
    units = np.array([[1.0, 1.0], [1.0, -1.0], [2.0, 2.0]])
    means = oracles.means(units, np.array([0, 0, 1]), 2)
    equal(oracles.reweighted(units, np.array([0, 0, 1]), means, 1, 8.0), [[2 * 4]])
    # (1, 1) and (3, 1): centroid (2, 1), of norm √5; its members' mean norm is (√2 + √10)/2.
    units = np.array([[1.0, 1.0], [3.0, 1.0]])
    labels = np.array([0, 0])
    rho = (math.sqrt(2) + math.sqrt(10)) / 2 / math.sqrt(5)
    got = oracles.reweighted(units, labels, oracles.means(units, labels, 1), 1, 1.0)
    equal(got, [[rho**2 * 2]])
    for seed in range(4):
        assert sorted(oracles.lloyd(points, 2, seed=seed).ravel()) in ([1, 10], [0, 6])


@pytest.mark.parametrize("seed", [0, 1234567])
def test_splitmix64(seed: int) -> None:
    # The first outputs of the authors' C code.
    published = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    assert oracles.splitmix64(seed, 1) == [published[seed]]
