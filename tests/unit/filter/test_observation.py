"""Scripts: what Envoy shows of one exchange goes in, one turn comes out."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import brotli
import msgspec
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import openai_chat
from extproc.filter.identity import Identity
from extproc.filter.observation import Observation, ObservationLimits, Observed, Room
from extproc.turns.turn import End, Turn, TurnText, checkpoint_id, session_id
from tests.unit.chat.transcripts import TRANSCRIPTS

ORG = "11111111-1111-4111-8111-111111111111"
AGENT = "22222222-2222-4222-8222-222222222222"
IDENTITY = Identity(ORG, AGENT, None)
OTHER = "33333333-3333-4333-8333-333333333333"
STARTED = datetime(2026, 3, 1, 12, tzinfo=UTC)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER_TRACEPARENT = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-00"

QUESTION = "Qu’est-ce que c’est ?"
BODY = json.dumps({"model": "asked", "messages": [{"role": "user", "content": QUESTION}]}).encode()
PATHS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic_messages": "/v1/messages",
    "gemini": "/v1beta/models/gemini-2.5-flash:streamGenerateContent",
}
BODIES = {
    "openai_chat": BODY,
    "openai_responses": json.dumps({"model": "asked", "input": QUESTION}).encode(),
    "anthropic_messages": BODY,
    "gemini": json.dumps({"contents": [{"role": "user", "parts": [{"text": QUESTION}]}]}).encode(),
}


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c1", "model": "answered", "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = event("It is ") + event("new.", "stop") + DONE
ERROR = json.dumps({"error": {"code": "PROVIDER_UNAVAILABLE", "message": "Nobody there."}}).encode()
SSE = "text/event-stream; charset=utf-8"
JSON = "application/json"

SMALL = ObservationLimits(max_body_bytes=1024, max_text_bytes=64, max_decoded_bytes=4096)


def json_answer(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


@dataclass
class Watched:
    """One exchange to be observed; every field is as in a healthy one until a test says otherwise."""

    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Changes to the request's; None removes one."""
    body: Sequence[bytes] = (BODY,)
    request_ends: bool = True
    status: str | None = "200"
    """None: no response headers came."""
    response_headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = SSE
    context: Mapping[str, str | float | bool] = field(default_factory=dict)
    gate: Mapping[str, str | float | bool] = field(default_factory=dict)
    cluster: str = "provider_openai"
    details: str = "via_upstream"
    answer: Sequence[bytes] = (ANSWER,)
    answer_ends: bool = True
    identity: Identity | None = IDENTITY
    traceparent: str = ""
    limits: ObservationLimits = field(default_factory=ObservationLimits)
    room: Room = field(default_factory=lambda: Room(64 * 1024 * 1024))
    lost: bool = False
    ended_at_ms: float = 99.0
    is_drained: bool = True

    def open(self) -> Observation:
        return Observation(self.limits, self.room, lambda: "minted")

    def show_request_headers(self, one: Observation) -> None:
        base: dict[str, str | None] = {
            ":method": "POST",
            ":path": "/v1/chat/completions",
            "content-type": "application/json",
            "x-request-id": "r1",
            "x-ibex-session-id": "s1",
        }
        one.see_request_headers({k: v for k, v in (base | dict(self.headers)).items() if v is not None})

    def show_request_body(self, one: Observation) -> None:
        for chunk in self.body:
            one.see_request_body(chunk, end_of_stream=False)
        if self.request_ends:
            one.see_request_body(b"", end_of_stream=True)
            self.drain(one)

    def show_response_headers(self, one: Observation) -> None:
        if self.status is not None:
            headers = {":status": self.status, "content-type": self.content_type, **self.response_headers}
            ends = not self.answer and self.answer_ends
            one.see_response_headers(
                headers, self.context, self.cluster, self.details, 10.0, end_of_stream=ends, gate=self.gate
            )

    def show_answer(self, one: Observation) -> None:
        for at, chunk in enumerate(self.answer):
            one.see_response_body(chunk, 20.0 + at, end_of_stream=False)
            self.drain(one)
        if self.answer and self.answer_ends:
            one.see_response_body(b"", 50.0, end_of_stream=True)

    def drain(self, one: Observation) -> None:
        while self.is_drained and one.work():
            pass

    def end(self, one: Observation) -> Observed | None:
        if self.lost:
            one.lose_sight()
        try:
            return one.finish(self.identity, self.traceparent, STARTED, self.ended_at_ms)
        finally:
            one.forget()

    def observed(self) -> Observed | None:
        one = self.open()
        self.show_request_headers(one)
        self.show_request_body(one)
        self.show_response_headers(one)
        self.show_answer(one)
        return self.end(one)


def observe(**given: Any) -> Observed:
    observed = Watched(**given).observed()
    assert observed is not None
    return observed


def turn(**given: Any) -> Turn:
    return observe(**given).turn


def texts(**given: Any) -> TurnText:
    text = observe(**given).text
    assert text is not None
    return text


def test_a_streamed_answer_is_one_complete_turn() -> None:
    observed = observe(context={"outcome": "injected", "memories": 2.0, "tokens": 30.0, "fallback": False})
    assert observed == Observed(
        Turn(
            request_id="r1",
            org_id=ORG,
            agent_id=AGENT,
            external_id="s1",
            session_id=session_id(ORG, AGENT, None, "s1"),
            checkpoint_id=checkpoint_id(ORG, "r1"),
            end=End.COMPLETE,
            status_code=200,
            chat_format="openai_chat",
            model="answered",
            provider="openai",
            provider_request_id="c1",
            finish_reason="stop",
            is_streaming=True,
            is_complete=True,
            messages_hash=openai_chat.hash_messages(BODY),
            completion_hash=hashlib.sha256(b"It is new.").hexdigest(),
            outcome="injected",
            memories_injected=2,
            context_tokens=30,
            context_fallback=False,
            ttfb_ms=20.0,
            total_ms=50.0,
            chunks=1,
            requested_at=STARTED,
            completed_at=STARTED + timedelta(milliseconds=50),
        ),
        TurnText(QUESTION, "It is new."),
    )


STREAMS = [one for one in TRANSCRIPTS if one.name.endswith(("-stream", "-array", "-body"))]


@pytest.mark.parametrize("name", PATHS)
@given(draw=st.data())
def test_neither_cuts_nor_interleaving_change_a_turn(name: str, draw: st.DataObject) -> None:
    """Both bodies are cut anywhere; chunks of the one may come between chunks of the other, as in an early answer."""
    transcript = draw.draw(st.sampled_from([one for one in STREAMS if one.chat.name == name]))
    whole = Watched(
        headers={":path": PATHS[name]},
        body=[BODIES[name]],
        content_type=SSE if transcript.is_sse else JSON,
        answer=[transcript.body],
    )
    expected = whole.observed()
    assert expected is not None
    assert expected.text == TurnText(QUESTION, transcript.expected.text)
    request_chunks = draw.draw(cuts(BODIES[name]))
    answer_chunks = draw.draw(cuts(transcript.body))
    is_request = draw.draw(
        st.permutations([True] * (len(request_chunks) + 1) + [False] * (len(answer_chunks) + 1)), label="order"
    )
    one = whole.open()
    whole.show_request_headers(one)
    left = {True: [*request_chunks, None], False: [None, *answer_chunks]}
    for side in is_request:
        chunk = left[side].pop(0)
        if side:
            one.see_request_body(chunk or b"", end_of_stream=chunk is None)
        elif chunk is None:
            whole.show_response_headers(one)
        else:
            one.see_response_body(chunk, 20.0, end_of_stream=False)
    one.see_response_body(b"", 50.0, end_of_stream=True)
    got = whole.end(one)
    assert got is not None
    assert got.text == expected.text
    assert timeless(got.turn) == timeless(expected.turn)
    assert whole.room.used == 0


def cuts(body: bytes) -> st.SearchStrategy[list[bytes]]:
    positions = st.lists(st.integers(0, len(body)), max_size=6).map(sorted)
    return positions.map(lambda at: [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)])


def timeless(one: Turn) -> Turn:
    return msgspec.structs.replace(one, chunks=0, ttfb_ms=None, longest_gap_ms=0.0)


# Whose turn


def test_what_the_context_filter_found_wins_over_the_trusted_sources() -> None:
    found = turn(context={"org_id": OTHER, "agent_id": AGENT, "user_id": "ada"})
    assert (found.org_id, found.agent_id, found.user_id) == (OTHER, AGENT, "ada")
    assert found.session_id == session_id(OTHER, AGENT, "ada", "s1")


def test_the_context_filters_silence_on_the_user_means_no_user() -> None:
    identity = replace(IDENTITY, user_id="grace")
    assert turn(identity=identity, context={"org_id": ORG, "agent_id": AGENT}).user_id is None


def test_the_trusted_sources_count_where_the_context_filter_named_nobody() -> None:
    found = turn(identity=replace(IDENTITY, user_id="grace"), context={"outcome": "timeout"})
    assert (found.org_id, found.user_id) == (ORG, "grace")


def test_an_id_is_written_in_lower_case() -> None:
    upper = OTHER.replace("3", "F")
    assert turn(context={"org_id": upper, "agent_id": AGENT}).org_id == upper.lower()


@pytest.mark.parametrize(
    "context",
    [
        {"org_id": "acme", "agent_id": AGENT},
        {"org_id": ORG, "agent_id": ""},
        {"org_id": ORG},
        {"agent_id": AGENT},
        {"org_id": 1.0, "agent_id": AGENT},
        {"org_id": True, "agent_id": AGENT},
        {"org_id": ORG + "\n", "agent_id": AGENT},
        {"org_id": ORG, "agent_id": AGENT, "user_id": ""},
        {"org_id": ORG, "agent_id": AGENT, "user_id": "two words"},
        {"org_id": ORG, "agent_id": AGENT, "user_id": "x" * 129},
        {"org_id": ORG, "agent_id": AGENT, "user_id": 7.0},
    ],
)
def test_a_malformed_identity_is_nobody_and_never_the_next_source(context: dict[str, str | float | bool]) -> None:
    assert Watched(context=context).observed() is None


def test_nobodys_exchange_leaves_no_turn() -> None:
    assert Watched(identity=None).observed() is None


@pytest.mark.parametrize(
    "headers",
    [
        {":path": "/v1/models"},
        {":method": "GET"},
        {"content-type": "multipart/form-data"},
        {":path": None},
        {":method": None},
    ],
)
def test_what_is_no_chat_leaves_no_turn_and_is_over_at_once(headers: dict[str, str | None]) -> None:
    watched = Watched(headers=headers)
    one = watched.open()
    watched.show_request_headers(one)
    assert one.is_over
    assert not one.is_chat
    assert watched.observed() is None


def test_an_answer_is_over_with_its_last_message_and_not_before() -> None:
    watched = Watched()
    one = watched.open()
    watched.show_request_headers(one)
    watched.show_request_body(one)
    watched.show_response_headers(one)
    one.see_response_body(ANSWER, 20.0, end_of_stream=False)
    assert not one.is_over
    one.see_response_body(b"", 21.0, end_of_stream=True)
    assert one.is_over


# Its session and its ids

CONTEXT = {"session_id": "from-context"}
REQUEST = {"x-ibex-session-id": "from-request"}
RESPONSE = {"x-ibex-session-id": "from-response"}


@pytest.mark.parametrize(
    ("context", "request_headers", "response_headers", "expected"),
    [
        (CONTEXT, REQUEST, RESPONSE, "from-context"),
        ({}, REQUEST, RESPONSE, "from-request"),
        ({}, {"x-ibex-session-id": None}, RESPONSE, "from-response"),
        ({}, {"x-ibex-session-id": None}, {}, "minted"),
        ({"session_id": 5.0}, REQUEST, RESPONSE, "from-request"),
        ({"session_id": "with blank"}, REQUEST, RESPONSE, "from-request"),
        ({}, {"x-ibex-session-id": "x" * 65}, RESPONSE, "from-response"),
        ({}, {"x-ibex-session-id": ""}, {"x-ibex-session-id": "mäh"}, "minted"),
        ({}, {"x-ibex-session-id": "line\n"}, {}, "minted"),
    ],
)
def test_a_session_is_named_by_the_first_that_names_it_well(
    context: dict[str, Any], request_headers: dict[str, Any], response_headers: dict[str, str], expected: str
) -> None:
    found = turn(context=context, headers=request_headers, response_headers=response_headers)
    assert found.external_id == expected
    assert found.session_id == session_id(ORG, AGENT, None, expected)


@pytest.mark.parametrize("sent", [None, "", "tell me a joke", "x" * 65, "mäh"])
def test_a_request_id_that_could_be_anything_is_replaced(sent: str | None) -> None:
    found = turn(headers={"x-request-id": sent})
    assert (found.request_id, found.checkpoint_id) == ("minted", checkpoint_id(ORG, "minted"))


@pytest.mark.parametrize(
    ("of_stream", "of_header", "expected"),
    [
        (TRACEPARENT, OTHER_TRACEPARENT, TRACEPARENT),
        ("", OTHER_TRACEPARENT, OTHER_TRACEPARENT),
        ("rubbish", OTHER_TRACEPARENT, OTHER_TRACEPARENT),
        ("", "my secret question", ""),
        ("", TRACEPARENT + "-my secret question", ""),
        ("", f"{TRACEPARENT},{OTHER_TRACEPARENT}", ""),
        ("", None, ""),
    ],
)
def test_trace_context_is_envoys_own_else_the_clients_if_well_formed(
    of_stream: str, of_header: str | None, expected: str
) -> None:
    assert turn(traceparent=of_stream, headers={"traceparent": of_header}).traceparent == expected


@pytest.mark.parametrize("value", ["1", "true", "YES", " on ", "True", "1,1", "0, 1"])
def test_a_clear_yes_skips_extraction_and_leaves_no_text(value: str) -> None:
    observed = observe(headers={"x-ibex-skip-extraction": value})
    assert observed.turn.skip_extraction
    assert observed.turn.messages_hash
    assert observed.text is None


@pytest.mark.parametrize("value", [None, "", "0", "false", "no", "maybe", "0,0"])
def test_anything_else_skips_nothing(value: str | None) -> None:
    observed = observe(headers={"x-ibex-skip-extraction": value})
    assert not observed.turn.skip_extraction
    assert observed.text is not None


# How it ended


def error_event(code: str) -> bytes:
    return b"data: " + json.dumps({"error": {"message": "x", "code": code}}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("given", "end", "has_checkpoint"),
    [
        ({}, End.COMPLETE, True),
        ({"status": "299"}, End.COMPLETE, True),
        ({"content_type": JSON, "answer": [json_answer("Yes.")]}, End.COMPLETE, True),
        ({"answer": [event("It is "), error_event("overloaded")]}, End.INCOMPLETE, True),
        ({"answer": [ANSWER, error_event("overloaded")]}, End.INCOMPLETE, True),
        ({"answer": [event("It is ")]}, End.INCOMPLETE, True),
        ({"content_type": JSON, "answer": [json_answer("Yes.")[:-9]]}, End.INCOMPLETE, True),
        ({"answer": []}, End.INCOMPLETE, True),
        ({"status": "204", "answer": []}, End.INCOMPLETE, True),
        ({"status": "302", "answer": []}, End.INCOMPLETE, False),
        ({"status": "302", "answer": [b"<a>moved</a>"], "content_type": "text/html"}, End.INCOMPLETE, False),
        ({"status": "101", "answer": []}, End.INCOMPLETE, False),
        ({"answer": [event("It is ")], "answer_ends": False, "lost": True}, End.INCOMPLETE, True),
        ({"status": None, "answer": [], "answer_ends": False, "lost": True}, End.INCOMPLETE, False),
        ({"answer": [event("It is ")], "answer_ends": False}, End.CLIENT_GONE, True),
        ({"answer": [], "answer_ends": False}, End.CLIENT_GONE, True),
        ({"status": None, "answer": []}, End.CLIENT_GONE, False),
        ({"status": None, "answer": [], "request_ends": False}, End.CLIENT_GONE, False),
        ({"status": "429"}, End.PROVIDER_ERROR, False),
        ({"status": "401"}, End.PROVIDER_ERROR, False),
        ({"status": "599", "answer": []}, End.PROVIDER_ERROR, False),
        ({"status": "501", "details": "direct_response"}, End.PROVIDER_ERROR, False),
        ({"status": "503", "details": "ext_authz_error"}, End.PROVIDER_ERROR, False),
        ({"status": "500", "answer_ends": False}, End.PROVIDER_ERROR, False),
        ({"status": "500", "answer_ends": False, "lost": True}, End.PROVIDER_ERROR, False),
        ({"status": "403", "details": "ext_authz_denied"}, End.DENIED, False),
        ({"status": "401", "details": "ext_authz_denied"}, End.DENIED, False),
        ({"status": "429", "details": "ext_authz_denied"}, End.DENIED, False),
        ({"status": "400", "details": "ext_authz_denied"}, End.DENIED, False),
        ({"status": "503", "details": "ext_authz_denied"}, End.DENIED, False),
        ({"status": "400", "details": "rbac_access_denied_matched_policy[none]"}, End.PROVIDER_ERROR, False),
        ({"status": "401", "details": "jwt_authn_access_denied{Jwt_is_missing}"}, End.DENIED, False),
        ({"status": "403", "details": "rbac_access_denied_matched_policy[none]"}, End.DENIED, False),
        ({"status": "403", "details": "ext_authz_denied", "lost": True, "answer_ends": False}, End.DENIED, False),
    ],
)
def test_how_an_exchange_ended(given: dict[str, Any], end: End, has_checkpoint: bool) -> None:
    observed = observe(**given)
    found = observed.turn
    assert (found.end, found.has_checkpoint) == (end, has_checkpoint)
    assert found.is_complete == (end is End.COMPLETE)
    assert (observed.text is not None) == has_checkpoint


@pytest.mark.parametrize(
    ("gate", "auth_ms"),
    [
        ({"auth_ms": 1.25}, 1.25),
        ({}, 0.0),
        ({"auth_ms": -1.0}, 0.0),
        ({"auth_ms": float("nan")}, 0.0),
        ({"auth_ms": "soon"}, 0.0),
        ({"auth_ms": 1e300}, 2**31 - 1),
    ],
)
def test_how_long_the_gate_took_is_what_the_gate_says(gate: dict[str, Any], auth_ms: float) -> None:
    assert turn(gate=gate).auth_ms == auth_ms


def test_a_client_that_leaves_at_the_last_event_got_the_whole_answer() -> None:
    """Libraries close the connection at `[DONE]`; and where trailers follow, no chunk ends the body."""
    observed = observe(answer_ends=False)
    assert observed.turn.end is End.COMPLETE
    assert observed.text == TurnText(QUESTION, "It is new.")


def test_sight_that_is_lost_after_the_end_is_not_lost() -> None:
    assert turn(lost=True).end is End.COMPLETE


def test_an_exchange_that_was_lost_is_marked_as_cut_and_has_no_hash() -> None:
    found = turn(answer=[ANSWER], answer_ends=False, lost=True)
    assert (found.text_was_cut, found.completion_hash) == (True, None)


def test_envoys_own_answer_gives_the_code_of_its_envelope() -> None:
    found = turn(status="503", details="no_healthy_upstream", content_type=JSON, answer=[ERROR], cluster="")
    assert (found.end, found.error_code, found.status_code) == (End.PROVIDER_ERROR, "PROVIDER_UNAVAILABLE", 503)
    assert found.provider == ""


@pytest.mark.parametrize(
    "status", ["", "abc", "²⁰⁰", "٢٠٠", "200,200", "+200", " 200", "-20", "20", "099", "2000", "9" * 5000, "200\n"]
)
def test_a_status_that_is_none_is_unknown(status: str) -> None:
    assert turn(status=status).status_code == 0


# What was said


@pytest.mark.parametrize("name", PATHS)
def test_each_formats_request_is_read_and_hashed(name: str) -> None:
    observed = observe(headers={":path": PATHS[name]}, body=[BODIES[name]])
    assert observed.turn.chat_format == name
    assert len(observed.turn.messages_hash) == 64
    assert observed.text is not None
    assert observed.text.user_text == QUESTION


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, zstd"])
def test_a_compressed_request_is_read(coding: str) -> None:
    encode = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstd.compress}
    body = BODY
    for one in coding.split(", "):
        body = encode[one](body)
    observed = observe(headers={"content-encoding": coding}, body=[body])
    assert observed.turn.messages_hash == openai_chat.hash_messages(BODY)
    assert observed.text is not None
    assert observed.text.user_text == QUESTION


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b"no gzip"),
        ("snappy", BODY),
        ("gzip", gzip.compress(b" " * 5000 + BODY)),
        ("gzip, gzip, gzip, gzip", BODY),
    ],
    ids=["broken", "unknown", "bomb", "too many"],
)
def test_a_request_that_cannot_be_decoded_leaves_its_turn_without_a_hash(coding: str, body: bytes) -> None:
    found = turn(headers={"content-encoding": coding}, body=[body], limits=replace(SMALL, max_decoded_bytes=10**6))
    assert (found.end, found.messages_hash, found.text_was_cut) == (End.COMPLETE, "", True)


def test_a_request_that_is_too_large_leaves_its_turn_without_a_hash() -> None:
    watched = Watched(body=[b" " * 1000, b" " * 1000, BODY], limits=SMALL)
    observed = watched.observed()
    assert observed is not None
    assert (observed.turn.end, observed.turn.messages_hash, observed.turn.text_was_cut) == (End.COMPLETE, "", True)
    assert observed.text == TurnText("", "It is new.")


def test_a_request_of_objects_without_end_is_not_read() -> None:
    """Reading 10 MB of them would hold the loop for half a second."""
    body = BODY[:-1] + b',"x":[' + b"{}," * 300_000 + b"0]}"
    found = turn(body=[body])
    assert (found.messages_hash, found.text_was_cut) == ("", True)


def test_without_room_a_request_is_dropped_and_not_its_turn() -> None:
    room = Room(100, used=60)
    found = turn(room=room)
    assert (found.messages_hash, found.text_was_cut, room.used) == ("", True, 60)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages":5}', b"null"])
def test_a_request_that_cannot_be_read_leaves_its_turn(body: bytes) -> None:
    found = turn(body=[body])
    assert (found.end, found.messages_hash) == (End.COMPLETE, "")


def test_a_request_without_an_end_is_read_all_the_same() -> None:
    """Trailers end it, and those are not shown."""
    assert texts(request_ends=False).user_text == QUESTION


def test_a_request_that_its_answer_overtakes_is_read_whole() -> None:
    watched = Watched()
    one = watched.open()
    watched.show_request_headers(one)
    one.see_request_body(BODY[:20], end_of_stream=False)
    watched.show_response_headers(one)
    one.see_response_body(ANSWER, 20.0, end_of_stream=False)
    one.see_request_body(BODY[20:], end_of_stream=True)
    one.see_response_body(b"", 21.0, end_of_stream=True)
    observed = watched.end(one)
    assert observed is not None
    assert observed.turn.messages_hash == openai_chat.hash_messages(BODY)


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 7, 64, 1000])
@pytest.mark.parametrize("text", ["a" * 200, "é" * 200, "中" * 200, "😀" * 200, "a😀" * 100, "short"])
def test_texts_end_between_two_characters_within_their_limit(limit: int, text: str) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    limits = ObservationLimits(max_text_bytes=limit)
    observed = observe(body=[body], answer=[event(text, "stop")], limits=limits)
    assert observed.text is not None
    fits = len(text.encode()) <= limit
    for kept in (observed.text.user_text, observed.text.assistant_text):
        assert len(kept.encode()) <= limit
        assert set(kept) <= set(text) | {"\n"}
        assert (kept == text) == fits
    assert observed.turn.text_was_cut == (not fits)
    assert (observed.turn.completion_hash is None) == (not fits)
    assert observed.turn.messages_hash == openai_chat.hash_messages(body)


def test_of_a_long_question_the_beginning_and_the_end_are_kept() -> None:
    text = "First " + "x" * 200 + " last?"
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    kept = texts(body=[body], limits=SMALL).user_text
    assert kept.startswith("First ")
    assert kept.endswith(" last?")


def test_a_question_that_was_cut_is_marked_and_leaves_the_answers_hash() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 200}]}).encode()
    found = turn(body=[body], limits=SMALL)
    assert found.text_was_cut
    assert found.completion_hash is not None


def test_a_question_that_escapes_make_long_is_kept_whole() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "é" * 30}]}).encode()
    found = observe(body=[body], limits=SMALL)
    assert not found.turn.text_was_cut
    assert found.text is not None
    assert found.text.user_text == "é" * 30


def test_a_refusal_is_the_answers_text_but_has_no_hash() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "refusal": "No."}, "finish_reason": "stop"}
    observed = observe(content_type=JSON, answer=[json.dumps({"choices": [choice]}).encode()])
    assert observed.text == TurnText(QUESTION, "No.")
    assert observed.turn.completion_hash is None


@pytest.mark.parametrize("content_type", [SSE, JSON])
def test_a_compressed_answer_is_read(content_type: str) -> None:
    body = ANSWER if content_type == SSE else json_answer("It is new.")
    packed = gzip.compress(body)
    chunks = [packed[at : at + 7] for at in range(0, len(packed), 7)]
    observed = observe(content_type=content_type, answer=chunks, response_headers={"content-encoding": "gzip"})
    assert observed.turn.end is End.COMPLETE
    assert observed.text == TurnText(QUESTION, "It is new.")


@pytest.mark.parametrize(
    ("coding", "answer"),
    [
        ("gzip", gzip.compress(b": \n" * 5000 + ANSWER)),
        ("gzip", b"no gzip"),
        ("snappy", ANSWER),
    ],
    ids=["bomb", "broken", "unknown"],
)
def test_an_answer_that_cannot_be_decoded_is_an_incomplete_turn(coding: str, answer: bytes) -> None:
    found = turn(answer=[answer], response_headers={"content-encoding": coding}, limits=SMALL)
    assert (found.end, found.completion_hash, found.text_was_cut) == (End.INCOMPLETE, None, True)


def test_without_room_an_answer_that_does_not_stream_is_dropped() -> None:
    room = Room(len(BODY))
    found = turn(content_type=JSON, answer=[json_answer("y" * 1000)], room=room)
    assert (found.end, found.text_was_cut, found.completion_hash, room.used) == (End.INCOMPLETE, True, None, 0)
    assert found.messages_hash


def test_an_answer_takes_no_more_room_than_its_reader_keeps() -> None:
    room = Room(20 * 1024 * 1024)
    watched = Watched(content_type=JSON, room=room)
    one = watched.open()
    watched.show_request_headers(one)
    watched.show_response_headers(one)
    for _ in range(30):
        one.see_response_body(b" " * 1024 * 1024, 20.0, end_of_stream=False)
        watched.drain(one)
    assert room.used <= 8 * 1024 * 1024
    watched.end(one)
    assert room.used == 0


def test_a_large_message_is_worked_off_in_steps() -> None:
    """A few kilobytes that stand for megabytes of short events may not hold the loop."""
    packed = gzip.compress(b"data:\n\n" * 300_000 + ANSWER)
    watched = Watched(response_headers={"content-encoding": "gzip"})
    one = watched.open()
    watched.show_request_headers(one)
    watched.show_request_body(one)
    watched.show_response_headers(one)
    one.see_response_body(packed, 20.0, end_of_stream=False)
    steps = 0
    while one.work():
        steps += 1
    assert steps > 100
    assert not one.has_work
    one.see_response_body(b"", 21.0, end_of_stream=True)
    observed = watched.end(one)
    assert observed is not None
    assert observed.text == TurnText(QUESTION, "It is new.")


def test_what_comes_while_work_is_left_waits_for_it() -> None:
    large = b"".join(event(f"{number} ") for number in range(500))
    watched = Watched(
        headers={"content-encoding": "gzip"},
        body=[gzip.compress(BODY)],
        answer=[large, event("and "), large, event("end", "stop")],
        is_drained=False,
    )
    observed = watched.observed()
    numbers = "".join(f"{number} " for number in range(500))
    assert observed is not None
    assert observed.turn.messages_hash
    assert observed.text == TurnText(QUESTION, f"{numbers}and {numbers}end")


def test_work_that_is_left_is_dropped_at_the_end() -> None:
    packed = gzip.compress(b"data:\n\n" * 300_000 + ANSWER)
    found = turn(answer=[packed], answer_ends=False, is_drained=False, response_headers={"content-encoding": "gzip"})
    assert (found.end, found.text_was_cut) == (End.CLIENT_GONE, True)


# What it is called


def test_the_model_that_answered_counts_else_the_one_that_was_asked_for() -> None:
    assert turn().model == "answered"
    assert turn(answer=[DONE]).model == "asked"
    assert turn(headers={":path": PATHS["gemini"]}, body=[BODIES["gemini"]], answer=[]).model == "gemini-2.5-flash"


def test_long_names_are_cut() -> None:
    body = json.dumps({"model": "m" * 5000, "messages": []}).encode()
    found = turn(body=[body], answer=[], cluster="c" * 5000, context={"outcome": "o" * 5000})
    assert [len(name) for name in (found.model, found.provider, found.outcome)] == [256] * 3


@pytest.mark.parametrize(
    ("cluster", "provider"),
    [("provider_openai", "openai"), ("openai", "openai"), ("my_provider_x", "my_provider_x"), ("", "")],
)
def test_the_provider_is_the_cluster_without_its_prefix(cluster: str, provider: str) -> None:
    assert turn(cluster=cluster).provider == provider


# Numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.0, 3),
        (2.9, 2),
        (0.0, 0),
        (-1.0, 0),
        (float("nan"), 0),
        (float("inf"), 0),
        (float("-inf"), 0),
        (1e308, 2**31 - 1),
        (5e-324, 0),
        ("7", 0),
        (True, 0),
    ],
)
def test_a_number_that_no_column_can_hold_is_none(value: str | float | bool, expected: int) -> None:
    keys = ("memories", "tokens", "engine_ms", "assemble_ms")
    found = turn(context=dict.fromkeys(keys, value))
    assert (found.memories_injected, found.context_tokens) == (expected, expected)
    assert 0 <= found.engine_ms <= 2**31
    assert 0 <= found.filter_ms <= 2**31
    assert msgspec.json.decode(msgspec.json.encode(found), type=Turn) == found


@pytest.mark.parametrize(
    ("context", "is_fallback"),
    [({}, True), ({"fallback": True}, True), ({"fallback": False}, False), ({"fallback": "false"}, True)],
)
def test_without_a_clear_no_it_was_a_fallback(context: dict[str, str | bool], is_fallback: bool) -> None:
    assert turn(context=context).context_fallback is is_fallback


def test_times_of_a_stream() -> None:
    watched = Watched()
    one = watched.open()
    watched.show_request_headers(one)
    watched.show_request_body(one)
    watched.show_response_headers(one)
    for at_ms in (15.0, 18.0, 48.0, 50.0):
        one.see_response_body(event("x"), at_ms, end_of_stream=False)
    one.see_response_body(DONE, 51.0, end_of_stream=True)
    observed = watched.end(one)
    assert observed is not None
    found = observed.turn
    assert (found.ttfb_ms, found.longest_gap_ms, found.total_ms, found.chunks) == (15.0, 30.0, 51.0, 5)
    assert found.completed_at - found.requested_at == timedelta(milliseconds=51)


def test_an_empty_last_chunk_counts_for_the_total_alone() -> None:
    found = turn()
    assert (found.chunks, found.longest_gap_ms, found.total_ms) == (1, 0.0, 50.0)


def test_an_answer_without_a_body_has_no_first_byte() -> None:
    found = turn(status="204", answer=[])
    assert (found.ttfb_ms, found.chunks, found.total_ms) == (None, 0, 10.0)


@pytest.mark.parametrize(("closed_at_ms", "total_ms"), [(99.0, 20.0), (1019.0, 20.0), (3000.0, 2000.0)])
def test_an_answer_that_broke_off_lasted_until_it_did_and_not_until_envoy_closed(
    closed_at_ms: float, total_ms: float
) -> None:
    """Envoy closes the stream a second late; the last byte came at 20 ms."""
    broken = turn(answer=[event("x")], answer_ends=False, ended_at_ms=closed_at_ms)
    assert broken.total_ms == total_ms
    assert broken.completion_hash is None


# Room


def test_room_is_given_back_once_however_often_it_is_forgotten() -> None:
    room = Room(10_000)
    watched = Watched(content_type=JSON, room=room)
    one = watched.open()
    watched.show_request_headers(one)
    one.see_request_body(BODY, end_of_stream=False)
    watched.show_response_headers(one)
    one.see_response_body(json_answer("x"), 20.0, end_of_stream=False)
    assert room.used == len(BODY) + len(json_answer("x"))
    one.forget()
    one.forget()
    assert room.used == 0


def test_a_request_that_was_read_takes_no_room_while_its_answer_streams() -> None:
    room = Room(10_000)
    watched = Watched(room=room)
    one = watched.open()
    watched.show_request_headers(one)
    watched.show_request_body(one)
    assert room.used == 0
    one.forget()


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=40))
def test_room_is_never_more_than_taken_than_there_is(steps: list[tuple[int, bool]]) -> None:
    room = Room(100)
    taken: list[int] = []
    for size, takes in steps:
        if takes:
            had = room.used
            if room.take(size):
                taken.append(size)
            else:
                assert had + size > room.limit
                assert room.used == had
        elif taken:
            room.give_back(taken.pop())
        assert room.used == sum(taken) <= room.limit


# Whatever comes

ANY_TEXT = st.one_of(st.sampled_from(["", "200", "²⁰⁰", "gzip", "br", SSE, JSON, "1", TRACEPARENT]), st.text())
ANY_HEADERS = st.dictionaries(
    st.one_of(
        st.sampled_from([":method", ":path", ":status", "content-type", "content-encoding", "x-ibex-session-id"]),
        st.sampled_from(["traceparent", "x-request-id", "x-ibex-skip-extraction"]),
        st.text(),
    ),
    ANY_TEXT,
)
CHAT_HEADERS = st.sampled_from([{":method": "POST", ":path": path} for path in PATHS.values()])
ANY_CONTEXT = st.dictionaries(
    st.sampled_from(
        ["org_id", "agent_id", "user_id", "session_id", "memories", "tokens", "engine_ms", "fallback", "outcome"]
    ),
    st.one_of(st.floats(), st.booleans(), st.sampled_from([ORG, AGENT, "1e308"]), st.text()),
)
ANY_BYTES = st.one_of(
    st.sampled_from([b"", BODY, BODY[:30], BODY[30:], ANSWER, ANSWER[:50], ERROR, gzip.compress(ANSWER), b" " * 700]),
    st.sampled_from([one.body for one in TRANSCRIPTS]),
    st.binary(),
)
HAPPENINGS = st.one_of(
    st.tuples(st.just("request_headers"), st.one_of(CHAT_HEADERS, ANY_HEADERS)),
    st.tuples(st.just("request_body"), ANY_BYTES, st.booleans()),
    st.tuples(st.just("response_headers"), ANY_HEADERS, ANY_CONTEXT, ANY_TEXT, st.booleans()),
    st.tuples(st.just("response_body"), ANY_BYTES, st.booleans()),
    st.tuples(st.just("work")),
    st.tuples(st.just("lose_sight")),
)


def happen(one: Observation, happening: Any, at_ms: float) -> None:
    match happening:
        case ("request_headers", headers):
            one.see_request_headers(headers)
        case ("request_body", chunk, ends):
            one.see_request_body(chunk, end_of_stream=ends)
        case ("response_headers", headers, context, text, ends):
            one.see_response_headers(headers, context, text, text, at_ms, end_of_stream=ends)
        case ("response_body", chunk, ends):
            one.see_response_body(chunk, at_ms, end_of_stream=ends)
        case ("work",):
            one.work()
        case ("lose_sight",):
            one.lose_sight()


@given(st.one_of(CHAT_HEADERS, ANY_HEADERS), st.lists(HAPPENINGS, max_size=12), st.integers(0, 4000), ANY_TEXT)
def test_nothing_raises_and_no_room_is_lost_whatever_comes(
    headers: dict[str, str], happenings: list[Any], room_bytes: int, traceparent: str
) -> None:
    room = Room(room_bytes)
    one = Observation(SMALL, room, lambda: "minted")
    one.see_request_headers(headers)
    for at, happening in enumerate(happenings):
        happen(one, happening, float(at))
        assert 0 <= room.used <= room.limit
    observed = one.finish(IDENTITY, traceparent, STARTED, 99.0)
    one.forget()
    assert room.used == 0
    if observed is None:
        return
    found = observed.turn
    assert msgspec.json.decode(msgspec.json.encode(found), type=Turn) == found
    assert found.status_code == 0 or 100 <= found.status_code <= 999
    assert found.is_complete == (found.end is End.COMPLETE)
    if observed.text is not None:
        assert found.has_checkpoint
        assert not found.skip_extraction
        for text in (observed.text.user_text, observed.text.assistant_text):
            assert len(text.encode()) <= SMALL.max_text_bytes
