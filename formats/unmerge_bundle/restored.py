"""What comes out of a bundle: one restored adapter, or the merged one, as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmerge_bundle.arrays import Array, FloatDtype
from unmerge_bundle.encodings import DeltaEncoding, FactorsEncoding
from unmerge_bundle.errors import WrongKindError
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.model import Generation, ModuleErrors, Source
from unmerge_bundle.peft import (
    PeftModule,
    original_tensors,
    parse_config,
    portable_config,
    portable_tensors,
    write_directory,
)

__all__ = ["MergedAdapter", "Origin", "RestoredAdapter", "RestoredModule"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The bundle something came from: its name, its generation's digest and document."""

    bundle: str
    digest: str
    generation: Generation


@dataclass(frozen=True, slots=True, eq=False)
class RestoredModule:
    """One module of a restored adapter; its delta is `scaling · B @ A`.

    Attributes:
        A: `(r, d_in)`, in the dtype restored to.
        B: `(d_out, r)`, likewise.
        scaling: What these factors are used with.
        source_scaling: What the original's factors were used with.
        source_rank: Rank of the original's factors; r may be larger.
        errors: Recorded errors against the original.
    """

    A: Array
    B: Array
    scaling: float
    source_scaling: float
    source_rank: int
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
    ) -> None:
        """Write a PEFT directory: configuration, weights, model card.

        The original configuration is kept byte for byte where it still describes the factors:
        the source was PEFT's and every module has its source's scaling and rank. Otherwise, and
        with `portable`, every scaling is folded into B, every module zero-padded to one rank and
        `lora_alpha` set to it, so that software that reads nothing but `lora_alpha / r` gets the
        same delta.

        Args:
            directory: The directory to write.
            portable: Ask for the portable form.
            dtype: Dtype of the factors, by default the one they were restored to.
            overwrite: Replace an existing adapter directory.

        Raises:
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
            ManifestError: The original configuration is needed and is not valid JSON.
        """
        modules = {
            path: PeftModule(module.A, module.B, module.scaling)
            for path, module in self.modules.items()
        }
        original = (
            self.format == "peft"
            and self.config != ""
            and all(
                module.scaling == module.source_scaling and len(module.A) == module.source_rank
                for module in self.modules.values()
            )
        )
        if original and not portable:
            config = self.config.encode("utf-8")
            tensors = original_tensors(modules, dtype)
        else:
            tensors, rank = portable_tensors(modules, dtype)
            config = portable_config(
                paths=list(modules),
                rank=rank,
                base_model=self.base_model,
                revision=self.revision,
                original=parse_config(self.config) if self.format == "peft" else {},
            )
        write_directory(
            Path(directory),
            config=config,
            tensors=tensors,
            verbatim=self.verbatim,
            card=_restored_card(self),
            overwrite=overwrite,
        )


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
    ) -> None:
        """Write a PEFT directory in the portable form: one rank, `lora_alpha` equal to it.

        Args:
            directory: The directory to write.
            dtype: Dtype of the factors, by default the bundle's.
            overwrite: Replace an existing adapter directory.

        Raises:
            WrongKindError: A module holds a full-rank delta, which is no adapter without a rank.
            OutputExistsError: The directory exists and may not be replaced.
            NonFiniteError: A value overflows the dtype.
        """
        modules: dict[str, PeftModule] = {}
        dense: list[str] = []
        for path, module in self.modules.items():
            if isinstance(module, DeltaEncoding):
                dense.append(path)
            else:
                modules[path] = PeftModule(module.A, module.B, 1.0)
        if dense:
            raise WrongKindError(
                f"{len(dense)} of {len(self.modules)} modules hold a full-rank delta, the first "
                f"is {dense[0]}; an adapter needs factors: export with a rank (--rank), or export "
                "a full checkpoint",
                path=self.origin.bundle,
            )
        tensors, rank = portable_tensors(modules, dtype)
        write_directory(
            Path(directory),
            config=portable_config(
                paths=list(modules),
                rank=rank,
                base_model=self.base_model,
                revision=self.revision,
                original={},
            ),
            tensors=tensors,
            verbatim={},
            card=_merged_card(self),
            overwrite=overwrite,
        )


def _product(A: Array, B: Array) -> Array:
    product: Array = B.astype(np.float32) @ A.astype(np.float32)
    return product


def _restored_card(adapter: RestoredAdapter) -> str:
    worst = max(adapter.modules, key=lambda path: adapter.modules[path].errors.delta)
    errors = [module.errors for module in adapter.modules.values()]
    lines = [
        f"Restored from the reversible merge bundle `{adapter.origin.bundle}`.",
        "An approximation of the original, unless the errors below are 0.",
        "",
        f"- Adapter: `{adapter.name}`, original digest `{adapter.source_digest}`",
        *_origin_lines(adapter.origin),
        "",
        "## Reconstruction error",
        "",
        "Relative Frobenius norm against the original, as recorded in the bundle.",
        "",
        "| | median over modules | largest |",
        "|---|---|---|",
        _error_row("factors", [error.factors for error in errors]),
        _error_row("delta", [error.delta for error in errors]),
        "",
        f"The largest delta error is that of module `{worst}`.",
    ]
    return _card(adapter.base_model, lines)


def _merged_card(adapter: MergedAdapter) -> str:
    weights = [f"| `{s.name}` | {s.weight:g} | `{s.digest}` |" for s in adapter.sources]
    lines = [
        f"Merged from {len(adapter.sources)} adapters.",
        f"Exported from the bundle `{adapter.origin.bundle}`.",
        "",
        *_origin_lines(adapter.origin),
        "",
        "## Sources",
        "",
        "| adapter | weight | digest |",
        "|---|---|---|",
        *weights,
    ]
    if adapter.unmerged:
        lines += ["", "## Not merged", "", "These tensors have no merged value and are left out."]
        lines += [
            f"- `{name}`: {', '.join(f'`{key}`' for key in keys)}"
            for name, keys in sorted(adapter.unmerged.items())
        ]
    return _card(adapter.base_model, lines)


def _origin_lines(origin: Origin) -> list[str]:
    generation = origin.generation
    strategy = generation.strategy
    base = generation.base_model
    recipe = canonical_bytes(generation.recipe).decode("utf-8")
    return [
        f"- Generation: {generation.number}, `{origin.digest}`",
        f"- Strategy: `{strategy.method}` version {strategy.version} ({strategy.distribution})",
        f"- Recipe: `{recipe}`",
        f"- Base model: `{base.id or 'unknown'}`, revision `{base.revision or 'unknown'}`",
        f"- Sources: {', '.join(f'`{source.name}`' for source in generation.sources)}",
    ]


def _error_row(label: str, values: list[float]) -> str:
    return f"| {label} | {np.median(values):.3g} | {max(values):.3g} |"


def _card(base_model: str | None, lines: list[str]) -> str:
    # Strings as JSON are YAML too, whatever characters they hold.
    base = f"base_model: {canonical_bytes(base_model).decode('utf-8')}\n" if base_model else ""
    front = f"---\n{base}library_name: peft\ntags:\n- lora\n- unmerge\n---\n"
    return front + "\n# LoRA adapter\n\n" + "\n".join(lines) + "\n"
