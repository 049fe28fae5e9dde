"""Deterministic random adapters as plain values: what the checks run on, and tests may use.

The numbers are drawn with the library's counter-based generator, so a collection is the same in
every process. Collections of `"integer"` values have small integers as factors and powers of two
as scalings: their deltas are exact in float32 however they are computed or factored, so that even
rules that compare numbers (trimming, voting) must give equal results where a law says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from unmerge.adapter import Adapter, Factors
from unmerge.errors import ConfigError
from unmerge.kernels import counter_uniform, stream_key
from unmerge.merger import MergeContext
from unmerge.stack import FactorStack, ModuleShape

__all__ = ["AdapterCollection", "Values", "random_collection"]

Values = Literal["flat", "decaying", "integer"]


@dataclass(frozen=True)
class AdapterCollection:
    """The adapters of one merge, with their weights.

    Attributes:
        name: What is special about it, for messages.
        modules: Float32 factors by module path, then adapter name.
        weights: One per adapter, also for adapters that lack some modules.
    """

    name: str
    modules: Mapping[str, Mapping[str, Factors]]
    weights: Mapping[str, float]

    def __str__(self) -> str:
        return self.name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(sorted(self.weights))

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """Shapes of all modules, in the order in which a pipeline merges them."""
        shapes = []
        for path, having in self.modules.items():
            names = tuple(sorted(having))
            first = having[names[0]]
            ranks = tuple(having[name].rank for name in names)
            shape = ModuleShape(path, first.d_out, first.d_in, names, ranks, kind=first.kind)
            shapes.append(shape)
        return tuple(sorted(shapes, key=lambda s: (s.d_out, s.d_in, s.path)))

    @property
    def mixed_ranks(self) -> bool:
        """Whether some module has adapters of different ranks."""
        return any(len(set(shape.ranks)) > 1 for shape in self.shapes)

    def stack(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        paths: Iterable[str] | None = None,
        reverse: bool = False,
    ) -> FactorStack:
        """Return modules of one shape as a stack.

        Args:
            dtype: Dtype of the stack.
            paths: Which modules; all of them unless given.
            reverse: Hand adapters and modules over in reverse, which must change nothing.

        Raises:
            IncompatibleAdaptersError: The modules have different shapes.
        """
        step = -1 if reverse else 1
        chosen = sorted(self.modules if paths is None else paths)[::step]
        modules = [(path, sorted(self.modules[path].items())[::step]) for path in chosen]
        return FactorStack.build(modules, self.adapters[::step], dtype=dtype)

    def stacks(
        self, *, size: int | None = None, dtype: torch.dtype = torch.float32, reverse: bool = False
    ) -> list[FactorStack]:
        """Return all modules, those of one shape together, in the pipeline's order.

        Args:
            size: Most modules a stack; all of one shape unless given.
            dtype: As for `stack`.
            reverse: As for `stack`.
        """
        groups: dict[tuple[int, int], list[str]] = {}
        for shape in self.shapes:
            groups.setdefault((shape.d_out, shape.d_in), []).append(shape.path)
        return [
            self.stack(
                dtype=dtype, paths=paths[start : start + (size or len(paths))], reverse=reverse
            )
            for paths in groups.values()
            for start in range(0, len(paths), size or len(paths))
        ]

    def context(
        self, *, seed: int = 0, block_rows: int = 256, state: Any = None, reverse: bool = False
    ) -> MergeContext:
        """Return a context with the collection's weights and no further inputs."""
        weights = dict(sorted(self.weights.items(), reverse=reverse))
        return MergeContext(weights=weights, seed=seed, block_rows=block_rows, state=state)

    def delta(self, path: str, adapter: str) -> torch.Tensor:
        """Return one delta, `(d_out, d_in)` in float64; zeros where the adapter has none."""
        having = self.modules[path]
        if adapter not in having:
            first = next(iter(having.values()))
            return torch.zeros(first.d_out, first.d_in, dtype=torch.float64)
        f = having[adapter]
        return f.scaling * (f.B.double() @ f.A.double())

    def as_adapters(self, *, base_model: str | None = None) -> list[Adapter]:
        """Return the collection as adapters in memory, sorted by name, for a store."""
        return [
            Adapter(
                name=name,
                modules={
                    path: having[name]
                    for path, having in sorted(self.modules.items())
                    if name in having
                },
                base_model=base_model,
            )
            for name in self.adapters
        ]

    def map(
        self, change: Callable[[str, str, Factors], Factors], name: str | None = None
    ) -> AdapterCollection:
        """Return the collection with `change(path, adapter, factors)` for all factors."""
        modules = {
            path: {adapter: change(path, adapter, f) for adapter, f in having.items()}
            for path, having in self.modules.items()
        }
        return replace(self, name=name or self.name, modules=modules)

    def weighted(self, weights: Mapping[str, float]) -> AdapterCollection:
        """Return the collection with some weights changed."""
        return replace(self, weights={**self.weights, **weights})

    def renamed(self, names: Mapping[str, str]) -> AdapterCollection:
        """Return the collection with every adapter under another name, weights and all."""
        modules = {
            path: {names[adapter]: f for adapter, f in having.items()}
            for path, having in self.modules.items()
        }
        weights = {names[adapter]: weight for adapter, weight in self.weights.items()}
        return replace(self, modules=modules, weights=weights)

    def without(self, path: str, *adapters: str) -> AdapterCollection:
        """Return the collection where some adapters lack module `path`."""
        having = {n: f for n, f in self.modules[path].items() if n not in adapters}
        return replace(self, modules={**self.modules, path: having})

    def joined(self, other: AdapterCollection) -> AdapterCollection:
        """Return the collection with the modules of another one, of the same adapters, added."""
        return replace(self, modules={**self.modules, **other.modules})


def random_collection(
    name: str = "adapters",
    *,
    ranks: Sequence[int] = (3, 3, 3),
    values: Values = "flat",
    d_out: int = 12,
    d_in: int = 9,
    paths: Sequence[str] = ("layers.0.q_proj",),
    scalings: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> AdapterCollection:
    """Return adapters a, b, c, … with the same modules; equal arguments give equal numbers.

    Args:
        name: What is special about it, for messages.
        ranks: One per adapter, 26 at most.
        values: `"flat"`: Gaussian factors; `"decaying"`: Gaussian, each rank-one component with a
            tenth of the one before; `"integer"`: integers from −3 to 3.
        d_out: Output features of all modules.
        d_in: Input features.
        paths: Module paths.
        scalings: One per adapter; 2 unless given.
        weights: One per adapter; 1 unless given.
        seed: Key of the numbers.

    Raises:
        ConfigError: Scalings or weights are not as many as ranks, or there are more than 26.
    """
    count = len(ranks)
    scales = [2.0] * count if scalings is None else scalings
    given = [1.0] * count if weights is None else weights
    if not 1 <= count <= 26 or len(scales) != count or len(given) != count:
        raise ConfigError(
            f"{count} ranks, {len(scales)} scalings and {len(given)} weights: expected as many of "
            "each, 1 to 26"
        )
    names = [chr(ord("a") + n) for n in range(count)]
    modules = {
        path: {
            adapter: _factors((path, adapter, str(seed)), rank, d_out, d_in, scaling, values)
            for adapter, rank, scaling in zip(names, ranks, scales, strict=True)
        }
        for path in paths
    }
    return AdapterCollection(name, modules, dict(zip(names, given, strict=True)))


def _factors(
    key: tuple[str, ...], rank: int, d_out: int, d_in: int, scaling: float, values: Values
) -> Factors:
    draw = _integers if values == "integer" else _gaussian
    A, B = draw((*key, "A"), rank, d_in), draw((*key, "B"), d_out, rank)
    if values == "decaying":
        root = 10.0 ** (-torch.arange(rank, dtype=torch.float64) / 2)
        A, B = root[:, None] * A, B * root
    return Factors(A=A.float(), B=B.float(), scaling=scaling)


def _uniform(key: tuple[str, ...], count: int) -> torch.Tensor:
    return counter_uniform(stream_key(0, "unmerge.testing", *key), torch.arange(count))


def _gaussian(key: tuple[str, ...], rows: int, columns: int) -> torch.Tensor:
    """Return Gaussian float64 by the method of Box and Muller."""
    first, second = _uniform(key, 2 * rows * columns).reshape(2, rows, columns)
    return (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)


def _integers(key: tuple[str, ...], rows: int, columns: int) -> torch.Tensor:
    return (_uniform(key, rows * columns) * 7).floor().reshape(rows, columns) - 3


def unimodular(key: tuple[str, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an integer matrix `(rank, rank)` and its inverse, which is of integers as well.

    A product of a lower and an upper unit triangular matrix: a change of gauge that, on factors
    of small integers, changes no bit of the delta.
    """
    draws = (_uniform((*key, "gauge"), 2 * rank * rank) * 3).floor() - 1
    first, second = draws.reshape(2, rank, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    G = (torch.tril(first, -1) + eye) @ (torch.triu(second, 1) + eye)
    return G, torch.linalg.inv(G).round()
