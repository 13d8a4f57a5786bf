"""Envoy's messages: a CheckRequest decoded, CheckResponses encoded (envoy.service.auth.v3).

Of a request only the headers that were wanted are read, and no body ever comes here. Of an allowed request's answer all
but the numbers is the same each time, and is kept serialised: protobuf merges messages that are written one behind the
other (Protocol Buffers, "Encoding", Last One Wins), so the numbers are appended, and they are few enough to be written
here byte by byte.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec
from envoy.config.core.v3 import base_pb2
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz

from extproc import names
from extproc.gate.credential import CREDENTIAL_HEADERS
from extproc.gate.passage import AGENT_HEADER, USER_HEADER, Allow, Deny
from extproc.gate.verdict import Denial, FieldError, Quota

__all__ = ["ADDRESS_HEADER", "AUTH_CACHED_HEADER", "CheckedRequest", "allow", "deny", "read_request"]

ADDRESS_HEADER = "x-envoy-external-address"
"""Envoy sets it where `use_remote_address` makes it the edge, whatever a client sent: the peer's address, or behind
`xff_num_trusted_hops` proxies the one that the outermost saw. It comes here only if `allowed_headers` names it."""
AUTH_CACHED_HEADER = "x-ibex-auth-cached"
"""Gate sets on the response when the token came from its cache."""

_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_DENIED = 7
"""google.rpc.Code PERMISSION_DENIED: anything but OK denies; the HTTP status stands in the answer."""

_REMOVED: Final = (
    *sorted(CREDENTIAL_HEADERS),
    "proxy-authorization",
    "cookie",
    # Nobody but the gate says whose request it is; Envoy removes it before, where it is set up as ours is.
    "x-ibex-org-id",
    "x-ibex-token-id",
)
"""The caller's credentials stay here, and the provider's own are put in behind the gate."""

_NOT_INJECTED: Final = (
    (names.MEMORIES_INJECTED_HEADER, "0"),
    (names.CONTEXT_TOKENS_HEADER, "0"),
    (names.CONTEXT_FALLBACK_HEADER, "true"),
)

_KEPT_HEADS = 4096
"""About 600 bytes each."""
_KEPT_MINUTES = 1024
"""One for each limit; 100 bytes."""

_AUTH_MS: Final = b"\x22\x16\x0a\x14\x0a\x07auth_ms\x12\x09\x11"
"""A CheckResponse whose metadata has one field, up to the eight bytes of its number."""
_DOUBLE: Final = struct.Struct("<d")


class CheckedRequest:
    """What was asked. The path, with its query, is never to be written anywhere."""

    __slots__ = ("_attributes", "headers", "path")

    def __init__(self, attributes: Any, headers: dict[str, str], path: str) -> None:
        self._attributes = attributes
        self.headers = headers
        """The wanted ones that were sent, by lower-case name."""
        self.path = path

    @property
    def address(self) -> str:
        """The client's, as Envoy tells it, else the connection's, which behind a load balancer is the same for all;
        empty for a Unix socket. Read when it is needed, which is seldom."""
        told = self.headers.get(ADDRESS_HEADER, "")
        if _is_address(told):
            return told
        address: str = self._attributes.source.address.socket_address.address
        return address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def read_request(raw: bytes, wanted: AbstractSet[str]) -> CheckedRequest:
    """Raises google.protobuf.message.DecodeError.

    With `encode_raw_headers` Envoy sends each header as it came, in bytes. Without, it joins those of one name with a
    comma and writes `!` for bytes that are no UTF-8, so that two user ids of another encoding can look the same.
    """
    attributes = ext_authz.CheckRequest.FromString(raw).attributes
    http = attributes.request.http
    if http.HasField("header_map"):
        headers = _read_raw(http.header_map.headers, wanted)
    else:
        given = http.headers
        headers = {name: value for name in wanted if (value := given.get(name)) is not None}
    return CheckedRequest(attributes, headers, http.path)


def _read_raw(entries: Iterable[Any], wanted: AbstractSet[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for entry in entries:
        name = entry.key
        if name in wanted:
            raw = entry.raw_value
            value = raw.decode("utf-8", "replace") if raw else entry.value
            # A space beside the comma: repeated, a header has no form that is taken from one.
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def allow(order: Allow, auth_ms: float, secret_parameters: Sequence[str]) -> bytes:
    """`secret_parameters`: names in the query that are not to reach the provider."""
    claims = order.claims
    head = _allowed_head(
        claims.org_id, order.agent_id, order.user_id, claims.token_id, claims.permissions, order.is_cached
    )
    tail = _AUTH_MS + _DOUBLE.pack(auth_ms)
    if order.quota is not None:
        tail += _minute(order.quota.limit, order.quota.reset) + _numbered(
            b"x-ratelimit-remaining", order.quota.remaining
        )
    if secret_parameters:
        rest = ext_authz.CheckResponse()
        rest.ok_response.query_parameters_to_remove.extend(secret_parameters)
        tail += _serialised(rest)
    return head + tail


@lru_cache(_KEPT_MINUTES)
def _minute(limit: int, reset: int) -> bytes:
    """The headers that stay the same until the minute ends."""
    return _numbered(b"x-ratelimit-limit", limit) + _numbered(b"x-ratelimit-reset", reset)


def _numbered(name: bytes, value: int) -> bytes:
    """A CheckResponse with one header for the client, as protobuf would write it. Below 128 bytes: name and value are
    short, and each length is one byte."""
    digits = b"%d" % value
    header = b"\x0a%c%b\x12%c%b" % (len(name), name, len(digits), digits)
    option = b"\x0a%c%b\x18%c" % (len(header), header, _OVERWRITE)
    return b"\x1a%c\x32%c%b" % (len(option) + 2, len(option), option)


@lru_cache(_KEPT_HEADS)
def _allowed_head(
    org_id: str,
    agent_id: str,
    user_id: str | None,
    token_id: str | None,
    permissions: int,
    is_cached: bool,  # noqa: FBT001 - a key of the cache
) -> bytes:
    reply = ext_authz.CheckResponse()
    reply.status.SetInParent()  # code 0: OK
    ok = reply.ok_response
    ok.headers_to_remove.extend(_REMOVED)
    # What filters behind the gate read as a header says the same as its metadata.
    _add(ok.headers, AGENT_HEADER, agent_id)
    if user_id is not None:
        _add(ok.headers, USER_HEADER, user_id)
    if is_cached:
        _add(ok.response_headers_to_add, AUTH_CACHED_HEADER, "true")
    fields = reply.dynamic_metadata.fields
    fields["decision"].string_value = "allowed"
    fields["org_id"].string_value = org_id
    fields["agent_id"].string_value = agent_id
    if user_id is not None:
        fields["user_id"].string_value = user_id
    if token_id is not None:
        fields["token_id"].string_value = token_id
    fields["permissions"].number_value = permissions
    fields["auth_cached"].bool_value = is_cached
    return _serialised(reply)


class _Error(msgspec.Struct, omit_defaults=True, kw_only=True):
    code: str
    message: str
    request_id: str
    timestamp: datetime
    field_errors: tuple[FieldError, ...] = ()


class _Envelope(msgspec.Struct):
    error: _Error


_encode = msgspec.json.Encoder().encode


def deny(order: Deny, request_id: str, auth_ms: float) -> bytes:
    """The error envelope of contract section 3."""
    denial = order.denial
    reply = ext_authz.CheckResponse()
    reply.status.code = _DENIED
    denied = reply.denied_response
    denied.status.code = denial.status
    denied.body = _body(denial, request_id)
    for name, value in _denied_headers(denial, order.quota):
        _add(denied.headers, name, value)
    fields = reply.dynamic_metadata.fields
    fields["decision"].string_value = "denied"
    fields["code"].string_value = denial.code.value
    fields["auth_ms"].number_value = auth_ms
    if order.org_id:
        fields["org_id"].string_value = order.org_id
    if order.agent_id:
        fields["agent_id"].string_value = order.agent_id
    return _serialised(reply)


def _body(denial: Denial, request_id: str) -> str:
    error = _Error(
        code=denial.code.value,
        message=denial.message,
        request_id=request_id,
        timestamp=datetime.now(UTC),
        field_errors=denial.field_errors,
    )
    return _encode(_Envelope(error)).decode()


def _denied_headers(denial: Denial, quota: Quota | None) -> list[tuple[str, str]]:
    headers = [("content-type", "application/json"), *_NOT_INJECTED]
    if denial.status == 401:
        headers.append(("www-authenticate", "Bearer"))  # RFC 9110, 15.5.2
    if denial.retry_after_s is not None:
        headers.append(("retry-after", str(denial.retry_after_s)))
    return headers if quota is None else [*headers, *_quota_headers(quota)]


def _quota_headers(quota: Quota) -> tuple[tuple[str, str], ...]:
    return (
        ("x-ratelimit-limit", str(quota.limit)),
        ("x-ratelimit-remaining", str(quota.remaining)),
        ("x-ratelimit-reset", str(quota.reset)),
    )


def _add(options: Any, name: str, value: str) -> None:
    option = options.add()
    option.append_action = _OVERWRITE
    option.header.key = name
    option.header.value = value  # ext_authz reads `value`, unlike ext_proc


def _serialised(reply: ext_authz.CheckResponse) -> bytes:
    data: bytes = reply.SerializeToString()
    return data
