"""The stand-in speaks its providers' languages, to their own clients, and never stumbles."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from extproc.stack import provider as stand_in
from extproc.stack.provider import create_app

TEXT = "a block with <memory> and ünïcode — and more than one chunk of text"
CHAT = "/v1/chat/completions"


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app())
    async with httpx2.AsyncClient(transport=transport, base_url="http://stand-in") as client:
        yield client


@pytest.fixture
async def served() -> AsyncIterator[str]:
    """The stand-in on a port, for client libraries that bring their own transport."""
    server = uvicorn.Server(uvicorn.Config(create_app(), port=0, log_level="error"))
    running = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await asyncio.wait_for(running, 10)


class TestOpenAI:
    @pytest.fixture
    async def openai_client(self, served: str) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
            yield client

    async def test_chat(self, openai_client: openai.AsyncOpenAI) -> None:
        answer = await openai_client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": TEXT}]
        )
        assert TEXT in (answer.choices[0].message.content or "")
        assert answer.model == "gpt-4o"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_chat_as_a_stream(self, openai_client: openai.AsyncOpenAI) -> None:
        stream = await openai_client.chat.completions.create(
            model="gpt-4o",
            messages=[{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert TEXT in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert len({chunk.id for chunk in chunks}) == 1
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert chunks[-1].usage is not None

    async def test_responses(self, openai_client: openai.AsyncOpenAI) -> None:
        answer = await openai_client.responses.create(model="gpt-4o", input=TEXT)
        assert TEXT in answer.output_text
        assert answer.status == "completed"

    async def test_responses_as_a_stream(self, openai_client: openai.AsyncOpenAI) -> None:
        stream = await openai_client.responses.create(
            model="gpt-4o",
            input=[{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}],
            stream=True,
        )
        events = [event async for event in stream]
        assert [event.type for event in events][:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        last = events[-1]
        assert last.type == "response.completed"
        assert last.response.output_text == deltas
        assert TEXT in deltas

    async def test_models(self, openai_client: openai.AsyncOpenAI) -> None:
        assert "gpt-4o" in [model.id async for model in openai_client.models.list()]

    async def test_an_error(self, openai_client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.RateLimitError, match="status 429"):
            await openai_client.chat.completions.create(
                model="gpt-4o", messages=[], extra_headers={"x-standin-status": "429"}
            )


class TestAnthropic:
    @pytest.fixture
    async def anthropic_client(self, served: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
        async with anthropic.AsyncAnthropic(base_url=served, api_key="none", max_retries=0) as client:
            yield client

    async def test_messages(self, anthropic_client: anthropic.AsyncAnthropic) -> None:
        answer = await anthropic_client.messages.create(
            model="claude-echo", max_tokens=100, messages=[{"role": "user", "content": TEXT}]
        )
        block = answer.content[0]
        assert block.type == "text"
        assert TEXT in block.text
        assert answer.stop_reason == "end_turn"
        assert answer.usage.output_tokens > 0

    async def test_messages_as_a_stream(self, anthropic_client: anthropic.AsyncAnthropic) -> None:
        async with anthropic_client.messages.stream(
            model="claude-echo",
            max_tokens=100,
            messages=[{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert TEXT in text
        assert final.stop_reason == "end_turn"

    async def test_models(self, anthropic_client: anthropic.AsyncAnthropic) -> None:
        assert "claude-echo" in [model.id async for model in anthropic_client.models.list()]

    async def test_an_error(self, anthropic_client: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.InternalServerError, match="api_error"):
            await anthropic_client.messages.create(
                model="claude-x", max_tokens=1, messages=[], extra_headers={"x-standin-status": "500"}
            )


class TestText:
    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            ([{"role": "user", "content": "first"}, {"role": "user", "content": "last"}], "last"),
            ([{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}], "asked"),
            ([{"role": "user", "content": "asked"}, {"role": "user", "content": [{"type": "image_url"}]}], "asked"),
            ([{"role": "user", "content": [{"text": "one"}, {"text": "two"}]}], "one\ntwo"),
            ("bare", "bare"),
            ([None, 1, "x", {}, {"role": "user"}, {"role": "user", "content": [None, {"text": 1}]}], ""),
            (None, ""),
            ({}, ""),
        ],
    )
    def test_is_that_of_the_last_user_message_with_text(self, messages: Any, text: str) -> None:
        assert stand_in.last_user_text(messages) == text


class TestOddRequests:
    async def test_an_unknown_path_is_a_404_of_openai(self, client: httpx2.AsyncClient) -> None:
        for method, path in (("POST", "/v1/nothing"), ("GET", CHAT), ("DELETE", "/"), ("POST", "/v1/models")):
            response = await client.request(method, path)
            assert response.status_code == 404
            assert response.json()["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"{", b"[]", b"1", b'"x"', b"null", b"\xff", b'{"n":' + b"9" * 10_000 + b"}"),
            b"[" * 300_000 + b"]" * 300_000,
        ],
    )
    @pytest.mark.parametrize("path", stand_in.SHAPES)
    async def test_an_unreadable_body_is_a_400(self, client: httpx2.AsyncClient, path: str, body: bytes) -> None:
        response = await client.post(path, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"]

    @pytest.mark.parametrize("body", [b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'\xef\xbb\xbf{"n":NaN}'])
    @pytest.mark.parametrize("stream", [b"", b',"stream":true'])
    async def test_an_odd_body_is_answered(self, client: httpx2.AsyncClient, body: bytes, stream: bytes) -> None:
        response = await client.post(CHAT, content=body[:-1] + stream + b"}")
        assert response.status_code == 200

    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            ("gzip", gzip.compress(b'{"model":"packed"}', mtime=0)),
            ("GZIP", gzip.compress(b'{"model":"packed"}', mtime=0)),
            ("deflate", zlib.compress(b'{"model":"packed"}')),
            ("identity", b'{"model":"packed"}'),
        ],
    )
    async def test_compressed(self, client: httpx2.AsyncClient, encoding: str, body: bytes) -> None:
        response = await client.post(CHAT, content=body, headers={"content-encoding": encoding})
        assert response.json()["model"] == "packed"

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
    async def test_badly_compressed_is_a_400(self, client: httpx2.AsyncClient, encoding: str) -> None:
        response = await client.post(CHAT, content=b"{}", headers={"content-encoding": encoding})
        assert response.status_code == 400

    async def test_a_compression_bomb_is_a_400(
        self, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stand_in, "MAX_BODY_BYTES", 1000)
        for encoding, bomb in (
            ("gzip", gzip.compress(b" " * 10_000, mtime=0)),
            ("deflate", zlib.compress(b" " * 10_000)),
        ):
            response = await client.post(CHAT, content=bomb, headers={"content-encoding": encoding})
            assert response.status_code == 400

    @given(
        body=st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(
                        ["model", "messages", "input", "role", "content", "text", "stream", "stream_options", "user"]
                    ),
                    inner,
                )
            ),
        )
    )
    def test_any_json_is_answered_or_refused(self, body: Any) -> None:
        try:
            turn = stand_in.read_turn(body)
        except stand_in.UnreadableBody:
            assert not isinstance(body, dict)
            return
        for shape in stand_in.SHAPES.values():
            stand_in.encode(shape.answer(turn))
            assert all(event.endswith(b"\n\n") for event in shape.events(turn))


class TestHooks:
    @pytest.mark.parametrize("value", ["200", "99", "600", "-1", "x", "5e2", "9" * 30, "٥٠٠"])
    async def test_a_status_out_of_range_is_ignored(self, client: httpx2.AsyncClient, value: str) -> None:
        headers = {b"x-standin-status": value.encode()}
        response = await client.post(CHAT, json={}, headers=headers)
        assert response.status_code == 200

    async def test_headers(self, client: httpx2.AsyncClient) -> None:
        wanted = ["x-ibex-evil: 1", "x-a:b:c", "content-length: 5", "bad name: x", "", ": x"]
        response = await client.post(CHAT, json={}, headers=[("x-standin-response-header", text) for text in wanted])
        assert response.headers["x-ibex-evil"] == "1"
        assert response.headers["x-a"] == "b:c"
        assert response.json()["object"] == "chat.completion"

    async def test_a_delay(self, client: httpx2.AsyncClient) -> None:
        response = await client.post(CHAT, json={}, headers={"x-standin-delay-ms": "60"})
        assert response.elapsed.total_seconds() >= 0.06


class TestReceived:
    async def test_every_byte_and_header(self, client: httpx2.AsyncClient) -> None:
        body = b'{ "model" : 1.0 }\xff'
        await client.post(f"{CHAT}?a=b", content=body, headers=[("X-Twice", "1"), ("x-twice", "2")])
        (entry,) = (await client.get("/received")).json()
        assert (entry["method"], entry["path"]) == ("POST", f"{CHAT}?a=b")
        assert base64.b64decode(entry["body"]) == body
        assert entry["headers"]["x-twice"] == "1, 2"

    async def test_forgets_when_told(self, client: httpx2.AsyncClient) -> None:
        await client.post(CHAT, json={})
        assert (await client.delete("/received")).status_code == 204
        assert (await client.get("/received")).json() == []

    async def test_is_bounded_by_number(self, client: httpx2.AsyncClient) -> None:
        for number in range(stand_in.MAX_REQUESTS + 5):
            await client.get(f"/{number}")
        paths = [entry["path"] for entry in (await client.get("/received")).json()]
        assert len(paths) == stand_in.MAX_REQUESTS
        assert paths[-1] == f"/{stand_in.MAX_REQUESTS + 4}"

    async def test_is_bounded_by_bytes(self, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stand_in, "MAX_REMEMBERED_BYTES", 100)
        for size in (60, 60, 30):
            await client.post("/x", content=b"x" * size)
        sizes = [len(base64.b64decode(entry["body"])) for entry in (await client.get("/received")).json()]
        assert sizes == [60, 30]

    async def test_a_larger_body_is_cut(self, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stand_in, "MAX_BODY_BYTES", 10)
        assert (await client.post(CHAT, content=json.dumps({"n": "x" * 100}).encode())).status_code == 400
