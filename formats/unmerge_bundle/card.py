"""The model cards of directories we write: where they come from, and how exact they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from unmerge_bundle.arrays import Array
from unmerge_bundle.jsontext import canonical_bytes
from unmerge_bundle.peft import PEFT, VERBATIM_FILE

if TYPE_CHECKING:  # for signatures only: `restored` imports this module
    from unmerge_bundle.restored import MergedAdapter, Origin, RestoredAdapter

__all__ = ["merged_card", "restored_card"]

_Factors = tuple[Array, Array]


def restored_card(
    adapter: RestoredAdapter,
    written: Mapping[str, _Factors],
    *,
    portable: bool,
    rounding: float,
    truncation: float,
) -> str:
    """Return the model card of a restored adapter.

    Args:
        adapter: The adapter.
        written: The factors the directory holds.
        portable: Whether they are in the portable form.
        rounding: Relative difference of their delta from the recorded one.
        truncation: Relative error of reducing deltas to a rank, 0 where none was.
    """
    worst = max(adapter.modules, key=lambda path: adapter.modules[path].errors.delta)
    errors = [module.errors for module in adapter.modules.values()]
    sources = sorted({module.source_dtype for module in adapter.modules.values()})
    form = (
        "with every scaling folded into factor B and one rank for all modules"
        if portable
        else "with the scaling of the original configuration"
    )
    lines = [
        f"Restored from the reversible merge bundle `{adapter.origin.bundle}`.",
        "An approximation of the original, unless everything measured below is 0.",
        "",
        f"- Adapter: `{adapter.name}`, original digest `{adapter.source_digest}`",
        *_format_lines(adapter),
        *_origin_lines(adapter.origin),
        "",
        "## Reconstruction error",
        "",
        "Relative Frobenius norm against the original, as recorded in the bundle: of what is",
        f"restored in the original's dtype ({_code(sources)}), the scaling beside factors.",
        "",
        "| | mean over modules | largest |",
        "|---|---|---|",
        *_error_rows("factors", [e.factors for e in errors if e.factors is not None]),
        *_error_rows("delta", [error.delta for error in errors]),
        "",
        f"The largest delta error is that of module `{worst}`.",
        "",
        f"This directory holds the factors in {_code(_dtypes(written))}, {form}.",
        *_truncation_lines(truncation, written),
        _rounding_line(rounding, "the reduced one" if truncation else "the one with these errors"),
        *_beside_lines(adapter),
        *_fact_lines(adapter.origin, adapter.modules),
    ]
    return _card(adapter.base_model, lines)


def merged_card(
    adapter: MergedAdapter,
    written: Mapping[str, _Factors],
    *,
    rounding: float,
    truncation: float,
) -> str:
    """Return the model card of a merged adapter.

    Args:
        adapter: The merged result.
        written: The factors the directory holds.
        rounding: Relative difference of their delta from the bundle's.
        truncation: Relative error of reducing deltas to a rank, 0 where none was.
    """
    weights = [f"| `{s.name}` | {s.weight:g} | `{s.digest}` |" for s in adapter.sources]
    lines = [
        f"Merged from {len(adapter.sources)} adapters.",
        f"Exported from the bundle `{adapter.origin.bundle}`.",
        "",
        *_origin_lines(adapter.origin),
        "",
        f"This directory holds the factors in {_code(_dtypes(written))}, their scaling inside.",
        *_truncation_lines(truncation, written),
        _rounding_line(rounding, "the reduced one" if truncation else "the bundle's"),
        *_fact_lines(adapter.origin, adapter.modules),
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


def _format_lines(adapter: RestoredAdapter) -> list[str]:
    if adapter.format == PEFT:
        return []
    return [
        f"- Original format: `{adapter.format}`; this directory is in PEFT's, with the module",
        "  paths that the original's format has",
    ]


def _beside_lines(adapter: RestoredAdapter) -> list[str]:
    """Return what says which of the adapter's tensors PEFT will not load, empty if none."""
    if adapter.format == PEFT or not adapter.verbatim:
        return []
    return [
        "",
        "## Not loaded by PEFT",
        "",
        "The original also has these tensors, which are no low-rank update and have no place in a",
        f"PEFT adapter. They are in `{VERBATIM_FILE}`, unchanged; without them the adapter is not",
        "complete.",
        *(f"- `{key}`" for key in sorted(adapter.verbatim)),
    ]


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


def _dtypes(written: Mapping[str, _Factors]) -> list[str]:
    return sorted({A.dtype.name for A, _ in written.values()})


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _rounding_line(rounding: float, recorded: str) -> str:
    if rounding == 0.0:
        return f"Their delta is exactly {recorded}."
    return (
        f"As written, their delta differs from {recorded} by at most {rounding:.3g}\n"
        "(relative Frobenius norm, largest over the modules)."
    )


def _truncation_lines(truncation: float, written: Mapping[str, _Factors]) -> list[str]:
    if truncation == 0.0:
        return []
    rank = max(len(A) for A, _ in written.values())
    return [
        f"Deltas of a larger rank were reduced to at most {rank}, which took the worst",
        f"{truncation:.3g} of its norm away from what the bundle holds.",
    ]


def _fact_lines(origin: Origin, paths: Iterable[str]) -> list[str]:
    """Return a table of what the strategy reported of these modules, empty if nothing."""
    chosen = set(paths)
    values: dict[str, list[float]] = {}
    for entry in origin.generation.modules:
        if entry.path in chosen:
            for name, value in entry.facts.items():
                values.setdefault(name, []).append(value)
    if not values:
        return []
    return [
        "",
        "## What the strategy reported",
        "",
        "| | smallest | mean over modules | largest |",
        "|---|---|---|---|",
        *(
            f"| {name} | {min(found):.6g} | {np.mean(found):.6g} | {max(found):.6g} |"
            for name, found in sorted(values.items())
        ),
    ]


def _error_rows(label: str, values: list[float]) -> list[str]:
    """Return one row, or none where no module has such an error."""
    return [f"| {label} | {np.mean(values):.3g} | {max(values):.3g} |"] if values else []


def _card(base_model: str | None, lines: list[str]) -> str:
    # Strings as JSON are YAML too, whatever characters they hold.
    base = f"base_model: {canonical_bytes(base_model).decode('utf-8')}\n" if base_model else ""
    front = f"---\n{base}library_name: peft\ntags:\n- lora\n- unmerge\n---\n"
    return front + "\n# LoRA adapter\n\n" + "\n".join(lines) + "\n"
