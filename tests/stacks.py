"""Stacks for strategy tests, next to the plain numpy parts that the oracles take.

One description of a merge gives both sides of a comparison, so a test cannot hand the code and the
oracle different adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from oracles import Matrix, Part
from unmerge.adapter import Factors
from unmerge.elementwise import ElementwiseMerger
from unmerge.merger import MergeContext, Merger, Passes
from unmerge.stack import FactorStack
from unmerge_bundle.encodings import AffineBasisEncoding, DeltaEncoding, Encoding, FactorsEncoding

Spectrum = Literal["flat", "decaying"]
Result = Encoding[torch.Tensor]


def random_factors(
    seed: int,
    *,
    rank: int,
    d_out: int,
    d_in: int,
    scaling: float = 2.0,
    spectrum: Spectrum = "flat",
) -> Factors:
    """Return float64 Gaussian factors; a decaying spectrum falls by 10 per direction."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    if spectrum == "decaying":
        A = A * (10.0 ** (-torch.arange(rank, dtype=torch.float64) / 2))[:, None]
        B = B * 10.0 ** (-torch.arange(rank, dtype=torch.float64) / 2)
    # Float32 values in a float64 tensor: the oracle sees the same numbers for either stack dtype.
    return Factors(A=A.float().double(), B=B.float().double(), scaling=scaling)


@dataclass(frozen=True)
class Case:
    """Adapters of a merge: factors by module path and adapter name, and weights."""

    name: str
    modules: Mapping[str, Mapping[str, Factors]]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def adapters(self) -> list[str]:
        return sorted({name for having in self.modules.values() for name in having})

    def stack(self, dtype: torch.dtype = torch.float64, *, reverse: bool = False) -> FactorStack:
        step = -1 if reverse else 1
        modules = [
            (path, list(self.modules[path].items())[::step]) for path in list(self.modules)[::step]
        ]
        return FactorStack.build(modules, self.adapters[::step], dtype=dtype)

    def only(self, path: str) -> Case:
        """Return the case with one module; every adapter stays selected through its weight."""
        return replace(self, modules={path: self.modules[path]})

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def context(self, *, seed: int = 0, block_rows: int = 256, state: Any = None) -> MergeContext:
        weights = {name: self.weight(name) for name in self.adapters}
        return MergeContext(weights=weights, seed=seed, block_rows=block_rows, state=state)

    def parts(self, path: str, *, absent_as_zero: bool = False) -> list[Part]:
        """Return `(A, B, scaling, weight)` of the adapters that have the module, sorted."""
        having = self.modules[path]
        first = next(iter(having.values()))
        zero = Factors(torch.zeros(1, first.d_in), torch.zeros(first.d_out, 1), scaling=1.0)
        names = self.adapters if absent_as_zero else sorted(having)
        chosen = [(name, having.get(name, zero)) for name in names]
        return [(f.A.numpy(), f.B.numpy(), f.scaling, self.weight(name)) for name, f in chosen]


def collection(
    ranks: Sequence[int] = (4, 4, 4),
    *,
    name: str = "",
    scalings: Sequence[float] | None = None,
    weights: Sequence[float] = (),
    d_out: int = 14,
    d_in: int = 11,
    paths: Sequence[str] = ("layer.0",),
    spectrum: Spectrum = "flat",
    seed: int = 1,
) -> Case:
    """Return a case of `len(ranks)` random adapters named a, b, c, …"""
    names = [chr(ord("a") + n) for n in range(len(ranks))]
    scales = scalings or [2.0] * len(ranks)
    modules = {
        path: {
            adapter: random_factors(
                10_000 * seed + 100 * layer + n,
                rank=rank,
                d_out=d_out,
                d_in=d_in,
                scaling=scaling,
                spectrum=spectrum,
            )
            for n, (adapter, rank, scaling) in enumerate(zip(names, ranks, scales, strict=True))
        }
        for layer, path in enumerate(paths)
    }
    return Case(name, modules, dict(zip(names, weights, strict=False)))


def of_deltas(
    modules: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    weights: Mapping[str, float] | None = None,
) -> Case:
    """Return adapters with exactly these deltas: B holds the matrix, A is the identity."""
    factors = {
        path: {
            name: Factors(
                A=torch.eye(len(rows[0]), dtype=torch.float64),
                B=torch.tensor(rows, dtype=torch.float64),
                scaling=1.0,
            )
            for name, rows in having.items()
        }
        for path, having in modules.items()
    }
    return Case("by hand", factors, weights or {})


def _duplicates() -> Case:
    case = collection((4, 4), name="duplicates", seed=2)
    having = case.modules["layer.0"]
    return replace(case, modules={"layer.0": {**having, "c": having["a"], "d": having["a"]}})


def _zero_adapter() -> Case:
    case = collection((4, 4, 4), name="zero adapter", seed=3)
    having = case.modules["layer.0"]
    zero = replace(having["b"], B=torch.zeros_like(having["b"].B))
    return replace(case, modules={"layer.0": {**having, "b": zero}})


def _missing_modules() -> Case:
    case = collection((4, 4, 4), name="missing modules", paths=("m.0", "m.1", "m.2"), seed=4)
    modules = {path: dict(having) for path, having in case.modules.items()}
    del modules["m.0"]["a"]
    del modules["m.1"]["b"], modules["m.1"]["c"]
    return replace(case, modules=modules, weights={"a": 2.0, "b": 0.5, "c": 3.0})


EQUAL_RANK_CASES: tuple[Case, ...] = (
    collection(name="flat"),
    collection(name="decaying", spectrum="decaying"),
    collection((1, 1, 1, 1), name="rank 1"),
    collection((4,), name="one adapter"),
    collection((6, 6, 6), d_out=3, name="d_out < r"),
    collection((8, 8), d_in=5, name="d_in < r"),
    collection((5,) * 6, d_out=14, d_in=20, name="R > d_out and R > d_in"),
    collection((3,) * 7, name="more adapters than the rank"),
    collection((4, 4), paths=("m.2", "m.0", "m.1"), name="several modules"),
    collection((4, 4, 4), weights=(0.5, -1.5, 0.0), name="negative and zero weights"),
    collection(
        (4, 4, 4), scalings=(16 / 4, 16 / 4**0.5, -0.25), name="alpha/r, rsLoRA and negative"
    ),
    _duplicates(),
    _zero_adapter(),
    _missing_modules(),
)
"""Cases that every strategy takes."""

MIXED_RANK_CASES: tuple[Case, ...] = (
    collection((2, 5, 3), name="mixed ranks"),
    collection(
        (1, 7, 4),
        scalings=(8.0, 16 / 7**0.5, 4.0),
        weights=(1.0, -0.5, 2.0),
        spectrum="decaying",
        name="mixed ranks, scalings and weights",
    ),
    collection((9, 2, 12), d_out=6, d_in=7, name="mixed ranks above both dimensions"),
)
"""Cases for strategies that take mixed ranks."""

ALL_CASES = EQUAL_RANK_CASES + MIXED_RANK_CASES


def merge(
    merger: Merger,
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    block_rows: int = 256,
) -> dict[str, Result]:
    """Run survey and merge as a pipeline would; results by module path."""
    stack = case.stack(dtype)
    context = case.context(seed=seed, block_rows=block_rows)
    if merger.capabilities.needs_survey:
        state = merger.survey(Passes(lambda: [stack]), context)
        context = case.context(seed=seed, block_rows=block_rows, state=state)
    return dict(zip(stack.modules, merger.merge(stack, context), strict=True))


def delta(encoding: Result) -> Matrix:
    """Return the merged delta of an encoding that holds one, float64."""
    if isinstance(encoding, FactorsEncoding):
        product: Matrix = encoding.B.double().numpy() @ encoding.A.double().numpy()
        return product
    assert isinstance(encoding, DeltaEncoding)
    return np.asarray(encoding.delta.double().numpy())


def restored(encoding: Result, name: str) -> tuple[Matrix, Matrix, float]:
    """Return `(A, B, scaling)` of one adapter, by the encoding's own formula, float64."""
    assert isinstance(encoding, AffineBasisEncoding)
    n = encoding.names.index(name)
    sides = []
    for mean, basis, coefficients in (
        (encoding.mean_A, encoding.basis_A, encoding.coefficients_A[n][:, None, :]),
        (encoding.mean_B, encoding.basis_B, encoding.coefficients_B[n][:, :, None]),
    ):
        sides.append((mean + (coefficients * basis).sum(0)).double().numpy())
    return sides[0], sides[1], encoding.scalings[n]


def stored_elements(encoding: Result) -> int:
    tensors = [*encoding.shared_tensors().values()]
    for name in encoding.adapters:
        tensors += encoding.adapter_tensors(name).values()
    return sum(tensor.numel() for tensor in tensors)


def same_bits(left: Result, right: Result) -> bool:
    """Whether two encodings are equal in kind, names, dtypes and every bit."""
    if type(left) is not type(right) or left.adapters != right.adapters:
        return False
    groups = [(left.shared_tensors(), right.shared_tensors())]
    groups += [(left.adapter_tensors(n), right.adapter_tensors(n)) for n in left.adapters]
    return all(
        a.keys() == b.keys()
        and all(
            a[key].dtype == b[key].dtype
            and a[key].contiguous().numpy().tobytes() == b[key].contiguous().numpy().tobytes()
            for key in a
        )
        for a, b in groups
    )


def relative(got: npt.NDArray[Any], expected: npt.NDArray[Any], *, scale: float = 0.0) -> float:
    """Return `‖got − expected‖ / max(‖expected‖, scale)`; 0 for 0 against 0."""
    assert got.shape == expected.shape
    difference = float(np.linalg.norm(np.asarray(got, np.float64) - expected))
    reference = max(float(np.linalg.norm(expected)), scale)
    return difference / reference if reference else difference


def regauge(case: Case, *, seed: int = 0) -> Case:
    """Return the same adapters with every `(B, A)` replaced by `(B G, G⁻¹ A)`."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, dict[str, Factors]] = {}
    for path, having in case.modules.items():
        modules[path] = {}
        for name, f in having.items():
            G = torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64)
            G = G + 3 * torch.eye(f.rank, dtype=torch.float64)
            modules[path][name] = replace(f, B=f.B @ G, A=torch.linalg.solve(G, f.A))
    return replace(case, modules=modules)


def rescaled(case: Case, *, A: float = 1.0, B: float = 1.0, scaling: float = 1.0) -> Case:
    """Return the case with every A, B and scaling multiplied."""
    modules = {
        path: {
            name: Factors(A=f.A * A, B=f.B * B, scaling=f.scaling * scaling)
            for name, f in having.items()
        }
        for path, having in case.modules.items()
    }
    return replace(case, modules=modules)


class SumRule(ElementwiseMerger, frozen=True):
    """`Σ w_i x_i` per entry: the simplest elementwise rule."""

    method = "test.sum"

    def combine(self, block: Any, state: Any) -> torch.Tensor:
        total = torch.zeros_like(block.values[0])
        for values, weight in zip(block.values, block.weights.tolist(), strict=True):
            total = total + weight * values
        return total
