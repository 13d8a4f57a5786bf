"""What is cut out of a question is what protobuf reads in it, or nothing."""

from __future__ import annotations

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from extproc.gate.glance import cut
from tests.unit.gate.gate_side import TOKEN, question

NAMES = frozenset((b"authorization", b"x-ibex-user-id"))

headers = st.lists(
    st.tuples(
        st.sampled_from(("authorization", "x-ibex-user-id", "x-request-id", "", "x" * 200)),
        st.text(max_size=5),
        st.binary(max_size=5) | st.binary(min_size=120, max_size=140),
    ),
    max_size=6,
)


@st.composite
def questions(draw: st.DrawFn) -> bytes:
    request = ext_authz.CheckRequest()
    attributes = request.attributes
    attributes.source.address.socket_address.port_value = draw(st.integers(0, 70_000))
    attributes.request.time.seconds = draw(st.integers(0, 2**40))
    for number in range(draw(st.integers(0, 2))):
        attributes.context_extensions[str(number)] = "authorization"
    attributes.metadata_context.SetInParent()
    http = attributes.request.http
    http.path = draw(st.text(max_size=5) | st.text(min_size=100, max_size=200))
    http.size = draw(st.sampled_from((-1, 0, 5, 2**40)))
    http.body = draw(st.text(max_size=5))
    for name, value, raw_value in draw(headers):
        http.header_map.headers.add(key=name, value=value, raw_value=raw_value)
    data: bytes = request.SerializeToString()
    return data


def is_cut_as_protobuf_reads(raw: bytes) -> bool:
    """Whether anything was cut; if so it must be what protobuf reads, where that reads anything."""
    sight = cut(raw, NAMES)
    if sight is None:
        return False
    try:
        http = ext_authz.CheckRequest.FromString(raw).attributes.request.http
    except DecodeError:
        return True
    wanted = [entry for entry in http.header_map.headers if entry.key.encode() in NAMES]
    assert list(base_pb2.HeaderMap.FromString(sight.headers).headers) == wanted
    assert sight.path == http.path
    return True


def test_a_question_of_envoys_is_cut() -> None:
    assert is_cut_as_protobuf_reads(question({"x-ibex-user-id": "u1", "authorization": f"Bearer {'x' * 300}"}))


@given(questions())
def test_what_is_cut_is_what_protobuf_reads(raw: bytes) -> None:
    is_cut_as_protobuf_reads(raw)


@given(questions(), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), max_size=3))
def test_so_it_is_in_damaged_questions(raw: bytes, damages: list[tuple[int, bytes, int]]) -> None:
    for at, put_in, taken_out in damages:
        raw = raw[:at] + put_in + raw[at + taken_out :]
    is_cut_as_protobuf_reads(raw)


@given(questions(), questions())
def test_so_it_is_where_messages_are_merged(first: bytes, second: bytes) -> None:
    is_cut_as_protobuf_reads(first + second)
    inner = [ext_authz.CheckRequest.FromString(raw).attributes.SerializeToString() for raw in (first, second)]
    is_cut_as_protobuf_reads(_field(1, inner[0] + inner[1]))


@given(st.binary(max_size=100))
def test_any_bytes_are_cut_or_not(raw: bytes) -> None:
    is_cut_as_protobuf_reads(raw)


def _field(number: int, content: bytes) -> bytes:
    """Length-delimited; up to 16,383 bytes."""
    return bytes((number << 3 | 2, len(content) & 0x7F | 0x80, len(content) >> 7)) + content


def _entry(*fields: tuple[int, bytes]) -> bytes:
    headers = _field(1, b"".join(bytes((number << 3 | 2, len(text))) + text for number, text in fields))
    return _field(1, _field(4, _field(2, _field(4, b"/") + _field(13, headers))))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        question(raw=False),
        question() + question(),
        question()[:-1],
        question() + b"\x0b\x0c",  # a group
        _entry((1, b"x"), (1, b"authorization"), (3, b"v")),
        _entry((1, b"authorization"), (3, b"v"), (1, b"x")),
        _entry((3, b"v"), (1, b"authorization")),
        _entry((1, b"authorization"), (2, b"v"), (3, b"w")),
        _entry(),
    ],
)
def test_another_shape_is_not_cut(raw: bytes) -> None:
    assert cut(raw, NAMES) is None


def test_headers_that_differ_are_cut_differently() -> None:
    cuts = {
        cut(_entry((1, name), (3, value)), NAMES | {b"a", b"ab"})
        for name, value in ((b"a", b"bc"), (b"ab", b"c"), (b"a", b""), (b"ab", b"bc"))
    }
    assert None not in cuts
    assert len({sight.headers for sight in cuts if sight is not None}) == 4


def test_its_repr_says_nothing() -> None:
    assert TOKEN not in repr(cut(question(), NAMES))
