"""Field types that all documents of the format share, and the strictness they are read with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from unmerge_bundle.kinds import check_kind
from unmerge_bundle.names import check_key, check_module_path, check_name

__all__ = [
    "TIME_FORMAT",
    "Count",
    "Digest",
    "FactName",
    "FormatModel",
    "Key",
    "Kind",
    "ModulePath",
    "Name",
    "Positive",
    "Time",
    "check_sorted",
]

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def _check_time(text: str) -> str:
    # Formatted back, because strptime also takes "2026-1-2T3:4:5Z".
    if datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC).strftime(TIME_FORMAT) != text:
        raise ValueError(f"{text!r} is no UTC time like 2026-01-31T12:00:00Z")
    return text


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(check_name)]
ModulePath = Annotated[str, AfterValidator(check_module_path)]
FactName = Annotated[str, AfterValidator(partial(check_name, what="fact"))]
Key = Annotated[str, AfterValidator(check_key)]
Kind = Annotated[str, AfterValidator(check_kind)]
Time = Annotated[str, AfterValidator(_check_time)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class FormatModel(BaseModel):
    """What all models of the format share: immutable, strictly typed, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


def check_sorted(label: str, names: Sequence[str]) -> frozenset[str]:
    """Return `names` as a set if they are strictly ascending by code point.

    Raises:
        ValueError: They are not.
    """
    for before, after in itertools.pairwise(names):
        if before >= after:
            problem = "appears twice" if before == after else f"stands after {before!r}"
            raise ValueError(f"{label} must be sorted and distinct: {after!r} {problem}")
    return frozenset(names)
