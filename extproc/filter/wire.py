"""Envoy's messages: decoded into events, encoded from effects.

Rules that were learnt on a real Envoy (`docs/envoy.md`): header values go into `raw_value` (a value in `value` reaches
the client empty), the append action is always explicit (its default differs between versions and proxies), and a body
that changed under BUFFERED needs `content-length` set in the same reply (otherwise Envoy answers 500, fail-open or
not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2

__all__ = [
    "header_map",
    "metadata_struct",
    "metadata_text",
    "replace_body",
    "set_response_headers",
    "unchanged",
]

_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

_EMPTY: dict[str | None, Callable[[], dict[str, Any]]] = {
    "request_headers": lambda: {"request_headers": ext_proc.HeadersResponse()},
    "request_body": lambda: {"request_body": ext_proc.BodyResponse()},
    "request_trailers": lambda: {"request_trailers": ext_proc.TrailersResponse()},
    "response_headers": lambda: {"response_headers": ext_proc.HeadersResponse()},
    "response_body": lambda: {"response_body": ext_proc.BodyResponse()},
    "response_trailers": lambda: {"response_trailers": ext_proc.TrailersResponse()},
}


def unchanged(kind: str | None, metadata: struct_pb2.Struct | None = None) -> ext_proc.ProcessingResponse:
    """The reply that changes nothing, by the message's kind; an empty one for a kind unknown to this release."""
    empty = _EMPTY.get(kind)
    return ext_proc.ProcessingResponse(**(empty() if empty else {}), dynamic_metadata=metadata)


def header_map(headers: ext_proc.HttpHeaders) -> dict[str, str]:
    """Lower-case names (as Envoy sends them) to text; a name sent twice is joined with a comma, as HTTP has it.

    Bytes that are no UTF-8 become replacement characters: such a value matches nothing that we look for.
    """
    result: dict[str, str] = {}
    for header in headers.headers.headers:
        name = header.key
        value = header.raw_value.decode("utf-8", "replace") if header.raw_value else header.value
        result[name] = f"{result[name]},{value}" if name in result else value
    return result


def metadata_text(request: ext_proc.ProcessingRequest, namespace: str, path: Iterable[str]) -> str | None:
    """The string at a path of one namespace of dynamic metadata; None when it is absent or no string."""
    filters = request.metadata_context.filter_metadata
    if namespace not in filters:  # a look-up would add it
        return None
    node: struct_pb2.Value | None = None
    fields = filters[namespace].fields
    for key in path:
        if key not in fields:
            return None
        node = fields[key]
        fields = node.struct_value.fields
    return node.string_value if node is not None and node.HasField("string_value") else None


def replace_body(
    body: bytes, content_length: int | None, metadata: struct_pb2.Struct | None
) -> ext_proc.ProcessingResponse:
    common = ext_proc.CommonResponse(body_mutation=ext_proc.BodyMutation(body=body))
    if content_length is not None:
        common.header_mutation.CopyFrom(_mutation((("content-length", str(content_length)),)))
    return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common), dynamic_metadata=metadata)


def set_response_headers(
    headers: Iterable[tuple[str, str]], metadata: struct_pb2.Struct | None
) -> ext_proc.ProcessingResponse:
    common = ext_proc.CommonResponse(header_mutation=_mutation(headers))
    response = ext_proc.HeadersResponse(response=common)
    return ext_proc.ProcessingResponse(response_headers=response, dynamic_metadata=metadata)


def metadata_struct(namespace: str, values: Mapping[str, str | float | bool]) -> struct_pb2.Struct:
    """Dynamic metadata of one namespace; Envoy takes it over where `receiving_namespaces` names it."""
    fields = {name: _value(value) for name, value in values.items()}
    inner = struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))
    return struct_pb2.Struct(fields={namespace: inner})


def _value(value: str | float) -> struct_pb2.Value:
    match value:
        case bool():
            return struct_pb2.Value(bool_value=value)
        case str():
            return struct_pb2.Value(string_value=value)
        case _:
            return struct_pb2.Value(number_value=value)


def _mutation(headers: Iterable[tuple[str, str]]) -> ext_proc.HeaderMutation:
    return ext_proc.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=name, raw_value=value.encode()), append_action=_OVERWRITE
            )
            for name, value in headers
        ]
    )
