"""Envoy's messages, checked with a second, independent implementation of their wire format (envoy-data-plane)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from extproc.filter import wire


@pytest.fixture(scope="module")
def other() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        from envoy_data_plane.envoy.service.ext_proc import v3
    return v3


def headers_message(*pairs: tuple[str, bytes]) -> ext_proc.HttpHeaders:
    entries = [base_pb2.HeaderValue(key=name, raw_value=value) for name, value in pairs]
    return ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=entries))


def test_a_replaced_body_reads_the_same_elsewhere(other: Any) -> None:
    metadata: wire.Metadata = {"outcome": "injected", "memories": 2, "assemble_ms": 1.5, "fallback": False}
    reply = other.ProcessingResponse.parse(wire.replace_body(b"\x00body", 5, metadata))
    common = reply.request_body.response
    assert common.body_mutation.body == b"\x00body"
    [option] = common.header_mutation.set_headers
    assert (option.header.key, option.header.raw_value, option.header.value) == ("content-length", b"5", "")
    assert option.append_action.name == "OVERWRITE_IF_EXISTS_OR_ADD"
    fields = reply.dynamic_metadata.fields["ibex.context"].struct_value.fields
    assert fields["outcome"].string_value == "injected"
    assert fields["memories"].number_value == 2
    assert fields["assemble_ms"].number_value == 1.5
    assert fields["fallback"].bool_value is False


def test_response_headers_read_the_same_elsewhere(other: Any) -> None:
    reply = other.ProcessingResponse.parse(wire.set_response_headers([("x-a", "1"), ("x-b", "ü")], None))
    options = reply.response_headers.response.header_mutation.set_headers
    assert [(option.header.key, option.header.raw_value) for option in options] == [
        ("x-a", b"1"),
        ("x-b", "ü".encode()),
    ]
    assert reply.immediate_response is None
    assert reply.mode_override is None


@pytest.mark.parametrize(
    "kind",
    [
        *("request_headers", "request_body", "request_trailers"),
        *("response_headers", "response_body", "response_trailers"),
    ],
)
@pytest.mark.parametrize("metadata", [None, {"outcome": "not_chat"}])
def test_an_unchanged_reply_is_of_its_kind_elsewhere(other: Any, kind: str, metadata: wire.Metadata | None) -> None:
    reply = other.ProcessingResponse.parse(wire.unchanged(kind, metadata))
    assert getattr(reply, kind) is not None
    assert (reply.dynamic_metadata is not None) == (metadata is not None)


def test_an_unknown_kind_gets_an_empty_reply() -> None:
    assert wire.unchanged(None) == b""


def test_headers_are_read_by_name_and_a_header_sent_twice_is_joined() -> None:
    message = headers_message(("a", b"1"), ("b", b"2"), ("a", b"3"), ("bad", b"\xff\xfe"), ("empty", b""))
    read = wire.read_headers(message, {"a", "bad", "empty", "absent"})
    assert read == {"a": "1,3", "bad": "\ufffd\ufffd", "empty": ""}


def test_the_status_is_found_and_may_be_absent() -> None:
    assert wire.read_status(headers_message(("x", b"1"), (":status", b"204"))) == "204"
    assert wire.read_status(headers_message(("x", b"1"))) == ""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (("org",), "o"),
        (("payload", "sub"), "u1"),
        (("payload",), ""),
        (("payload", "sub", "deeper"), ""),
        (("number",), ""),
        (("null",), ""),
        (("absent",), None),
        (("payload", "absent"), None),
        (("org", "deeper"), ""),
    ],
)
def test_metadata_is_text_at_a_path_or_nothing_or_malformed(path: tuple[str, ...], found: str | None) -> None:
    struct = struct_pb2.Struct()
    struct.update({"org": "o", "number": 5, "null": None, "payload": {"sub": "u1"}})
    request = ext_proc.ProcessingRequest()
    request.metadata_context.filter_metadata["ns"].CopyFrom(struct)
    before = request.SerializeToString(deterministic=True)
    assert wire.metadata_text(request, "ns", path) == found
    assert wire.metadata_text(request, "other", path) is None
    assert request.SerializeToString(deterministic=True) == before, "reading adds nothing"


def metadata_message(namespace: str, **values: Any) -> ext_proc.ProcessingRequest:
    struct = struct_pb2.Struct()
    struct.update(values)
    request = ext_proc.ProcessingRequest()
    request.metadata_context.filter_metadata[namespace].CopyFrom(struct)
    return request


def test_what_the_context_filter_wrote_is_text_numbers_and_truth_values() -> None:
    request = metadata_message(
        "ibex.context", outcome="injected", memories=2, fallback=False, empty="", null=None, list=[1], struct={"a": 1}
    )
    assert wire.context_metadata(request) == {"outcome": "injected", "memories": 2.0, "fallback": False, "empty": ""}


@pytest.mark.parametrize("number", [float("inf"), -1.5, 1e308, 0.0])
def test_any_number_is_read_as_it_is(number: float) -> None:
    assert wire.context_metadata(metadata_message("ibex.context", memories=number)) == {"memories": number}


def test_no_number_at_all_is_read_as_it_is() -> None:
    read = wire.context_metadata(metadata_message("ibex.context", memories=float("nan")))["memories"]
    assert isinstance(read, float)
    assert math.isnan(read)


def test_what_was_set_as_context_metadata_is_read_back() -> None:
    metadata: wire.Metadata = {"outcome": "injected", "memories": 2, "assemble_ms": 1.5, "fallback": True, "text": ""}
    reply = ext_proc.ProcessingResponse.FromString(wire.unchanged("request_body", metadata))
    request = ext_proc.ProcessingRequest()
    context = reply.dynamic_metadata.fields["ibex.context"].struct_value
    request.metadata_context.filter_metadata["ibex.context"].CopyFrom(context)
    assert wire.context_metadata(request) == metadata


def test_metadata_of_other_namespaces_is_not_the_context_filters_and_reading_adds_nothing() -> None:
    request = metadata_message("ibex.identity", outcome="injected")
    before = request.SerializeToString(deterministic=True)
    assert wire.context_metadata(request) == {}
    assert wire.context_metadata(ext_proc.ProcessingRequest()) == {}
    assert request.SerializeToString(deterministic=True) == before


def test_attributes_are_text_of_whichever_filter() -> None:
    request = ext_proc.ProcessingRequest()
    request.attributes["envoy.filters.http.ext_proc"].update({"xds.cluster_name": "openai", "response.code": 200})
    request.attributes["observer"].update({"response.code_details": "via_upstream", "null": None, "empty": ""})
    assert wire.attributes(request) == {
        "xds.cluster_name": "openai",
        "response.code_details": "via_upstream",
        "empty": "",
    }
    assert wire.attributes(ext_proc.ProcessingRequest()) == {}


def test_attributes_of_the_other_implementation_are_read(other: Any) -> None:
    from envoy_data_plane.google.protobuf import Struct, Value

    message = other.ProcessingRequest(
        attributes={"envoy.filters.http.ext_proc": Struct(fields={"xds.cluster_name": Value(string_value="openai")})}
    )
    assert wire.attributes(ext_proc.ProcessingRequest.FromString(bytes(message))) == {"xds.cluster_name": "openai"}


def chunk_message(body: bytes, metadata: str, *, end_of_stream: bool, is_request: bool) -> ext_proc.ProcessingRequest:
    message = ext_proc.ProcessingRequest(observability_mode=True)
    shown = message.request_body if is_request else message.response_body
    shown.body = body
    shown.end_of_stream = end_of_stream
    if metadata:
        message.metadata_context.filter_metadata["ibex.context"].update({"session_id": metadata})
    return message


sizes = st.sampled_from([0, 1, 2, 3, 125, 126, 127, 128, 129, 300, 16_379, 16_380, 16_381, 16_383, 16_384, 70_000])


@given(sizes, st.text(max_size=200), st.booleans(), st.booleans())
def test_the_fast_way_to_a_chunk_says_what_decoding_says(
    size: int, metadata: str, end_of_stream: bool, is_request: bool
) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    message = chunk_message(body, metadata, end_of_stream=end_of_stream, is_request=is_request)
    chunk = wire.answer_chunk(message.SerializeToString())
    if end_of_stream or is_request or not body or size >= 16_384:
        assert chunk is None
    elif 4 <= size < 16_380:
        assert chunk == body
    else:
        assert chunk in {None, body}


@given(st.binary(max_size=40), sizes, st.integers(0, 200))
def test_the_fast_way_never_raises(start: bytes, size: int, cut: int) -> None:
    raw = chunk_message(b"x" * size, "m", end_of_stream=False, is_request=False).SerializeToString()
    for odd in (start, start + raw, raw[: len(raw) - cut], raw[:cut], b"*" + start, b"*\xff\xff" + start):
        chunk = wire.answer_chunk(odd)
        assert chunk is None or chunk in odd


def test_every_other_message_takes_the_slow_way() -> None:
    for message in (
        ext_proc.ProcessingRequest(),
        ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders()),
        ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(end_of_stream=True)),
        ext_proc.ProcessingRequest(response_trailers=ext_proc.HttpTrailers()),
    ):
        assert wire.answer_chunk(message.SerializeToString()) is None
