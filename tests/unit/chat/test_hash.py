"""Hashes of messages: the same words give the same hash, however they are spelled."""

from __future__ import annotations

import hashlib
import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import (
    ChatFormat,
    UnreadableBody,
    anthropic_messages,
    gemini,
    hash_text,
    openai_chat,
    openai_responses,
)
from tests.unit.chat.formats import FORMATS, Format
from tests.unit.chat.odd_json import obj, parse, render, spell, texts

every_format = pytest.mark.parametrize("chat_format", FORMATS, ids=lambda chat_format: chat_format.name)


def sha256(canonical: str | bytes) -> str:
    return hashlib.sha256(canonical.encode() if isinstance(canonical, str) else canonical).hexdigest()


def minimal(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize(
    ("chat", "body", "canonical"),
    [
        (
            openai_chat,
            r'{ "model" : "x", "messages" : [ {"content" : "caf\u00e9 \/ \u001F\"\\\n", "role" : "us\u0065r"} ] }',
            r'[{"role":"user","content":"café / \u001f\"\\\n"}]',
        ),
        (openai_chat, '{"messages":[]}', "[]"),
        (openai_chat, '{"messages":[{"role":"assistant"}]}', '[{"role":"assistant","content":null}]'),
        (openai_chat, '{"messages":[{"role":null,"content":null}]}', '[{"role":null,"content":null}]'),
        (
            openai_chat,
            '{"messages":[{"role":"user","content":[ {"type" : "text", "text":"a b\\u00e9"}, 1.0 , %s ],"x":1}]}'
            % ("9" * 80),
            '[{"role":"user","content":[{"type":"text","text":"a b\\u00e9"},1.0,%s]}]' % ("9" * 80),
        ),
        (
            openai_chat,
            '{"messages":[{"role":"a"}],"messages":[{"role":"b","role":"c","content":"2"},{"role":"d","content":3}]}',
            '[{"role":"c","content":"2"},{"role":"d","content":3}]',
        ),
        (
            anthropic_messages,
            '{"system":"no","messages":[{"role":"user","content":"hi"}]}',
            '[{"role":"user","content":"hi"}]',
        ),
        (openai_responses, r'{"input":"h\u0069","instructions":"no"}', '[{"role":"user","content":"hi"}]'),
        (
            openai_responses,
            '{"input":[{"type":"reasoning"},{"role":"user","content":"a"},{"role":null},{"role":"assistant"}]}',
            '[{"role":"user","content":"a"},{"role":"assistant","content":null}]',
        ),
        (
            gemini,
            '{"contents":[{"parts":[{"text": "a"}]},{"role":"model","parts":{"text":"b"}}]}',
            '[{"role":"user","content":[{"text":"a"}]},{"role":"model","content":{"text":"b"}}]',
        ),
        (gemini, '{"contents":{"parts":[{"text":"a"}]}}', '[{"role":"user","content":[{"text":"a"}]}]'),
    ],
)
def test_it_is_the_hash_of_the_canonical_array(chat: ChatFormat, body: str, canonical: str) -> None:
    assert chat.hash_messages(body.encode()) == sha256(canonical)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "système"]), texts()), max_size=4),
    st.integers(0, 2**32),
)
def test_no_spelling_of_strings_and_no_white_space_changes_it(messages: list[tuple[str, str]], seed: int) -> None:
    tree = obj(model="x", messages=[obj(name="n", role=role, content=text) for role, text in messages])
    body = render(tree, Random(seed))
    inner = ",".join(f'{{"role":{minimal(role)},"content":{minimal(text)}}}' for role, text in messages)
    assert openai_chat.hash_messages(body) == sha256(f"[{inner}]")


@every_format
@given(data=st.data())
def test_what_is_read_as_a_request_has_a_hash_and_its_white_space_does_not_count(
    chat_format: Format, data: st.DataObject
) -> None:
    tree = parse(render(data.draw(chat_format.bodies), Random(0)))
    plain = json.dumps(_plain(tree), ensure_ascii=False)
    loose = json.dumps(_plain(tree), ensure_ascii=False, indent=3)
    hashes = {chat_format.chat.hash_messages(body.encode()) for body in (plain, loose)}
    assert len(hashes) == 1


def _plain(tree: Any) -> Any:
    """As `json` writes it: without duplicate keys, numbers as strings."""
    if isinstance(tree, list) and type(tree) is not list:
        return {key: _plain(value) for key, value in tree}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


@every_format
@given(body=st.binary(max_size=60) | st.text('{}[]",:\\ umessagcontrl01', max_size=60).map(str.encode))
def test_any_bytes_have_a_hash_or_are_refused(chat_format: Format, body: bytes) -> None:
    hash_or_refuse(chat_format.chat, body)
    for key in (b"messages", b"input", b"contents"):
        hash_or_refuse(chat_format.chat, b'{"%b":[{"role":"user","content":%b,"parts":%b}]}' % (key, body, body))


def hash_or_refuse(chat: ChatFormat, body: bytes) -> None:
    refused = None
    try:
        assert len(chat.hash_messages(body)) == 64
    except UnreadableBody as error:
        refused = error
    assert refused is None or refused.__context__ is None  # it would hold the client's bytes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
        (rb'"\ud83d"', "not_json"),
        (b'"\xff\\n"', "not_utf8"),
        (b"[NaN]", "not_json"),
    ],
)
def test_what_cannot_be_read_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableBody) as refused:
        openai_chat.hash_messages(b'{"messages":[{"role":"user","content":%b}]}' % content)
    assert refused.value.reason == reason


def test_too_many_messages_are_refused() -> None:
    with pytest.raises(UnreadableBody, match="too_many_messages"):
        openai_chat.hash_messages(b'{"messages":[%b{"role":"user"}]}' % (b'{"role":"user"},' * 20_000))


@given(text=st.text(max_size=20), seed=st.integers(0, 2**32))
def test_a_text_has_the_hash_of_its_utf8(text: str, seed: int) -> None:
    assert hash_text(text) == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(spell(text, Random(seed))) == text


def test_a_lone_surrogate_in_a_text_does_not_raise() -> None:
    assert len(hash_text("\ud83d")) == 64
