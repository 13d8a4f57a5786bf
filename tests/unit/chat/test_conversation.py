"""Long conversations and heavy ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.chat import (
    ChatFormat,
    Placement,
    ReadLimits,
    UnreadableBody,
    anthropic_messages,
    gemini,
    openai_chat,
    openai_responses,
)

PICTURE = "QUJD" * 50_000


def repeated(count: int) -> bytes:
    message = b'{"role":"user","content":"x"}'
    return b'{"messages":[' + b",".join([message] * count) + b"]}"


@pytest.mark.parametrize("count", [1000, 20_000])
def test_many_messages_are_read(count: int) -> None:
    body = repeated(count)
    request = openai_chat.read_request(body, "/", ReadLimits())
    spliced = openai_chat.splice(body, request, "B", Placement.LAST_USER)
    assert spliced == body[: -len(b'x"}]}')] + b'B\\n\\nx"}]}'


@pytest.mark.parametrize("count", [20_001, 100_000])
def test_more_messages_or_parts_than_anyone_sends_are_refused(count: int) -> None:
    parts = b",".join([b"{}"] * count)
    for body in (repeated(count), b'{"messages":[{"role":"user","content":[%b]}]}' % parts):
        with pytest.raises(UnreadableBody, match="too_many_messages"):
            openai_chat.read_request(body, "/", ReadLimits())


@pytest.mark.parametrize(
    ("chat_format", "path", "body"),
    [
        (openai_chat, "/v1/chat/completions", '{{"messages":[{{"role":"user","content":"hi"}}],"tools":[{}]}}'),
        (anthropic_messages, "/v1/messages", '{{"messages":[{{"role":"user","content":"hi"}}],"tools":[{}]}}'),
        (openai_responses, "/v1/responses", '{{"input":[{{"role":"user","content":"hi"}}],"tools":[{}]}}'),
        (gemini, "/v1beta/models/g:generateContent", '{{"contents":[{{"parts":[{{"text":"hi"}}]}}],"tools":[{}]}}'),
    ],
    ids=["openai_chat", "anthropic_messages", "openai_responses", "gemini"],
)
def test_a_body_of_so_many_objects_that_its_decoding_would_hold_others_up_is_refused(
    chat_format: ChatFormat, path: str, body: str
) -> None:
    others = body.format("").count("{")
    most = body.format(",".join(["{}"] * (99_999 - others))).encode()
    assert chat_format.read_request(most, path, ReadLimits()).query == "hi"
    with pytest.raises(UnreadableBody, match="too_many_messages"):
        chat_format.read_request(most.replace(b"[{},", b"[{},{},"), path, ReadLimits())


def test_a_long_text_of_json_is_no_body_of_many_objects() -> None:
    log = '{"level": "info"}\n' * 60_000 + '{\n "level": "info"}\n' * 60_000
    body = json.dumps({"messages": [{"role": "user", "content": log}]}).encode()
    assert openai_chat.read_request(body, "/v1/chat/completions", ReadLimits()).query


@pytest.mark.parametrize("count", [2, 81])
def test_all_messages_together_have_no_more_parts_than_one_may_have(count: int) -> None:
    many = ",".join(["{}"] * 10_001)
    message = f'{{"role":"user","content":[{many}]}}'
    result = f'{{"role":"user","content":[{{"type":"tool_result","content":[{many}]}}]}}'
    for one in (message, result):
        read_one = f'{{"messages":[{one}]}}'.encode()
        assert openai_chat.read_request(read_one, "/", ReadLimits()).query == ""
        with pytest.raises(UnreadableBody, match="too_many_messages"):
            openai_chat.read_request(f'{{"messages":[{",".join([one] * count)}]}}'.encode(), "/", ReadLimits())


def test_a_content_that_is_read_twice_counts_once() -> None:
    """For a text, and for its weight."""
    message = '{{"role":"user","content":[{}]}}'.format(",".join(["{}"] * 15_000))
    body = f'{{"messages":[{message},{{"role":"assistant","content":"x"}}]}}'.encode()
    assert openai_chat.read_request(body, "/", ReadLimits()).content_bytes == len(body)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_recent_messages_obey_their_limits(limit: int) -> None:
    limits = ReadLimits(recent_messages=limit, recent_bytes=10)
    messages = [{"role": "user", "content": f"{n} " + "a" * 100} for n in range(5)]
    recent = openai_chat.read_request(json.dumps({"messages": messages}).encode(), "/", limits).recent
    assert [message.text[0] for message in recent] == ["1", "2", "3"][3 - limit :]
    assert all(len(message.text) <= 10 for message in recent)


def weight(chat_format: ChatFormat, **body: Any) -> int:
    return chat_format.read_request(json.dumps(body).encode(), "/x:y", ReadLimits()).content_bytes


def test_text_weighs_what_it_is() -> None:
    messages = [{"role": "user", "content": "a" * 100_000}, {"role": "user", "content": "b" * 100_000}]
    assert 200_000 < weight(openai_chat, messages=messages) < 200_200


@pytest.mark.parametrize(
    ("chat_format", "messages", "content", "part"),
    [
        (openai_chat, "messages", "content", {"type": "image_url", "image_url": {"url": PICTURE}}),
        (openai_chat, "messages", "content", {"type": "input_audio", "input_audio": {"data": PICTURE}}),
        (openai_chat, "messages", "content", {"type": "file", "file": {"file_data": PICTURE}}),
        (openai_responses, "input", "content", {"type": "input_image", "image_url": PICTURE}),
        (openai_responses, "input", "content", {"type": "input_file", "file_data": PICTURE}),
        (openai_responses, "input", "output", {"type": "input_image", "image_url": PICTURE}),
        (anthropic_messages, "messages", "content", {"source": {"type": "base64", "data": PICTURE}}),
        (anthropic_messages, "messages", "content", {"content": [{"source": {"type": "base64", "data": PICTURE}}]}),
        (gemini, "contents", "parts", {"inlineData": {"data": PICTURE}}),
        (gemini, "contents", "parts", {"inline_data": {"data": PICTURE}}),
    ],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_a_picture_weighs_its_tokens(
    chat_format: ChatFormat, messages: str, content: str, part: Any, is_last: bool
) -> None:
    text = {"type": {"input": "input_text"}.get(messages, "text"), "text": "What is this?"}
    if chat_format is gemini:
        del text["type"]
    turns = [{"role": "user", content: [part, text]}] + [{"role": "user", content: [text]}] * (not is_last)
    assert 6000 < weight(chat_format, **{messages: turns}) < 6400


def test_a_document_of_plain_text_weighs_what_it_is() -> None:
    document = {"type": "document", "source": {"type": "text", "data": "word " * 40_000}}
    assert weight(anthropic_messages, messages=[{"role": "user", "content": [document]}]) > 200_000


def test_deeper_results_are_not_looked_into() -> None:
    """Each level would be one more pass over the same bytes, and one more frame on the stack."""
    content: Any = [{"source": {"type": "base64", "data": PICTURE}}]
    for _ in range(100):
        content = [{"content": content}]
    assert weight(anthropic_messages, messages=[{"role": "user", "content": content}]) > len(PICTURE)


@pytest.mark.parametrize("content", [b'"Hi"', b'[{"type":"text","text":"Hi"}]'])
@pytest.mark.parametrize("size", [1, 40_000])
def test_edit_points_lie_at_their_values(content: bytes, size: int) -> None:
    """A wrong one would only make the splice read the body again, which no other test sees."""
    messages = (
        b'{"role":"system","content":"x"}',
        b'{"role":"user","content":[]}',
        b'{"role":"user","content":%b}' % content,
        b'{"role":"assistant","content":"%b"}' % (b"y" * size),
        b'{"role":"user","content":%b}' % content,
    )
    body = b'{"messages":[%b]}' % b",".join(messages)
    edits = openai_chat.read_request(body, "/", ReadLimits()).edits
    assert edits.user_content_at == body.rindex(content)
    assert (edits.opening is None) == (size == 1)
    if edits.opening:
        assert edits.opening.leading == 1
        assert body[edits.opening.first_content_at :].startswith(b'"x"')
        assert body[edits.opening.next_content_at :].startswith(b"[]}")
        assert body[edits.opening.first_user_at : edits.opening.first_user_end] == b"[]"


@pytest.mark.parametrize("picture", [b"", b'{"type":"image_url"},'])
def test_the_first_text_of_the_only_message_needs_no_second_look(picture: bytes) -> None:
    long = b'{"type":"text","text":"%b"}' % (b"y" * 40_000)
    body = b'{"messages":[{"role":"user","content":[%b{"type":"text","text":"Hi"},%b]}]}' % (picture, long)
    opening = openai_chat.read_request(body, "/", ReadLimits()).edits.opening
    assert opening is not None
    assert body[opening.first_user_at : opening.first_user_end] == b'"Hi"'
