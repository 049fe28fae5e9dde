"""DARE: its masks to the bit, its three ways to rescale, and how it composes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import oracles
from stacks import (
    Case,
    collection,
    delta,
    merge,
    of_deltas,
    regauge,
    relative,
    same_bits,
    stored_elements,
)
from unmerge.adapter import Factors
from unmerge.errors import IncompatibleAdaptersError
from unmerge.kernels import stream_key
from unmerge.registry import default_registry
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_strategies import Average, Dare, MagnitudePrune, TaskArithmetic, Ties

GOLDEN_PATH = "model.layers.0.self_attn.q_proj"
GOLDEN_MASK = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
"""What density 0.5 keeps of adapter "sql" on that module at seed 0, the first 16 of its entries."""


def mask(
    case: Case, path: str, *, seed: int = 0, density: float = 0.5, block_rows: Any = None
) -> list[list[int]]:
    """Return which entries of an adapter that is 1 everywhere are kept."""
    merger = Dare(density=density, rescale="none")
    encoding = merge(merger, case, seed=seed, block_rows=block_rows)[path]
    rows: list[list[int]] = delta(encoding).astype(int).tolist()
    return rows


def ones(name: str, path: str, rows: int, columns: int) -> Case:
    return of_deltas({path: {name: np.ones((rows, columns)).tolist()}})


def test_the_mask_of_the_documentation() -> None:
    assert mask(ones("sql", GOLDEN_PATH, 4, 4), GOLDEN_PATH) == GOLDEN_MASK
    page = Path(__file__).parents[2] / "docs" / "methods" / "dare.md"
    for row in GOLDEN_MASK:
        assert "".join(map(str, row)) in page.read_text(encoding="utf-8")


def test_the_mask_is_the_published_generator_on_the_named_stream() -> None:
    key = stream_key(0, "dare", "sql", GOLDEN_PATH, "delta")
    drawn = [(bits >> 11) / 2**53 < 0.3 for bits in oracles.splitmix64(key, 15)]
    got = mask(ones("sql", GOLDEN_PATH, 3, 5), GOLDEN_PATH, density=0.3)
    assert [bool(bit) for row in got for bit in row] == drawn


def test_a_mask_depends_on_seed_adapter_module_and_place_alone() -> None:
    alone = mask(ones("b", "m", 70, 3), "m")
    wide = mask(ones("b", "m", 30, 7), "m")
    assert np.ravel(wide).tolist() == np.ravel(alone).tolist()
    assert mask(ones("b", "m", 70, 3), "m", block_rows=1) == alone
    # Other adapters, other modules, another order: the same mask.
    rows = np.ones((70, 3)).tolist()
    zeros = np.zeros((70, 3)).tolist()
    crowded = of_deltas({"n": {"b": rows}, "m": {"c": zeros, "b": rows, "a": zeros}})
    assert mask(crowded, "m") == alone
    others = [
        mask(ones("b", "m", 70, 3), "m", seed=1),
        mask(ones("c", "m", 70, 3), "m"),
        mask(ones("b", "n", 70, 3), "n"),
    ]
    assert all(other != alone for other in others)


def test_a_smaller_density_keeps_a_subset() -> None:
    case = ones("b", "m", 20, 20)
    few, many = (np.asarray(mask(case, "m", density=d)) for d in (0.2, 0.6))
    assert (few <= many).all()
    assert few.sum() < many.sum()


def test_a_and_b_have_masks_of_their_own() -> None:
    factors = Factors(A=torch.ones(4, 4), B=torch.ones(4, 4), scaling=1.0)
    merger = Dare(density=0.5, rescale="none", space="factors")
    encoding = merge(merger, Case("", {"m": {"a": factors}}))["m"]
    assert isinstance(encoding, FactorsEncoding)
    assert not torch.equal(encoding.A, encoding.B)


def test_rescaling_by_hand() -> None:
    """Of sixteen ones seven are kept: 1 / 0.5 each, 16 / 7 each, or 1."""
    case = ones("sql", GOLDEN_PATH, 4, 4)
    for rescale, value in (("density", 2.0), ("norm", 16 / 7), ("none", 1.0)):
        got = delta(
            merge(Dare.model_validate({"density": 0.5, "rescale": rescale}), case)[GOLDEN_PATH]
        )
        np.testing.assert_allclose(got, value * np.asarray(GOLDEN_MASK), rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_norm_is_kept_per_adapter_and_matrix(dtype: torch.dtype) -> None:
    case = collection((3,), paths=("m.0", "m.1"), d_out=40, d_in=30)
    for path, encoding in merge(Dare(density=0.2, rescale="norm"), case, dtype=dtype).items():
        whole = np.abs(oracles.dense(case.parts(path)[0])).sum()
        assert np.abs(delta(encoding)).sum() == pytest.approx(whole, rel=1e-6)
        # And not by dividing by the density.
        assert (delta(encoding) == 0).mean() == pytest.approx(0.8, abs=0.05)


def test_nothing_left_is_nothing_and_no_number_is_lost() -> None:
    case = ones("a", "m", 2, 2)
    for rescale in ("density", "norm", "none"):
        merger = Dare.model_validate({"density": 1e-9, "rescale": rescale})
        assert not delta(merge(merger, case)["m"]).any()


@pytest.mark.parametrize("rescale", ["density", "norm", "none"])
@pytest.mark.parametrize(
    "inner",
    [Ties(density=0.4), Ties(density=0.4, scope="model"), MagnitudePrune(density=0.3)],
    ids=str,
)
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_nothing_dropped_is_the_inner_rule_bit_for_bit(
    space: Any, inner: Any, rescale: Any
) -> None:
    case = collection((4, 4, 4), paths=("m.0", "m.1"), weights=(1.0, -0.5, 2.0))
    got = merge(Dare(density=1.0, rescale=rescale, inner=inner, space=space), case)
    alone = merge(inner.model_copy(update={"space": space}), case)
    assert all(same_bits(got[path], alone[path]) for path in case.modules)


@pytest.mark.parametrize("inner", [TaskArithmetic(scale=0.3), Average()], ids=str)
def test_nothing_dropped_is_the_linear_rule_to_rounding(inner: Any) -> None:
    """Bits differ: alone it concatenates factors, here it adds entries."""
    case = collection((4, 4, 4), weights=(1.0, -0.5, 2.0))
    got, alone = (merge(m, case)["layer.0"] for m in (Dare(density=1.0, inner=inner), inner))
    assert isinstance(got, DeltaEncoding)
    assert relative(delta(got), delta(alone)) < 1e-14


@pytest.mark.parametrize(
    "inner", [TaskArithmetic(), Average(absent="renormalise")], ids=lambda m: m.method
)
def test_the_mean_over_seeds_is_the_linear_rule(inner: Any) -> None:
    """By Hoeffding: 300 seeds, 30 entries; a bound that all together break once in 10⁸."""
    case = collection((2, 2), d_out=6, d_in=5, weights=(1.0, 0.5))
    exact = delta(merge(inner, case)["layer.0"])
    merger = Dare(density=0.25, inner=inner)
    draws = [delta(merge(merger, case, seed=seed)["layer.0"]) for seed in range(300)]
    weight = 1.0 if inner.method == "task_arithmetic" else 1 / 1.5
    parts = case.parts("layer.0")
    spans = sum((weight * p[3] * oracles.dense(p) / 0.25) ** 2 for p in parts)
    bound = np.sqrt(spans * np.log(2 * 30 * 1e8) / (2 * 300))
    error = np.abs(np.mean(draws, axis=0) - exact)
    assert (error <= bound).all()
    # Without rescaling the mean is a quarter of that, far outside.
    assert np.abs(0.25 * exact - exact).max() > bound.max() / 2


def test_one_cut_over_all_modules_is_of_the_survivors() -> None:
    """What is left over all modules is trimmed together, to exactly k of all entries."""
    case = collection((4,), paths=("m.0", "m.1"), d_out=20, d_in=15)
    inner = {"method": "ties", "density": 0.1, "scope": "model"}
    merger = Dare.model_validate({"density": 0.5, "inner": inner, "rescale": "none"})
    assert merger.capabilities.needs_survey
    survivors = merge(Dare(density=0.5, rescale="none"), case, seed=3)
    values = np.concatenate([delta(survivors[path]).ravel() for path in case.modules])
    trimmed = oracles.trim_vector(values, 0.1)
    got = merge(merger, case, seed=3)
    np.testing.assert_allclose(
        np.concatenate([delta(got[path]).ravel() for path in case.modules]), trimmed, rtol=1e-14
    )
    assert np.count_nonzero(trimmed) == int(0.1 * values.size)


FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"rescale": "norm", "space": "factors"},
    {"rescale": "norm", "inner": {"method": "ties", "scope": "model", "zero_vote": "majority"}},
    {"rescale": "none", "inner": {"method": "magnitude_prune"}, "density": 0.7},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_every_block_height_gives_the_same_bits(fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = collection((5, 5, 5), paths=("m.1", "m.0"), d_out=70, d_in=9, weights=(1.0, -0.3, 2.0))
    merger = Dare.model_validate(fields)
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(merger, case, dtype=dtype, seed=5, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in case.modules)


def test_masks_of_deltas_do_not_depend_on_the_gauge() -> None:
    case = collection((4, 4, 4))
    merger = Dare(density=0.5, inner=Ties(density=0.5))
    left, right = (delta(merge(merger, c)["layer.0"]) for c in (case, regauge(case)))
    assert relative(right, left) < 1e-12


def test_mixed_ranks_are_refused_in_factor_space() -> None:
    case = collection((2, 3))
    with pytest.raises(IncompatibleAdaptersError, match="needs equal ranks"):
        Dare(space="factors").check(case.stack().module(0).shape, case.context())
    Dare().check(case.stack().module(0).shape, case.context())


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"method": "dare"}, "dare inside dare would draw one mask twice; multiply the densities"),
        ({"method": "rmm"}, '"rmm" is no ElementwiseMerger'),
        ({"method": "emr"}, '"emr" is no ElementwiseMerger'),
        ({"method": "knots"}, '"knots" is no ElementwiseMerger'),
        ({"method": "mm_svd"}, '"mm_svd" is no ElementwiseMerger'),
        ({"method": "ties", "space": "factors"}, '"ties" runs in the space of the strategy around'),
        ({"method": "ties", "density": 2.0}, "density"),
        ({"method": "ties", "densty": 0.2}, "densty"),
        ("ties", "expected a merger or its recipe"),
    ],
    ids=str,
)
def test_compositions_that_mean_nothing_are_refused_when_the_recipe_is_read(
    inner: object, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        default_registry().build({"method": "dare", "inner": inner})


def test_a_recipe_is_read_as_it_was_written() -> None:
    merger = Dare(density=0.3, space="factors", inner=Ties(density=0.5, scope="model"))
    recipe = merger.recipe()
    assert recipe["inner"]["method"] == "ties"
    assert "space" not in recipe["inner"]
    assert default_registry().build(recipe) == merger
    assert Dare().recipe()["inner"]["method"] == "task_arithmetic"


def test_what_is_declared() -> None:
    declared = Dare().capabilities
    assert declared.stochastic
    assert declared.weight_scales_delta
    assert declared.sign_equivariant
    assert not declared.factor_exact
    assert not declared.needs_survey
    assert not Dare(density=1.0).capabilities.stochastic
    inner = Dare(inner=Ties(zero_vote="positive")).capabilities
    assert not inner.weight_scales_delta
    assert not inner.sign_equivariant


def test_lossless_settings_keep_one_adapter() -> None:
    case = collection((3,))
    merger = Dare(density=0.2, inner=Ties(density=0.1, scale=2.0), rescale="norm").lossless()
    assert merger is not None
    exact = oracles.dense(case.parts("layer.0")[0])
    assert relative(delta(merge(merger, case)["layer.0"]), exact) < 1e-14


@pytest.mark.parametrize(
    "fields", [{"density": 0.0}, {"density": 1.1}, {"rescale": "l1"}, {"seed": 3}], ids=str
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Dare.model_validate(fields)


def test_the_memory_of_the_inner_rule_is_counted() -> None:
    """On small matrices the counters of its cuts are more than the masks."""
    shape = collection((2, 2)).stack().module(0).shape
    inner = Ties()
    assert Dare(inner=inner).workspace_bytes(shape) == inner.workspace_bytes(shape)
    large = replace(shape, d_out=4096, d_in=4096)
    assert Dare(inner=inner).workspace_bytes(large) > inner.workspace_bytes(large)


def test_the_predicted_size_is_the_size() -> None:
    case = collection((2, 2))
    shape = case.stack().module(0).shape
    for merger in (Dare(), Dare(space="factors")):
        assert merger.predict(shape).total == stored_elements(merge(merger, case)["layer.0"])
