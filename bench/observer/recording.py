"""The messages that an Envoy sent an observer for one exchange, so that they can be sent again without an Envoy.

Pure, but for `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import msgspec
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

__all__ = ["Recording", "load", "save", "split"]

_REQUEST_ID_LENGTH = 36


class Recording(msgspec.Struct, frozen=True):
    """One exchange. Every message is a whole ProcessingRequest, byte for byte as it came."""

    opening: list[bytes]
    """Up to the first chunk of the answer, which is in it."""
    chunks: list[bytes]
    """The chunks of the answer that are like all others."""
    closing: list[bytes]
    """The answer's last events and its end."""
    request_id: bytes
    """As it stands in the first message: 36 bytes of a UUID."""
    metadata: list[tuple[str, str]]
    """Of the call."""

    def opening_of(self, request_id: bytes) -> list[bytes]:
        """The same for another request; ids have one length, so that no length around them changes."""
        return [message.replace(self.request_id, request_id) for message in self.opening]

    def only(self, pieces: Container[bytes]) -> Recording:
        """With those chunks alone that are one of `pieces`: Envoy joins what a late provider sends at once."""
        kept = [
            message
            for message in self.chunks
            if ext_proc.ProcessingRequest.FromString(message).response_body.body in pieces
        ]
        return msgspec.structs.replace(self, chunks=kept)

    @property
    def chunk_bytes(self) -> int:
        """Of one message with a chunk of the answer, on average."""
        return round(sum(map(len, self.chunks)) / len(self.chunks))


def split(messages: Sequence[bytes], metadata: Sequence[tuple[str, str]] = ()) -> Recording:
    """Raises ValueError for what is not a whole exchange with a streamed answer of five chunks or more."""
    read = [ext_proc.ProcessingRequest.FromString(message) for message in messages]
    bodies = [number for number, message in enumerate(read) if message.HasField("response_body")]
    if len(bodies) < 5 or bodies != list(range(bodies[0], len(read))):
        raise ValueError("this is not a streamed answer of five chunks or more")
    if not read[-1].response_body.end_of_stream:
        raise ValueError("the answer has no end")
    sent = [header for header in read[0].request_headers.headers.headers if header.key == "x-request-id"]
    if len(sent) != 1 or len(sent[0].raw_value) != _REQUEST_ID_LENGTH:
        raise ValueError("the first message has no request id that is a UUID")
    # Envoy may tell the end with the last events or behind them, in a message of its own.
    last = bodies[-1] if read[-1].response_body.body else bodies[-2]
    return Recording(
        opening=list(messages[: bodies[1]]),
        chunks=list(messages[bodies[1] : last]),
        closing=list(messages[last:]),
        request_id=sent[0].raw_value,
        metadata=list(metadata),
    )


def save(recording: Recording, file: Path) -> None:
    """At once or not at all: whoever waits for the file finds it whole."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(msgspec.msgpack.encode(recording))
    partial.rename(file)


def load(file: Path) -> Recording:
    return msgspec.msgpack.decode(file.read_bytes(), type=Recording)
