"""The collections that checks run on, and one way to run a merger over a collection."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from unmerge.adapter import Factors
from unmerge.errors import UnmergeError
from unmerge.merger import MergeContext, Merger, Passes
from unmerge.stack import FactorStack
from unmerge.testing.collections import AdapterCollection, random_collection, unimodular
from unmerge.testing.outcome import Result, total_norm
from unmerge.testing.results import Violation

__all__ = [
    "context_of",
    "edge_cases",
    "exact",
    "general",
    "many",
    "merge_collection",
    "mixed",
    "one_adapter",
    "refusal_of",
    "regauged",
    "result_of",
    "scale_of",
    "sizeable",
    "surveyed",
    "tall",
    "with_missing_modules",
]

_PATHS = ("layers.0.q_proj", "layers.1.q_proj")


@functools.cache
def general() -> AdapterCollection:
    """Three Gaussian adapters of one rank, two shapes of modules."""
    square = random_collection(
        "three adapters", paths=_PATHS, weights=(1.0, 0.5, 2.0), scalings=(2.0, 0.5, 4.0)
    )
    return square.joined(random_collection(paths=("layers.0.up_proj",), d_out=20, seed=1))


@functools.cache
def with_missing_modules() -> AdapterCollection:
    """Three adapters, two of which lack a module."""
    full = random_collection(
        "missing modules",
        paths=(*_PATHS, "layers.2.q_proj"),
        scalings=(1.0, 4.0, 0.5),
        weights=(2.0, 0.5, 3.0),
        seed=2,
    )
    return full.without(_PATHS[0], "a").without(_PATHS[1], "b", "c")


@functools.cache
def exact() -> AdapterCollection:
    """Three adapters whose deltas are exact in float32, with many entries of equal magnitude."""
    return random_collection(
        "adapters of exact deltas",
        values="integer",
        scalings=(2.0, 0.5, -1.0),
        weights=(1.0, 0.5, 2.0),
        paths=_PATHS,
        seed=3,
    )


@functools.cache
def mixed() -> AdapterCollection:
    """Three adapters of different ranks."""
    return random_collection(
        "mixed ranks", ranks=(1, 4, 2), paths=_PATHS, scalings=(8.0, 2.0, 4.0), seed=4
    )


@functools.cache
def tall() -> AdapterCollection:
    """Three adapters with more rows than a tile of the delta, and than most row blocks here."""
    return random_collection("70 rows", d_out=70, d_in=6, weights=(1.0, 0.5, 2.0), seed=5)


@functools.cache
def many() -> AdapterCollection:
    """Seven adapters, more than their rank, each of a weight of its own."""
    return random_collection(
        "seven adapters", ranks=(2,) * 7, weights=(1, 0.5, 2, 1.5, 0.25, 3, 0.75), seed=18
    )


@functools.cache
def sizeable() -> AdapterCollection:
    """Four adapters on a module large enough for its memory to be told from small change."""
    return random_collection("a module of 300 × 260", ranks=(6,) * 4, d_out=300, d_in=260, seed=19)


def one_adapter(scaling: float, name: str) -> AdapterCollection:
    """One adapter at weight 1, with a flat, a decaying, a wide and a large module."""
    flat = random_collection(name, ranks=(4,), scalings=(scaling,), seed=6)
    decaying = random_collection(
        ranks=(4,), scalings=(scaling,), values="decaying", paths=("layers.1.q_proj",), seed=6
    )
    wide = random_collection(
        ranks=(4,), scalings=(scaling,), d_out=3, paths=("layers.0.head",), seed=6
    )
    large = random_collection(
        ranks=(4,), scalings=(scaling,), d_out=70, d_in=140, paths=("layers.0.up_proj",), seed=6
    )
    return flat.joined(decaying).joined(wide).joined(large)


@functools.cache
def edge_cases() -> tuple[AdapterCollection, ...]:
    """What breaks strategies: zeros, copies, rank 1, few or many adapters, odd shapes, weights."""
    plain = random_collection("zero adapter", seed=7)
    copied = random_collection("duplicate adapters", seed=8)
    [path] = copied.modules
    a = copied.modules[path]["a"]
    return (
        plain.map(lambda _path, name, f: replace(f, B=torch.zeros_like(f.B)) if name == "b" else f),
        plain.map(
            lambda _path, _name, f: replace(f, B=torch.zeros_like(f.B)), "only zero adapters"
        ),
        copied.map(lambda _path, name, f: f if name == "c" else a),
        random_collection("rank 1", ranks=(1, 1, 1, 1), seed=9),
        random_collection("one adapter", ranks=(3,), seed=10),
        random_collection("more adapters than the rank", ranks=(2,) * 7, seed=11),
        random_collection("d_out < rank", ranks=(5, 5), d_out=3, seed=12),
        random_collection("d_in < rank", ranks=(5, 5), d_in=2, seed=13),
        random_collection("one row, one column", ranks=(1, 1), d_out=1, d_in=1, seed=14),
        random_collection("a decaying spectrum", values="decaying", ranks=(6, 6), seed=15),
        random_collection("negative and zero weights", weights=(2.0, -0.5, 0.0), seed=16),
        random_collection("a negative scaling", scalings=(1.0, -4.0, 16 / 3**0.5), seed=17),
        with_missing_modules(),
    )


def regauged(collection: AdapterCollection) -> AdapterCollection:
    """Return the adapters with `(B G, G⁻¹ A)` for `(B, A)`, G of integers and so is its inverse."""

    def change(path: str, name: str, f: Factors) -> Factors:
        G, inverse = unimodular((path, name), f.rank)
        return replace(f, B=(f.B.double() @ G).float(), A=(inverse @ f.A.double()).float())

    return collection.map(change, f"{collection.name}, (B G, G⁻¹ A) for (B, A)")


def scale_of(collection: AdapterCollection) -> float:
    """Return the size of what goes into a merge: the largest sum of weighted norms of a module."""
    return max(
        total_norm(abs(collection.weights[name]) * collection.delta(path, name) for name in having)
        for path, having in collection.modules.items()
    )


def merge_collection(
    merger: Merger,
    collection: AdapterCollection,
    *,
    seed: int = 0,
    block_rows: int = 256,
    reverse: bool = False,
    survey_stacks: Sequence[FactorStack] | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Result]:
    """Check, survey and merge as a pipeline does; return the encodings by module path.

    Where weights are ignored, all are 1: giving others is refused.

    Args:
        merger: The strategy.
        collection: The adapters.
        seed: Key of all randomness.
        block_rows: Height of row blocks.
        reverse: Hand everything over in reverse order.
        survey_stacks: What the survey passes over; the collection's stacks unless given.
        changes: Further fields of the context, to replace.
    """
    stacks = collection.stacks(reverse=reverse)
    context = context_of(
        merger, collection, seed=seed, block_rows=block_rows, reverse=reverse, changes=changes
    )
    for shape in collection.shapes:
        merger.check(shape, context)
    context = surveyed(merger, stacks if survey_stacks is None else survey_stacks, context)
    results: dict[str, Result] = {}
    for stack in stacks:
        results.update(zip(stack.modules, merger.merge(stack, context), strict=True))
    return results


def result_of(
    merger: Merger,
    collection: AdapterCollection,
    *,
    seed: int = 0,
    block_rows: int = 256,
    reverse: bool = False,
    survey_stacks: Sequence[FactorStack] | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Result]:
    """Return what `merge_collection` does, where a result is due: an error is a violation."""
    try:
        return merge_collection(
            merger,
            collection,
            seed=seed,
            block_rows=block_rows,
            reverse=reverse,
            survey_stacks=survey_stacks,
            changes=changes,
        )
    except Exception as error:
        # A strategy is foreign code and may raise anything.
        raise Violation(collection.name, "a result", f"{type(error).__name__}: {error}") from error


def refusal_of(merger: Merger, collection: AdapterCollection) -> str | None:
    """Return why the merger's `check` refuses a collection, or `None` where it does not."""
    context = context_of(merger, collection)
    for shape in collection.shapes:
        try:
            merger.check(shape, context)
        except UnmergeError as error:
            return str(error)
    return None


def context_of(
    merger: Merger,
    collection: AdapterCollection,
    *,
    seed: int = 0,
    block_rows: int = 256,
    reverse: bool = False,
    changes: dict[str, Any] | None = None,
) -> MergeContext:
    """Return the context of a merge: base weights where declared, weights where they count."""
    capabilities = merger.capabilities
    if capabilities.ignores_weights:
        collection = collection.weighted(dict.fromkeys(collection.weights, 1.0))
    context = collection.context(seed=seed, block_rows=block_rows, reverse=reverse)
    if capabilities.needs_base_weights:
        context = replace(context, base_weights=_base_weights(collection))
    return replace(context, **(changes or {}))


def surveyed(merger: Merger, stacks: Sequence[FactorStack], context: MergeContext) -> MergeContext:
    """Return the context with the state that the merger's survey returns, where it needs one."""
    if not merger.capabilities.needs_survey:
        return context
    return replace(context, state=merger.survey(Passes(lambda: stacks), context))


def _base_weights(collection: AdapterCollection) -> dict[str, torch.Tensor]:
    """Return a matrix `(d_out, d_in)` for every module."""
    weights = {}
    for shape in collection.shapes:
        drawn = random_collection(
            ranks=(1,), d_out=shape.d_out, d_in=shape.d_in, paths=(shape.path,), seed=100
        )
        weights[shape.path] = drawn.delta(shape.path, "a").float()
    return weights
