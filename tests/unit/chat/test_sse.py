"""Server-sent events by the rules of the WHATWG, however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat._sse import Event, EventStream


def parse(*batches: bytes, limit: int = 1000) -> list[Event]:
    stream = EventStream(limit)
    events = [event for batch in batches if batch for event in stream.feed(batch)]
    return events + stream.finish()


def data_of(*batches: bytes, limit: int = 1000) -> list[bytes]:
    return [data for _, data in parse(*batches, limit=limit)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\ndata\ndata:\ndata: b\n\n", [b"a\n\n\nb"]),
        (b"data: a: b\n\n", [b"a: b"]),
        (b": comment\ndata: a\n:\n: data: no\n\n", [b"a"]),
        (b"id: 1\ndata: a\nretry: 5\nunknown: x\nalone\n\n", [b"a"]),
        (b"Data: no\n data: no\ndatas: no\ndata: a\n\n", [b"a"]),
        (b"event: x\n\nid: 1\n\n\n\n\n", []),
        (b"data: a\x0bb\x0cc\xe2\x80\xa8d\n\n", [b"a\x0bb\x0cc\xe2\x80\xa8d"]),
        (b"data: a", [b"a"]),
        (b"data: a\n", [b"a"]),
        (b"data: a\r\n\r", [b"a"]),
    ],
)
def test_what_stands_in_data_is_the_event(body: bytes, expected: list[bytes]) -> None:
    assert data_of(body) == expected
    assert data_of(*(bytes([byte]) for byte in body)) == expected


def test_the_name_belongs_to_one_event_wherever_it_stands() -> None:
    body = b"event: a\ndata: 1\n\ndata: 2\nevent:b\n\ndata: 3\n\nevent: c\n\ndata: 4\n\nevent: d\nevent\ndata: 5\n\n"
    assert parse(body) == [(b"a", b"1"), (b"b", b"2"), (b"", b"3"), (b"", b"4"), (b"", b"5")]


@given(
    lines=st.lists(
        st.sampled_from([b"data: a", b"data:bc", b"data", b"", b"", b"event: x", b": c", b"x", b"data: " + b"long" * 9])
        | st.binary(max_size=6),
        max_size=20,
    ),
    seed=st.integers(0, 2**32),
    limit=st.sampled_from([5, 20, 100, 1000]),
    places=st.lists(st.integers(0, 300), max_size=8),
)
def test_any_split_gives_the_same_events(lines: list[bytes], seed: int, limit: int, places: list[int]) -> None:
    random = Random(seed)
    body = b"".join(line + random.choice((b"\n", b"\r\n", b"\r")) for line in lines)
    edges = [0, *sorted(min(place, len(body)) for place in places), len(body)]
    batches = [body[start:end] for start, end in pairwise(edges)]
    assert parse(*batches, limit=limit) == parse(body, limit=limit)
    assert parse(*(bytes([byte]) for byte in body), limit=limit) == parse(body, limit=limit)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_longer_event_is_left_out_up_to_its_blank_line(size: int) -> None:
    body = b"data: 1\n\nevent: x\ndata: " + b"y" * 60 + b"\ndata: tail\n\ndata: 2\n\n"
    stream = EventStream(50)
    events = []
    for at in range(0, len(body), size):
        events += stream.feed(body[at : at + size])
    assert events == [(b"", b"1"), (b"", b"2")]
    assert stream.was_cut


def test_the_end_of_a_longer_line_is_no_blank_line() -> None:
    assert data_of(b"data: " + b"y" * 45, b"\ndata: tail\n\n", b"data: a\n\n", limit=50) == [b"a"]


def test_the_limit_itself_is_allowed() -> None:
    assert data_of(b"data:" + b"y" * 45 + b"\n\n", limit=50) == [b"y" * 45]
    assert data_of(b"data:" + b"y" * 46 + b"\n\n", limit=50) == []


def test_many_short_lines_count_for_what_they_cost() -> None:
    assert data_of(b"data:\n" * 16, limit=1000) == [b"\n" * 15]
    assert data_of(b"data:\n" * 17 + b"\ndata: a\n\n", limit=1000) == [b"a"]


def test_a_line_without_an_end_takes_no_more_than_the_limit() -> None:
    stream = EventStream(1000)
    for _ in range(1000):
        stream.feed(b"data: " + b"a" * 500)
        assert sum(map(len, stream._line)) <= 1000 + 506
    assert stream.feed(b"\n\ndata: b\n\n") == [(b"", b"b")]
