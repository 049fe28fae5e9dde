"""FactorStack: one or several modules of one shape across N adapters, as strategies see them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from unmerge.adapter import Factors
from unmerge.errors import IncompatibleAdaptersError
from unmerge_bundle.kinds import LINEAR

__all__ = ["FactorStack", "ModuleShape", "StackModule", "one_kind"]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What is known of a module before any tensor is read.

    Attributes:
        path: Module path.
        d_out: Output features.
        d_in: Input features.
        adapters: Names of the adapters that have the module, sorted.
        ranks: Rank of each of them.
        kind: The layer it is, see `unmerge_bundle.check_kind`; no part of a merge, in which a
            delta is a matrix, but of what is done with its result.
    """

    path: str
    d_out: int
    d_in: int
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: str = LINEAR

    @property
    def elements(self) -> int:
        """Elements of all adapters' factors: `Σ r_i · (d_out + d_in)`."""
        return sum(self.ranks) * (self.d_out + self.d_in)


@dataclass(frozen=True, slots=True)
class StackModule:
    """One module of a stack: the adapters that have it, unpadded.

    Attributes:
        path: Module path.
        adapters: Names of the adapters that have the module, sorted.
        factors: Their factors, in that order, each a contiguous copy.
    """

    path: str
    adapters: tuple[str, ...]
    factors: tuple[Factors, ...]

    @property
    def shape(self) -> ModuleShape:
        """The module's shape."""
        first = self.factors[0]
        ranks = tuple(f.rank for f in self.factors)
        return ModuleShape(
            self.path, first.d_out, first.d_in, self.adapters, ranks, kind=first.kind
        )

    def __iter__(self) -> Iterator[tuple[str, Factors]]:
        return iter(zip(self.adapters, self.factors, strict=True))


@dataclass(frozen=True, slots=True)
class FactorStack:
    """L modules of one shape across N adapters; absent adapters and missing ranks are zeros.

    Iterating gives one `StackModule` a module, without padding: what most strategies want.

    Attributes:
        modules: The L module paths, sorted.
        kinds: The layer each of them is, in that order; modules of one shape may be of several.
        adapters: The N adapter names, sorted.
        A: `(L, N, r, d_in)`, r the largest rank, float32 or wider.
        B: `(L, N, d_out, r)`.
        ranks: `(L, N)` int64 on the CPU; 0 where the adapter lacks the module.
        scalings: `(L, N)` float64 on the CPU; 0 where the adapter lacks the module.
    """

    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    adapters: tuple[str, ...]
    A: torch.Tensor
    B: torch.Tensor
    ranks: torch.Tensor
    scalings: torch.Tensor

    @classmethod
    def build(
        cls,
        modules: Sequence[tuple[str, Sequence[tuple[str, Factors]]]],
        adapters: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> FactorStack:
        """Stack modules of one `(d_out, d_in)`.

        Args:
            modules: Module paths with their `(adapter name, factors)` pairs.
            adapters: Names of all N adapters, also of those that lack some of the modules.
            device: Where the stack is put.
            dtype: Its dtype; every stored dtype widens to float32 without loss.

        Raises:
            IncompatibleAdaptersError: Shapes differ, or the kinds of one module do, something is
                named twice, or a name is not among `adapters`.
        """
        names = tuple(sorted(adapters))
        _check_distinct("adapter", names)
        rows = {name: n for n, name in enumerate(names)}
        ordered = sorted(modules, key=lambda item: item[0])
        _check_distinct("module", [path for path, _ in ordered])
        for path, pairs in ordered:
            _check_distinct(f"{path}: adapter", sorted(name for name, _ in pairs))
        present = [f for _, pairs in ordered for _, f in pairs]
        if not present:
            raise IncompatibleAdaptersError("a stack needs at least one adapter with a module")
        d_out, d_in = present[0].d_out, present[0].d_in
        rank = max(f.rank for f in present)
        L, N = len(ordered), len(names)
        A = torch.zeros(L, N, rank, d_in, dtype=dtype, device=device)
        B = torch.zeros(L, N, d_out, rank, dtype=dtype, device=device)
        ranks = torch.zeros(L, N, dtype=torch.int64)
        scalings = torch.zeros(L, N, dtype=torch.float64)
        kinds = tuple(one_kind(path, ((n, f.kind) for n, f in pairs)) for path, pairs in ordered)
        for layer, (path, pairs) in enumerate(ordered):
            for name, factors in pairs:
                if (factors.d_out, factors.d_in) != (d_out, d_in):
                    raise IncompatibleAdaptersError(
                        f'{path}: adapter "{name}" has shape ({factors.d_out}, {factors.d_in}), '
                        f"expected ({d_out}, {d_in}); check that all used the same base model"
                    )
                if name not in rows:
                    raise IncompatibleAdaptersError(f'{path}: adapter "{name}" is not selected')
                row = rows[name]
                A[layer, row, : factors.rank] = factors.A
                B[layer, row, :, : factors.rank] = factors.B
                ranks[layer, row] = factors.rank
                scalings[layer, row] = factors.scaling
        paths = tuple(path for path, _ in ordered)
        return cls(
            modules=paths,
            kinds=kinds,
            adapters=names,
            A=A,
            B=B,
            ranks=ranks,
            scalings=scalings,
        )

    @property
    def present(self) -> torch.Tensor:
        """`(L, N)` bool: which adapter has which module."""
        return self.ranks > 0

    @property
    def d_out(self) -> int:
        """Output features of every module."""
        return self.B.shape[2]

    @property
    def d_in(self) -> int:
        """Input features of every module."""
        return self.A.shape[3]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[StackModule]:
        return (self.module(index) for index in range(len(self)))

    def narrow(self, index: int) -> FactorStack:
        """Return the stack of module `index` alone; its tensors are views."""
        one = slice(index, index + 1)
        return FactorStack(
            modules=self.modules[one],
            kinds=self.kinds[one],
            adapters=self.adapters,
            A=self.A[one],
            B=self.B[one],
            ranks=self.ranks[one],
            scalings=self.scalings[one],
        )

    def module(self, index: int) -> StackModule:
        """Return module `index` with the adapters that have it, unpadded."""
        rows = [n for n in range(len(self.adapters)) if self.ranks[index, n] > 0]
        factors = []
        for n in rows:
            rank = int(self.ranks[index, n])
            factors.append(
                # Copies: BLAS may round differently for another alignment or stride, and a module's
                # bits must not depend on the stack it sits in.
                Factors(
                    A=self.A[index, n, :rank].clone(memory_format=torch.contiguous_format),
                    B=self.B[index, n, :, :rank].clone(memory_format=torch.contiguous_format),
                    scaling=float(self.scalings[index, n]),
                    kind=self.kinds[index],
                )
            )
        names = tuple(self.adapters[n] for n in rows)
        return StackModule(path=self.modules[index], adapters=names, factors=tuple(factors))


def one_kind(path: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return the kind of layer that all adapters have a module as.

    Args:
        path: The module.
        pairs: Names of adapters with the kind that each says it is.

    Raises:
        IncompatibleAdaptersError: They disagree.
    """
    found: dict[str, str] = {}
    for name, kind in pairs:
        found.setdefault(kind, name)
    if len(found) > 1:
        each = ", ".join(f'{kind} in "{name}"' for kind, name in sorted(found.items()))
        raise IncompatibleAdaptersError(
            f"{path}: adapters disagree on the kind of layer: {each}; check that all used the same "
            "base model"
        )
    return next(iter(found), LINEAR)


def _check_distinct(what: str, ordered: Sequence[str]) -> None:
    for name, following in itertools.pairwise(ordered):
        if name == following:
            raise IncompatibleAdaptersError(f'{what} "{name}" is given twice')
