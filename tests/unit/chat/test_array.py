"""Elements of a JSON array that is streamed."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat._array import ArrayStream
from extproc.chat._sse import Event

_values = st.recursive(
    st.none() | st.integers() | st.text('ab"\\[]{},é\n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"}', max_size=3), inner, max_size=3),
    max_leaves=6,
)


def elements(*batches: bytes, limit: int = 10_000) -> list[bytes]:
    stream = ArrayStream(limit)
    found = [event for batch in batches for event in stream.feed(batch)]
    return [element for _, element in [*found, *stream.finish()]]


@given(
    st.lists(st.dictionaries(st.text('a"', max_size=3), _values, max_size=3), max_size=4),
    st.sampled_from([None, 2]),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_each_object_comes_as_it_stands_however_it_is_cut(
    objects: list[object], indent: int | None, places: list[int]
) -> None:
    body = json.dumps(objects, indent=indent, ensure_ascii=False).encode() + b"\n"
    edges = [0, *sorted(min(place, len(body)) for place in places), len(body)]
    batches = [body[start:end] for start, end in pairwise(edges)]
    found = elements(*batches)
    assert [json.loads(element) for element in found] == objects
    assert elements(*(bytes([byte]) for byte in body)) == found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'[{"a":1}', [b'{"a":1}']),
        (b'[{"a":1},{"b":"}', [b'{"a":1}']),
        (b'[{"a":1}]{"b":2}', [b'{"a":1}']),
        (b'[1,"{",[2],{"a":"\\"}"}]', [b"[2]", b'{"a":"\\"}"}']),
        (b"[", []),
        (b"[]", []),
    ],
)
def test_what_is_whole_counts(body: bytes, expected: list[bytes]) -> None:
    assert elements(body) == expected
    assert elements(*(bytes([byte]) for byte in body)) == expected


@pytest.mark.parametrize("size", [1, 10, 10_000])
def test_at_a_longer_element_reading_ends(size: int) -> None:
    body = b'[{"a":1},{"b":"' + b"x" * 42 + b'"},{"c":"' + b"x" * 50 + b'"},{"d":1}]'
    stream = ArrayStream(50)
    found = []
    for at in range(0, len(body), size):
        found += stream.feed(body[at : at + size])
    assert [len(element) for _, element in found + stream.finish()] == [7, 50]
    assert stream.was_cut


def test_an_element_of_brackets_alone_ends_it_too() -> None:
    stream = ArrayStream(10**7)
    for _ in range(100):
        stream.feed(b"[{" * 4096)
    assert stream.was_cut
    assert not stream._pieces


def test_a_string_without_an_end_takes_no_more_than_the_limit() -> None:
    stream = ArrayStream(1000)
    stream.feed(b'[{"a":"')
    for _ in range(100):
        stream.feed(b"x" * 100)
    assert stream.was_cut
    assert not stream._pieces


def test_a_long_element_is_not_read_again_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ArrayStream(10**7)
    reads = []
    scan = stream._scan

    def counted() -> list[Event]:
        reads.append(1)
        return scan()

    monkeypatch.setattr(stream, "_scan", counted)
    stream.feed(b'[{"a":"')
    for _ in range(10_000):
        stream.feed(b"x" * 100)
    assert [len(element) for _, element in stream.feed(b'"}') + stream.finish()] == [1_000_008]
    assert len(reads) < 30
