"""The closed set of encodings: what a bundle can hold for one module, and how it is rebuilt.

An encoding is data, never code: named tensors with fixed shapes and one reconstruction formula
(`docs/spec/bundle-v1.md`, section "Encodings"). The classes are generic over the array type, so
that a strategy returns torch tensors, the writer takes numpy arrays, and neither needs the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
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
    """

    kind: ClassVar[str]
    restores: ClassVar[Restores | None]

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
        return FactorsEncoding(A=convert(self.A), B=convert(self.B))


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
        return DeltaEncoding(delta=convert(self.delta))


@dataclass(frozen=True, kw_only=True)
class AffineBasisEncoding(Encoding[ArrayT]):
    """Every adapter's factors as a mean plus a combination of p basis adapters, per position.

    Position j of factor A is its column j, position i of factor B its row i (RMM's task
    vectors). With `k` running over the basis in ascending order,

        A[:, j] = mean_A[:, j] + Σ_k coefficients_A[k, j] · basis_A[k, :, j]
        B[i, :] = mean_B[i, :] + Σ_k coefficients_B[k, i] · basis_B[k, i, :]

    and the restored delta is `scaling · B @ A`.

    Attributes:
        names: The N adapters, in the order of the leading axis of the coefficients.
        scalings: Per adapter, the scaling its restored factors are used with.
        mean_A: `(r, d_in)`.
        basis_A: `(p, r, d_in)`.
        coefficients_A: `(N, p, d_in)`; adapter `names[n]` owns `coefficients_A[n]`.
        mean_B: `(d_out, r)`.
        basis_B: `(p, d_out, r)`.
        coefficients_B: `(N, p, d_out)`.
    """

    kind: ClassVar[str] = "affine_basis"
    restores: ClassVar[Restores | None] = "factors"

    names: tuple[str, ...]
    scalings: tuple[float, ...]
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

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names, in the order of the coefficients."""
        return self.names

    # Callers ask for one adapter after the other: searching `names` each time would be O(N²).
    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

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
        index = self._positions[name]
        coefficients_A: Any = self.coefficients_A
        coefficients_B: Any = self.coefficients_B
        return {
            "coefficients_A": coefficients_A[index],
            "coefficients_B": coefficients_B[index],
        }

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
        )


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in array.shape)
