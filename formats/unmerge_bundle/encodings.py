"""The closed set of encodings: what a bundle can hold for one module, and how it is rebuilt.

An encoding is data, never code: named tensors with fixed shapes and one reconstruction formula
(`docs/spec/bundle-v1.md`, section "Encodings"). The classes are generic over the array type, so
that a strategy returns torch tensors, the writer takes numpy arrays, and neither needs the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, TypeVar

ArrayT = TypeVar("ArrayT")
OtherT = TypeVar("OtherT")

Restores = Literal["factors", "delta"]


# No slots: a frozen, slotted generic dataclass cannot be built as `FactorsEncoding[Array](...)`.
@dataclass(frozen=True, kw_only=True)
class Encoding(ABC, Generic[ArrayT]):
    """What one module becomes.

    Class attributes:
        kind: The encoding's name in the manifest.
        restores: What it gives back for each adapter: its "factors", its "delta", or `None`
            where it holds one merged result only.

    Attributes:
        facts: What the strategy has to say about this module, finite numbers by name: iterations
            it took, how much a truncation cut off. Kept in the manifest, no part of restoring.
    """

    kind: ClassVar[str]
    restores: ClassVar[Restores | None]

    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The module's `(d_out, d_in)`."""

    @abstractmethod
    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return the tensors that all adapters share, by tensor name."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be restored, in the order of the per-adapter tensors."""
        return ()

    def adapter_tensors(self, name: str) -> dict[str, ArrayT]:
        """Return the tensors that belong to adapter `name` alone, by tensor name.

        Raises:
            KeyError: The encoding restores no adapter of that name.
        """
        raise KeyError(name)

    def scaling(self, name: str) -> float:
        """Return what the restored factors or delta of adapter `name` are multiplied with.

        Raises:
            KeyError: The encoding restores no adapter of that name.
        """
        raise KeyError(name)

    @abstractmethod
    def map(self, convert: Callable[[ArrayT], OtherT]) -> Encoding[OtherT]:
        """Return the same encoding with every tensor replaced by `convert(tensor)`."""


@dataclass(frozen=True, kw_only=True)
class FactorsEncoding(Encoding[ArrayT]):
    """One merged adapter as factors: `delta = B @ A`, scaling already inside.

    Attributes:
        A: `(rank, d_in)`.
        B: `(d_out, rank)`.
    """

    kind: ClassVar[str] = "factors"
    restores: ClassVar[Restores | None] = None

    A: ArrayT
    B: ArrayT

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`, from B and A."""
        return (_shape(self.B)[0], _shape(self.A)[1])

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return A and B."""
        return {"A": self.A, "B": self.B}

    def map(self, convert: Callable[[ArrayT], OtherT]) -> FactorsEncoding[OtherT]:
        """Return the same encoding with `convert` applied to A and B."""
        return FactorsEncoding(A=convert(self.A), B=convert(self.B), facts=self.facts)


@dataclass(frozen=True, kw_only=True)
class DeltaEncoding(Encoding[ArrayT]):
    """One merged full-rank update.

    Attributes:
        delta: `(d_out, d_in)`.
    """

    kind: ClassVar[str] = "delta"
    restores: ClassVar[Restores | None] = None

    delta: ArrayT

    @property
    def shape(self) -> tuple[int, int]:
        """The delta's shape."""
        d_out, d_in = _shape(self.delta)
        return (d_out, d_in)

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return the delta."""
        return {"delta": self.delta}

    def map(self, convert: Callable[[ArrayT], OtherT]) -> DeltaEncoding[OtherT]:
        """Return the same encoding with `convert` applied to the delta."""
        return DeltaEncoding(delta=convert(self.delta), facts=self.facts)


@dataclass(frozen=True, kw_only=True)
class RestoringEncoding(Encoding[ArrayT]):
    """An encoding from which every adapter comes back.

    Attributes:
        names: The N adapters, in the order of everything that is per adapter.
        scalings: Per adapter, what its restored factors or delta are multiplied with.
    """

    names: tuple[str, ...]
    scalings: tuple[float, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names."""
        return self.names

    def scaling(self, name: str) -> float:
        """Return adapter `name`'s entry of `scalings`.

        Raises:
            KeyError: It is not one of `names`.
        """
        return self.scalings[self.position(name)]

    @abstractmethod
    def restored_rank(self, name: str) -> int | None:
        """Return the rank of the factors that come back for adapter `name`.

        `None` where a dense delta comes back.

        Raises:
            KeyError: It is not one of `names`.
        """

    def position(self, name: str) -> int:
        """Return the place of adapter `name` among `names`, in constant time.

        Raises:
            KeyError: It is not one of `names`.
        """
        return self._positions[name]

    # Callers ask for one adapter after the other: searching `names` each time would be O(N²).
    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}


@dataclass(frozen=True, kw_only=True)
class AffineBasisEncoding(RestoringEncoding[ArrayT]):
    """Every adapter's factors as a mean plus a combination of p basis adapters, per position.

    Position j of factor A is its column j, position i of factor B its row i (RMM's task
    vectors). With `k` running over the basis in ascending order,

        A[:, j] = mean_A[:, j] + Σ_k coefficients_A[k, j] · basis_A[k, :, j]
        B[i, :] = mean_B[i, :] + Σ_k coefficients_B[k, i] · basis_B[k, i, :]

    and the restored delta is `scaling · B @ A`.

    Attributes:
        mean_A: `(r, d_in)`.
        basis_A: `(p, r, d_in)`.
        coefficients_A: `(N, p, d_in)`; adapter `names[n]` owns `coefficients_A[n]`.
        mean_B: `(d_out, r)`.
        basis_B: `(p, d_out, r)`.
        coefficients_B: `(N, p, d_out)`.
    """

    kind: ClassVar[str] = "affine_basis"
    restores: ClassVar[Restores | None] = "factors"

    mean_A: ArrayT
    basis_A: ArrayT
    coefficients_A: ArrayT
    mean_B: ArrayT
    basis_B: ArrayT
    coefficients_B: ArrayT

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`, from the means of B and A."""
        return (_shape(self.mean_B)[0], _shape(self.mean_A)[1])

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return means and bases."""
        return {
            "mean_A": self.mean_A,
            "basis_A": self.basis_A,
            "mean_B": self.mean_B,
            "basis_B": self.basis_B,
        }

    def adapter_tensors(self, name: str) -> dict[str, ArrayT]:
        """Return adapter `name`'s coefficients, as views of the stacked ones, in constant time.

        Raises:
            KeyError: It is not one of `names`.
        """
        index = self.position(name)
        coefficients_A: Any = self.coefficients_A
        coefficients_B: Any = self.coefficients_B
        return {
            "coefficients_A": coefficients_A[index],
            "coefficients_B": coefficients_B[index],
        }

    def restored_rank(self, name: str) -> int | None:
        """Return the rank of the means, whatever the rank of the source.

        Raises:
            KeyError: It is not one of `names`.
        """
        self.position(name)
        return _shape(self.mean_A)[0]

    def map(self, convert: Callable[[ArrayT], OtherT]) -> AffineBasisEncoding[OtherT]:
        """Return the same encoding with `convert` applied to every tensor."""
        return AffineBasisEncoding(
            names=self.names,
            scalings=self.scalings,
            mean_A=convert(self.mean_A),
            basis_A=convert(self.basis_A),
            coefficients_A=convert(self.coefficients_A),
            mean_B=convert(self.mean_B),
            basis_B=convert(self.basis_B),
            coefficients_B=convert(self.coefficients_B),
            facts=self.facts,
        )


@dataclass(frozen=True, kw_only=True)
class SharedFactorsEncoding(RestoringEncoding[ArrayT]):
    """Every adapter's delta as a small core between two shared factors.

        delta = scaling · U @ cores[n] @ V

    It comes back as factors of rank min(k_out, k_in), which are not those that went in.

    Attributes:
        U: `(d_out, k_out)`.
        V: `(k_in, d_in)`.
        cores: `(N, k_out, k_in)`, or `(N, k)` for diagonal cores, where k = k_out = k_in.
    """

    kind: ClassVar[str] = "shared_factors"
    restores: ClassVar[Restores | None] = "delta"

    U: ArrayT
    V: ArrayT
    cores: ArrayT

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`, from U and V."""
        return (_shape(self.U)[0], _shape(self.V)[1])

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonals of the cores are kept."""
        return len(_shape(self.cores)) == 2

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return U and V."""
        return {"U": self.U, "V": self.V}

    def adapter_tensors(self, name: str) -> dict[str, ArrayT]:
        """Return adapter `name`'s core.

        Raises:
            KeyError: It is not one of `names`.
        """
        cores: Any = self.cores
        return {"core": cores[self.position(name)]}

    def restored_rank(self, name: str) -> int | None:
        """Return the smaller of k_out and k_in: the core is multiplied into the larger factor.

        Raises:
            KeyError: It is not one of `names`.
        """
        self.position(name)
        return min(_shape(self.U)[1], _shape(self.V)[0])

    def map(self, convert: Callable[[ArrayT], OtherT]) -> SharedFactorsEncoding[OtherT]:
        """Return the same encoding with `convert` applied to every tensor."""
        return SharedFactorsEncoding(
            names=self.names,
            scalings=self.scalings,
            U=convert(self.U),
            V=convert(self.V),
            cores=convert(self.cores),
            facts=self.facts,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedDeltaEncoding(RestoringEncoding[ArrayT]):
    """Every adapter's delta as the entries of one unified delta that its mask lets through.

        delta = scaling · mask[n] ⊙ unified

    Attributes:
        unified: `(d_out, d_in)`.
        masks: `(N, d_out, ceil(d_in / 8))` uint8: bit `j % 8`, counted from the least significant,
            of byte `j // 8` is the mask's column j; the bits beyond d_in are 0.
    """

    kind: ClassVar[str] = "masked_delta"
    restores: ClassVar[Restores | None] = "delta"

    unified: ArrayT
    masks: ArrayT

    @property
    def shape(self) -> tuple[int, int]:
        """The unified delta's shape."""
        d_out, d_in = _shape(self.unified)
        return (d_out, d_in)

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return the unified delta."""
        return {"unified": self.unified}

    def adapter_tensors(self, name: str) -> dict[str, ArrayT]:
        """Return adapter `name`'s mask.

        Raises:
            KeyError: It is not one of `names`.
        """
        masks: Any = self.masks
        return {"mask": masks[self.position(name)]}

    def restored_rank(self, name: str) -> int | None:
        """Return `None`: a dense delta comes back.

        Raises:
            KeyError: It is not one of `names`.
        """
        self.position(name)
        return None

    def map(self, convert: Callable[[ArrayT], OtherT]) -> MaskedDeltaEncoding[OtherT]:
        """Return the same encoding with `convert` applied to every tensor, the masks too."""
        return MaskedDeltaEncoding(
            names=self.names,
            scalings=self.scalings,
            unified=convert(self.unified),
            masks=convert(self.masks),
            facts=self.facts,
        )


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix(Generic[ArrayT]):
    """A matrix as integers with one scale per group of consecutive entries of a row.

    With `q = code - 2^(bits - 1)` and g running over the groups of a row,

        matrix[i, j] = q[i, j] · scales[i, j // group_size]

    Attributes:
        codes: `(rows, ceil(columns · bits / 8))` uint8. 8 bits: one code a byte. 4 bits: column
            2m in the low half of byte m, column 2m + 1 in the high half; an unused half is 0.
        scales: `(rows, ceil(columns / group_size))`, ≥ 0, floating.
        bits: 4 or 8.
        group_size: Entries per scale; the last group of a row may be shorter.
        columns: Columns of the matrix.
    """

    codes: ArrayT
    scales: ArrayT
    bits: int
    group_size: int
    columns: int

    def map(self, convert: Callable[[ArrayT], OtherT]) -> QuantisedMatrix[OtherT]:
        """Return the same matrix with `convert` applied to codes and scales."""
        return QuantisedMatrix(
            codes=convert(self.codes),
            scales=convert(self.scales),
            bits=self.bits,
            group_size=self.group_size,
            columns=self.columns,
        )


@dataclass(frozen=True, kw_only=True)
class AdapterFactorsEncoding(RestoringEncoding[ArrayT]):
    """Every adapter's factors on their own: nothing shared, each of a rank of its own.

    All matrices are raw, or all are quantised with one `bits` and one `group_size`.

    Attributes:
        A: Per adapter, `(k_n, d_in)`, k_n ≥ 1.
        B_transposed: Per adapter, the transpose of B, `(k_n, d_out)`: rank-one components are
            rows, so that no group of a quantised matrix spans two of them.
        d_out: Output features.
        d_in: Input features.
    """

    kind: ClassVar[str] = "adapter_factors"
    restores: ClassVar[Restores | None] = "factors"

    A: tuple[ArrayT | QuantisedMatrix[ArrayT], ...]
    B_transposed: tuple[ArrayT | QuantisedMatrix[ArrayT], ...]
    d_out: int
    d_in: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return (self.d_out, self.d_in)

    def shared_tensors(self) -> dict[str, ArrayT]:
        """Return nothing: there are no shared tensors."""
        return {}

    def adapter_tensors(self, name: str) -> dict[str, ArrayT]:
        """Return adapter `name`'s `A` and `B_transposed`, or the codes and scales of each.

        Raises:
            KeyError: It is not one of `names`.
        """
        index = self.position(name)
        tensors: dict[str, ArrayT] = {}
        for key, matrix in (("A", self.A[index]), ("B_transposed", self.B_transposed[index])):
            if isinstance(matrix, QuantisedMatrix):
                tensors[f"{key}.codes"] = matrix.codes
                tensors[f"{key}.scales"] = matrix.scales
            else:
                tensors[key] = matrix
        return tensors

    def restored_rank(self, name: str) -> int | None:
        """Return the number of components adapter `name` keeps.

        Raises:
            KeyError: It is not one of `names`.
        """
        matrix = self.A[self.position(name)]
        return _shape(matrix.codes if isinstance(matrix, QuantisedMatrix) else matrix)[0]

    def map(self, convert: Callable[[ArrayT], OtherT]) -> AdapterFactorsEncoding[OtherT]:
        """Return the same encoding with `convert` applied to every tensor, codes too."""

        def mapped(
            matrices: tuple[ArrayT | QuantisedMatrix[ArrayT], ...],
        ) -> tuple[OtherT | QuantisedMatrix[OtherT], ...]:
            return tuple(
                m.map(convert) if isinstance(m, QuantisedMatrix) else convert(m) for m in matrices
            )

        return AdapterFactorsEncoding(
            names=self.names,
            scalings=self.scalings,
            A=mapped(self.A),
            B_transposed=mapped(self.B_transposed),
            d_out=self.d_out,
            d_in=self.d_in,
            facts=self.facts,
        )


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in array.shape)
