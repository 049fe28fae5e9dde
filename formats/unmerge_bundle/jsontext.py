"""JSON as the format needs it: one canonical spelling to hash, and a reader that trusts nobody.

Python's own parser lets duplicate keys, NaN and overflowing numbers through; each of them would
let two readers see two different documents in the same bytes.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from unmerge_bundle.errors import BundleError

__all__ = ["canonical_bytes", "parse_object"]


def canonical_bytes(value: object) -> bytes:
    """Return the canonical JSON of `value`.

    UTF-8, keys sorted by code point, no whitespace, only the required escapes, floats in their
    shortest round-trip spelling.

    Raises:
        ValueError: `value` holds NaN, an infinity, or text that UTF-8 cannot express.
    """
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )
    return text.encode("utf-8")


def parse_object(
    data: bytes, *, where: str, error: type[BundleError], floats: bool
) -> dict[str, Any]:
    """Return the JSON object that `data` holds.

    Args:
        data: UTF-8 text, of a size the caller has checked.
        where: The place named in errors.
        error: Class of the errors raised.
        floats: Whether numbers with a fraction or exponent are allowed.

    Raises:
        BundleError: Of class `error`; the bytes are no UTF-8, no JSON or no object, repeat a key,
            or hold a number or a string the format does not allow.
    """

    def refuse(message: str) -> NoReturn:
        raise _RefusedError(message)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            repeated = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"the key {repeated!r} appears twice in one object")
        return result

    def number(text: str) -> float:
        if not floats:
            refuse(f"the number {text} is no integer")
        value = float(text)
        if not math.isfinite(value):
            refuse(f"the number {text} is out of range")
        return value

    def constant(text: str) -> NoReturn:
        refuse(f"{text} is no JSON")

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_float=number,
            parse_constant=constant,
        )
        # Escapes such as "\ud800" decode to text that cannot be written again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _RefusedError as refusal:
        raise error(f"{refusal}; the document is refused", path=where) from None
    except RecursionError:
        raise error("JSON nested too deeply; the document is refused", path=where) from None
    except ValueError as problem:  # also JSONDecodeError, UnicodeError, overlong integers
        raise error(f"not valid UTF-8 JSON: {problem}", path=where) from problem
    if not isinstance(value, dict):
        raise error(f"expected a JSON object, got {type(value).__name__}", path=where)
    return value


class _RefusedError(Exception):
    """Carries a refusal out of the parser's callbacks."""
