"""What is read in whole answers, and what holds for every answer: however it is cut, encoded or damaged."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from random import Random

import brotli
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.chat import AnswerLimits, ChatFormat, Completion, content_decoder
from tests.unit.chat.formats import FORMATS
from tests.unit.chat.transcripts import TRANSCRIPTS, Transcript

LIMITS = AnswerLimits()
TINY = AnswerLimits(max_text_bytes=7, max_event_bytes=300, max_json_bytes=400)

every_transcript = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda transcript: transcript.name)
every_format = pytest.mark.parametrize("chat", [each.chat for each in FORMATS], ids=lambda chat: chat.name)


def read(transcript: Transcript, chunks: Iterable[bytes] | None = None, limits: AnswerLimits = LIMITS) -> Completion:
    return read_body(transcript.chat, transcript.is_sse, [transcript.body] if chunks is None else chunks, limits)


def read_body(chat: ChatFormat, is_sse: bool, chunks: Iterable[bytes], limits: AnswerLimits = LIMITS) -> Completion:
    reader = chat.read_answer(is_sse, limits)
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def cut(body: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


@every_transcript
def test_a_transcript_is_read(transcript: Transcript) -> None:
    assert read(transcript) == transcript.expected


@every_transcript
def test_byte_by_byte_it_is_the_same(transcript: Transcript, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.chat._reader._BATCH_BYTES", 1)
    assert read(transcript, (bytes([byte]) for byte in transcript.body)) == transcript.expected


@pytest.mark.parametrize("batch_bytes", [1, 100, 8192])
@settings(max_examples=4 * settings().max_examples)
@given(transcript=st.sampled_from(TRANSCRIPTS), places=st.lists(st.integers(0, 2**16), max_size=12))
def test_any_split_gives_the_same_as_the_whole(batch_bytes: int, transcript: Transcript, places: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extproc.chat._reader._BATCH_BYTES", batch_bytes)
        assert read(transcript, cut(transcript.body, places)) == transcript.expected


@settings(max_examples=8 * settings().max_examples)
@given(
    transcript=st.sampled_from(TRANSCRIPTS),
    places=st.lists(st.integers(0, 2**16), max_size=6),
    at=st.integers(0, 2**16),
)
def test_so_does_any_split_within_small_limits_and_of_any_beginning(
    transcript: Transcript, places: list[int], at: int
) -> None:
    body = transcript.body[: at % (len(transcript.body) + 1)]
    whole = read(transcript, [body], TINY)
    assert max(len(whole.text.encode()), len(whole.refusal.encode())) <= TINY.max_text_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extproc.chat._reader._BATCH_BYTES", 1)
        assert read(transcript, cut(body, places), TINY) == whole


def deflate_raw(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


ENCODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "identity": ("identity", bytes),
    "gzip": ("gzip", gzip.compress),
    "two members": ("gzip", lambda body: gzip.compress(body[:100]) + gzip.compress(body[100:])),
    "zlib": ("deflate", zlib.compress),
    "raw": ("deflate", deflate_raw),
    "br": ("br", brotli.compress),
    "zstd": ("zstd", zstd.compress),
    "two frames": ("zstd", lambda body: zstd.compress(body[:100]) + zstd.compress(body[100:])),
    "gzip, br": ("gzip, br", lambda body: brotli.compress(gzip.compress(body))),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(
    transcript=st.sampled_from(TRANSCRIPTS), places=st.lists(st.integers(0, 2**16), max_size=12), whole=st.booleans()
)
def test_encoded_and_split_anywhere_it_is_the_same(
    encoding: str, transcript: Transcript, places: list[int], whole: bool
) -> None:
    name, encode = ENCODINGS[encoding]
    body = encode(transcript.body)
    decoder = content_decoder(name, 1_000_000)
    chunks = cut(body, places) if whole else [bytes([byte]) for byte in body]
    assert read(transcript, map(decoder.feed, chunks)) == transcript.expected
    assert not decoder.failed
    assert not decoder.is_cut


@every_format
@given(
    is_sse=st.booleans(),
    body=st.binary(max_size=80) | st.text('{}[]",:\\ data\n\rchoices01', max_size=80).map(str.encode),
)
def test_no_bytes_raise(chat: ChatFormat, is_sse: bool, body: bytes) -> None:
    read_body(chat, is_sse, [body])
    read_body(chat, is_sse, [b"data: ", body, b"\n\n"])
    read_body(chat, is_sse, [b'data: {"type":"', body, b'"}\n\n'])


@every_format
@given(
    transcript=st.sampled_from(TRANSCRIPTS),
    seed=st.integers(0, 2**32),
    piece=st.sampled_from(
        [
            b"null",
            b"[]",
            b"{}",
            b'"x"',
            b"-1",
            b"1e9",
            b"true",
            b"\xff",
            b"\\ud83d",
            b"\x00",
            b"\n\n",
            b"data:",
            b"[[",
            b"9" * 40,
        ]
    ),
)
def test_nor_does_a_damaged_transcript_of_any_format(
    chat: ChatFormat, transcript: Transcript, seed: int, piece: bytes
) -> None:
    random = Random(seed)
    body = bytearray(transcript.body)
    for _ in range(random.choice((1, 3, 20))):
        start = random.randrange(len(body) + 1)
        body[start : start + random.choice((0, 1, 2, 5, 30))] = piece
    completion = read_body(chat, random.random() < 0.5, [bytes(body)], random.choice((LIMITS, TINY)))
    completion.text.encode()


@every_format
@given(transcript=st.sampled_from(TRANSCRIPTS), seed=st.integers(0, 2**32))
def test_any_value_may_be_of_a_wrong_type(chat: ChatFormat, transcript: Transcript, seed: int) -> None:
    """A colon of JSON is followed by the value of some other key."""
    random = Random(seed)
    values = [b"null", b"[]", b"{}", b'"x"', b"-1", b"1.5", b"true", b"[[{}]]", b'{"type":{}}']
    pieces = transcript.body.split(b":")
    for at in range(1, len(pieces)):
        if random.random() < 0.1:
            pieces[at] = random.choice(values) + b"," + pieces[at]
    read_body(chat, transcript.is_sse, [b":".join(pieces)])


@every_format
def test_a_reader_that_saw_nothing_knows_nothing(chat: ChatFormat) -> None:
    assert chat.read_answer(True, LIMITS).finish() == Completion()
    assert read_body(chat, False, [b"", b" \r\n"]) == Completion()
