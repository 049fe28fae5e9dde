"""Adapter collections as Hypothesis strategies, for properties of a merger's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unmerge.testing.collections import AdapterCollection, Values, random_collection
from unmerge.testing.results import MissingExtraError

if TYPE_CHECKING:
    from hypothesis import strategies as st

__all__ = ["adapter_collections"]

_SCALINGS = (0.5, 1.0, 2.0, 16.0)
_PATHS = ("layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj")


def adapter_collections(
    *,
    values: Sequence[Values] = ("flat", "decaying", "integer"),
    max_adapters: int = 5,
    max_rank: int = 5,
    max_dimension: int = 12,
    max_modules: int = 2,
    mixed_ranks: bool = True,
    missing_modules: bool = True,
    negative: bool = True,
) -> st.SearchStrategy[AdapterCollection]:
    """Return a Hypothesis strategy of small adapter collections.

    Everything is drawn but the numbers themselves, which follow from a drawn seed: collections
    shrink to few adapters of low rank, and Hypothesis keeps small examples.

    Args:
        values: What the factors may hold; see `random_collection`.
        max_adapters: Most adapters.
        max_rank: Highest rank.
        max_dimension: Largest d_out and d_in.
        max_modules: Most modules, up to 3, of one shape.
        mixed_ranks: Whether ranks may differ between adapters.
        missing_modules: Whether an adapter may lack a module that another one has.
        negative: Whether weights and scalings may be negative, and weights zero.

    Raises:
        MissingExtraError: Hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise MissingExtraError(
            'adapter_collections needs Hypothesis; pip install "unmerge[testing]"'
        ) from error

    @st.composite
    def collections(draw: st.DrawFn) -> AdapterCollection:
        count = draw(st.integers(1, max_adapters))
        rank = st.integers(1, max_rank)
        ranks = (
            draw(st.lists(rank, min_size=count, max_size=count))
            if mixed_ranks
            else [draw(rank)] * count
        )
        scaling = st.sampled_from([*_SCALINGS, *((-1.0,) if negative else ())])
        weight = st.sampled_from([0.5, 1.0, 2.0, *((0.0, -0.5) if negative else ())])
        dimension = st.integers(1, max_dimension)
        paths = _PATHS[: draw(st.integers(1, min(max_modules, len(_PATHS))))]
        collection = random_collection(
            "a drawn collection",
            ranks=ranks,
            values=draw(st.sampled_from(list(values))),
            d_out=draw(dimension),
            d_in=draw(dimension),
            paths=paths,
            scalings=draw(st.lists(scaling, min_size=count, max_size=count)),
            weights=draw(st.lists(weight, min_size=count, max_size=count)),
            seed=draw(st.integers(0, 10_000)),
        )
        if missing_modules and len(paths) > 1 and count > 1:
            # Every adapter keeps the first module, and every module the first adapter.
            for path in paths[1:]:
                lacking = draw(st.sets(st.sampled_from(collection.adapters[1:])))
                collection = collection.without(path, *sorted(lacking))
        return collection

    return collections()
