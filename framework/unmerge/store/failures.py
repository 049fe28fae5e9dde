"""What Zarr, Icechunk, a server or the disk raises, as one error of ours with one line of text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from unmerge.errors import StoreError, UnmergeError

# How a service says what it refused: `Error { code: "NoSuchBucket", message: "..." }`.
_SERVICE_ERROR = re.compile(r'code: "(?P<code>\w+)", message: "(?P<message>[^"]*)"')
# How the AWS SDK says it at the different places it looks.
_LOOKED_FOR_CREDENTIALS = re.compile(r"credential provider|loading credentials|providers in chain")
_NO_CREDENTIALS = (
    "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
    "or AWS_SKIP_SIGNATURE=true for a public bucket"
)


@contextlib.contextmanager
def backend(what: str) -> Iterator[None]:
    """Turn whatever Zarr, Icechunk or the disk raises into a `StoreError` that begins with `what`.

    Damaged data makes them raise nearly anything (KeyError, TypeError, a panic of the Rust side),
    so no list of classes would be complete.
    """
    try:
        yield
    except UnmergeError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise StoreError(f"{what}: {reason(error)}") from error


def is_failure(error: BaseException) -> bool:
    """Return whether something failed, rather than a person or the interpreter asking to stop."""
    # PyO3 derives the exception of a panic from BaseException and exports no class to catch.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" |")]
    # Icechunk prints a tree: its first line says what happened, those after the places in its
    # sources say why, the last of them most exactly. A panic prints that tree on one line.
    text = lines[0].removeprefix("x ").partition(", context: SpanTrace")[0] if lines else ""
    if service := _SERVICE_ERROR.search(" ".join(lines)):
        return f"{service['message'].rstrip('.')} ({service['code']})"
    if _LOOKED_FOR_CREDENTIALS.search(str(error)):
        return _NO_CREDENTIALS
    causes = [line.lstrip("|`-> ") for line in lines if line.startswith(("|->", "`->"))]
    if causes and causes[-1] not in text:
        text = f"{text}: {causes[-1]}"
    return text.rstrip(".") or type(error).__name__
