"""RESP2, and a link to a server that misbehaves; real Valkeys are in the integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.redis.link import LinkProblem, RedisLink, Refusal, Wire, _NotRedis, encode_command, read_reply
from extproc.turns.broker import Broker


def test_a_command_is_an_array_of_strings() -> None:
    assert encode_command("GET", b"k\r\n") == b"*2\r\n$3\r\nGET\r\n$3\r\nk\r\n\r\n"


REPLIES: list[tuple[bytes, Any]] = [
    (b"+OK\r\n", "OK"),
    (b"-NOSCRIPT none\r\n", Refusal("NOSCRIPT none")),
    (b":-42\r\n", -42),
    (b"$3\r\na\r\n\r\n", b"a\r\n"),
    (b"$-1\r\n", None),
    (b"*3\r\n:1\r\n$1\r\nx\r\n*1\r\n:2\r\n", [1, b"x", [2]]),
    (b"*-1\r\n", []),
]


@pytest.mark.parametrize(("raw", "reply"), REPLIES)
def test_a_reply_is_read_when_it_is_whole(raw: bytes, reply: Any) -> None:
    assert read_reply(raw, 0) == (reply, len(raw))
    for end in range(len(raw)):
        assert read_reply(raw[:end], 0)[1] == -1


@pytest.mark.parametrize("raw", [b"?\r\n", b":x\r\n", b"$99999999\r\n", b"*99999\r\n"])
def test_what_is_no_redis_is_refused(raw: bytes) -> None:
    with pytest.raises(_NotRedis):
        read_reply(raw, 0)


@given(st.lists(st.sampled_from(REPLIES), max_size=6), st.lists(st.integers(0, 120)))
def test_cut_anywhere_the_replies_are_the_same(replies: list[tuple[bytes, Any]], cuts: list[int]) -> None:
    raw = b"".join(part for part, _ in replies)
    read: list[Any] = []
    wire = Wire(read.append, lambda: None)
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    for start, end in pairwise(edges):
        wire.data_received(raw[start:end])
    assert read == [reply for _, reply in replies]


@given(st.binary())
def test_any_bytes_leave_the_process_alive(raw: bytes) -> None:
    Wire(lambda _reply: None, lambda: None).data_received(raw)


Answer = Callable[[bytes], bytes]


@asynccontextmanager
async def linked(answer: Answer, timeout_s: float = 0.05) -> AsyncIterator[RedisLink]:
    """A link to a server that answers PING, and all else with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while command := await reader.read(4096):
            writer.write(b"+PONG\r\n" if b"PING" in command else answer(command))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = RedisLink(Broker.parse(f"redis://127.0.0.1:{port}"), timeout_s)
    await link.start()
    try:
        yield link
    finally:
        await link.close()
        server.close()
        await asyncio.sleep(0.01)


async def test_answers_come_back_in_order() -> None:
    def count(command: bytes) -> bytes:
        return b"".join(b":%d\r\n" % number for number in range(command.count(b"*1\r\n")))

    async with linked(count, timeout_s=5) as link:
        assert await asyncio.gather(*(link.ask(encode_command("X")) for _ in range(3))) == [0, 1, 2]


async def test_an_answer_that_does_not_come_is_a_timeout_and_then_a_lost_connection() -> None:
    async with linked(lambda _command: b"") as link:
        assert await asyncio.wait_for(link.ask(b"*1\r\n$1\r\nX\r\n"), 20) is LinkProblem.TIMEOUT
        for _ in range(100):
            if not link.is_up:
                break
            await asyncio.sleep(0.02)
        assert not link.is_up
        assert await link.ask(b"*1\r\n$1\r\nX\r\n") is LinkProblem.DOWN


async def test_a_late_answer_is_not_taken_for_the_next_ones() -> None:
    held: list[bytes] = []

    def late(command: bytes) -> bytes:
        held.append(command)
        return b"" if len(held) == 1 else b":1\r\n:2\r\n"

    async with linked(late, timeout_s=0.2) as link:
        assert await link.ask(encode_command("A")) is LinkProblem.TIMEOUT
        assert await link.ask(encode_command("B")) == 2


async def test_rubbish_ends_the_connection() -> None:
    async with linked(lambda _command: b"HTTP/1.1 400\r\n\r\n", timeout_s=5) as link:
        assert await asyncio.wait_for(link.ask(encode_command("X")), 20) is LinkProblem.DOWN


async def test_with_nobody_there_a_question_does_not_wait() -> None:
    link = RedisLink(Broker.parse("redis://127.0.0.1:1"), 5)
    await link.start()
    assert await link.ask(encode_command("X")) is LinkProblem.DOWN
    await link.close()


@pytest.mark.parametrize("ticks", range(6))
async def test_it_can_be_closed_in_the_moment_in_which_an_attempt_ends(
    monkeypatch: pytest.MonkeyPatch, ticks: int
) -> None:
    refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect() -> None:
        await refused
        raise ConnectionRefusedError

    link = RedisLink(Broker.parse("redis://127.0.0.1:1"), 5)
    monkeypatch.setattr(link, "_connect", connect)
    starting = asyncio.create_task(link.start())
    for _ in range(5):
        await asyncio.sleep(0)
    refused.set_result(None)
    for _ in range(ticks):
        await asyncio.sleep(0)
    await asyncio.wait_for(link.close(), 20)
    starting.cancel()
