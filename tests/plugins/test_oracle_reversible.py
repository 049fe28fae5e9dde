"""RMM, EMR, joint diagonalisation, truncation, quantisation against dense references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
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
    equal_weights,
    expected,
    labelled,
)
from stacks import (
    ALL_CASES,
    EQUAL_RANK_CASES,
    Case,
    Result,
    collection,
    merge,
    regauge,
    restored,
)
from unmerge_bundle.encodings import (
    AdapterFactorsEncoding,
    MaskedDeltaEncoding,
    QuantisedMatrix,
    SharedFactorsEncoding,
)

Codes = npt.NDArray[np.int64]


def case_named(name: str) -> Case:
    return next(case for case in ALL_CASES if case.name == name)


def part_of(case: Case, path: str, name: str) -> oracles.Part:
    return dict(zip(sorted(case.modules[path]), case.parts(path), strict=True))[name]


# Reversible model merging.


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_rmm(case: Case, fold: bool) -> None:
    case = equal_weights(case)
    for p, dtype in itertools.product((1, 2, 3), TOLERANCE):
        merged = merge(build("rmm", basis_size=p, fold_scaling=fold), case, dtype=dtype)
        for path, encoding in merged.items():
            names, parts = sorted(case.modules[path]), case.parts(path)
            folded = [part[2] if fold else 1.0 for part in parts]
            wanted = oracles.rmm_restore(
                [part[0] for part in parts],
                [s * part[1] for s, part in zip(folded, parts, strict=True)],
                min(p, len(parts) - 1, parts[0][0].shape[0]),
            )
            size = math.hypot(*(float(np.linalg.norm(M)) for part in parts for M in part[:2]))
            for n, name in enumerate(names):
                A, B, scaling = restored(encoding, name)
                assert_close(A, wanted.A[n], TOLERANCE[dtype], scale=size)
                assert_close(B, wanted.B[n], TOLERANCE[dtype], scale=max(folded) * size)
                assert scaling == (1.0 if fold else parts[n][2])


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_rmm_of_balanced_adapters(case: Case) -> None:
    """Compared by their deltas, at one scaling: where the scaling went is then no matter."""
    case = equal_weights(case)
    for path, encoding in merge(build("rmm", basis_size=2, gauge="balanced"), case).items():
        names, parts = sorted(case.modules[path]), case.parts(path)
        if len({part[2] for part in parts}) > 1:
            continue
        balanced = [oracles.balanced_factors(part) for part in parts]
        p = min(2, len(parts) - 1)
        wanted = oracles.rmm_restore([A for A, _ in balanced], [B for _, B in balanced], p)
        size = max(float(np.linalg.norm(oracles.dense(part))) for part in parts)
        for n, name in enumerate(names):
            A, B, scaling = restored(encoding, name)
            delta = parts[n][2] * wanted.B[n] @ wanted.A[n]
            assert_close(scaling * B @ A, delta, 1e-10, scale=size)


@pytest.mark.parametrize("gauge", ["none", "balanced", "aligned"])
def test_rmm_with_a_full_basis_loses_nothing_in_any_gauge(gauge: str) -> None:
    for case in (collection((4, 4, 4)), collection((3, 3), scalings=(4.0, 0.5))):
        merged = merge(build("rmm", basis_size=4, gauge=gauge), case)
        for path, encoding in merged.items():
            for name, part in zip(sorted(case.modules[path]), case.parts(path), strict=True):
                A, B, scaling = restored(encoding, name)
                assert_close(scaling * B @ A, oracles.dense(part), 1e-10)


@pytest.mark.parametrize(
    ("gauge", "invariant"), [("none", False), ("balanced", True), ("aligned", True)]
)
def test_rmm_depends_on_the_gauge_only_where_it_says_so(gauge: str, invariant: bool) -> None:
    case = collection((4, 4, 4))
    merger = build("rmm", basis_size=1, gauge=gauge)
    results = [merge(merger, c)["layer.0"] for c in (case, regauge(case))]
    for name in case.adapters:
        (A, B, s), (C, D, t) = (restored(result, name) for result in results)
        difference = np.linalg.norm(s * B @ A - t * D @ C) / np.linalg.norm(s * B @ A)
        assert difference < 1e-8 if invariant else difference > 0.01


def test_aligning_brings_the_adapters_nearer_to_their_mean() -> None:
    """What Procrustes is for: in the common frame a basis of one direction restores more."""
    case = regauge(collection((4,) * 6, seed=3), seed=1)
    errors = {}
    for gauge in ("none", "aligned"):
        encoding = merge(build("rmm", basis_size=1, gauge=gauge), case)["layer.0"]
        errors[gauge] = 0.0
        for name, part in zip(case.adapters, case.parts("layer.0"), strict=True):
            A, B, scaling = restored(encoding, name)
            delta = oracles.dense(part)
            errors[gauge] += float(np.linalg.norm(scaling * B @ A - delta)) / float(
                np.linalg.norm(delta)
            )
    assert errors["aligned"] < errors["none"]


def test_rmm_chooses_its_basis_by_storage() -> None:
    """The largest p whose storage ratio is within the budget."""
    case = collection((8,) * 8, d_out=20, d_in=18)
    for budget in (0.3, 0.5, 0.8):
        fits = [p for p in range(1, 8) if oracles.rmm_storage_ratio(8, 8, p) <= budget]
        if not fits:
            continue
        encoding = merge(build("rmm", storage=budget), case)["layer.0"]
        assert encoding.shared_tensors()["basis_A"].shape[0] == max(fits)


def test_rmm_chooses_its_basis_by_error() -> None:
    """The bound holds for both factors together; one basis adapter less misses it."""
    case = collection((6,) * 6, d_out=20, d_in=18)
    parts = case.parts("layer.0")
    As, Bs = [part[0] for part in parts], [part[1] for part in parts]
    norm = math.hypot(*(float(np.linalg.norm(M)) for M in (*As, *Bs)))
    for bound in (0.6, 0.3):
        encoding = merge(build("rmm", error=bound), case)["layer.0"]
        p = encoding.shared_tensors()["basis_A"].shape[0]
        used, fewer = (oracles.rmm_restore(As, Bs, q) for q in (p, p - 1))
        assert math.sqrt(used.tail_A + used.tail_B) <= bound * norm
        larger = max(
            math.sqrt(tail) / math.hypot(*(float(np.linalg.norm(M)) for M in matrices))
            for tail, matrices in ((fewer.tail_A, As), (fewer.tail_B, Bs))
        )
        assert larger > bound


def test_rmm_pads_unequal_ranks() -> None:
    """Zeros up to the largest rank; every adapter comes back, at its own rank or the largest."""
    case = collection((2, 5, 3))
    encoding = merge(build("rmm", basis_size=1, pad=True), case)["layer.0"]
    parts = case.parts("layer.0")
    As = [np.pad(part[0], ((0, 5 - part[0].shape[0]), (0, 0))) for part in parts]
    Bs = [np.pad(part[1], ((0, 0), (0, 5 - part[1].shape[1]))) for part in parts]
    wanted = oracles.rmm_restore(As, Bs, 1)
    for n, name in enumerate(case.adapters):
        A, B, scaling = restored(encoding, name)
        assert_close(scaling * B @ A, parts[n][2] * wanted.B[n] @ wanted.A[n], 1e-10)


# EMR.


def emr_masks(encoding: MaskedDeltaEncoding[torch.Tensor], name: str) -> npt.NDArray[np.bool_]:
    """Unpack a mask by the encoding's own words: bit j % 8 of byte j // 8 is column j."""
    d_out, d_in = encoding.shape
    packed = encoding.adapter_tensors(name)["mask"].numpy()
    mask = np.zeros((d_out, d_in), dtype=bool)
    for i in range(d_out):
        for j in range(d_in):
            mask[i, j] = bool(int(packed[i, j // 8]) >> (j % 8) & 1)
    return mask


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_emr(case: Case, scope: Scope) -> None:
    for dtype in TOLERANCE:
        check_emr(equal_weights(case), scope, dtype)


def check_emr(case: Case, scope: Scope, dtype: torch.dtype) -> None:
    matrices = labelled(case, "delta")
    merged = merge(build("emr", scope=scope), case, dtype=dtype)
    paths = [path for path, _ in matrices.labels]
    whole = oracles.emr(matrices.tensors)
    doubts = expected(
        lambda t, w: oracles.contested(t, w, density=1.0, tolerance=DOUBT[dtype]),
        matrices,
        "module",
    )
    for m, path in enumerate(paths):
        encoding = merged[path]
        assert isinstance(encoding, MaskedDeltaEncoding)
        wanted = whole if scope == "model" else oracles.emr([matrices.tensors[m]])
        index = m if scope == "model" else 0
        doubt = doubts[path, "delta"]
        unified = encoding.unified.double().numpy()
        assert_agrees(unified, wanted.unified[index], doubt, TOLERANCE[dtype])
        for name in sorted(case.modules[path]):
            mask = emr_masks(encoding, name)
            # Where τ is 0 a mask lets nothing through, whatever it says.
            differs = (mask != wanted.masks[index][name]) & (unified != 0) & ~doubt
            assert not differs.any()
            if any(d.any() for d in doubts.values()):
                continue
            limit = 10 * TOLERANCE[dtype]
            if wanted.rescalers[name]:  # of a zero adapter any rescaler will do
                assert encoding.scaling(name) == pytest.approx(wanted.rescalers[name], rel=limit)
            got = encoding.scaling(name) * np.where(mask, unified, 0.0)
            assert_close(got, wanted.restore(index, name), limit)


def test_emr_of_one_adapter_is_that_adapter() -> None:
    case = collection((4,))
    [encoding] = merge(build("emr"), case).values()
    assert isinstance(encoding, MaskedDeltaEncoding)
    got = encoding.scaling("a") * emr_masks(encoding, "a") * encoding.unified.double().numpy()
    assert_close(got, oracles.dense(case.parts("layer.0")[0]), 1e-12)


# Joint diagonalisation.


def joint(encoding: Result) -> tuple[oracles.Matrix, oracles.Matrix, oracles.Matrix]:
    """Return U `(d_out, k)`, V `(k, d_in)` and the cores with their scalings, full or diagonal."""
    assert isinstance(encoding, SharedFactorsEncoding)
    scalings = np.array(encoding.scalings).reshape(-1, *[1] * (encoding.cores.ndim - 1))
    return (
        encoding.U.double().numpy(),
        encoding.V.double().numpy(),
        scalings * encoding.cores.double().numpy(),
    )


def unit(deltas: list[oracles.Matrix]) -> list[oracles.Matrix]:
    """Return the deltas at norm 1: what the paper fits. A zero delta stays zero."""
    return [d / (np.linalg.norm(d) or 1.0) for d in deltas]


def full_error(deltas: list[oracles.Matrix], U: oracles.Matrix, V: oracles.Matrix) -> float:
    return oracles.with_best_cores(deltas, U, V.T).squared_error(deltas)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_jd(case: Case, normalise: bool) -> None:
    """Orthonormal bases, the best cores for them, and bases that a further round cannot improve."""
    merger = build("jd", rank=2, normalise=normalise, tolerance=1e-10, max_iterations=500)
    for path, encoding in merge(merger, case).items():
        deltas = [oracles.dense(part) for part in case.parts(path)]
        U, V, cores = joint(encoding)
        k = U.shape[1]
        np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-10)
        np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-10)
        for delta, core in zip(deltas, cores, strict=True):
            assert_close(core, U.T @ delta @ V.T, 1e-9, scale=float(np.linalg.norm(delta)))
        fitted = unit(deltas) if normalise else deltas
        total = sum(float(np.linalg.norm(d)) ** 2 for d in fitted)
        error = full_error(fitted, U, V)
        projected = [d @ V.T for d in fitted]
        better = np.linalg.eigh(sum(p @ p.T for p in projected))[1][:, ::-1][:, :k]
        assert error - full_error(fitted, better, V) < 1e-6 * total
        # Both descend from a start of their own; neither should be far behind.
        assert (
            error <= 1.05 * oracles.joint_full(fitted, k, 100).squared_error(fitted) + 1e-9 * total
        )


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_jd_at_full_rank_loses_nothing(case: Case) -> None:
    rank = max(sum(f.rank for f in having.values()) for having in case.modules.values())
    for path, encoding in merge(build("jd", rank=rank), case).items():
        U, V, cores = joint(encoding)
        for part, core in zip(case.parts(path), cores, strict=True):
            assert_close(U @ core @ V, oracles.dense(part), 1e-9)


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=str)
def test_jd_with_diagonal_cores(case: Case) -> None:
    """No further round of least squares helps, and full cores of that size do at least as well."""
    merger = build("jd", rank=2, diagonal=True, normalise=False, tolerance=1e-9, max_iterations=300)
    full = merge(build("jd", rank=2, normalise=False, tolerance=1e-12), case)
    for path, encoding in merge(merger, case).items():
        deltas = [oracles.dense(part) for part in case.parts(path)]
        total = sum(float(np.linalg.norm(d)) ** 2 for d in deltas)
        U, V, diagonals = joint(encoding)
        error = oracles.diagonal_error(deltas, U, V.T, diagonals)
        again = oracles.diagonal_error(deltas, *oracles.diagonal_round(deltas, U, V.T, diagonals))
        assert error - again < 1e-5 * total
        assert error <= total
        with_cores = full_error(deltas, *joint(full[path])[:2])
        assert with_cores <= 1.05 * error + 1e-9 * total


def test_jd_finds_common_singular_directions() -> None:
    """Deltas that share their singular vectors are diagonal in them: exactly k numbers each."""
    generator = np.random.default_rng(4)
    U, V = (np.linalg.qr(generator.normal(size=(n, 3)))[0] for n in (9, 8))
    case = collection((3, 3, 3, 3), d_out=9, d_in=8)
    having = {}
    for name, factors in case.modules["layer.0"].items():
        values = generator.normal(size=3) + 2
        having[name] = type(factors)(
            A=torch.from_numpy(values[:, None] * V.T), B=torch.from_numpy(U.copy()), scaling=1.0
        )
    case = Case("jointly diagonal", {"m": having})
    merger = build("jd", rank=3, diagonal=True, tolerance=1e-14, max_iterations=5000)
    left, right, diagonals = joint(merge(merger, case)["m"])
    for part, c in zip(case.parts("m"), diagonals, strict=True):
        assert_close((left * c) @ right, oracles.dense(part), 1e-4)


# Every adapter on its own.


def own_factors(encoding: Result, name: str) -> tuple[oracles.Matrix, oracles.Matrix, float]:
    assert isinstance(encoding, AdapterFactorsEncoding)
    n = encoding.names.index(name)
    A, Bt = encoding.A[n], encoding.B_transposed[n]
    assert isinstance(A, torch.Tensor)
    assert isinstance(Bt, torch.Tensor)
    return A.double().numpy(), Bt.double().numpy().T, encoding.scaling(name)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_truncate(case: Case) -> None:
    choices: list[dict[str, Any]] = [{}, {"rank": 1}, {"rank": 3}, {"energy": 0.8}, {"error": 0.3}]
    for fields, dtype in itertools.product(choices, TOLERANCE):
        check_truncate(case, fields, dtype)


def check_truncate(case: Case, fields: dict[str, Any], dtype: torch.dtype) -> None:
    for path, encoding in merge(build("truncate", **fields), case, dtype=dtype).items():
        for name, part in zip(sorted(case.modules[path]), case.parts(path), strict=True):
            delta, own = oracles.dense(part), part[0].shape[0]
            rank = fields.get("rank", -(-own // 2))
            if "energy" in fields:
                rank = oracles.rank_for_energy(delta, fields["energy"])
            elif "error" in fields:
                rank = oracles.rank_for_error(delta, fields["error"])
            A, B, scaling = own_factors(encoding, name)
            assert scaling == part[2]
            assert A.shape[0] <= max(min(rank, own), 1)
            assert_close(
                scaling * B @ A,
                oracles.truncate(part, rank),
                TOLERANCE[dtype],
                scale=float(np.linalg.norm(delta)),
            )


def unpacked(matrix: QuantisedMatrix[torch.Tensor]) -> Codes:
    """Read codes by the encoding's own words: a byte each, or two to a byte, low half first."""
    packed = matrix.codes.numpy().astype(np.int64)
    if matrix.bits == 8:
        codes = packed
    else:
        codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)
    return codes[:, : matrix.columns] - 2 ** (matrix.bits - 1)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_quantize(case: Case) -> None:
    """Codes agree but where an entry lies within rounding of the middle between two codes."""
    check_quantize(case, 8, 64, torch.float64)
    check_quantize(case, 8, 4, torch.float32)
    check_quantize(case, 4, 3, torch.float64)
    check_quantize(case, 4, 64, torch.float32)


def check_quantize(case: Case, bits: int, group_size: int, dtype: torch.dtype) -> None:
    merged = merge(build("quantize", bits=bits, group_size=group_size), case, dtype=dtype)
    for path, encoding in merged.items():
        assert isinstance(encoding, AdapterFactorsEncoding)
        for n, name in enumerate(encoding.names):
            A, B, scaling, _ = part_of(case, path, name)
            assert encoding.scaling(name) == scaling
            for original, got in ((A, encoding.A[n]), (B.T, encoding.B_transposed[n])):
                assert isinstance(got, QuantisedMatrix)
                wanted = oracles.quantise(original, bits, group_size, step_bits=8)
                np.testing.assert_array_equal(got.scales.double().numpy(), wanted.scales)
                steps = np.repeat(wanted.scales, group_size, axis=1)[:, : original.shape[1]]
                ratio = np.where(steps > 0, original / np.where(steps > 0, steps, 1.0), 0.0)
                halfway = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < 1e-4
                assert halfway.mean() < 0.2
                np.testing.assert_array_equal(unpacked(got)[~halfway], wanted.codes[~halfway])
                assert (np.abs(unpacked(got) - wanted.codes) <= halfway).all()


def test_quantize_rounds_halves_to_even() -> None:
    """Entries in the exact middle of two codes, which no rounding error can have decided."""
    row = [127.0, 2.5, 3.5, -0.5, -1.5, 0.0]
    case = collection((1,), d_out=6, d_in=6)
    factors = case.modules["layer.0"]["a"]
    exact = type(factors)(
        A=torch.tensor([row], dtype=torch.float64),
        B=torch.tensor([row], dtype=torch.float64).T,
        scaling=1.0,
    )
    encoding = merge(build("quantize"), Case("halves", {"m": {"a": exact}}))["m"]
    assert isinstance(encoding, AdapterFactorsEncoding)
    for matrix in (encoding.A[0], encoding.B_transposed[0]):
        assert isinstance(matrix, QuantisedMatrix)
        assert unpacked(matrix).tolist() == [[127, 2, 4, 0, -2, 0]]
