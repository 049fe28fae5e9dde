"""KnOTS and core space against dense references, in the coordinates where their rules decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import oracles
from oracles.compare import (
    DOUBT,
    TOLERANCE,
    Scope,
    assert_agrees,
    assert_close,
    build,
    dense_delta,
    in_each_dtype,
)
from stacks import ALL_CASES, Case, collection, merge, regauge
from unmerge.adapter import Factors

KNOTS: tuple[dict[str, Any], ...] = ({"axis": "output"}, {"axis": "input"})
CORES: tuple[dict[str, Any], ...] = ({}, {"balance": False})
SPACES = [
    *(pytest.param("knots", fields, id=f"knots-{fields['axis']}") for fields in KNOTS),
    pytest.param("core_space", {}, id="core"),
    pytest.param("core_space", {"balance": False}, id="core-unbalanced"),
]
INNER: tuple[dict[str, Any], ...] = (
    {},
    {"density": 0.5, "scale": 0.7},
    {"density": 1.0, "vote": "count"},
    {"density": 0.4, "reduce": "sum"},
    {"density": 0.4, "weigh_votes": True, "reduce": "max"},
)


def align(method: str, fields: dict[str, Any], parts: Sequence[oracles.Part]) -> oracles.Aligned:
    if method == "knots":
        return oracles.knots_blocks(parts, **fields)
    return oracles.core_blocks(parts, **fields)


def aligned_sum(
    method: str, fields: dict[str, Any], parts: Sequence[oracles.Part]
) -> oracles.Matrix:
    aligned = align(method, fields, parts)
    return aligned.restore(oracles.sum_rule(aligned.blocks, [part[3] for part in parts]))


def check_ties(
    method: str,
    fields: dict[str, Any],
    case: Case,
    dtype: torch.dtype,
    *,
    scope: Scope = "module",
    **options: Any,
) -> None:
    """Compare in the blocks' own coordinates, where no decision of trim or vote is in doubt."""
    merger = build(method, **fields, inner={"method": "ties", "scope": scope, **options})
    rule = {"density": 0.2, **options}
    decisive = {k: v for k, v in rule.items() if k in ("density", "vote", "weigh_votes")}
    paths = sorted(case.modules)
    aligned = {path: align(method, fields, case.parts(path)) for path in paths}
    tensors = [
        dict(zip(sorted(case.modules[path]), aligned[path].blocks, strict=True)) for path in paths
    ]
    weights = [{name: case.weight(name) for name in case.modules[path]} for path in paths]
    groups = (
        [slice(0, len(paths))] if scope == "model" else [slice(i, i + 1) for i in range(len(paths))]
    )
    wanted, doubts = [], []
    for group in groups:
        wanted += oracles.ties(tensors[group], weights[group], **rule)
        doubts += oracles.contested(
            tensors[group], weights[group], tolerance=DOUBT[dtype], **decisive
        )
    merged = merge(merger, case, dtype=dtype)
    for path, block, doubt in zip(paths, wanted, doubts, strict=True):
        got = dense_delta(merged[path])
        left, _, right = aligned[path]
        in_blocks = left.T @ got @ right.T
        assert_agrees(in_blocks, block, doubt, TOLERANCE[dtype])
        assert_close(left @ in_blocks @ right, got, TOLERANCE[dtype])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize(("method", "fields"), SPACES)
def test_ties(method: str, fields: dict[str, Any], case: Case) -> None:
    check_ties(method, fields, case, torch.float64, density=0.5)
    # Seven decades of singular values: in float32 most entries lie within rounding of the cut.
    if "scalings and weights" not in case.name:
        check_ties(method, fields, case, torch.float32, density=0.5)


@pytest.mark.parametrize(("method", "fields"), SPACES)
def test_rounding_noise_has_no_vote(method: str, fields: dict[str, Any]) -> None:
    """Where an adapter has nothing, it neither agrees nor counts.

    The deltas have orthogonal column and row spaces: in the shared basis no direction belongs to
    more than one adapter. Their mean over those that agree is each adapter's own block, so merging
    gives the sum, unless 1e-16 of rounding counts as an agreeing adapter.
    """
    generator = np.random.default_rng(9)
    U, V = (np.linalg.qr(generator.normal(size=(12, 12)))[0] for _ in range(2))
    having = {
        name: Factors(
            A=torch.from_numpy(np.diag([5.0 + n, 3.0 + n / 2]) @ V[2 * n : 2 * n + 2]),
            B=torch.from_numpy(U[:, 2 * n : 2 * n + 2].copy()),
            scaling=1.0,
        )
        for n, name in enumerate("abcd")
    }
    case = Case("orthogonal", {"m": having})
    merger = build(method, **fields, inner={"method": "ties", "density": 1.0})
    wanted = oracles.task_arithmetic(case.parts("m"))
    assert_close(dense_delta(merge(merger, case)["m"]), wanted, 1e-10)


@pytest.mark.parametrize("options", INNER, ids=str)
@pytest.mark.parametrize(("method", "fields"), SPACES)
def test_every_field_of_the_inner_rule(
    method: str, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    for weights in ((), (2.0, 0.5, 1.0)):
        case = collection((4, 3, 5), weights=weights, seed=8)
        check_ties(method, fields, case, torch.float64, **options)


@pytest.mark.parametrize(("method", "fields"), SPACES)
def test_one_threshold_over_the_model(method: str, fields: dict[str, Any]) -> None:
    missing = next(case for case in ALL_CASES if case.name == "missing modules")
    for case in (collection((4, 4), paths=("m.0", "m.1", "m.2")), missing):
        check_ties(method, fields, case, torch.float64, scope="model", density=0.3)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize(("method", "fields"), SPACES)
def test_a_linear_rule_is_the_same_in_any_basis(
    method: str, fields: dict[str, Any], case: Case
) -> None:
    merger = build(method, **fields, inner={"method": "task_arithmetic", "scale": 0.3})
    for dtype, path, encoding in in_each_dtype(merger, case):
        # Through the blocks: the cut-off takes something from a steeply decaying spectrum.
        wanted = 0.3 * aligned_sum(method, fields, case.parts(path))
        size = sum(abs(p[3]) * np.linalg.norm(oracles.dense(p)) for p in case.parts(path))
        assert_close(dense_delta(encoding), wanted, TOLERANCE[dtype], scale=float(size))


@pytest.mark.parametrize(
    ("method", "fields", "invariant"),
    [("knots", {}, True), ("core_space", {}, True), ("core_space", {"balance": False}, False)],
)
def test_balancing_is_what_makes_core_space_gauge_invariant(
    method: str, fields: dict[str, Any], invariant: bool
) -> None:
    case = collection((4, 4, 4))
    merger = build(method, **fields, inner={"method": "ties", "density": 0.5})
    got, other = (dense_delta(merge(merger, c)["layer.0"]) for c in (case, regauge(case)))
    difference = np.linalg.norm(got - other) / np.linalg.norm(got)
    assert difference < 1e-9 if invariant else difference > 0.01


def test_the_result_has_the_rank_of_the_shared_basis() -> None:
    """A direction below the relative cut-off is dropped; one above is kept."""
    strong = collection((1, 1), d_out=6, d_in=5)
    parts = strong.parts("layer.0")
    singular_values = np.linalg.svd(
        np.concatenate([oracles.dense(p) for p in parts], axis=1), compute_uv=False
    )
    ratio = float(singular_values[1] / singular_values[0])
    for cutoff, rank in ((0.9 * ratio, 2), (1.1 * ratio, 1)):
        merger = build("knots", cutoff=cutoff, inner={"method": "task_arithmetic"})
        got = dense_delta(merge(merger, strong)["layer.0"])
        assert np.linalg.matrix_rank(got, tol=1e-9) == rank
        wanted = oracles.knots(parts, oracles.sum_rule, cutoff=cutoff)
        assert_close(got, wanted, 1e-10)
