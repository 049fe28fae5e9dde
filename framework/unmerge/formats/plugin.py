"""Registers the built-in formats through the hook that everybody else uses, and nothing else."""

from __future__ import annotations

from unmerge.formats import BUILTIN_FORMATS, AdapterFormat
from unmerge.hookspecs import hookimpl


@hookimpl
def unmerge_formats() -> list[type[AdapterFormat]]:
    """Return the formats that come with the framework."""
    return list(BUILTIN_FORMATS)
