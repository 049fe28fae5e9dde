"""EMR by hand: what is elected, what a mask lets through, what rescalers restore."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import oracles
from stacks import (
    ALL_CASES,
    Case,
    Result,
    collection,
    merge,
    of_deltas,
    regauge,
    relative,
    same_bits,
)
from unmerge.errors import NonFiniteError
from unmerge.kernels import unpack_bits
from unmerge.stack import ModuleShape
from unmerge_bundle.encodings import MaskedDeltaEncoding
from unmerge_strategies import Emr

A = [[4.0, -2.0], [1.0, 0.0]]
B = [[2.0, 3.0], [-3.0, 0.0]]
# Sums: 6, 1, −2, 0; the largest that agree: 4, 3, −3.
UNIFIED = [[4.0, 3.0], [-3.0, 0.0]]


def masked(encoding: Result) -> MaskedDeltaEncoding[torch.Tensor]:
    assert isinstance(encoding, MaskedDeltaEncoding)
    return encoding


def restored(encoding: Result, name: str) -> oracles.Matrix:
    """Return `λ · M ⊙ τ` as the encoding defines it."""
    own = masked(encoding)
    mask = unpack_bits(own.adapter_tensors(name)["mask"], own.shape[1])
    delta: oracles.Matrix = own.scaling(name) * (own.unified.double() * mask).numpy()
    return delta


def test_by_hand() -> None:
    encoding = merge(Emr(), of_deltas({"m": {"a": A, "b": B}}))["m"]
    assert masked(encoding).unified.tolist() == UNIFIED
    # a agrees in its first entry: 7 / 4. b agrees everywhere: 8 / 10.
    assert masked(encoding).masks.tolist() == [[[1], [0]], [[3], [1]]]
    assert masked(encoding).scalings == (1.75, 0.8)
    assert restored(encoding, "a").tolist() == [[7.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(restored(encoding, "b"), [[3.2, 2.4], [-2.4, 0.0]], rtol=1e-15)


def test_one_rescaler_for_all_modules_by_hand() -> None:
    case = of_deltas({"m": {"a": A, "b": B}, "n": {"b": [[5.0, -1.0], [0.0, 0.0]]}})
    merged = merge(Emr(scope="model"), case)
    # b: (8 + 6) / (10 + 6); a, which lacks n, as before.
    assert masked(merged["m"]).scalings == (1.75, 0.875)
    assert masked(merged["n"]).names == ("b",)
    assert masked(merged["n"]).scalings == (0.875,)
    assert masked(merge(Emr(), case)["n"]).scalings == (1.0,)


@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_norm_is_restored_over_its_scope(case: Case, scope: Any) -> None:
    """Σ|Δ̂_i| = Σ|Δ_i| over what one rescaler is for."""
    encodings = merge(Emr(scope=scope), case)
    for name in case.adapters:
        pairs = []
        for path, having in case.modules.items():
            if name in having:
                part = case.only(path).parts(path)[sorted(having).index(name)]
                pairs.append((restored(encodings[path], name), oracles.dense(part)))
        groups = [pairs] if scope == "model" else [[pair] for pair in pairs]
        for group in groups:
            got, whole = (
                sum(float(np.abs(x).sum()) for x in side) for side in zip(*group, strict=True)
            )
            assert got == pytest.approx(whole, rel=1e-12) or got == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["module", "model"])
def test_one_adapter_comes_back_as_itself(scope: Any, dtype: torch.dtype) -> None:
    case = collection((4,), paths=("m.0", "m.1"), d_in=37)
    merger = Emr(scope=scope).lossless()
    for path, encoding in merge(merger, case, dtype=dtype).items():
        assert masked(encoding).scalings == pytest.approx((1.0,), rel=1e-14)
        exact = oracles.dense(case.parts(path)[0])
        error = relative(restored(encoding, "a"), exact)
        assert error < (1e-6 if dtype == torch.float32 else 1e-14)


def test_a_zero_adapter_comes_back_as_zero() -> None:
    case = of_deltas({"m": {"a": A, "z": [[0.0, 0.0], [0.0, 0.0]]}})
    encoding = merge(Emr(), case)["m"]
    assert masked(encoding).scalings == (1.0, 1.0)
    assert not restored(encoding, "z").any()
    assert restored(encoding, "a").tolist() == A


def test_an_adapter_that_is_outvoted_everywhere_comes_back_as_zero() -> None:
    encoding = merge(Emr(), of_deltas({"m": {"a": [[3.0, -3.0]], "b": [[-1.0, 1.0]]}}))["m"]
    assert masked(encoding).scalings == (1.0, 1.0)
    assert not restored(encoding, "b").any()


def test_weights_play_no_part() -> None:
    case = collection((4, 4, 4))
    weighted = replace(case, weights={"a": 0.0, "b": -3.0})
    assert same_bits(merge(Emr(), case)["layer.0"], merge(Emr(), weighted)["layer.0"])
    assert Emr().capabilities.ignores_weights


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_masks_are_packed_row_by_row(columns: int) -> None:
    case = collection((2, 2), d_out=5, d_in=columns)
    encoding = masked(merge(Emr(), case)["layer.0"])
    assert encoding.masks.shape == (2, 5, -(-columns // 8))
    assert encoding.masks.dtype == torch.uint8
    deltas = [torch.from_numpy(oracles.dense(part)) for part in case.parts("layer.0")]
    for delta, packed in zip(deltas, encoding.masks, strict=True):
        agrees = delta * encoding.unified > 0
        assert torch.equal(unpack_bits(packed, columns), agrees)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["module", "model"])
def test_blocks_and_stacks_make_no_difference(scope: Any, dtype: torch.dtype) -> None:
    case = collection((5, 5, 5), paths=("m.1", "m.0"), d_out=70, d_in=9)
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(Emr(scope=scope), case, dtype=dtype, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in case.modules)
    if scope == "module":
        for path in case.modules:
            assert same_bits(merge(Emr(), case.only(path), dtype=dtype)[path], first[path])


def test_the_gauge_does_not_matter() -> None:
    case = collection((4, 4, 4))
    left, right = (masked(merge(Emr(), c)["layer.0"]) for c in (case, regauge(case)))
    assert torch.equal(left.masks, right.masks)
    np.testing.assert_allclose(right.unified.numpy(), left.unified.numpy(), rtol=1e-9)
    np.testing.assert_allclose(right.scalings, left.scalings, rtol=1e-12)


def test_what_is_not_finite_is_an_error() -> None:
    case = of_deltas({"m": {"a": A, "b": B}})
    case.modules["m"]["a"].B[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        merge(Emr(), case)


def test_the_predicted_size_is_the_size() -> None:
    case = collection((2, 5, 3), d_in=13)
    encoding = masked(merge(Emr(), case)["layer.0"])
    size = Emr().predict(case.stack().module(0).shape)
    assert size.total == encoding.unified.numel()
    assert size.packed_bytes == encoding.masks.numel() == 3 * 14 * 2
    assert not size.at_most


def test_advice_where_masks_are_larger_than_adapters() -> None:
    def shape(size: int, rank: int) -> ModuleShape:
        return ModuleShape("m", size, size, ("a", "b"), (rank, rank))

    # A mask: 4096² / 8 = 2 MiB. Factors of rank 16 in float16: 256 KiB; of rank 256, 4 MiB.
    assert Emr().advise([shape(4096, 256)]) == []
    [advice] = Emr().advise([shape(4096, 256), shape(4096, 16)])
    assert advice.startswith("on 1 of 2 modules a mask of one bit an entry takes more bytes")


def test_what_is_declared() -> None:
    declared = Emr().capabilities
    assert declared.restores == "delta"
    assert declared.gauge_invariant
    assert declared.mixed_ranks
    assert not declared.needs_survey
    assert Emr(scope="model").capabilities.needs_survey
