"""What rules on single entries look at: one matrix per adapter, read by row blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from unmerge.adapter import Factors
from unmerge.errors import ConfigError
from unmerge.kernels.counter import counter_uniform, stream_key
from unmerge.kernels.lowrank import TILE_ROWS, delta_rows
from unmerge.merger import Absent, MergeContext
from unmerge.stack import ModuleShape, StackModule

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Blocks",
    "Matrices",
    "PartWeights",
    "Space",
    "module_matrices",
]

Space = Literal["delta", "factors"]

# A block that stays near the cache: its values are gone over several times.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class PartWeights:
    """The adapters' weights as one matrix of a module takes them.

    A delta takes the weights as they are. Of two factors each takes the square root, and A the
    sign, so that their product carries the weight once, as in PEFT's factor-space rules.

    Attributes:
        values: One per adapter that has the module.
        total: Sum over all adapters of the merge, those that lack the module too.
        part: Which matrix: "A", "B", or the space's own name.
        module: Module path, for errors.
    """

    values: tuple[float, ...]
    total: float
    part: str
    module: str

    @classmethod
    def of(
        cls, module: str, adapters: tuple[str, ...], part: str, context: MergeContext
    ) -> PartWeights:
        """Return the weights of `adapters`, as `part` takes them."""
        values = tuple(_shared_out(w, part) for w in context.weights_of(adapters))
        total = sum(_shared_out(w, part) for w in context.weights.values())
        return cls(values=values, total=total, part=part, module=module)

    @classmethod
    def of_deltas(cls, shape: ModuleShape, context: MergeContext) -> PartWeights:
        """Return the weights of a module's adapters as their deltas take them: as they are."""
        return cls.of(shape.path, shape.adapters, "delta", context)

    def scale(self, value: float) -> float:
        """Return a factor of the whole result, as this matrix takes it."""
        return _shared_out(value, self.part)

    def renormalisation(self, absent: Absent) -> float:
        """Return what a weighted sum is multiplied with so that it counts as `absent` says.

        1 where adapters that lack the module count as zero deltas; where they do not count, what
        brings the others' weights to the sum of all.

        Raises:
            ConfigError: They are not to count, and the others' weights sum to 0.
        """
        present = sum(self.values)
        if absent == "zero" or present == self.total:
            return 1.0
        # Relative: weights such as 0.1, 0.2, -0.3 sum to rounding noise, not to 0.
        if abs(present) <= 1e-12 * sum(abs(w) for w in self.values):
            raise ConfigError(
                f"{self.module}: the weights of the adapters that have it sum to 0 and cannot be "
                "renormalised; use absent=zero"
            )
        return self.total / present

    def renormalised(self, absent: Absent) -> list[float]:
        """Return the weights times `renormalisation`.

        Raises:
            ConfigError: As there.
        """
        factor = self.renormalisation(absent)
        return [factor * w for w in self.values]


def _shared_out(value: float, part: str) -> float:
    if part == "A":
        return math.copysign(math.sqrt(abs(value)), value)
    return math.sqrt(abs(value)) if part == "B" else value


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of one matrix of a module, for all adapters that have the module.

    Attributes:
        values: `(N, rows, cols)`, float32 or wider; not to be written to.
        part_weights: The weights as this matrix takes them; see `weights`.
        adapters: The N adapter names, sorted.
        module: Module path.
        part: Which matrix: "A" or "B" in `factors` space, elsewhere the name of the space.
        row: Index of the first row in the whole matrix.
        shape: `(rows, cols)` of the whole matrix.
        space: The space the rule runs in: "delta", "factors", or a wrapper's own.
        seed: Key of the merge's randomness.
    """

    values: torch.Tensor
    part_weights: PartWeights
    adapters: tuple[str, ...]
    module: str
    part: str
    row: int
    shape: tuple[int, int]
    space: str
    seed: int

    @property
    def weights(self) -> torch.Tensor:
        """`(N,)` float64 on the device of `values`: the weights as this matrix takes them."""
        values = self.part_weights.values
        return torch.tensor(values, dtype=torch.float64, device=self.values.device)

    @property
    def start(self) -> int:
        """Row-major index of the block's first entry in the whole matrix."""
        return self.row * self.shape[1]

    def uniform(self, label: str = "") -> torch.Tensor:
        """Return a uniform float64 in [0, 1) per entry, `(N, rows, cols)`.

        A function of (seed, label, adapter, module, part, row-major entry index) alone.
        """
        rows, cols = self.values.shape[1:]
        index = torch.arange(rows * cols, device=self.values.device) + self.start
        draws = self.values.new_empty(len(self.adapters), rows * cols, dtype=torch.float64)
        for n, name in enumerate(self.adapters):
            key = stream_key(self.seed, label, name, self.module, self.part)
            draws[n] = counter_uniform(key, index)
        return draws.reshape(len(self.adapters), rows, cols)

    def replace(self, values: torch.Tensor) -> Block:
        """Return the block with other values, for a rule that hands it on."""
        return dataclasses.replace(self, values=values)


class Blocks(Iterable[Block]):
    """Row blocks to be iterated as often as `measure` needs, always in the same order."""

    def __init__(self, blocks: Callable[[], Iterator[Block]]) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[Block]:
        return self._blocks()


@dataclass(frozen=True, slots=True)
class Matrices:
    """One matrix per adapter, all of one shape, read by row blocks: what a rule merges.

    Attributes:
        module: Module path.
        adapters: The N adapter names, sorted.
        part: Which matrix of the module; see `Block.part`.
        space: The space; see `Block.space`.
        shape: `(rows, cols)`.
        weights: The adapters' weights, as this matrix takes them.
        seed: Key of the merge's randomness.
        rows: Returns rows `start:stop` of all matrices, `(N, stop - start, cols)`; equal bits
            for a row however it is asked for.
    """

    module: str
    adapters: tuple[str, ...]
    part: str
    space: str
    shape: tuple[int, int]
    weights: PartWeights
    seed: int
    rows: Callable[[int, int], torch.Tensor]

    @classmethod
    def of_factors(
        cls,
        factors: Sequence[Factors],
        module: StackModule,
        space: str,
        context: MergeContext,
        *,
        dtype: torch.dtype | None = None,
    ) -> Matrices:
        """Return the products `scaling · B A` that a wrapper has as factors, one per adapter.

        They are multiplied when their rows are read, so that no matrix is ever held.

        Args:
            factors: One pair per adapter of the module.
            module: The module they stand for.
            space: What the wrapper calls the space.
            context: The merge's.
            dtype: What the products are rounded to; that of the factors unless given.
        """
        products = StackModule(module.path, module.adapters, tuple(factors))
        [matrices] = module_matrices(products, "delta", context)
        rows = matrices.rows
        return dataclasses.replace(
            matrices,
            part=space,
            space=space,
            rows=rows if dtype is None else lambda start, stop: rows(start, stop).to(dtype),
        )

    def blocks(self, height: int | None = None) -> Iterator[Block]:
        """Yield all rows in order, `height` at a time; by default what keeps a block small."""
        rows, cols = self.shape
        if height is None:
            fitting = BLOCK_BYTES // (4 * len(self.adapters) * cols)
            height = max(fitting // TILE_ROWS, 1) * TILE_ROWS
        for start in range(0, rows, height):
            yield Block(
                values=self.rows(start, min(start + height, rows)),
                part_weights=self.weights,
                adapters=self.adapters,
                module=self.module,
                part=self.part,
                row=start,
                shape=self.shape,
                space=self.space,
                seed=self.seed,
            )


def module_matrices(module: StackModule, space: Space, context: MergeContext) -> list[Matrices]:
    """Return a module's matrices in `space`: the deltas, or the factors A and B."""
    shape = module.shape
    rank = max(shape.ranks)
    parts = (
        {"delta": (shape.d_out, shape.d_in)}
        if space == "delta"
        else {"A": (rank, shape.d_in), "B": (shape.d_out, rank)}
    )

    def rows(part: str, cols: int) -> Callable[[int, int], torch.Tensor]:
        def read(start: int, stop: int) -> torch.Tensor:
            first = module.factors[0].A
            dtype = torch.promote_types(first.dtype, torch.float32)
            values = first.new_empty(len(module.factors), stop - start, cols, dtype=dtype)
            for factors, out in zip(module.factors, values, strict=True):
                _read_rows(factors, part, start, stop, out)
            return values

        return read

    return [
        Matrices(
            module=module.path,
            adapters=module.adapters,
            part=part,
            space=space,
            shape=size,
            weights=PartWeights.of(module.path, module.adapters, part, context),
            seed=context.seed,
            rows=rows(part, size[1]),
        )
        for part, size in parts.items()
    ]


def _read_rows(factors: Factors, part: str, start: int, stop: int, out: torch.Tensor) -> None:
    if part == "delta":
        delta_rows(factors, start, stop, out=out)
    else:
        matrix = factors.A if part == "A" else factors.B
        out.copy_(matrix[start:stop]).mul_(_shared_out(factors.scaling, part))
