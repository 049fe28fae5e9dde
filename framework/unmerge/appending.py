"""Appends adapters to reversible bundles: a new generation, fitted to what the bundle shares."""

from __future__ import annotations

import os

from unmerge.adapter import Adapter
from unmerge.arrays import dtype_name, to_numpy
from unmerge_bundle import AdapterRecord, Appended, RecordedModule, append_adapter

__all__ = ["append"]


def append(
    bundle: str | os.PathLike[str], adapter: Adapter, *, weight: float = 1.0, message: str = ""
) -> Appended:
    """Append `adapter` to a bundle as a new generation.

    What is in the bundle stays as it is; the adapter is fitted to it by its encodings' own rules
    and comes back as well as a fixed basis allows. The errors returned say how well; merging again
    with the adapter makes a basis for it, which is the way to go where `rmm` first brought the
    adapters into a gauge of their own.

    Args:
        bundle: Its directory; it must restore adapters.
        adapter: The adapter, as a reader gives it.
        weight: The weight recorded for it; it had none in the merge.
        message: What the generation is for.

    Raises:
        BundleError: As `unmerge_bundle.append_adapter`: the bundle cannot take the adapter, holds
            one of its name, or another writer is at work. Nothing has changed then.
    """
    record = AdapterRecord(
        name=adapter.name,
        format=adapter.format,
        config=adapter.config,
        base_model=adapter.base_model,
        revision=adapter.revision,
        digest=adapter.digest(),
        modules=tuple(
            RecordedModule.model_validate(
                {
                    "path": module,
                    "rank": f.rank,
                    "dtype": dtype_name(f.A.dtype),
                    "source_scaling": f.scaling,
                    "kind": f.kind,
                }
            )
            for module, f in adapter.modules.items()
        ),
    )
    factors = {path: (to_numpy(f.A), to_numpy(f.B)) for path, f in adapter.modules.items()}
    verbatim = {key: to_numpy(tensor) for key, tensor in adapter.verbatim.items()}
    return append_adapter(bundle, record, factors, verbatim, weight=weight, message=message)
