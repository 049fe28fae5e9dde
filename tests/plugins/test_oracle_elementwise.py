"""Average, task arithmetic, magnitude pruning, TIES and DARE against their dense references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

import oracles
from oracles.compare import (
    DOUBT,
    TOLERANCE,
    Absent,
    Labelled,
    Scope,
    Space,
    assert_agrees,
    assert_close,
    build,
    dense_delta,
    expected,
    labelled,
    merged_matrices,
    part_scale,
)
from oracles.sparse import Tensors, Weights
from stacks import ALL_CASES, EQUAL_RANK_CASES, Case, collection, merge
from unmerge.adapter import Factors

SPACES: tuple[Space, ...] = ("delta", "factors")
CASES = [
    pytest.param(space, case, id=f"{space}-{case}")
    for space in SPACES
    for case in (ALL_CASES if space == "delta" else EQUAL_RANK_CASES)
]
Label = tuple[str, str]


def whole(case: Case) -> float:
    """Return the norm of everything that goes in: the scale that rounding errors have."""
    return float(
        sum(
            abs(part[3]) * np.linalg.norm(oracles.dense(part))
            for path in case.modules
            for part in case.parts(path)
        )
    )


def weighted_sum(tensors: Tensors, weights: Weights) -> list[oracles.Matrix]:
    return oracles.magnitude_prune(tensors, weights, density=1.0)


def divisors(case: Case, part: str) -> float:
    """Return `Σ w_i` over all adapters, as one matrix takes the weights."""
    parts = [(np.zeros((1, 1)), np.zeros((1, 1)), 1.0, case.weight(n)) for n in case.adapters]
    if part == "delta":
        return sum(p[3] for p in parts)
    return sum(oracles.factor_weights(p)[0 if part == "A" else 1] for p in parts)


def product(matrices: dict[Label, oracles.Matrix], path: str) -> oracles.Matrix:
    if (path, "delta") in matrices:
        return matrices[path, "delta"]
    return matrices[path, "B"] @ matrices[path, "A"]


@pytest.mark.parametrize("absent", ["zero", "renormalise"])
@pytest.mark.parametrize(("space", "case"), CASES)
def test_average_and_task_arithmetic(space: Space, case: Case, absent: Absent) -> None:
    sums = expected(weighted_sum, labelled(case, space, absent), "module")
    means = {label: value / divisors(case, label[1]) for label, value in sums.items()}
    average = build("average", space=space, absent=absent)
    arithmetic = build("task_arithmetic", space=space, scale=0.3, absent=absent)
    for dtype, tolerance in TOLERANCE.items():
        for path, encoding in merge(arithmetic, case, dtype=dtype).items():
            assert_close(dense_delta(encoding), 0.3 * product(sums, path), tolerance)
        for path, encoding in merge(average, case, dtype=dtype).items():
            assert_close(dense_delta(encoding), product(means, path), tolerance)


def test_factor_space_has_the_cross_terms() -> None:
    """Without them `factors` would be `delta`: the two must differ."""
    case = collection((4, 4, 4))
    direct = dense_delta(merge(build("task_arithmetic", space="factors"), case)["layer.0"])
    assert_close(direct, oracles.direct_merge(case.parts("layer.0")), 1e-12)
    exact = oracles.task_arithmetic(case.parts("layer.0"))
    assert np.linalg.norm(direct - exact) > 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize(("space", "case"), CASES)
def test_magnitude_prune(space: Space, case: Case, scope: Scope) -> None:
    merger = build("magnitude_prune", space=space, density=0.3, scope=scope, scale=-0.5)
    matrices = labelled(case, space)
    wanted = part_scale(
        expected(lambda t, w: oracles.magnitude_prune(t, w, density=0.3), matrices, scope), -0.5
    )
    for dtype, tolerance in TOLERANCE.items():
        doubts = doubtful(matrices, scope, dtype, density=0.3, vote="count")
        for label, got in merged_matrices(merger, case, space, dtype).items():
            assert_agrees(got, wanted[label], doubts[label], tolerance)


def test_magnitude_prune_renormalises() -> None:
    case = next(case for case in ALL_CASES if case.name == "missing modules")
    merger = build("magnitude_prune", density=0.3, absent="renormalise")
    matrices = labelled(case, "delta", "renormalise")
    wanted = expected(lambda t, w: oracles.magnitude_prune(t, w, density=0.3), matrices, "module")
    for label, got in merged_matrices(merger, case, "delta").items():
        assert_close(got, wanted[label], 1e-10)


TIES_FIELDS: tuple[dict[str, Any], ...] = (
    {"density": 1.0, "scale": 0.7},
    {"vote": "count", "zero_vote": "positive"},
    {"reduce": "sum", "density": 0.6},
    {"reduce": "max", "density": 0.6},
    {"density": 0.05},
    {"zero_vote": "majority", "density": 0.4},
)


def doubtful(
    matrices: Labelled,
    scope: Scope,
    dtype: torch.dtype,
    *,
    density: float,
    vote: Literal["value", "count"] = "value",
    weigh_votes: bool = False,
) -> dict[Label, npt.NDArray[np.bool_]]:
    return expected(
        lambda t, w: oracles.contested(
            t, w, density=density, tolerance=DOUBT[dtype], vote=vote, weigh_votes=weigh_votes
        ),
        matrices,
        scope,
    )


def check_ties(
    case: Case, space: Space, scope: Scope, dtype: torch.dtype, **fields: Any
) -> dict[Label, oracles.Matrix]:
    """Compare where no decision is in doubt; return what the strategy gave."""
    merger = build("ties", space=space, scope=scope, **fields)
    options = {"density": 0.2, **fields}
    scale = options.pop("scale", 1.0)
    matrices = labelled(case, space)
    wanted = part_scale(
        expected(lambda t, w: oracles.ties(t, w, **options), matrices, scope), scale
    )
    decisive = {k: v for k, v in options.items() if k in ("density", "vote", "weigh_votes")}
    doubts = doubtful(matrices, scope, dtype, **decisive)
    got = merged_matrices(merger, case, space, dtype)
    assert got.keys() == wanted.keys()
    for label, values in got.items():
        assert_agrees(values, wanted[label], doubts[label], TOLERANCE[dtype])
    return got


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize(("space", "case"), CASES)
def test_ties(space: Space, case: Case, scope: Scope) -> None:
    check_ties(case, space, scope, torch.float64)
    check_ties(case, space, scope, torch.float32, density=0.5)


@pytest.mark.parametrize("fields", TIES_FIELDS, ids=str)
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("space", SPACES)
def test_every_field_of_ties(space: Space, scope: Scope, fields: dict[str, Any]) -> None:
    for name in (
        "decaying",
        "missing modules",
        "negative and zero weights",
        "R > d_out and R > d_in",
    ):
        case = next(case for case in EQUAL_RANK_CASES if case.name == name)
        check_ties(case, space, scope, torch.float64, **fields)


@pytest.mark.parametrize("vote", ["value", "count"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("weights", [(2.0, 0.5, 1.0), (0.0, 1.0, 3.0), (1.0, 1.0, -0.25)], ids=str)
def test_ties_weighs_votes(weights: tuple[float, ...], reduce: str, vote: str) -> None:
    if min(weights) < 0 and reduce == "mean":
        weights = (weights[0], weights[1], 0.25)  # the divisor of mixed signs has its own test
    case = collection((4, 4, 4), weights=weights, seed=7)
    for space in SPACES:
        check_ties(
            case, space, "module", torch.float64,
            density=0.5, weigh_votes=True, reduce=reduce, vote=vote,
        )  # fmt: skip


def integers(
    seed: int,
    *,
    adapters: int = 4,
    rank: int = 2,
    shape: tuple[int, int] = (9, 7),
    paths: tuple[str, ...] = ("m.0", "m.1"),
    weights: tuple[float, ...] = (),
) -> Case:
    """Adapters of small integers: every product, sum and comparison is exact in float32.

    Scalings are 4 and ¼, so that their roots are exact as well.
    """
    generator = np.random.default_rng(seed)
    names = [chr(ord("a") + n) for n in range(adapters)]

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(generator.integers(-2, 3, size)).double()

    modules = {
        path: {
            name: Factors(
                A=draw(rank, shape[1]), B=draw(shape[0], rank), scaling=(4.0, 0.25)[n % 2]
            )
            for n, name in enumerate(names)
        }
        for path in paths
    }
    return Case("integers", modules, dict(zip(names, weights, strict=False)))


EXACT_FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"density": 0.5},
    {"density": 1.0},
    {"density": 0.5, "vote": "count"},
    {"density": 0.5, "zero_vote": "positive"},
    {"density": 0.5, "zero_vote": "majority"},
    {"density": 0.5, "vote": "count", "zero_vote": "majority", "reduce": "sum"},
    {"density": 0.5, "reduce": "max", "zero_vote": "positive"},
    {"density": 0.5, "weigh_votes": True},
    {"density": 0.5, "weigh_votes": True, "vote": "count", "reduce": "sum"},
)


@pytest.mark.parametrize("fields", EXACT_FIELDS, ids=str)
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("space", SPACES)
def test_ties_on_integers_is_exact(space: Space, scope: Scope, fields: dict[str, Any]) -> None:
    """Ties at every cut, drawn votes everywhere: equal to the last bit all the same."""
    for weights in ((), (4.0, 1.0, 0.25, 1.0), (0.0, 1.0, 4.0, 1.0)):
        case = integers(11, weights=weights)
        merger = build("ties", space=space, scope=scope, **fields)
        options = {"density": 0.2, **fields}
        wanted = expected(
            lambda t, w, o=options: oracles.ties(t, w, **o), labelled(case, space), scope
        )
        for dtype, width in ((torch.float32, np.float32), (torch.float64, np.float64)):
            for label, got in merged_matrices(merger, case, space, dtype).items():
                np.testing.assert_array_equal(
                    got.astype(width), wanted[label].astype(width), err_msg=str(label)
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("space", SPACES)
def test_magnitude_prune_on_integers_is_exact(
    space: Space, scope: Scope, dtype: torch.dtype
) -> None:
    case = integers(12, weights=(4.0, -1.0, 0.25, 1.0))
    merger = build("magnitude_prune", space=space, scope=scope, density=0.35)
    wanted = expected(
        lambda t, w: oracles.magnitude_prune(t, w, density=0.35), labelled(case, space), scope
    )
    for label, got in merged_matrices(merger, case, space, dtype).items():
        np.testing.assert_array_equal(got, wanted[label], err_msg=str(label))


def test_exactly_k_survive_over_the_model() -> None:
    """`int(density · numel)` of all modules together, on inputs where the cut is a draw."""
    case = integers(13, adapters=1)
    numel = sum(9 * 7 for _ in case.modules)
    for density in (0.1, 0.29, 0.5):
        trimmed = merged_matrices(
            build("ties", scope="model", density=density), case, "delta"
        ).values()
        assert sum(np.count_nonzero(m) for m in trimmed) == int(density * numel)


def drawn_masks(
    case: Case, space: Space, density: float, seed: int
) -> list[dict[str, npt.NDArray[np.bool_]]]:
    """Return DARE's masks by looking at what it keeps of adapters that are 1 everywhere.

    A mask depends on (seed, adapter name, module path, entry) alone, so an adapter of ones with
    the same name, path and shape gets the mask of the real one.
    """
    merger = build(
        "dare", space=space, density=density, rescale="none",
        inner={"method": "task_arithmetic"},
    )  # fmt: skip
    masks = []
    for label in labelled(case, space).labels:
        path, part = label
        masks.append({})
        for name, real in case.modules[path].items():
            rank = real.rank if space == "factors" else 1
            ones = Factors(
                A=torch.ones(rank, real.d_in), B=torch.ones(real.d_out, rank), scaling=1.0
            )
            probe = Case("ones", {path: {name: ones}})
            masks[-1][name] = merged_matrices(merger, probe, space, seed=seed)[path, part] != 0
    return masks


DARE_INNER: tuple[dict[str, Any], ...] = (
    {"method": "task_arithmetic", "scale": 0.5},
    {"method": "ties", "density": 0.5},
    {"method": "ties", "density": 0.3, "scope": "model"},
)


@pytest.mark.parametrize("rescale", ["density", "norm", "none"])
@pytest.mark.parametrize("inner", DARE_INNER, ids=str)
@pytest.mark.parametrize("space", SPACES)
def test_dare(space: Space, inner: dict[str, Any], rescale: Any) -> None:
    """The masks are the strategy's own, read off adapters of ones; everything after is compared."""
    for case in (collection(name="flat"), _missing(), collection((2, 2), weights=(0.5, -1.5))):
        masks = drawn_masks(case, space, 0.5, seed=3)
        matrices = labelled(case, space)
        dropped = matrices._replace(
            tensors=oracles.dare(matrices.tensors, masks, density=0.5, rescale=rescale)
        )
        options = {k: v for k, v in inner.items() if k in ("density",)}
        scope: Scope = inner.get("scope", "module")
        rule = (
            weighted_sum
            if inner["method"] == "task_arithmetic"
            else lambda t, w, o=options: oracles.ties(t, w, **o)
        )
        wanted = part_scale(expected(rule, dropped, scope), inner.get("scale", 1.0))
        merger = build("dare", space=space, density=0.5, rescale=rescale, inner=inner)
        for label, got in merged_matrices(merger, case, space, seed=3).items():
            assert_close(got, wanted[label], 1e-10)


def _missing() -> Case:
    return next(case for case in EQUAL_RANK_CASES if case.name == "missing modules")


def test_dare_masks_are_fair_and_independent() -> None:
    """The share kept is the density; adapters, modules and seeds have masks of their own."""
    density, shape = 0.3, (60, 50)
    case = collection((1, 1), d_out=60, d_in=50, paths=("m.0", "m.1"))
    kept = [mask for by_name in drawn_masks(case, "delta", density, 0) for mask in by_name.values()]
    kept += [
        mask for by_name in drawn_masks(case, "delta", density, 1) for mask in by_name.values()
    ]
    deviation = np.sqrt(density * (1 - density) / np.prod(shape))
    for i, mask in enumerate(kept):
        assert mask.shape == shape
        assert abs(mask.mean() - density) < 5 * deviation
        for other in kept[:i]:
            both = (mask & other).mean()
            assert abs(both - density**2) < 5 * np.sqrt(density**2 / np.prod(shape))
    assert len(kept) == 8


@pytest.mark.parametrize("inner", DARE_INNER, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_dare_that_drops_nothing_is_its_inner_rule(case: Case, inner: dict[str, Any]) -> None:
    got = merge(build("dare", density=1.0, inner=inner), case)
    for path, encoding in merge(build(**inner), case).items():
        assert_close(dense_delta(got[path]), dense_delta(encoding), 1e-12, scale=whole(case))


def test_dare_is_right_on_average() -> None:
    """`E[DARE] = inner` for a linear inner rule: over many seeds the mean nears the sum."""
    case = collection((2, 2), d_out=6, d_in=5, weights=(1.0, -0.5))
    merger, exact = build("dare", density=0.5), oracles.task_arithmetic(case.parts("layer.0"))
    draws = [dense_delta(merge(merger, case, seed=seed)["layer.0"]) for seed in range(200)]
    # At density ½ an entry of variance Σ (w Δ)² (1 − p)/p; five standard errors of the mean.
    variance = sum((p[3] * oracles.dense(p)) ** 2 for p in case.parts("layer.0"))
    assert (np.abs(np.mean(draws, axis=0) - exact) <= 5 * np.sqrt(variance / 200)).all()


def test_the_order_of_the_adapters_is_no_input() -> None:
    """Oracles sort by name; so must strategies, also where the trim is a draw."""
    case = integers(14)
    turned = replace(case, modules={p: dict(reversed(h.items())) for p, h in case.modules.items()})
    for scope in ("module", "model"):
        merger = build("ties", scope=scope, density=0.5)
        for label, got in merged_matrices(merger, case, "delta").items():
            other = merged_matrices(merger, turned, "delta")[label]
            np.testing.assert_array_equal(got, other)
