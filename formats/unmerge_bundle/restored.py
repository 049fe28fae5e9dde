"""What comes out of a bundle: one restored adapter, or the merged one, as numpy arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.card import merged_card, restored_card
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_bundle.errors import InvalidInputError, NonFiniteError, WrongKindError
from unmerge_bundle.measure import relative_errors
from unmerge_bundle.model import Generation, ModuleErrors, Source
from unmerge_bundle.peft import (
    PEFT,
    parse_config,
    portable_config,
    write_directory,
    written_factors,
)
from unmerge_bundle.reduce import reduce_delta, reduce_factors

__all__ = [
    "AnyRestored",
    "MergedAdapter",
    "Origin",
    "RestoredAdapter",
    "RestoredDelta",
    "RestoredModule",
    "SavedAdapter",
]

_Factors = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class Origin:
    """The bundle something came from: its name, its generation's digest and document."""

    bundle: str
    digest: str
    generation: Generation


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What `save_peft` wrote.

    Attributes:
        directory: The directory.
        rounding: How far the written weights are from what the bundle promises: the largest
            relative difference, over the modules, of the written delta from the recorded one
            (`‖written − recorded‖ / ‖recorded‖`). The recorded delta is the one the bundle's
            errors are about, that of the factors restored in their source's dtype, or the merged
            result's own. 0 where exactly those factors are written. Where a module was reduced to
            a smaller rank, the difference is that from the reduced delta.
        truncation: How far the reduction to a rank took any module's delta, relative to it: the
            largest `‖reduced − delta‖ / ‖delta‖`. 0 where nothing was reduced.
        beside: Keys of the tensors that PEFT will not load: those that an adapter of another
            format keeps verbatim. They are in `verbatim.safetensors`, sorted, as they were.
    """

    directory: Path
    rounding: float
    truncation: float = 0.0
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RestoredModule:
    """One module of a restored adapter as factors; its delta is `scaling · B @ A`.

    Attributes:
        A: `(r, d_in)`, in the dtype restored to.
        B: `(d_out, r)`, likewise.
        scaling: What these factors are used with.
        source_scaling: What the original's factors were used with.
        source_rank: Rank of the original's factors; r may be larger or smaller.
        source_dtype: Dtype of the original's factors.
        errors: Recorded errors against the original, of the factors restored in `source_dtype`.
        kind: The layer the module is, which says how the delta goes into its weight; see
            `unmerge_bundle.check_kind`.
    """

    A: Array
    B: Array
    scaling: float
    source_scaling: float
    source_rank: int
    source_dtype: FloatDtype
    errors: ModuleErrors
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class RestoredDelta:
    """One module of a restored adapter as a dense delta.

    Attributes:
        delta: `(d_out, d_in)`, its scaling inside, in the dtype restored to.
        source_scaling: What the original's factors were used with.
        source_rank: Rank of the original's factors.
        source_dtype: Dtype of the original's factors.
        errors: Recorded errors against the original, of the delta restored in `source_dtype`.
        kind: The layer the module is, which says how the delta goes into its weight; see
            `unmerge_bundle.check_kind`.
    """

    delta: Array
    source_scaling: float
    source_rank: int
    source_dtype: FloatDtype
    errors: ModuleErrors
    kind: str


AnyRestored: TypeAlias = RestoredModule | RestoredDelta


@dataclass(frozen=True, eq=False)
class RestoredAdapter:
    """One adapter, complete: factors, the tensors kept verbatim, its configuration.

    Attributes:
        name: The adapter's name.
        modules: By module path, sorted: factors, or a dense delta where the encoding has no more.
        verbatim: Tensors that are no low-rank update, by their key in the source.
        config: Text of the source's configuration, byte for byte, or "": PEFT's file where
            `format` is "peft", otherwise for that format alone to read.
        format: Format the source was read from.
        base_model: Id of the base model, where known.
        revision: Its revision, where known.
        source_digest: Digest of the original.
        origin: The bundle it came from.
        exact: Gives every module again by path, in float32, from the bundle's files; needed only
            to write another form or dtype than the one restored to.
    """

    name: str
    modules: Mapping[str, AnyRestored]
    verbatim: Mapping[str, Array]
    config: str
    format: str
    base_model: str | None
    revision: str | None
    source_digest: str
    origin: Origin
    exact: Callable[[], Iterator[tuple[str, AnyRestored]]]

    def delta(self, path: str) -> Array:
        """Return the update of one module, float32, `(d_out, d_in)`.

        Raises:
            KeyError: The adapter has no such module.
            NonFiniteError: A value overflows float32.
        """
        module = self.modules[path]
        if isinstance(module, RestoredDelta):
            return module.delta.astype(np.float32)
        return _product(module.A, module.B, scaling=module.scaling, path=path)

    def save_peft(
        self,
        directory: str | os.PathLike[str],
        *,
        portable: bool = False,
        rank: int | None = None,
        dtype: FloatDtype | None = None,
        overwrite: bool = False,
    ) -> SavedAdapter:
        """Write a PEFT directory: configuration, weights, model card.

        The original configuration is kept byte for byte where it still describes the factors:
        the source was PEFT's, every module has its source's scaling, and none has a larger rank
        than its source; those of a smaller one are zero-padded to it, unless the bundle claims a
        source's rank beyond the module's features. Otherwise, and with
        `portable`, every scaling is folded into B, every module zero-padded to one rank and
        `lora_alpha` set to it, so that software that reads nothing but `lora_alpha / r` gets the
        same delta. The configuration of another format is no business of PEFT's: its adapters
        come in the portable form, their verbatim tensors in a file beside it.

        What is written is the float32 reconstruction, folded if need be, rounded once. Where the
        factors held have been rounded already, the bundle's files are read for it again. The
        bundle's errors are recorded for factors of the source's dtype with their scaling beside
        them; how far anything else is from those is measured here, and said in the model card.

        Args:
            directory: The directory to write.
            portable: Ask for the portable form.
            rank: Largest rank of a module, in the portable form: a dense delta, or factors of a
                larger rank, become the best approximation of this rank, in float64. Needed where a
                module is a dense delta; otherwise nothing is reduced unless it is given.
            dtype: Dtype of the factors, by default the one they were restored to.
            overwrite: Replace an existing adapter directory.

        Returns:
            The directory, what rounding and reduction added to the recorded errors, and what PEFT
            has no place for.

        Raises:
            WrongKindError: A module is a dense delta, which is no adapter without a rank.
            InvalidInputError: `rank` is below 1, or `directory` cannot be a path.
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
            ManifestError: The original configuration is needed and is not valid JSON.
            BundleError: The bundle is read again, and a blob is missing or damaged.
        """
        dense = [path for path, m in self.modules.items() if isinstance(m, RestoredDelta)]
        _check_rank(rank, dense, of=len(self.modules), where=f"adapter {self.name!r}")
        ranks = {path: _written_rank(module, rank) for path, module in self.modules.items()}
        portable = portable or not self._fits_its_config(ranks)
        foreign = self.format != PEFT  # names and configuration are not PEFT's
        widest = max(ranks.values())
        written: dict[str, _Factors] = {}
        rounding = truncation = 0.0
        for path, exact in self._written_from(dtype, portable=portable):
            module = self.modules[path]
            result = _write(
                exact,
                rank=ranks[path],
                padded=widest if portable else module.source_rank,
                fold=portable,
                recorded=FLOAT_DTYPES[module.source_dtype],
                dtype=FLOAT_DTYPES[dtype] if dtype else _held(module).dtype,
                path=path,
            )
            written[path] = result.factors
            rounding = max(rounding, result.rounding)
            truncation = max(truncation, result.truncation)
        if portable:
            config = portable_config(
                paths=list(self.modules),
                rank=widest,
                base_model=self.base_model,
                revision=self.revision,
                original=parse_config(self.config) if self.format == PEFT else {},
            )
        else:
            config = self.config.encode("utf-8")
        write_directory(
            Path(directory),
            config=config,
            factors=written,
            kinds={path: module.kind for path, module in self.modules.items()},
            verbatim={} if foreign else self.verbatim,
            beside=self.verbatim if foreign else {},
            card=restored_card(
                self, written, portable=portable, rounding=rounding, truncation=truncation
            ),
            overwrite=overwrite,
        )
        beside = tuple(sorted(self.verbatim)) if foreign else ()
        return SavedAdapter(Path(directory), rounding, truncation, beside)

    def _fits_its_config(self, ranks: Mapping[str, int]) -> bool:
        return (
            self.format == PEFT
            and self.config != ""
            and all(
                isinstance(module, RestoredModule)
                and module.scaling == module.source_scaling
                and ranks[path] == len(module.A) <= module.source_rank
                and _worth_padding(module)
                for path, module in self.modules.items()
            )
        )

    def _written_from(
        self, dtype: FloatDtype | None, *, portable: bool
    ) -> Iterable[tuple[str, AnyRestored]]:
        """Return what is written from: the float32 reconstruction, or what is held if as good."""
        held = [(_held(module).dtype, module.source_dtype) for module in self.modules.values()]
        wide = all(found == np.float32 for found, _ in held)
        recorded = not portable and all(
            found == FLOAT_DTYPES[source] and dtype in (None, source) for found, source in held
        )
        return self.modules.items() if wide or recorded else self.exact()


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """The merged result of a bundle.

    Attributes:
        modules: By module path, sorted: factors with their scaling inside, or a full delta, in
            the bundle's dtype, as read-only views of its files.
        origin: The bundle it came from.
    """

    modules: Mapping[str, FactorsEncoding[Array] | DeltaEncoding[Array]]
    origin: Origin

    @property
    def base_model(self) -> str | None:
        """Id of the base model, where known."""
        return self.origin.generation.base_model.id

    @property
    def revision(self) -> str | None:
        """Revision of the base model, where known."""
        return self.origin.generation.base_model.revision

    @property
    def sources(self) -> tuple[Source, ...]:
        """The adapters that went in, sorted by name, with their digests and weights."""
        return self.origin.generation.sources

    @property
    def kinds(self) -> dict[str, str]:
        """The layer each module is, by path; see `unmerge_bundle.check_kind`."""
        return {module.path: module.kind for module in self.origin.generation.modules}

    @property
    def unmerged(self) -> dict[str, tuple[str, ...]]:
        """Per adapter, the keys of tensors (task heads, biases) that could not be merged."""
        return self.origin.generation.unmerged

    def delta(self, path: str) -> Array:
        """Return the update of one module, float32, `(d_out, d_in)`.

        Raises:
            KeyError: There is no such module.
            NonFiniteError: A value overflows float32.
        """
        module = self.modules[path]
        if isinstance(module, DeltaEncoding):
            return module.delta.astype(np.float32)
        return _product(module.A, module.B, path=path)

    def save_peft(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int | None = None,
        dtype: FloatDtype | None = None,
        overwrite: bool = False,
    ) -> SavedAdapter:
        """Write a PEFT directory in the portable form: one rank, `lora_alpha` equal to it.

        Args:
            directory: The directory to write.
            rank: Largest rank of a module: a full-rank delta, or factors of a larger rank, become
                the best approximation of this rank, in float64. Needed where a module is a
                full-rank delta; otherwise nothing is reduced unless it is given.
            dtype: Dtype of the factors, by default the bundle's.
            overwrite: Replace an existing adapter directory.

        Returns:
            The directory, and how far `dtype` and `rank` took the deltas from the bundle's.

        Raises:
            WrongKindError: A module holds a full-rank delta, which is no adapter without a rank.
            InvalidInputError: `rank` is below 1, or `directory` cannot be a path.
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
        """
        dense = [path for path, m in self.modules.items() if isinstance(m, DeltaEncoding)]
        _check_rank(rank, dense, of=len(self.modules), where=self.origin.bundle)
        store_dtype = self.origin.generation.store_dtype
        kinds = self.kinds
        held: dict[str, AnyRestored] = {
            path: _as_restored(module, store_dtype, kinds[path])
            for path, module in self.modules.items()
        }
        ranks = {path: _written_rank(module, rank) for path, module in held.items()}
        written: dict[str, _Factors] = {}
        rounding = truncation = 0.0
        for path, module in held.items():
            result = _write(
                module,
                rank=ranks[path],
                padded=max(ranks.values()),
                fold=True,
                recorded=FLOAT_DTYPES[store_dtype],
                dtype=FLOAT_DTYPES[dtype or store_dtype],
                path=path,
            )
            written[path] = result.factors
            rounding = max(rounding, result.rounding)
            truncation = max(truncation, result.truncation)
        write_directory(
            Path(directory),
            config=portable_config(
                paths=list(written),
                rank=max(ranks.values()),
                base_model=self.base_model,
                revision=self.revision,
                original={},
            ),
            factors=written,
            kinds=kinds,
            verbatim={},
            beside={},
            card=merged_card(self, written, rounding=rounding, truncation=truncation),
            overwrite=overwrite,
        )
        return SavedAdapter(Path(directory), rounding, truncation)


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    factors: _Factors
    rounding: float
    truncation: float


def _write(
    exact: AnyRestored,
    *,
    rank: int,
    padded: int,
    fold: bool,
    recorded: np.dtype[Any],
    dtype: np.dtype[Any],
    path: str,
) -> _Written:
    """Return a module's factors as they are written, and what that changes.

    Args:
        exact: The module before anything is rounded.
        rank: Rank to reduce it to, if it is dense or of a larger one.
        padded: Rank to append zeros up to.
        fold: Whether its scaling is multiplied into B.
        recorded: Dtype in which the bundle's errors are recorded for it.
        dtype: Dtype written.
        path: The module, for errors.
    """
    truncation = 0.0
    if isinstance(exact, RestoredModule) and len(exact.A) == rank:
        A, B, scaling = exact.A, exact.B, exact.scaling
        promised = round_to(A, recorded), round_to(B, recorded)
    else:
        reduced = (
            reduce_delta(exact.delta, rank)
            if isinstance(exact, RestoredDelta)
            else reduce_factors(exact.A, exact.scaling * exact.B.astype(np.float64), rank)
        )
        A, B, scaling = reduced.A, reduced.B, 1.0
        promised = A, B
        truncation = reduced.error
    factors = written_factors(
        A, B, dtype=dtype, scaling=scaling if fold else 1.0, rank=padded, path=path
    )
    rounding = _difference(
        promised,
        factors,
        recorded_scaling=scaling,
        written_scaling=1.0 if fold else scaling,
    )
    return _Written(factors, rounding, truncation)


def _written_rank(module: AnyRestored, rank: int | None) -> int:
    if isinstance(module, RestoredDelta):
        smaller: int = min(module.delta.shape)
        return min(rank or 1, smaller)  # a rank is given: `_check_rank` has seen to it
    return min(rank or len(module.A), len(module.A))


def _worth_padding(module: RestoredModule) -> bool:
    """Return whether a source of this rank can have been one.

    The bundle may claim any, and zeros up to it are written: no more than a module has features.
    """
    most: int = max(len(module.B), module.A.shape[1], len(module.A))
    return module.source_rank <= most


def _held(module: AnyRestored) -> Array:
    return module.delta if isinstance(module, RestoredDelta) else module.A


def _as_restored(
    module: FactorsEncoding[Array] | DeltaEncoding[Array], dtype: FloatDtype, kind: str
) -> AnyRestored:
    """Return a merged module in the shape of a restored one: the merge is its own source."""
    errors = ModuleErrors(factors=None, delta=0.0)
    if isinstance(module, DeltaEncoding):
        return RestoredDelta(
            delta=module.delta,
            source_scaling=1.0,
            source_rank=min(module.shape),
            source_dtype=dtype,
            errors=errors,
            kind=kind,
        )
    return RestoredModule(
        A=module.A,
        B=module.B,
        scaling=1.0,
        source_scaling=1.0,
        source_rank=len(module.A),
        source_dtype=dtype,
        errors=errors,
        kind=kind,
    )


def _check_rank(rank: int | None, dense: Sequence[str], *, of: int, where: str) -> None:
    """Refuse a rank below 1, and a missing one where modules are dense deltas.

    Args:
        rank: The rank asked for.
        dense: Paths of the modules that are dense deltas.
        of: Number of modules.
        where: What is to be written, for errors.

    Raises:
        InvalidInputError: The rank is below 1.
        WrongKindError: It is missing and needed.
    """
    if rank is not None and rank < 1:
        raise InvalidInputError(f"rank is {rank}, expected at least 1", path=where)
    if dense and rank is None:
        raise WrongKindError(
            f"{len(dense)} of {of} modules hold a full-rank delta, the first is {dense[0]}; an "
            "adapter needs factors: give the rank to reduce them to (rank=16 in Python, --rank 16 "
            "on the command line; the error is reported), or read them with delta(path)",
            path=where,
        )


def _product(A: Array, B: Array, *, path: str, scaling: float = 1.0) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # judged below
        product: Array = B.astype(np.float32) @ A.astype(np.float32)
        product *= np.float32(scaling)
    if not all_finite(product):
        raise NonFiniteError("the delta has values that overflow float32", path=path)
    return product


def _difference(
    recorded: _Factors,
    written: _Factors,
    *,
    recorded_scaling: float = 1.0,
    written_scaling: float = 1.0,
) -> float:
    """Return the relative difference of the written delta from the recorded one."""
    # Restoring in a wider dtype is the way out where a value overflows the source's.
    if not all(all_finite(factor) for factor in recorded):
        return math.inf
    return relative_errors(
        recorded, written, source_scaling=recorded_scaling, scaling=written_scaling
    ).delta
