"""What adapters, modules and verbatim tensors may be called, so that a name is safe everywhere.

Adapter names become command-line words and directory names; module paths and keys become tensor
names in blobs. Checked once here, they need no escaping anywhere else.
"""

from __future__ import annotations

import re

__all__ = ["check_key", "check_module_path", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,127}")
_LONGEST_PATH = 1024


def check_name(name: str, *, what: str = "adapter name") -> str:
    """Return `name` if it may name an adapter, or anything else that is named alike.

    Allowed are 1 to 128 ASCII letters, digits and `._+@-`, beginning with a letter or a digit.

    Args:
        name: The name.
        what: The kind of name it is, for the error.

    Raises:
        ValueError: It may not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} is not allowed: expected 1 to 128 letters, digits or any of "
            "'._+@-', beginning with a letter or digit; choose another name"
        )
    return name


def check_module_path(path: str) -> str:
    """Return `path` if it may be a module path: dotted, not empty, printable, without `/`.

    Raises:
        ValueError: It may not.
    """
    reason = None
    if not path:
        reason = "it is empty"
    elif len(path) > _LONGEST_PATH:
        reason = f"it has {len(path)} characters, at most {_LONGEST_PATH} are allowed"
    elif not path.isprintable():
        reason = "it holds control or other unprintable characters"
    elif "/" in path:
        reason = "it holds '/'"
    elif path.startswith(".") or path.endswith(".") or ".." in path:
        reason = "it has an empty part: a leading, trailing or double dot"
    if reason is not None:
        raise ValueError(f"module path {path!r} is not allowed: {reason}")
    return path


def check_key(key: str) -> str:
    """Return `key` if it may be the key of a verbatim tensor: not empty, printable.

    Raises:
        ValueError: It may not.
    """
    if not key or len(key) > _LONGEST_PATH or not key.isprintable():
        raise ValueError(
            f"tensor key {key!r} is not allowed: expected 1 to {_LONGEST_PATH} printable characters"
        )
    return key
