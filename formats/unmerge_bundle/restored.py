"""What comes out of a bundle: one restored adapter, or the merged one, as numpy arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmerge_bundle.arrays import FLOAT_DTYPES, Array, FloatDtype, all_finite, round_to
from unmerge_bundle.card import merged_card, restored_card
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_bundle.errors import WrongKindError
from unmerge_bundle.measure import relative_errors
from unmerge_bundle.model import Generation, ModuleErrors, Source
from unmerge_bundle.peft import (
    parse_config,
    portable_config,
    write_directory,
    written_factors,
)

__all__ = ["MergedAdapter", "Origin", "RestoredAdapter", "RestoredModule", "SavedAdapter"]

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
            result's own. 0 where exactly those factors are written.
    """

    directory: Path
    rounding: float


@dataclass(frozen=True, slots=True, eq=False)
class RestoredModule:
    """One module of a restored adapter; its delta is `scaling · B @ A`.

    Attributes:
        A: `(r, d_in)`, in the dtype restored to.
        B: `(d_out, r)`, likewise.
        scaling: What these factors are used with.
        source_scaling: What the original's factors were used with.
        source_rank: Rank of the original's factors; r may be larger.
        source_dtype: Dtype of the original's factors.
        errors: Recorded errors against the original, of the factors restored in `source_dtype`.
    """

    A: Array
    B: Array
    scaling: float
    source_scaling: float
    source_rank: int
    source_dtype: FloatDtype
    errors: ModuleErrors


@dataclass(frozen=True, eq=False)
class RestoredAdapter:
    """One adapter, complete: factors, the tensors kept verbatim, its configuration.

    Attributes:
        name: The adapter's name.
        modules: By module path, sorted.
        verbatim: Tensors that are no low-rank update, by their key in the source.
        config: Text of the source's configuration file, byte for byte, or "".
        format: Format the source was read from.
        base_model: Id of the base model, where known.
        revision: Its revision, where known.
        source_digest: Digest of the original.
        origin: The bundle it came from.
        exact: Gives path, A and B of every module again, in float32, from the bundle's files;
            needed only to write another form or dtype than the one restored to.
    """

    name: str
    modules: Mapping[str, RestoredModule]
    verbatim: Mapping[str, Array]
    config: str
    format: str
    base_model: str | None
    revision: str | None
    source_digest: str
    origin: Origin
    exact: Callable[[], Iterator[tuple[str, Array, Array]]]

    def delta(self, path: str) -> Array:
        """Return `scaling · B @ A` of one module, float32, `(d_out, d_in)`.

        Raises:
            KeyError: The adapter has no such module.
        """
        module = self.modules[path]
        return _product(module.A, module.B) * np.float32(module.scaling)

    def save_peft(
        self,
        directory: str | os.PathLike[str],
        *,
        portable: bool = False,
        dtype: FloatDtype | None = None,
        overwrite: bool = False,
    ) -> SavedAdapter:
        """Write a PEFT directory: configuration, weights, model card.

        The original configuration is kept byte for byte where it still describes the factors:
        the source was PEFT's and every module has its source's scaling and rank. Otherwise, and
        with `portable`, every scaling is folded into B, every module zero-padded to one rank and
        `lora_alpha` set to it, so that software that reads nothing but `lora_alpha / r` gets the
        same delta.

        What is written is the float32 reconstruction, folded if need be, rounded once. Where the
        factors held have been rounded already, the bundle's files are read for it again. The
        bundle's errors are recorded for factors of the source's dtype with their scaling beside
        them; how far anything else is from those is measured here, and said in the model card.

        Args:
            directory: The directory to write.
            portable: Ask for the portable form.
            dtype: Dtype of the factors, by default the one they were restored to.
            overwrite: Replace an existing adapter directory.

        Returns:
            The directory, and what rounding added to the recorded errors.

        Raises:
            InvalidInputError: `directory` cannot be a path.
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
            ManifestError: The original configuration is needed and is not valid JSON.
            BundleError: The bundle is read again, and a blob is missing or damaged.
        """
        portable = portable or not self._fits_its_config()
        rank = max(len(module.A) for module in self.modules.values())
        written: dict[str, _Factors] = {}
        rounding = 0.0
        if not portable and self._is_recorded_in(dtype):
            written = {path: (module.A, module.B) for path, module in self.modules.items()}
        else:
            for path, A, B in self._exact():
                module = self.modules[path]
                written[path] = written_factors(
                    A,
                    B,
                    dtype=FLOAT_DTYPES[dtype] if dtype else module.A.dtype,
                    scaling=module.scaling if portable else 1.0,
                    rank=rank if portable else None,
                    path=path,
                )
                recorded = FLOAT_DTYPES[module.source_dtype]
                difference = _difference(
                    (round_to(A, recorded), round_to(B, recorded)),
                    written[path],
                    recorded_scaling=module.scaling,
                    written_scaling=1.0 if portable else module.scaling,
                )
                rounding = max(rounding, difference)
        if portable:
            config = portable_config(
                paths=list(self.modules),
                rank=rank,
                base_model=self.base_model,
                revision=self.revision,
                original=parse_config(self.config) if self.format == "peft" else {},
            )
        else:
            config = self.config.encode("utf-8")
        write_directory(
            Path(directory),
            config=config,
            factors=written,
            verbatim=self.verbatim,
            card=restored_card(self, written, portable=portable, rounding=rounding),
            overwrite=overwrite,
        )
        return SavedAdapter(Path(directory), rounding)

    def _fits_its_config(self) -> bool:
        return (
            self.format == "peft"
            and self.config != ""
            and all(
                module.scaling == module.source_scaling and len(module.A) == module.source_rank
                for module in self.modules.values()
            )
        )

    def _is_recorded_in(self, dtype: FloatDtype | None) -> bool:
        """Return whether the factors held are the recorded ones, and `dtype` keeps them so."""
        return all(
            module.A.dtype == FLOAT_DTYPES[module.source_dtype]
            and dtype in (None, module.source_dtype)
            for module in self.modules.values()
        )

    def _exact(self) -> Iterator[tuple[str, Array, Array]]:
        if all(module.A.dtype == np.float32 for module in self.modules.values()):
            return ((path, module.A, module.B) for path, module in self.modules.items())
        return self.exact()


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
    def unmerged(self) -> dict[str, tuple[str, ...]]:
        """Per adapter, the keys of tensors (task heads, biases) that could not be merged."""
        return self.origin.generation.unmerged

    def delta(self, path: str) -> Array:
        """Return the update of one module, float32, `(d_out, d_in)`.

        Raises:
            KeyError: There is no such module.
        """
        module = self.modules[path]
        if isinstance(module, DeltaEncoding):
            return module.delta.astype(np.float32)
        return _product(module.A, module.B)

    def save_peft(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: FloatDtype | None = None,
        overwrite: bool = False,
    ) -> SavedAdapter:
        """Write a PEFT directory in the portable form: one rank, `lora_alpha` equal to it.

        Args:
            directory: The directory to write.
            dtype: Dtype of the factors, by default the bundle's.
            overwrite: Replace an existing adapter directory.

        Returns:
            The directory, and how far `dtype` took the deltas from the bundle's.

        Raises:
            WrongKindError: A module holds a full-rank delta, which is no adapter without a rank.
            InvalidInputError: `directory` cannot be a path.
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
        """
        factors: dict[str, _Factors] = {}
        dense: list[str] = []
        for path, module in self.modules.items():
            if isinstance(module, DeltaEncoding):
                dense.append(path)
            else:
                factors[path] = (module.A, module.B)
        if dense:
            raise WrongKindError(
                f"{len(dense)} of {len(self.modules)} modules hold a full-rank delta, the first "
                f"is {dense[0]}; an adapter needs factors, and this release does not reduce a "
                "delta to them: read it with merged().delta(path)",
                path=self.origin.bundle,
            )
        rank = max(len(A) for A, _ in factors.values())
        target = FLOAT_DTYPES[dtype or self.origin.generation.store_dtype]
        written = {
            path: written_factors(A, B, dtype=target, rank=rank, path=path)
            for path, (A, B) in factors.items()
        }
        rounding = max(_difference(factors[path], written[path]) for path in factors)
        write_directory(
            Path(directory),
            config=portable_config(
                paths=list(factors),
                rank=rank,
                base_model=self.base_model,
                revision=self.revision,
                original={},
            ),
            factors=written,
            verbatim={},
            card=merged_card(self, written, rounding=rounding),
            overwrite=overwrite,
        )
        return SavedAdapter(Path(directory), rounding)


def _product(A: Array, B: Array) -> Array:
    product: Array = B.astype(np.float32) @ A.astype(np.float32)
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
