"""The hooks a plugin may implement. Hooks return; they never change what they are given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from unmerge.formats import AdapterFormat
    from unmerge.merger import Merger

PROJECT = "unmerge"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def unmerge_mergers() -> Iterable[type[Merger]]:  # type: ignore[empty-body]
    """Return the merging strategies this plugin provides.

    Returns:
        Concrete `Merger` classes. An outsider's `method` has the form `vendor.name`.
    """


@hookspec
def unmerge_formats() -> Iterable[type[AdapterFormat]]:  # type: ignore[empty-body]
    """Return the adapter formats this plugin can read, and perhaps write.

    Returns:
        Concrete `AdapterFormat` classes. An outsider's `format` has the form `vendor.name`.
    """
