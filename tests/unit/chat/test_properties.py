"""What holds for every format and every body, however it is spelled."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import ChatRequest, Directive, InjectionMode, Placement, ReadLimits, UnreadableBody, _conversation
from tests.unit.chat.formats import FORMATS, Format
from tests.unit.chat.odd_json import parse, render, texts

LIMITS = ReadLimits()
REASONS = {"not_json", "not_utf8", "too_deep", "too_many_messages", "wrong_type"}

every_format = pytest.mark.parametrize("chat_format", FORMATS, ids=lambda chat_format: chat_format.name)
blocks = texts(12).filter(bool)


def read(chat_format: Format, body: bytes, *, as_long: bool = False) -> ChatRequest:
    """`as_long`: as a long body is read, where more offsets are found at once."""
    with pytest.MonkeyPatch.context() as patch:
        if as_long:
            patch.setattr(_conversation, "_LONG_BYTES", -1)
        return chat_format.chat.read_request(body, chat_format.path, LIMITS)


def directives(text: str) -> list[Directive]:
    return [Directive(text, mode) for mode in InjectionMode]


def splice_all(chat_format: Format, body: bytes, request: ChatRequest, block: str) -> list[bytes]:
    return [
        chat_format.chat.splice(body, request, block, placement, directive)
        for placement in Placement
        for directive in (None, *directives("Be kind."))
    ]


@every_format
@given(data=st.data())
def test_a_splice_changes_one_place_of_the_tree_and_nothing_else(chat_format: Format, data: st.DataObject) -> None:
    tree = data.draw(chat_format.bodies)
    block = data.draw(blocks)
    body = render(tree, Random(data.draw(st.integers(0, 2**32))))
    tree = parse(body)
    request = chat_format.chat.read_request(body, chat_format.path, LIMITS)
    assert request.query == chat_format.query(tree)
    for placement in Placement:
        spliced = chat_format.chat.splice(body, request, block, placement)
        assert parse(spliced) == chat_format.expected(tree, block, placement), placement


@every_format
@given(data=st.data(), as_long=st.booleans())
def test_a_directive_goes_where_its_mode_says_and_memories_after_it(
    chat_format: Format, data: st.DataObject, as_long: bool
) -> None:
    tree = data.draw(chat_format.bodies)
    block, text = data.draw(texts(12)), data.draw(blocks)
    body = render(tree, Random(data.draw(st.integers(0, 2**32))))
    tree = parse(body)
    request = read(chat_format, body, as_long=as_long)
    for directive in directives(text):
        for placement in Placement:
            spliced = chat_format.chat.splice(body, request, block, placement, directive)
            expected = chat_format.expected(tree, block, placement, directive)
            assert parse(spliced) == expected, (directive.mode, placement)
            assert (spliced is body) == (expected == tree)


def is_made_by_two_insertions(body: bytes, spliced: bytes) -> bool:
    """Is it `body[:p] + … + body[p:q] + … + body[q:]` for any p and q?"""
    grown = len(spliced) - len(body)
    prefix = next((at for at, byte in enumerate(body) if spliced[at] != byte), len(body))
    suffix = next((at for at, byte in enumerate(reversed(body)) if spliced[-1 - at] != byte), len(body))
    return any(
        body[p:q] in spliced[p : grown + q]
        for p in range(prefix, -1, -1)
        for q in range(max(p, len(body) - suffix), len(body) + 1)
    )


@every_format
@given(data=st.data(), as_long=st.booleans())
def test_without_both_insertions_the_bytes_are_the_clients(
    chat_format: Format, data: st.DataObject, as_long: bool
) -> None:
    body = render(data.draw(chat_format.bodies), Random(data.draw(st.integers(0, 2**32))))
    request = read(chat_format, body, as_long=as_long)
    for spliced in splice_all(chat_format, body, request, data.draw(blocks)):
        assert is_made_by_two_insertions(body, spliced)


@every_format
@given(data=st.data())
def test_whenever_memories_go_in_the_directive_does(chat_format: Format, data: st.DataObject) -> None:
    body = render(data.draw(chat_format.bodies), Random(data.draw(st.integers(0, 2**32))))
    request = read(chat_format, body)
    for directive in directives("Be kind, 42."):
        for placement in Placement:
            alone = chat_format.chat.splice(body, request, "", placement, directive)
            if chat_format.chat.splice(body, request, "block", placement) is not body:
                assert alone is not body
            if request.query:
                both = chat_format.chat.splice(body, request, "block", placement, directive)
                assert b"Be kind, 42." in both
                assert b"block" in both


@every_format
@given(data=st.data())
def test_without_what_was_inserted_the_bytes_are_the_clients(chat_format: Format, data: st.DataObject) -> None:
    body = render(data.draw(chat_format.bodies), Random(data.draw(st.integers(0, 2**32))))
    request = chat_format.chat.read_request(body, chat_format.path, LIMITS)
    block = data.draw(blocks)
    for placement in Placement:
        spliced = chat_format.chat.splice(body, request, block, placement)
        size = len(spliced) - len(body)
        at = next((at for at, byte in enumerate(body) if spliced[at] != byte), len(body))
        assert spliced[:at] + spliced[at + size :] == body


@every_format
@given(data=st.data())
def test_the_same_request_gives_the_same_bytes(chat_format: Format, data: st.DataObject) -> None:
    body = render(data.draw(chat_format.bodies), Random(data.draw(st.integers(0, 2**32))))
    again = bytes(bytearray(body))
    requests = [chat_format.chat.read_request(each, chat_format.path, LIMITS) for each in (body, again)]
    assert requests[0] == requests[1]
    assert splice_all(chat_format, body, requests[0], "block") == splice_all(chat_format, again, requests[1], "block")
    # The body may also be another object by the time of the splice, as protobuf hands out a new one each time.
    assert splice_all(chat_format, body, requests[0], "block") == splice_all(chat_format, again, requests[0], "block")


def read_or_refuse(chat_format: Format, body: bytes, limits: ReadLimits = LIMITS) -> None:
    refused = None
    try:
        request = chat_format.chat.read_request(body, chat_format.path, limits)
    except UnreadableBody as error:
        refused = error
    else:
        for spliced in splice_all(chat_format, body, request, 'a "block"\n'):
            assert len(spliced) >= len(body)
    if refused is not None:
        assert refused.reason in REASONS
        assert refused.__context__ is None  # it would hold the client's bytes


@every_format
@given(body=st.binary(max_size=60) | st.text('{}[]",:\\ umessagcontrl01', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(chat_format: Format, body: bytes) -> None:
    read_or_refuse(chat_format, body)


@st.composite
def damaged(draw: st.DrawFn, chat_format: Format) -> bytes:
    body = bytearray(render(draw(chat_format.bodies), Random(draw(st.integers(0, 2**32)))))
    for _ in range(draw(st.integers(1, 3))):
        texts_at = [found.end() for found in re.finditer(rb'(?:text|content|input)"\s*:\s*"', body)]
        anywhere = st.integers(0, max(0, len(body) - 1))
        at = draw(anywhere | st.sampled_from(texts_at) if texts_at else anywhere)
        match draw(st.sampled_from(("truncate", "flip", "insert", "delete"))):
            case "truncate":
                del body[at:]
            case "flip":
                body[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                body[at:at] = draw(
                    st.sampled_from((b'"', b"\\", b"{", b"]", b"\xff", b"\xff", b"\\ud800", b"null", b","))
                )
            case "delete":
                del body[at : at + 3]
    return bytes(body)


@every_format
@given(data=st.data())
def test_a_damaged_body_is_read_or_refused(chat_format: Format, data: st.DataObject) -> None:
    limits = ReadLimits(query_bytes=data.draw(st.integers(0, 12)), recent_bytes=data.draw(st.integers(0, 12)))
    read_or_refuse(chat_format, data.draw(damaged(chat_format)), limits)
