"""A recorded exchange comes apart where chunks begin and end."""

from __future__ import annotations

from pathlib import Path

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from bench.observer.recording import load, save, split

REQUEST_ID = b"0b6f3c52-6f0e-4a57-9a52-0f3f0c2f7a01"
OTHER_ID = b"5d1f7a34-93a8-4a0d-8a3e-6d9f4f1b2c02"


def written(message: ext_proc.ProcessingRequest) -> bytes:
    wire: bytes = message.SerializeToString()
    return wire


def headers(request_id: bytes = REQUEST_ID) -> bytes:
    one = base_pb2.HeaderValue(key="x-request-id", raw_value=request_id)
    sent = ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=[one]))
    return written(ext_proc.ProcessingRequest(request_headers=sent))


def body(text: bytes, *, end: bool = False) -> bytes:
    sent = ext_proc.HttpBody(body=text, end_of_stream=end)
    return written(ext_proc.ProcessingRequest(response_body=sent))


RESPONSE_HEADERS = written(ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders()))
CHUNKS = [body(b"%d" % number) for number in range(1, 5)]
END_APART = [headers(), RESPONSE_HEADERS, body(b"0"), *CHUNKS, body(b"last"), body(b"", end=True)]
END_WITH_LAST = [headers(), RESPONSE_HEADERS, body(b"0"), *CHUNKS, body(b"last", end=True)]


@pytest.mark.parametrize("messages", [END_APART, END_WITH_LAST])
def test_the_first_chunk_opens_and_the_last_one_closes(messages: list[bytes]) -> None:
    recording = split(messages)
    assert recording.opening == messages[:3]
    assert recording.chunks == CHUNKS
    assert recording.closing == messages[7:]


def test_another_request_differs_in_its_id_alone() -> None:
    recording = split(END_APART)
    assert recording.opening_of(OTHER_ID) == [headers(OTHER_ID), *recording.opening[1:]]


def test_chunks_that_envoy_joined_are_left_out() -> None:
    assert split(END_APART).only({b"1", b"4"}).chunks == [CHUNKS[0], CHUNKS[3]]


@pytest.mark.parametrize(
    "messages",
    [
        END_APART[:-1],
        [headers(), RESPONSE_HEADERS, body(b"0"), body(b"", end=True)],
        [headers(b"no-uuid"), *END_APART[1:]],
        [RESPONSE_HEADERS, *END_APART[2:]],
    ],
    ids=["without end", "too short", "id of another length", "without id"],
)
def test_what_is_no_whole_exchange_is_refused(messages: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"answer|request id"):
        split(messages)


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    recording = split(END_APART, [("traceparent", "00-1-2-01")])
    save(recording, tmp_path / "one.recording")
    assert load(tmp_path / "one.recording") == recording
