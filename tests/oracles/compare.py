"""From a `Case` to an oracle's input, and from a strategy's result to numbers to compare.

Strategies are built by recipe, through the registry, and never imported: an oracle test knows
nothing of the code it tests but the names a user types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import unmerge
from oracles.common import Matrix, Part, dense, factor_matrices, sign
from oracles.sparse import Mask, Tensors, Weights
from stacks import Case, Result, merge
from unmerge.merger import Merger
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative error of a continuous rule, by the dtype of the adapters."""

DOUBT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""How near a decision must be to its threshold to be left out of a comparison."""

Space = Literal["delta", "factors"]
Scope = Literal["module", "model"]
Absent = Literal["zero", "renormalise"]


def build(method: str, **fields: Any) -> Merger:  # a recipe's fields are any
    """Return the strategy with this recipe, or fail by its name where it is not registered."""
    return unmerge.default_registry().build({"method": method, **fields})


class Labelled(NamedTuple):
    """Matrices of a case in the order a scope over the model sees them."""

    labels: list[tuple[str, str]]  # (module path, "delta", "A" or "B")
    tensors: list[dict[str, Matrix]]
    weights: list[dict[str, float]]


def shared_out(number: float, part: str) -> float:
    """Return a factor of the product as one matrix takes it: roots on A and B, the sign on A."""
    if part == "delta":
        return number
    return math.sqrt(abs(number)) * (sign(number) if part == "A" else 1.0)


def labelled(case: Case, space: Space, absent: Absent = "zero") -> Labelled:
    """Return every adapter's matrices and weights in `space`.

    `absent="renormalise"` scales the weights of the adapters that have a module so that they sum,
    as that matrix takes them, to those of all adapters.
    """
    result = Labelled([], [], [])
    for path in sorted(case.modules):
        names = sorted(case.modules[path])
        parts = dict(zip(names, case.parts(path), strict=True))
        for part in ("delta",) if space == "delta" else ("A", "B"):
            result.labels.append((path, part))
            result.tensors.append({n: _matrix(parts[n], part) for n in names})
            weights = {n: shared_out(case.weight(n), part) for n in names}
            everyone = sum(shared_out(case.weight(n), part) for n in case.adapters)
            if absent == "renormalise":
                share = everyone / sum(weights.values())
                weights = {n: w * share for n, w in weights.items()}
            result.weights.append(weights)
    return result


def _matrix(part: Part, which: str) -> Matrix:
    if which == "delta":
        return dense(part)
    return factor_matrices(part)[0 if which == "A" else 1]


def expected(
    rule: Callable[[Tensors, Weights], Sequence[npt.NDArray[Any]]],
    matrices: Labelled,
    scope: Scope,
) -> dict[tuple[str, str], Any]:
    """Apply a rule to each matrix alone, or to all of them at once."""
    if scope == "model":
        results = list(rule(matrices.tensors, matrices.weights))
    else:
        results = [
            rule([tensor], [weight])[0]
            for tensor, weight in zip(matrices.tensors, matrices.weights, strict=True)
        ]
    return dict(zip(matrices.labels, results, strict=True))


def merged_matrices(
    merger: Merger, case: Case, space: Space, dtype: torch.dtype = torch.float64, *, seed: int = 0
) -> dict[tuple[str, str], Matrix]:
    """Return what the strategy makes of the case, matrix by matrix of the space."""
    got: dict[tuple[str, str], Matrix] = {}
    for path, encoding in merge(merger, case, dtype=dtype, seed=seed).items():
        if space == "delta":
            got[path, "delta"] = dense_delta(encoding)
        else:
            assert isinstance(encoding, FactorsEncoding)
            got[path, "A"] = encoding.A.double().numpy()
            got[path, "B"] = encoding.B.double().numpy()
    return dict(sorted(got.items()))


def in_each_dtype(merger: Merger, case: Case) -> Iterator[tuple[torch.dtype, str, Result]]:
    """Merge the case at each dtype of `TOLERANCE`; yield dtype, module path and encoding."""
    for dtype in TOLERANCE:
        for path, encoding in merge(merger, case, dtype=dtype).items():
            yield dtype, path, encoding


def dense_delta(encoding: Result) -> Matrix:
    """Return the merged delta, whether it came as a delta or as factors, float64."""
    if isinstance(encoding, FactorsEncoding):
        product: Matrix = encoding.B.double().numpy() @ encoding.A.double().numpy()
        return product
    assert isinstance(encoding, DeltaEncoding)
    return np.asarray(encoding.delta.double().numpy())


def assert_close(got: Matrix, wanted: Matrix, tolerance: float, *, scale: float = 0.0) -> None:
    """Fail unless `‖got − wanted‖ ≤ tolerance · max(‖wanted‖, scale)`."""
    assert got.shape == wanted.shape, f"shape {got.shape}, expected {wanted.shape}"
    error = float(np.linalg.norm(got - wanted))
    limit = tolerance * max(float(np.linalg.norm(wanted)), scale)
    assert error <= limit, f"error {error:.3g}, at most {limit:.3g}"


def assert_agrees(
    got: Matrix, wanted: Matrix, doubt: Mask, tolerance: float, *, most: float = 0.1
) -> None:
    """Fail unless the matrices agree in every entry that is not in doubt, and few are."""
    assert doubt.mean() <= most, f"{doubt.mean():.0%} of the entries are in doubt"
    settled = ~doubt
    assert_close(
        np.where(settled, got, 0.0),
        np.where(settled, wanted, 0.0),
        tolerance,
        scale=float(np.linalg.norm(wanted)),
    )


def part_scale(values: Mapping[tuple[str, str], Matrix], scale: float) -> dict[Any, Matrix]:
    """Return the matrices with a final factor λ of their product in them."""
    return {label: shared_out(scale, label[1]) * value for label, value in values.items()}


def equal_weights(case: Case) -> Case:
    """Return the case with every weight 1, for strategies that take no weights."""
    return Case(case.name, case.modules)
