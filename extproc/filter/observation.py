"""One chat request and its answer, as somebody sees them who only watches. Everything about the turn is decided here.

No I/O, no clock, no await, no protobuf: the driver feeds what Envoy shows it, in any order and cut anywhere, and asks
once, at the end, for the turn. Nothing that a client or a provider sends may raise out of it, and what it holds has a
limit: beyond it content is dropped, never a message refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeAlias

from extproc import names
from extproc.chat import (
    AnswerLimits,
    ChatFormat,
    Completion,
    ReadLimits,
    UnreadableBody,
    content_decoder,
    hash_text,
    is_event_stream,
    recognise,
)
from extproc.filter.exchange import readable_request_id
from extproc.turns.turn import End, Turn, TurnText, checkpoint_id, session_id

if TYPE_CHECKING:
    from extproc.chat import AnswerReader, ContentDecoder
    from extproc.filter.identity import Identity

__all__ = ["REQUEST_HEADERS", "RESPONSE_HEADERS", "Observation", "ObservationLimits", "Observed", "Room"]

REQUEST_HEADERS: Final = frozenset(
    (
        ":method",
        ":path",
        "content-encoding",
        "content-type",
        "traceparent",
        names.REQUEST_ID_HEADER,
        names.SESSION_ID_HEADER,
        names.SKIP_EXTRACTION_HEADER,
    )
)
RESPONSE_HEADERS: Final = frozenset((":status", "content-encoding", "content-type", names.SESSION_ID_HEADER))
"""What an observation reads of the headers; the driver need not tell it others."""

_GATE_DENIAL: Final = "ext_authz_denied"
"""`response.code_details` where a gate answered, with whatever status."""
_DENIALS: Final = ("ext_authz_", "jwt_authn_", "rbac_", "oauth", "basic_auth", "api_key_auth")
"""How they begin where a filter of Envoy's said no to the caller."""
_DENIAL_STATUS: Final = frozenset((401, 403, 429))

Metadata: TypeAlias = Mapping[str, str | float | bool]
_NOTHING: Final[Metadata] = {}

_STATUS: Final = re.compile(r"[1-9][0-9]{2}")
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_USER_ID: Final = re.compile(r"[!-~]{1,128}")
_SESSION_ID: Final = re.compile(r"[!-~]{1,64}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header, as far as version 00 goes; a client may write anything."""
_YES: Final = frozenset(("1", "true", "yes", "on"))
_PROVIDER_PREFIX: Final = "provider_"
_NAME_CHARACTERS: Final = 256
_MAX_NUMBER: Final = 2**31 - 1
"""Of memories, tokens and milliseconds: metadata holds any double, and columns do not."""

_MAX_HELD_BYTES: Final = AnswerLimits().max_json_bytes
"""What an answer that does not stream can take of the room: more of it its reader does not keep."""
_STEP_BYTES: Final = 16 * 1024
"""Read at a time. As events of seven bytes, the shortest, they cost some 5 ms."""
_LARGE_BYTES: Final = 256 * 1024
_MAX_OBJECTS: Final = 200_000
"""Most objects in a larger request, braces in strings included. A body of 10 MB may hold 3 million, which would hold
the loop for half a second; as many as these take 40 ms."""


@dataclass(frozen=True, slots=True)
class ObservationLimits:
    max_body_bytes: int = 10 * 1024 * 1024
    """Of a request's body; a longer one is not read."""
    max_text_bytes: int = 1024 * 1024
    """Kept of what the user said, and of the answer, each."""
    deferred_close_ms: float = 1000.0
    """Envoy's `deferred_close_timeout` of the observer filter, as the shipped configurations have it."""
    max_decoded_bytes: int = 16 * 1024 * 1024
    """Of a compressed answer, decoded; what comes behind is not read. Decoding as much holds the loop for 50 ms."""


@dataclass(slots=True)
class Room:
    """How much all observations of a process may hold at once, in bytes. Beyond it content is dropped."""

    limit: int
    used: int = 0

    def take(self, size: int) -> bool:
        """Whether there is room; if so it is taken, and must be given back."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        self.used -= size


@dataclass(frozen=True, slots=True)
class Observed:
    """What an exchange leaves behind."""

    turn: Turn
    text: TurnText | None
    """None: the client asked for none to be kept, or there is none."""


class Observation:
    """Feed the `see_…` methods as messages come; `finish` once, whatever happened. Times are milliseconds, rising.

    What takes long is left to `work`, which is called until there is no more, best before the next message.
    """

    __slots__ = (
        "_body",
        "_body_is_whole",
        "_chunks",
        "_cluster",
        "_code_details",
        "_context",
        "_decoder",
        "_ended_at_ms",
        "_first_byte_ms",
        "_format",
        "_gate",
        "_has_answer",
        "_has_dropped",
        "_held",
        "_held_answer",
        "_is_lost",
        "_is_sse",
        "_last_byte_ms",
        "_limits",
        "_longest_gap_ms",
        "_messages_hash",
        "_mint_id",
        "_model",
        "_path",
        "_reader",
        "_request_headers",
        "_response_session_id",
        "_room",
        "_status",
        "_text_was_cut",
        "_user_text",
        "_work",
        "is_over",
    )

    def __init__(self, limits: ObservationLimits, room: Room, mint_id: Callable[[], str]) -> None:
        self._limits = limits
        self._room = room
        self._mint_id = mint_id
        self._request_headers: Mapping[str, str] = {}
        self._path = ""
        self._format: ChatFormat | None = None
        self._body = bytearray()
        self._held = 0
        self._body_is_whole = True
        self._messages_hash = ""
        self._user_text = ""
        self._text_was_cut = False
        self._model = ""
        self._status = 0
        self._response_session_id = ""
        self._context: Metadata = {}
        self._gate: Metadata = {}
        self._cluster = ""
        self._code_details = ""
        self._decoder: ContentDecoder | None = None
        self._reader: AnswerReader | None = None
        self._has_answer = False
        self._has_dropped = False
        self._held_answer = 0
        self._is_lost = False
        self._is_sse = False
        self._chunks = 0
        self._first_byte_ms = -1.0
        self._last_byte_ms = -1.0
        self._longest_gap_ms = 0.0
        self._ended_at_ms = -1.0
        self._work: Iterator[None] | None = None
        self.is_over = False
        """Nothing of interest will come: it is no chat, or the answer has arrived whole."""

    @property
    def is_chat(self) -> bool:
        return self._format is not None

    @property
    def has_work(self) -> bool:
        return self._work is not None

    def work(self) -> bool:
        """Do a little of what large messages left to do, some milliseconds at most; False: nothing is left."""
        if self._work is None:
            return False
        for _ in self._work:
            return True
        self._work = None
        return False

    def _work_off(self) -> None:
        while self.work():
            pass

    def see_request_headers(self, headers: Mapping[str, str]) -> None:
        """`headers`: lower-case names; a header sent twice is joined with a comma."""
        self._request_headers = headers
        self._path = headers.get(":path", "")
        self._format = recognise(headers.get(":method", ""), self._path, headers.get("content-type", ""))
        self.is_over = self._format is None

    def see_request_body(self, chunk: bytes, *, end_of_stream: bool) -> None:
        self._work_off()
        if chunk and self._body_is_whole:
            if self._held + len(chunk) <= self._limits.max_body_bytes and self._hold(len(chunk)):
                self._body += chunk
            else:
                self._drop_body()
        if end_of_stream:
            # At once, so that the body need not be kept while the answer streams.
            if encoding := self._request_headers.get("content-encoding", ""):
                self._work = self._read_encoded_request(encoding)
            else:
                self._read_request()

    def see_response_headers(
        self,
        headers: Mapping[str, str],
        context: Metadata,
        cluster: str,
        code_details: str,
        at_ms: float,
        *,
        end_of_stream: bool,
        gate: Metadata = _NOTHING,
    ) -> None:
        """`context`, `gate`: dynamic metadata of these filters; `cluster`, `code_details`: attributes of Envoy's."""
        self._work_off()
        status = headers.get(":status", "")
        self._status = int(status) if _STATUS.fullmatch(status) else 0
        self._response_session_id = headers.get(names.SESSION_ID_HEADER, "")
        self._context = context
        self._gate = gate
        self._cluster = cluster
        self._code_details = code_details
        if self._format is not None:
            self._is_sse = is_event_stream(headers.get("content-type", ""))
            limits = AnswerLimits(max_text_bytes=self._limits.max_text_bytes)
            self._reader = self._format.read_answer(self._is_sse, limits)
            if encoding := headers.get("content-encoding", ""):
                self._decoder = content_decoder(encoding, self._limits.max_decoded_bytes)
        if end_of_stream:
            self._end_answer(at_ms)

    def see_response_body(self, chunk: bytes, at_ms: float, *, end_of_stream: bool) -> None:
        if self._work is not None:
            self._work_off()
        if chunk:
            if self._chunks:
                gap_ms = at_ms - self._last_byte_ms
                if gap_ms > self._longest_gap_ms:
                    self._longest_gap_ms = gap_ms
            else:
                self._first_byte_ms = at_ms
            self._last_byte_ms = at_ms
            self._chunks += 1
            if self._reader is None:
                pass
            elif self._decoder is not None or len(chunk) > _STEP_BYTES:
                self._work = self._feed_steps(self._reader, chunk)
            elif self._is_sse:
                self._reader.feed(chunk)
            else:
                self._feed(self._reader, chunk)
        if end_of_stream:
            self._end_answer(at_ms)

    def _feed_steps(self, reader: AnswerReader, chunk: bytes) -> Iterator[None]:
        """A large chunk, or one of a compressed body."""
        for piece in _steps(chunk) if self._decoder is None else _decoded(self._decoder, chunk):
            self._feed(reader, piece)
            yield

    def _feed(self, reader: AnswerReader, piece: bytes) -> None:
        """A body that does not stream is held until it is whole."""
        if self._is_sse or (not self._has_dropped and self._hold_answer(len(piece))):
            reader.feed(piece)
        else:
            self._has_dropped = True

    def _hold_answer(self, size: int) -> bool:
        """Whether there is room for a piece of the answer."""
        size = min(size, _MAX_HELD_BYTES - self._held_answer)
        if not self._room.take(size):
            return False
        self._held_answer += size
        return True

    def lose_sight(self) -> None:
        """We stop watching before the end: how it ends stays unknown."""
        self._is_lost = not self._has_answer

    def finish(
        self, identity: Identity | None, traceparent: str, started_at: datetime, ended_at_ms: float
    ) -> Observed | None:
        """The turn; None where there is none to record: no chat, or nobody's.

        `identity`: by the trusted sources, used where the context filter named none. `ended_at_ms`: when Envoy closed
        the stream, used where the answer did not end before. Work that is left is dropped.
        """
        if self._work is not None:
            self._work = None
            self._has_dropped = True
        self._read_unended_request()
        chat_format, owner = self._format, self._owner(identity)
        if chat_format is None or owner is None:
            return None
        completion = self._reader.finish() if self._reader is not None else Completion()
        end = self._end(completion)
        turn = self._turn(chat_format, owner, completion, end, traceparent, started_at, ended_at_ms)
        has_text = turn.has_checkpoint and not turn.skip_extraction
        text = TurnText(self._user_text, completion.text or completion.refusal) if has_text else None
        return Observed(turn, text)

    def forget(self) -> None:
        """Give back what is held. May be called twice."""
        self._forget_body()
        self._room.give_back(self._held_answer)
        self._held_answer = 0
        self._reader = None

    def _hold(self, size: int) -> bool:
        """Whether there is room for as much of the request."""
        if not self._room.take(size):
            return False
        self._held += size
        return True

    def _drop_body(self) -> None:
        self._body_is_whole = False
        self._forget_body()

    def _forget_body(self) -> None:
        self._body = bytearray()
        self._room.give_back(self._held)
        self._held = 0

    def _read_encoded_request(self, encoding: str) -> Iterator[None]:
        decoder = content_decoder(encoding, self._limits.max_body_bytes)
        body = bytearray()
        for piece in _decoded(decoder, bytes(self._body)):
            if not self._hold(len(piece)):
                self._drop_body()
                return
            body += piece
            yield
        if decoder.is_cut or decoder.failed:
            self._drop_body()
        else:
            self._body = body
            self._read_request()

    def _read_unended_request(self) -> None:
        """One whose end was not shown: the answer came before it, or trailers after it."""
        if self._body and "content-encoding" in self._request_headers:
            self._drop_body()  # decoding may take long, and there is no more time for it
        self._read_request()

    def _read_request(self) -> None:
        body = bytes(self._body)
        self._forget_body()
        if self._format is None or not body:
            return
        if len(body) > _LARGE_BYTES and body.count(b"{") > _MAX_OBJECTS:
            self._drop_body()
            return
        try:
            request = self._format.read_request(body, self._path, ReadLimits(len(body), recent_messages=0))
            self._messages_hash = self._format.hash_messages(body)
        except UnreadableBody:
            return
        self._model = request.model
        self._user_text = _both_ends(request.query, self._limits.max_text_bytes)
        self._text_was_cut = self._user_text != request.query

    def _end_answer(self, at_ms: float) -> None:
        self._has_answer = True
        self._ended_at_ms = at_ms
        self.is_over = True

    def _owner(self, identity: Identity | None) -> tuple[str, str, str | None] | None:
        """Org, agent and user, as the context filter found them, else as this process does.

        As with any source, what is there in a wrong form gives nobody.
        """
        context = self._context
        if "org_id" not in context and "agent_id" not in context:
            return (identity.org_id, identity.agent_id, identity.user_id) if identity is not None else None
        org_id, agent_id, user_id = context.get("org_id"), context.get("agent_id"), context.get("user_id")
        if not _is(_UUID, org_id) or not _is(_UUID, agent_id) or not (user_id is None or _is(_USER_ID, user_id)):
            return None
        return str(org_id).lower(), str(agent_id).lower(), None if user_id is None else str(user_id)

    def _end(self, completion: Completion) -> End:
        if self._status >= 400:
            return End.DENIED if self._is_denial() else End.PROVIDER_ERROR
        if self._is_lost:
            return End.INCOMPLETE
        if self._status == 0:
            return End.CLIENT_GONE
        # Many a client leaves at the last event, before the body's end, and trailers end an answer without one.
        if not self._has_answer and not completion.has_ended:
            # Envoy closes the stream in the same way when the provider's connection broke; its access log knows better.
            return End.CLIENT_GONE
        return End.COMPLETE if completion.has_ended and not completion.error else End.INCOMPLETE

    def _is_denial(self) -> bool:
        if self._code_details == _GATE_DENIAL:
            return True
        return self._code_details.startswith(_DENIALS) and self._status in _DENIAL_STATUS

    def _external_id(self) -> str:
        for sent in (
            self._context.get("session_id"),
            self._request_headers.get(names.SESSION_ID_HEADER),
            self._response_session_id,
        ):
            if _is(_SESSION_ID, sent):
                return str(sent)
        return self._mint_id()

    def _turn(
        self,
        chat_format: ChatFormat,
        owner: tuple[str, str, str | None],
        completion: Completion,
        end: End,
        traceparent: str,
        started_at: datetime,
        ended_at_ms: float,
    ) -> Turn:
        org_id, agent_id, user_id = owner
        external_id = self._external_id()
        request_id = readable_request_id(self._request_headers) or self._mint_id()
        total_ms = self._total_ms(ended_at_ms)
        usage = completion.usage
        decoder = self._decoder
        was_undecoded = decoder is not None and (decoder.is_cut or decoder.failed)
        was_cut = self._is_lost or self._has_dropped or completion.was_cut or was_undecoded
        is_whole = end is End.COMPLETE and bool(completion.text) and not was_cut
        return Turn(
            request_id=request_id,
            org_id=org_id,
            agent_id=agent_id,
            user_id=user_id,
            external_id=external_id,
            session_id=session_id(org_id, agent_id, user_id, external_id),
            checkpoint_id=checkpoint_id(org_id, request_id),
            end=end,
            status_code=self._status,
            error_code=completion.error,
            chat_format=chat_format.name,
            model=(completion.model or self._model)[:_NAME_CHARACTERS],
            provider=self._cluster.removeprefix(_PROVIDER_PREFIX)[:_NAME_CHARACTERS],
            provider_request_id=completion.response_id,
            finish_reason=completion.finish_reason,
            is_streaming=self._is_sse,
            is_complete=end is End.COMPLETE,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            messages_hash=self._messages_hash,
            completion_hash=hash_text(completion.text) if is_whole else None,
            outcome=self._text_of("outcome"),
            memories_injected=int(_number_of(self._context, "memories")),
            context_tokens=int(_number_of(self._context, "tokens")),
            context_fallback=self._context.get("fallback", True) is not False,
            auth_ms=_number_of(self._gate, "auth_ms"),
            directive_ms=_number_of(self._context, "directive_ms"),
            engine_ms=_number_of(self._context, "engine_ms"),
            filter_ms=_number_of(self._context, "assemble_ms"),
            ttfb_ms=self._first_byte_ms if self._chunks else None,
            total_ms=total_ms,
            chunks=self._chunks,
            longest_gap_ms=self._longest_gap_ms,
            requested_at=started_at,
            completed_at=started_at + timedelta(milliseconds=total_ms),
            traceparent=self._traceparent(traceparent),
            skip_extraction=self._wants_no_extraction(),
            text_was_cut=was_cut or self._text_was_cut or not self._body_is_whole,
        )

    def _traceparent(self, of_stream: str) -> str:
        """Envoy's own, as it comes with the stream, else the client's; empty where neither is well-formed."""
        for sent in (of_stream, self._request_headers.get("traceparent", "")):
            if _is(_TRACEPARENT, sent):
                return sent
        return ""

    def _total_ms(self, closed_at_ms: float) -> float:
        """Envoy closes the stream of an exchange that broke off later than that happened, by its setting."""
        if self._ended_at_ms >= 0:
            return self._ended_at_ms
        if self._is_lost:
            return closed_at_ms
        return max(self._last_byte_ms, closed_at_ms - self._limits.deferred_close_ms, 0.0)

    def _wants_no_extraction(self) -> bool:
        """Sent twice, one yes is enough: better to learn too little."""
        sent = self._request_headers.get(names.SKIP_EXTRACTION_HEADER, "")
        return any(value.strip().lower() in _YES for value in sent.split(","))

    def _text_of(self, key: str) -> str:
        value = self._context.get(key, "")
        return value[:_NAME_CHARACTERS] if isinstance(value, str) else ""


def _number_of(metadata: Metadata, key: str) -> float:
    value = metadata.get(key, 0.0)
    if isinstance(value, str | bool) or not 0 <= value < math.inf:
        return 0.0
    return min(value, _MAX_NUMBER)


def _is(form: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _steps(chunk: bytes) -> Iterator[bytes]:
    """Cut into what may be read at a time; once for no bytes too."""
    if len(chunk) <= _STEP_BYTES:
        yield chunk
        return
    for at in range(0, len(chunk), _STEP_BYTES):
        yield chunk[at : at + _STEP_BYTES]


def _decoded(decoder: ContentDecoder, chunk: bytes) -> Iterator[bytes]:
    # In steps on both sides: many empty members are slow to decode, and a few bytes may stand for megabytes.
    for step in _steps(chunk):
        for piece in decoder.pieces(step):
            yield from _steps(piece)


def _both_ends(text: str, max_bytes: int) -> str:
    """At most as much of it in UTF-8: whole, or its beginning and its end, where people put what they ask for."""
    if len(text) * 4 <= max_bytes:
        return text
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return text
    half = max_bytes // 2
    ends = encoded[: max(0, max_bytes - half - 1)], encoded[len(encoded) - half :]
    return "\n".join(filter(None, (end.decode("utf-8", "ignore") for end in ends)))
