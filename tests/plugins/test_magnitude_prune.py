"""Magnitude pruning by hand: which entries are kept, what they are summed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stacks import Case, collection, delta, merge, of_deltas, relative, same_bits, stored_elements
from unmerge.adapter import Factors
from unmerge.errors import ConfigError, IncompatibleAdaptersError
from unmerge_bundle.encodings import FactorsEncoding
from unmerge_strategies import MagnitudePrune, TaskArithmetic

A = [[5.0, -1.0, 2.0], [0.0, -4.0, 3.0]]
ONES = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def merged(case: Case, path: str = "m", **fields: Any) -> list[list[float]]:
    rows: list[list[float]] = delta(merge(MagnitudePrune(**fields), case)[path]).tolist()
    return rows


def test_by_hand() -> None:
    case = of_deltas({"m": {"a": A, "b": ONES}}, {"a": 2.0, "b": -1.0})
    # Three of six: 5, −4 and 3 of a, the first three of b. (2a − b) / 2.
    assert merged(case, density=0.5, scale=0.5) == [[4.5, -0.5, -0.5], [0.0, -4.0, 3.0]]
    # ⌊0.49 · 6⌋ = 2.
    assert merged(case, density=0.49, scale=0.5) == [[4.5, -0.5, 0.0], [0.0, -4.0, 0.0]]
    # Not one entry.
    assert merged(case, density=0.1) == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_one_cut_over_all_modules_by_hand() -> None:
    case = of_deltas({"m.1": {"a": [[3.0, -4.0]]}, "m.0": {"a": [[1.0, 2.0]]}})
    assert merged(case, "m.0", density=0.5) == [[0.0, 2.0]]
    assert merged(case, "m.1", density=0.5) == [[0.0, -4.0]]
    assert merged(case, "m.0", density=0.5, scope="model") == [[0.0, 0.0]]
    assert merged(case, "m.1", density=0.5, scope="model") == [[3.0, -4.0]]


def test_over_all_modules_the_first_of_equals_are_kept() -> None:
    """By module path, though the modules are given in another order."""
    case = of_deltas({path: {"a": [[1.0, -1.0]]} for path in ("m.2", "m.10", "m.1")})
    kept = {path: merged(case, path, density=0.5, scope="model") for path in case.modules}
    assert kept == {"m.1": [[1.0, -1.0]], "m.10": [[1.0, 0.0]], "m.2": [[0.0, 0.0]]}


def test_of_factors_by_hand() -> None:
    # Roots of the scaling: 2. A: [2, −4] → −4; B: [6, 2] → 6. Weight −9: −3 on A, 3 on B.
    a = Factors(A=torch.tensor([[1.0, -2.0]]), B=torch.tensor([[3.0], [1.0]]), scaling=4.0)
    case = Case("", {"m": {"a": a}}, {"a": -9.0})
    encoding = merge(MagnitudePrune(density=0.5, space="factors"), case)["m"]
    assert isinstance(encoding, FactorsEncoding)
    assert encoding.A.tolist() == [[0.0, 12.0]]
    assert encoding.B.tolist() == [[18.0], [0.0]]


def test_over_a_model_of_factors_one_cut_takes_a_before_b() -> None:
    """Four equal entries: both of A come first, by the name of the matrix."""
    a = Factors(A=torch.tensor([[1.0, -1.0]]), B=torch.tensor([[1.0], [1.0]]), scaling=1.0)
    merger = MagnitudePrune(density=0.75, scope="model", space="factors")
    encoding = merge(merger, Case("", {"m": {"a": a}}))["m"]
    assert isinstance(encoding, FactorsEncoding)
    assert encoding.A.tolist() == [[1.0, -1.0]]
    assert encoding.B.tolist() == [[1.0], [0.0]]


def test_an_absent_adapter_by_hand() -> None:
    case = of_deltas({"m": {"a": A, "b": A}, "n": {"b": A}}, {"a": 1.0, "b": 3.0})
    kept = np.asarray([[5.0, 0.0, 0.0], [0.0, -4.0, 3.0]])
    for absent, weight in (("zero", 3.0), ("renormalise", 4.0)):
        assert merged(case, "n", density=0.5, absent=absent) == (weight * kept).tolist()
        assert merged(case, "m", density=0.5, absent=absent) == (4 * kept).tolist()


def test_weights_that_cannot_be_renormalised_are_refused_before_reading() -> None:
    case = of_deltas(
        {"m": {"a": A, "b": A}, "n": {"a": A, "b": A, "c": A}}, {"a": 0.1, "b": -0.1, "c": 1.0}
    )
    merger = MagnitudePrune(absent="renormalise")
    shapes = {module.path: module.shape for module in case.stack()}
    merger.check(shapes["n"], case.context())
    MagnitudePrune().check(shapes["m"], case.context())
    with pytest.raises(ConfigError, match=r"^m: the weights .* sum to 0 .*; use absent=zero"):
        merger.check(shapes["m"], case.context())


def test_mixed_ranks_are_refused_in_factor_space_only() -> None:
    shape = collection((2, 3)).stack().module(0).shape
    context = collection((2, 3)).context()
    MagnitudePrune().check(shape, context)
    with pytest.raises(IncompatibleAdaptersError, match=r"magnitude_prune with space=factors"):
        MagnitudePrune(space="factors").check(shape, context)


def test_everything_kept_is_task_arithmetic() -> None:
    case = collection((4, 2, 3), weights=(1.0, -0.5, 0.0))
    got = delta(merge(MagnitudePrune(density=1.0, scale=0.3), case)["layer.0"])
    assert relative(got, delta(merge(TaskArithmetic(scale=0.3), case)["layer.0"])) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["module", "model"])
@pytest.mark.parametrize("space", ["delta", "factors"])
def test_every_block_height_gives_the_same_bits(space: Any, scope: Any, dtype: torch.dtype) -> None:
    case = collection((5, 5, 5), paths=("m.1", "m.0"), d_out=70, d_in=9, weights=(1.0, -0.3, 2.0))
    merger = MagnitudePrune(density=0.3, space=space, scope=scope)
    heights: tuple[Any, ...] = (None, 1, 7, 64)
    first, *others = (merge(merger, case, dtype=dtype, block_rows=h) for h in heights)
    for other in others:
        assert all(same_bits(first[path], other[path]) for path in case.modules)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), "0.2", True])
def test_a_density_that_is_no_fraction_is_refused(density: object) -> None:
    with pytest.raises(ValidationError, match="density"):
        MagnitudePrune.model_validate({"density": density})


def test_what_is_declared() -> None:
    declared = MagnitudePrune().capabilities
    assert declared.weight_scales_delta
    assert declared.sign_equivariant
    assert declared.gauge_invariant
    assert declared.mixed_ranks
    assert not declared.needs_survey
    assert MagnitudePrune(scope="model").capabilities.needs_survey
    assert not MagnitudePrune(absent="renormalise").capabilities.weight_scales_delta
    assert not MagnitudePrune(space="factors").capabilities.weight_scales_delta


def test_the_predicted_size_is_the_size() -> None:
    case = collection((2, 2))
    shape = case.stack().module(0).shape
    for merger in (MagnitudePrune(), MagnitudePrune(space="factors")):
        stored = stored_elements(merge(merger, case)["layer.0"])
        assert merger.predict(shape).total == stored


def test_the_counters_of_a_cut_are_part_of_the_memory() -> None:
    shape = collection((2, 2)).stack().module(0).shape
    needed = [MagnitudePrune(density=d).workspace_bytes(shape) for d in (0.5, 1.0)]
    assert needed[0] - needed[1] == (2 + 2) * 8 * 2**16
