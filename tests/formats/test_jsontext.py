import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmerge_bundle.errors import ManifestError
from unmerge_bundle.jsontext import canonical_bytes, parse_object

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def parse(data: bytes, *, floats: bool = True) -> dict[str, Any]:
    return parse_object(data, where="here", error=ManifestError, floats=floats)


def test_canonical_form_is_what_the_spec_says() -> None:
    value = {"b": [1, 0.1, True, None], "a": 'é"\\\n\x7f', "A": {}}
    assert canonical_bytes(value) == (
        '{"A":{},"a":"é\\"\\\\\\n\x7f","b":[1,0.1,true,null]}'.encode()
    )


@given(st.dictionaries(texts, values, max_size=4))
def test_canonical_bytes_round_trip_and_are_stable(value: dict[str, Any]) -> None:
    data = canonical_bytes(value)
    assert parse(data) == value
    assert canonical_bytes(json.loads(data)) == data


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"a":1,"a":2}', "'a' appears twice"),
        (b'{"x":{"a":1,"b":1,"a":1}}', "'a' appears twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "out of range"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a":1', "not valid UTF-8 JSON"),
        (b'{"a":"\xff"}', "not valid UTF-8 JSON"),
        (b'\xef\xbb\xbf{"a":1}', "not valid UTF-8 JSON"),
        (b'{"a":"\\ud800"}', "not valid UTF-8 JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid UTF-8 JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_malformed_documents_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(ManifestError, match=match) as caught:
        parse(data)
    assert caught.value.path == "here"


@pytest.mark.parametrize("number", [b"1.0", b"1e2", b"-0.5"])
def test_floats_are_refused_where_they_have_no_place(number: bytes) -> None:
    with pytest.raises(ManifestError, match="no integer"):
        parse(b'{"a":' + number + b"}", floats=False)
    assert parse(b'{"a":-12}', floats=False) == {"a": -12}


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": float("inf")}, {"a": "\ud800"}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON|surrogates"):
        canonical_bytes(value)
