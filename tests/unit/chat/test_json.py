"""Bodies that are no chat request, and bodies that only look so."""

from __future__ import annotations

import pytest

from extproc.chat import Placement, ReadLimits, UnreadableBody
from tests.unit.chat.formats import FORMATS, Format

LIMITS = ReadLimits()

every_format = pytest.mark.parametrize("chat_format", FORMATS, ids=lambda chat_format: chat_format.name)


def refusal(chat_format: Format, body: bytes) -> str:
    with pytest.raises(UnreadableBody) as caught:
        chat_format.chat.read_request(body, chat_format.path, LIMITS)
    assert caught.value.__context__ is None
    return caught.value.reason


def body_with(chat_format: Format, messages: bytes, more: bytes = b"") -> bytes:
    return b'{"%b":%b%b}' % (chat_format.messages.encode(), messages, more)


def user(chat_format: Format, text: bytes) -> bytes:
    """An array of one user message whose text is the given spelling."""
    content = b'[{"text":%b}]' % text if chat_format.name == "gemini" else text
    return b'[{"role":"user","%b":%b}]' % (chat_format.content.encode(), content)


@every_format
@pytest.mark.parametrize(("count", "reason"), [(149_999, "not_json"), (150_000, "too_many_messages")])
def test_too_many_objects_are_refused_before_any_is_built(chat_format: Format, count: int, reason: str) -> None:
    """The string never ends: whoever decodes the body finds that it is no JSON."""
    body = b'{"a":"' + b"{ } " * count
    assert refusal(chat_format, body) == reason
    with pytest.raises(UnreadableBody) as caught:
        chat_format.chat.hash_messages(body)
    assert caught.value.reason == reason


@every_format
@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b'{"a":1', b"\xef\xbb\xbf{}", b"\x00", b"{'a':1}", b'{"a":NaN}', b'{"a":01}', b"\xff"],
)
def test_what_is_not_json_is_refused(chat_format: Format, body: bytes) -> None:
    assert refusal(chat_format, body) == "not_json"


@every_format
def test_nothing_may_follow_the_body(chat_format: Format) -> None:
    assert refusal(chat_format, body_with(chat_format, b"[]") + b"x") == "not_json"


@every_format
@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"1", b'"x"', b'{"other":[]}'])
def test_json_of_another_kind_is_refused(chat_format: Format, body: bytes) -> None:
    assert refusal(chat_format, body) == "wrong_type"


@every_format
@pytest.mark.parametrize("messages", [b"null", b"5", b"true", b"[null]", b"[5]", b'["x"]', b"[[]]", b'[{"role":5}]'])
def test_messages_of_another_kind_are_refused(chat_format: Format, messages: bytes) -> None:
    assert refusal(chat_format, body_with(chat_format, messages)) == "wrong_type"


@every_format
@pytest.mark.parametrize("depth", [10_000, 300_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(chat_format: Format, depth: int, opening: bytes) -> None:
    deep = opening * depth
    reason = "too_many_messages" if deep.count(b"{") > 150_000 else "too_deep"
    assert refusal(chat_format, body_with(chat_format, b"[]", b',"x":' + deep)) == reason
    assert refusal(chat_format, body_with(chat_format, b'[{"role":"user","content":' + deep)) == reason
    assert refusal(chat_format, body_with(chat_format, deep)) in {reason, "wrong_type"}


@every_format
@pytest.mark.parametrize(
    "value", [b"9" * 80, b"1e999", b"-0.0", b"1.0", b'"\\u0000"', b'"\xff"', b'{"a":1,"a":2}', b'"\\ud83d\\ude00"']
)
def test_odd_values_elsewhere_are_none_of_our_business(chat_format: Format, value: bytes) -> None:
    body = body_with(chat_format, user(chat_format, b'"Hi"'), b',"x":' + value)
    request = chat_format.chat.read_request(body, chat_format.path, LIMITS)
    for placement in Placement:
        assert b',"x":' + value in chat_format.chat.splice(body, request, "BLOCK", placement)


@every_format
def test_a_lone_surrogate_is_refused(chat_format: Format) -> None:
    """msgspec refuses it anywhere; so does Envoy's own JSON parser."""
    assert refusal(chat_format, body_with(chat_format, user(chat_format, b'"\\ud800"'))) == "not_json"


@every_format
@pytest.mark.parametrize("text", [b'"\xff"', b'"\xed\xa0\x80"', b'"\xc3"'])
def test_text_that_is_not_utf8_is_refused(chat_format: Format, text: bytes) -> None:
    assert refusal(chat_format, body_with(chat_format, user(chat_format, text))) == "not_utf8"


@every_format
def test_control_characters_are_text(chat_format: Format) -> None:
    body = body_with(chat_format, user(chat_format, b'"a\\u0000\\u001f\x7f"'))
    request = chat_format.chat.read_request(body, chat_format.path, LIMITS)
    assert request.query == "a\x00\x1f\x7f"


@every_format
def test_of_duplicate_keys_the_last_counts(chat_format: Format) -> None:
    key = chat_format.messages.encode()
    body = b'{"%b":%b,"%b":%b}' % (key, user(chat_format, b'"old"'), key, user(chat_format, b'"new"'))
    request = chat_format.chat.read_request(body, chat_format.path, LIMITS)
    assert request.query == "new"
    assert b'"BLOCK\\n\\nnew"' in chat_format.chat.splice(body, request, "BLOCK", Placement.LAST_USER)
