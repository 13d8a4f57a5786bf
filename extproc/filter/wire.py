"""Envoy's messages: decoded into events, encoded from effects.

Rules that were learnt on a real Envoy (`docs/envoy.md`): header values go into `raw_value` (a value in `value` reaches
the client empty), the append action is always explicit (its default differs between versions and proxies), and a body
that changed under BUFFERED needs `content-length` set in the same reply (otherwise Envoy answers 500, fail-open or
not).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2

from extproc import names
from extproc.filter.outcome import Outcome

__all__ = [
    "LOCAL_REPLY",
    "Metadata",
    "answer_chunk",
    "attributes",
    "context_metadata",
    "is_response_headers",
    "metadata_text",
    "read_headers",
    "read_status",
    "replace_body",
    "set_response_headers",
    "unchanged",
]

Metadata = Mapping[str, str | float | bool]
"""What goes into the dynamic metadata `ibex.context`, where Envoy's `receiving_namespaces` names it."""

_RESPONSE_HEADERS: Final = 3 << 3 | 2
"""Tag of a length-delimited field of ProcessingRequest."""
_RESPONSE_BODY: Final = 5 << 3 | 2
_BODY: Final = 1 << 3 | 2
"""Tags of length-delimited fields: ProcessingRequest.response_body, HttpBody.body."""
_LEAST_CHUNK_MESSAGE: Final = 6
"""Bytes that the tags and lengths of a chunk's message take at most; what is shorter needs no fast way."""

_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

_KINDS: Final = (
    "request_headers",
    "request_body",
    "request_trailers",
    "response_headers",
    "response_body",
    "response_trailers",
)


def _empty_reply(kind: str | None) -> ext_proc.ProcessingResponse:
    reply = ext_proc.ProcessingResponse()
    if kind in _KINDS:
        getattr(reply, kind).SetInParent()
    return reply


_UNCHANGED: Final[dict[str | None, bytes]] = {kind: _empty_reply(kind).SerializeToString() for kind in _KINDS}


def is_response_headers(raw: bytes) -> bool:
    """Whether a serialised ProcessingRequest shows those of an answer, as far as its first byte tells: serialisers
    write fields by number, and no more than one kind is in a message."""
    return raw[:1] == bytes((_RESPONSE_HEADERS,))


def answer_chunk(raw: bytes) -> bytes | None:
    """The chunk of a serialised ProcessingRequest that shows one in the middle of an answer; None: decode the message.

    With each chunk comes all dynamic metadata again, and building those objects costs several times what the chunk
    does. Serialisers write fields by number: `response_body` (5) with `body` (1) alone in it, then the metadata (8),
    which is not looked at. A message that is cut, ends the stream, holds 16 KB or more, or looks otherwise gives None.
    """
    if len(raw) < _LEAST_CHUNK_MESSAGE or raw[0] != _RESPONSE_BODY:
        return None
    size, at = raw[1], 2
    if size > 0x7F:
        if raw[2] > 0x7F:
            return None
        size, at = (size & 0x7F) | (raw[2] << 7), 3
    length, start = raw[at + 1], at + 2
    if length > 0x7F:
        if raw[start] > 0x7F:
            return None
        length, start = (length & 0x7F) | (raw[start] << 7), start + 1
    end = start + length
    return raw[start:end] if raw[at] == _BODY and end == at + size <= len(raw) else None


def read_headers(headers: ext_proc.HttpHeaders, wanted: AbstractSet[str]) -> dict[str, str]:
    """The headers with these lower-case names (as Envoy sends them); one sent twice is joined with a comma.

    Bytes that are no UTF-8 become replacement characters: such a value matches nothing that we look for.
    """
    result: dict[str, str] = {}
    for header in headers.headers.headers:
        name = header.key
        if name in wanted:
            value = _text(header)
            result[name] = f"{result[name]},{value}" if name in result else value
    return result


def read_status(headers: ext_proc.HttpHeaders) -> str:
    """`:status`, which comes first; empty without one."""
    return next((_text(header) for header in headers.headers.headers if header.key == ":status"), "")


def _text(header: base_pb2.HeaderValue) -> str:
    raw: bytes = header.raw_value
    text: str = raw.decode("utf-8", "replace") if raw else header.value
    return text


def metadata_text(request: ext_proc.ProcessingRequest, namespace: str, path: Iterable[str]) -> str | None:
    """The string at a path of one namespace of dynamic metadata; None when nothing is there.

    Empty when something else is there, a number or a list: that is malformed, and must not look like absent.
    """
    filters = request.metadata_context.filter_metadata
    if namespace not in filters:  # a look-up would add it
        return None
    node: struct_pb2.Value | None = None
    fields = filters[namespace].fields
    for key in path:
        if node is not None and not node.HasField("struct_value"):
            return ""
        if key not in fields:
            return None
        node = fields[key]
        fields = node.struct_value.fields
    return node.string_value if node is not None else None


def context_metadata(request: ext_proc.ProcessingRequest) -> dict[str, str | float | bool]:
    """What the context filter wrote about this request; empty when it did not answer."""
    filters = request.metadata_context.filter_metadata
    if names.CONTEXT_METADATA not in filters:
        return {}
    values: dict[str, str | float | bool] = {}
    for key, value in filters[names.CONTEXT_METADATA].fields.items():
        match value.WhichOneof("kind"):
            case "string_value":
                values[key] = value.string_value
            case "number_value":
                values[key] = value.number_value
            case "bool_value":
                values[key] = value.bool_value
    return values


def attributes(request: ext_proc.ProcessingRequest) -> dict[str, str]:
    """The attributes that are text, whichever filter's name Envoy puts them under."""
    return {
        key: value.string_value
        for struct in request.attributes.values()
        for key, value in struct.fields.items()
        if value.HasField("string_value")
    }


# Replies are built in place and serialised here: a nested constructor copies each message into the next.


def unchanged(kind: str | None, metadata: Metadata | None = None) -> bytes:
    """The reply that changes nothing, by the message's kind; an empty one for a kind unknown to this release."""
    if metadata is None:
        return _UNCHANGED.get(kind, b"")
    reply = _empty_reply(kind)
    _set_metadata(reply, metadata)
    return _serialised(reply)


def replace_body(body: bytes, content_length: int | None, metadata: Metadata | None) -> bytes:
    reply = ext_proc.ProcessingResponse()
    common = reply.request_body.response
    common.body_mutation.body = body
    if content_length is not None:
        _set_header(common.header_mutation, "content-length", str(content_length))
    _set_metadata(reply, metadata)
    return _serialised(reply)


def set_response_headers(headers: Iterable[tuple[str, str]], metadata: Metadata | None) -> bytes:
    reply = ext_proc.ProcessingResponse()
    mutation = reply.response_headers.response.header_mutation
    for name, value in headers:
        _set_header(mutation, name, value)
    _set_metadata(reply, metadata)
    return _serialised(reply)


def _set_header(mutation: ext_proc.HeaderMutation, name: str, value: str) -> None:
    option = mutation.set_headers.add()
    option.append_action = _OVERWRITE
    option.header.key = name
    option.header.raw_value = value.encode()


def _set_metadata(reply: ext_proc.ProcessingResponse, metadata: Metadata | None) -> None:
    if metadata is None:
        return
    fields = reply.dynamic_metadata.fields[names.CONTEXT_METADATA].struct_value.fields
    for name, value in metadata.items():
        match value:
            case bool():
                fields[name].bool_value = value
            case str():
                fields[name].string_value = value
            case _:
                fields[name].number_value = value


def _serialised(reply: ext_proc.ProcessingResponse) -> bytes:
    data: bytes = reply.SerializeToString()
    return data


LOCAL_REPLY: Final = unchanged(
    "response_headers",
    {
        "outcome": Outcome.LOCAL_REPLY.value,
        "memories": 0,
        "tokens": 0,
        "fallback": Outcome.LOCAL_REPLY.is_fallback,
        "assemble_ms": 0,
        "engine_ms": 0,
        "session_id": "",
    },
)
"""The answer to a stream that begins with response headers, as `extproc.filter.report` would tell it."""
