"""The model cards of directories we write: where they come from, and how exact they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from unmerge_bundle.arrays import Array
from unmerge_bundle.jsontext import canonical_bytes

if TYPE_CHECKING:  # for signatures only: `restored` imports this module
    from unmerge_bundle.restored import MergedAdapter, Origin, RestoredAdapter

__all__ = ["merged_card", "restored_card"]

_Factors = tuple[Array, Array]


def restored_card(
    adapter: RestoredAdapter, written: Mapping[str, _Factors], *, portable: bool, rounding: float
) -> str:
    """Return the model card of a restored adapter.

    Args:
        adapter: The adapter.
        written: The factors the directory holds.
        portable: Whether they are in the portable form.
        rounding: Relative difference of their delta from the recorded one.
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
        *_origin_lines(adapter.origin),
        "",
        "## Reconstruction error",
        "",
        "Relative Frobenius norm against the original, as recorded in the bundle: of the factors",
        f"restored in the original's dtype ({_code(sources)}), their scaling beside them.",
        "",
        "| | mean over modules | largest |",
        "|---|---|---|",
        _error_row("factors", [error.factors for error in errors]),
        _error_row("delta", [error.delta for error in errors]),
        "",
        f"The largest delta error is that of module `{worst}`.",
        "",
        f"This directory holds the factors in {_code(_dtypes(written))}, {form}.",
        _rounding_line(rounding, "the one with these errors"),
    ]
    return _card(adapter.base_model, lines)


def merged_card(adapter: MergedAdapter, written: Mapping[str, _Factors], *, rounding: float) -> str:
    """Return the model card of a merged adapter.

    Args:
        adapter: The merged result.
        written: The factors the directory holds.
        rounding: Relative difference of their delta from the bundle's.
    """
    weights = [f"| `{s.name}` | {s.weight:g} | `{s.digest}` |" for s in adapter.sources]
    lines = [
        f"Merged from {len(adapter.sources)} adapters.",
        f"Exported from the bundle `{adapter.origin.bundle}`.",
        "",
        *_origin_lines(adapter.origin),
        "",
        f"This directory holds the factors in {_code(_dtypes(written))}, their scaling inside.",
        _rounding_line(rounding, "the bundle's"),
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


def _error_row(label: str, values: list[float]) -> str:
    return f"| {label} | {np.mean(values):.3g} | {max(values):.3g} |"


def _card(base_model: str | None, lines: list[str]) -> str:
    # Strings as JSON are YAML too, whatever characters they hold.
    base = f"base_model: {canonical_bytes(base_model).decode('utf-8')}\n" if base_model else ""
    front = f"---\n{base}library_name: peft\ntags:\n- lora\n- unmerge\n---\n"
    return front + "\n# LoRA adapter\n\n" + "\n".join(lines) + "\n"
