"""The other process of the kit: merges on request and answers with a hash of the result.

Started by `unmerge.testing.processes` as `python -m unmerge.testing.worker`; reads one JSON
request a line and writes one JSON answer a line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import torch
from pydantic import ValidationError

from unmerge.errors import UnmergeError
from unmerge.merger import Merger
from unmerge.testing.processes import digest_here


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Return `{"digest": …}`, `{"error": …}`, or `{"skipped": …}` where it cannot be built."""
    sys.path[:] = request["path"]
    name = f"{request['module']}.{request['class']}"
    try:
        found: Any = importlib.import_module(request["module"])
        for part in request["class"].split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return {"skipped": f"{name} cannot be imported in another process: {error}"}
    try:
        merger: Merger = found.model_validate(request["recipe"])
    except (UnmergeError, ValidationError) as error:
        # A nested strategy, say, that was registered by hand in the asking process only.
        return {"skipped": f"{name} cannot be built from its recipe in another process: {error}"}
    try:
        return {"digest": digest_here(merger)}
    except Exception as error:  # noqa: BLE001 - foreign code; the asking process reports it
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    # What a strategy prints must not mix with the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(f"{json.dumps(answer(json.loads(line)))}\n")
            answers.flush()


if __name__ == "__main__":
    main()
