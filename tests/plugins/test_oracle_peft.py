"""Strategies and oracles against what PEFT itself makes of the same adapters.

Only where both mean the same thing, which the choice of inputs sees to:

* `cat`, `linear`, `svd`, `magnitude_prune`: any scalings and weights. For `svd` PEFT merges deltas
  and keeps a rank; scaling is 1, because versions before 0.21 applied it twice there.
* `ties`: PEFT votes on the factors without their scaling, so all scalings are equal here; its drawn
  votes are positive; it does not normalise weights. `ties_svd` is the same on deltas.
* DARE: PEFT draws from the global generator, so masks cannot be equal; the rule after the mask is
  compared instead, with PEFT's own masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import peft
import pytest
import torch
from peft.utils import merge_utils

import oracles
from oracles.compare import assert_close, build, dense_delta, labelled
from stacks import Case, collection, merge
from unmerge.adapter import Factors

RANK, SHAPE = 3, (10, 8)


class Base(torch.nn.Module):
    """One linear layer under the case's module path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.ModuleList([torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)])


def peft_merge(case: Case, kind: str, **options: object) -> oracles.Matrix:
    """Return the delta of PEFT's `add_weighted_adapter`, its own scaling included."""
    having = case.modules["layer.0"]
    model = None
    for name, factors in having.items():
        config = peft.LoraConfig(
            r=factors.rank,
            lora_alpha=factors.scaling * factors.rank,
            target_modules=["layer.0"],
            bias="none",
        )
        if model is None:
            model = peft.PeftModel(Base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    layer = model.base_model.model.layer[0]
    for name, factors in having.items():
        layer.lora_A[name].weight.data = factors.A.float()
        layer.lora_B[name].weight.data = factors.B.float()
        assert layer.scaling[name] == factors.scaling
    names = list(having)
    model.add_weighted_adapter(
        names, [case.weight(name) for name in names], "merged", combination_type=kind, **options
    )
    merged: oracles.Matrix = layer.get_delta_weight("merged").detach().double().numpy()
    return merged


def adapters(
    weights: Sequence[float] = (1.0, 0.5, 2.0), scalings: Sequence[float] = (2.0, 2.0, 2.0)
) -> Case:
    return collection(
        (RANK,) * 3, d_out=SHAPE[0], d_in=SHAPE[1], weights=weights, scalings=scalings, seed=21
    )


WEIGHTS = [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0), (1.0, -0.5, 0.25)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_cat_is_task_arithmetic(weights: tuple[float, ...]) -> None:
    case = adapters(weights, scalings=(2.0, 0.5, 4.0))
    wanted = peft_merge(case, "cat")
    assert_close(oracles.task_arithmetic(case.parts("layer.0")), wanted, 1e-6)
    assert_close(dense_delta(merge(build("task_arithmetic"), case)["layer.0"]), wanted, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_linear_is_task_arithmetic_in_factor_space(weights: tuple[float, ...]) -> None:
    case = adapters(weights, scalings=(2.0, 0.5, 4.0))
    wanted = peft_merge(case, "linear")
    parts = case.parts("layer.0")
    assert_close(oracles.in_factors(oracles.sum_rule, parts), wanted, 1e-6)
    merger = build("task_arithmetic", space="factors")
    assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("rank", [None, 2, 5])
def test_svd_is_mm_svd(rank: int | None, weights: tuple[float, ...]) -> None:
    case = adapters(weights, scalings=(1.0, 1.0, 1.0))
    wanted = peft_merge(case, "svd", svd_rank=rank)
    assert_close(oracles.mm_svd(case.parts("layer.0"), rank or RANK).delta, wanted, 1e-5)
    merger = build("mm_svd", rank=rank, inner={"method": "task_arithmetic"}, split="B")
    assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.25, 0.6])
def test_magnitude_prune(density: float, weights: tuple[float, ...]) -> None:
    case = adapters(weights, scalings=(2.0, 0.5, 4.0))
    wanted = peft_merge(case, "magnitude_prune", density=density)

    def rule(matrices: Sequence[oracles.Matrix], given: Sequence[float]) -> oracles.Matrix:
        trimmed = [oracles.trim_vector(m.ravel(), density).reshape(m.shape) for m in matrices]
        return oracles.sum_rule(trimmed, given)

    assert_close(oracles.in_factors(rule, case.parts("layer.0")), wanted, 1e-6)
    merger = build("magnitude_prune", space="factors", density=density)
    assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-6)


@pytest.mark.parametrize(("theirs", "ours"), [("total", "value"), ("frequency", "count")])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("density", [0.25, 0.6])
def test_ties(density: float, weights: tuple[float, ...], theirs: str, ours: str) -> None:
    """By count of three votes, few are drawn; those that are go to `+` in both."""
    case = adapters(weights)
    wanted = peft_merge(case, "ties", density=density, majority_sign_method=theirs)
    matrices = labelled(case, "factors")
    A, B = (
        oracles.ties([tensor], [weight], density=density, vote=ours, zero_vote="positive")[0]  # type: ignore[arg-type]
        for tensor, weight in zip(matrices.tensors, matrices.weights, strict=True)
    )
    assert_close(B @ A, wanted, 1e-6)
    merger = build("ties", space="factors", density=density, vote=ours, zero_vote="positive")
    assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_ties_svd_is_mm_svd_over_ties(weights: tuple[float, ...]) -> None:
    case = adapters(weights, scalings=(1.0, 1.0, 1.0))
    wanted = peft_merge(case, "ties_svd", density=0.5, svd_rank=4)
    inner = {"method": "ties", "density": 0.5, "zero_vote": "positive"}
    merger = build("mm_svd", rank=4, inner=inner)
    assert_close(dense_delta(merge(merger, case)["layer.0"]), wanted, 1e-5)


def test_pefts_ties_differs_where_the_scalings_do() -> None:
    """The convention that is not shared: PEFT lets every adapter vote with its unscaled factors."""
    case = adapters(scalings=(8.0, 0.25, 1.0))
    wanted = peft_merge(case, "ties", density=0.5)
    merger = build("ties", space="factors", density=0.5, zero_vote="positive")
    got = dense_delta(merge(merger, case)["layer.0"])
    assert np.linalg.norm(got - wanted) > 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_dare_after_the_mask(density: float) -> None:
    """PEFT's random pruning, and the oracle with the mask PEFT drew: the same numbers."""
    parts = adapters().parts("layer.0")
    tensors = {name: oracles.dense(p) for name, p in zip("abc", parts, strict=True)}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pruned = {
            name: merge_utils.prune(torch.from_numpy(x), density, "random", rescale=True).numpy()
            for name, x in tensors.items()
        }
    masks = {name: x != 0 for name, x in pruned.items()}
    [dropped] = oracles.dare([tensors], [masks], density=density)
    for name in "abc":
        assert_close(dropped[name], pruned[name], 1e-12)


def test_the_cross_check_sees_a_wrong_scaling() -> None:
    """A scaling applied twice, PEFT's old fault, is far outside every tolerance above."""
    case = adapters(scalings=(2.0, 0.5, 4.0))
    twice = [(A, B, s * s, w) for A, B, s, w in case.parts("layer.0")]
    wanted = peft_merge(case, "cat")
    error = np.linalg.norm(oracles.task_arithmetic(twice) - wanted) / np.linalg.norm(wanted)
    assert error > 0.1


def test_the_case_is_what_peft_was_given() -> None:
    """One adapter at weight 1 through PEFT is its delta: shapes, sides and scaling agree."""
    case = adapters()
    one: dict[str, Factors] = {"a": case.modules["layer.0"]["a"]}
    alone = Case("one", {"layer.0": one})
    assert_close(peft_merge(alone, "cat"), oracles.dense(alone.parts("layer.0")[0]), 1e-6)
