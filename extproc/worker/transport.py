"""kombu's Redis transports, which live on after a message that they cannot read, and count how often one comes again.

A stock worker ends with an exception at one, and the message is gone with it. Here it is handed to the callback
`on_unreadable` of the transport options, with what could be read of it.

A message whose process died, or whose worker is gone, is put back on the queue, for ever. kombu marks it as redelivered
and does not count; here its own header does, so that somebody can give up. What a worker gives back when it stops, or
when it has lost the broker, does not count: nothing died of it, however often somebody restarts workers.
"""

from __future__ import annotations

import json
from base64 import b64decode
from binascii import Error as NotBase64
from queue import Empty
from typing import Any

from celery.worker import state
from kombu.transport import redis
from typing_extensions import override

__all__ = ["DELIVERIES_HEADER", "SentinelTransport", "ServerTransport", "deliveries", "is_readable"]

DELIVERIES_HEADER = "ibex_deliveries"
"""A worker sets and reads: how often the message was taken before and not ended. Absent: never."""
_MOST_DELIVERIES = 1_000_000


def is_readable(message: object) -> bool:
    """Whether kombu can make a message of it."""
    if not isinstance(message, dict) or not isinstance(message.get("headers", {}), dict):
        return False
    properties, body = message.get("properties"), message.get("body")
    if not isinstance(properties, dict) or not isinstance(body, str):
        return False
    if not isinstance(properties.get("delivery_tag"), str) or not isinstance(properties.get("delivery_info"), dict):
        return False
    if properties.get("body_encoding") != "base64":
        return properties.get("body_encoding") in {None, "utf-8"}
    try:
        b64decode(body)
    except (NotBase64, ValueError):
        return False
    return True


class _Reading:
    """Of a channel."""

    connection: Any
    is_giving_back = False
    """While the channel closes: what it has taken is given back, begun or not."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (json.JSONDecodeError, UnicodeDecodeError):  # it is off the queue by now
            _report(self.connection, None)
            raise Empty from None

    def _do_restore_message(self, payload: Any, *args: Any, **given: Any) -> None:
        if not self.is_giving_back and state.should_stop is None:
            _count_delivery(payload)
        super()._do_restore_message(payload, *args, **given)  # type: ignore[misc]


class _Qos(redis.QoS):
    @override
    def restore_unacked(self, client: Any = None) -> None:
        self.channel.is_giving_back = True
        try:
            super().restore_unacked(client)  # type: ignore[no-untyped-call]
        finally:
            self.channel.is_giving_back = False


class _Delivering:
    """Of a transport."""

    def _deliver(self, message: Any, queue: Any) -> Any:
        if not is_readable(message):
            return _report(self, message)
        return super()._deliver(message, queue)  # type: ignore[misc]


def _count_delivery(payload: Any) -> None:
    headers = payload.get("headers") if isinstance(payload, dict) else None
    if isinstance(headers, dict):
        headers[DELIVERIES_HEADER] = deliveries(headers.get(DELIVERIES_HEADER)) + 1


def deliveries(header: object) -> int:
    """As the header says; 0 for what is no such number."""
    return header if type(header) is int and 0 < header < _MOST_DELIVERIES else 0


def _report(transport: Any, message: Any) -> None:
    transport.client.transport_options["on_unreadable"](message)


class _ServerChannel(_Reading, redis.Channel):
    QoS = _Qos


class _SentinelChannel(_Reading, redis.SentinelChannel):
    QoS = _Qos


class ServerTransport(_Delivering, redis.Transport):
    Channel = _ServerChannel


class SentinelTransport(_Delivering, redis.SentinelTransport):
    Channel = _SentinelChannel
