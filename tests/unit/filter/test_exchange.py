"""Scripts: these events in, these effects out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import Placement
from extproc.filter.exchange import (
    Assemble,
    Assembled,
    Continue,
    Effect,
    Event,
    Exchange,
    Failed,
    Forward,
    NotAssembled,
    OtherMessage,
    Policy,
    Record,
    RequestBody,
    RequestHeaders,
    ResponseHeaders,
    SetResponseHeaders,
    StreamEnded,
    UnexpectedEvent,
)
from extproc.filter.identity import Identity
from extproc.filter.outcome import Outcome

IDENTITY = Identity("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222", None)
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "What is my name?"}]}).encode()


def headers(**changes: str | None) -> RequestHeaders:
    """A chat request's headers; a change to None removes one."""
    base: dict[str, str | None] = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "x-ibex-session-id": "s1",
        "x-request-id": "r1",
    }
    base |= {name.replace("_", "-"): value for name, value in changes.items()}
    return RequestHeaders({name: value for name, value in base.items() if value is not None}, IDENTITY, False)


def exchange(policy: Policy | None = None) -> Exchange:
    return Exchange(policy or Policy(), lambda: "minted")


def response_headers(injected: int, tokens: int, fallback: str, session: str = "s1") -> SetResponseHeaders:
    return SetResponseHeaders(
        (
            ("x-ibex-memories-injected", str(injected)),
            ("x-ibex-context-tokens", str(tokens)),
            ("x-ibex-context-fallback", fallback),
            ("x-ibex-session-id", session),
        )
    )


def test_memories_found_are_spliced_and_reported() -> None:
    chat = exchange()
    assert chat.receive(headers()) == [Continue()]
    [assemble] = chat.receive(RequestBody(BODY))
    assert isinstance(assemble, Assemble)
    assert (assemble.request.query, assemble.identity, assemble.session_id) == ("What is my name?", IDENTITY, "s1")
    record, forward = chat.receive(Assembled("The name is Ada.", 1, 7))
    assert record == Record(Outcome.INJECTED, 1, 7)
    assert isinstance(forward, Forward)
    assert forward.body is not None
    assert forward.content_length == len(forward.body)
    content = json.loads(forward.body)["messages"][0]["content"]
    assert content.startswith("The name is Ada.")
    assert content.endswith("What is my name?")
    assert chat.receive(ResponseHeaders("200")) == [response_headers(1, 7, "false")]
    assert chat.receive(StreamEnded()) == []


def test_a_body_without_content_length_gets_none() -> None:
    chat = exchange()
    chat.receive(headers(content_length=None))
    chat.receive(RequestBody(BODY))
    _, forward = chat.receive(Assembled("x", 1, 1))
    assert isinstance(forward, Forward)
    assert forward.body is not None
    assert forward.content_length is None


def test_a_model_of_megabytes_is_cut() -> None:
    chat = exchange(Policy(context_window_tokens=10**9))
    chat.receive(headers())
    body = json.dumps({"model": "m" * 5_000_000, "messages": [{"role": "user", "content": "hi there"}]}).encode()
    [assemble] = chat.receive(RequestBody(body))
    assert isinstance(assemble, Assemble)
    assert assemble.model == chat.model == "m" * 256


@pytest.mark.parametrize("sent", ["a prompt with blanks", "x" * 65, "mäh"])
def test_a_request_id_that_could_be_a_prompt_is_not_taken_over(sent: str) -> None:
    chat = exchange()
    chat.receive(headers(x_request_id=sent))
    [assemble] = chat.receive(RequestBody(BODY))
    assert isinstance(assemble, Assemble)
    assert assemble.request_id == ""


def test_an_empty_answer_is_no_fallback() -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    assert chat.receive(Assembled("", 0, 0)) == [Record(Outcome.NOTHING_FOUND, 0, 0), Forward(None, None)]
    assert chat.receive(ResponseHeaders("200")) == [response_headers(0, 0, "false")]


@pytest.mark.parametrize("reason", [Outcome.TIMEOUT, Outcome.ENGINE_UNAVAILABLE, Outcome.ENGINE_ERROR])
def test_an_engine_that_fails_leaves_the_clients_bytes_and_says_fallback(reason: Outcome) -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    assert chat.receive(NotAssembled(reason)) == [Record(reason, 0, 0), Forward(None, None)]
    assert chat.receive(ResponseHeaders("200")) == [response_headers(0, 0, "true")]


@pytest.mark.parametrize(
    ("event", "outcome", "fallback"),
    [
        (headers(**{":path": "/v1/models", ":method": "GET"}), Outcome.NOT_CHAT, "false"),
        (headers(x_ibex_skip_memory=" Yes "), Outcome.SKIPPED, "false"),
        (replace(headers(), identity=None), Outcome.NO_IDENTITY, "false"),
        (headers(content_encoding="gzip"), Outcome.ENCODED_BODY, "true"),
        (replace(headers(), end_of_stream=True), Outcome.UNREADABLE_BODY, "true"),
    ],
    ids=["not chat", "skipped", "no identity", "encoded", "no body"],
)
def test_what_the_headers_decide_needs_no_engine(event: RequestHeaders, outcome: Outcome, fallback: str) -> None:
    chat = exchange()
    assert chat.receive(event) == [Record(outcome, 0, 0), Continue()]
    assert chat.receive(RequestBody(BODY)) == [Forward(None, None)]
    assert chat.receive(ResponseHeaders("200")) == [response_headers(0, 0, fallback)]


def test_a_route_can_be_without_memory() -> None:
    assert exchange(Policy(is_enabled=False)).receive(headers())[0] == Record(Outcome.DISABLED, 0, 0)


@pytest.mark.parametrize("value", ["0", "false", "", "no", "maybe"])
def test_only_a_clear_yes_skips_memory(value: str) -> None:
    assert exchange().receive(headers(x_ibex_skip_memory=value)) == [Continue()]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b"not json", Outcome.UNREADABLE_BODY),
        (b'{"model":"m","messages":[]}', Outcome.NO_QUERY),
        (b'{"model":"m","messages":[{"role":"user","content":"  "}]}', Outcome.NO_QUERY),
    ],
)
def test_a_body_without_a_query_goes_on_as_it_is(body: bytes, outcome: Outcome) -> None:
    chat = exchange()
    chat.receive(headers())
    assert chat.receive(RequestBody(body)) == [Record(outcome, 0, 0), Forward(None, None)]


def test_a_body_over_the_limit_is_not_read() -> None:
    chat = exchange(Policy(max_body_bytes=len(BODY) - 1))
    chat.receive(headers())
    assert chat.receive(RequestBody(BODY)) == [Record(Outcome.BODY_TOO_LARGE, 0, 0), Forward(None, None)]


def test_a_body_that_the_block_would_make_too_large_stays_the_clients() -> None:
    chat = exchange(Policy(max_body_bytes=len(BODY) + 5))
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    assert chat.receive(Assembled("six...", 1, 2)) == [Record(Outcome.BODY_TOO_LARGE, 0, 0), Forward(None, None)]


def test_a_request_that_fills_the_window_gets_nothing_more() -> None:
    chat = exchange(Policy(context_window_tokens=4096))
    chat.receive(headers())
    assert chat.receive(RequestBody(BODY))[0] == Record(Outcome.NOTHING_FOUND, 0, 0)


@pytest.mark.parametrize("sent", [None, "", "with blank", "x" * 65, "mäh"])
def test_a_session_id_that_is_absent_or_malformed_is_minted(sent: str | None) -> None:
    chat = exchange()
    chat.receive(headers(x_ibex_session_id=sent))
    assert chat.session_id == "minted"


def test_envoys_own_413_is_a_body_that_was_too_large() -> None:
    chat = exchange()
    chat.receive(headers())
    assert chat.receive(ResponseHeaders("413")) == [
        Record(Outcome.BODY_TOO_LARGE, 0, 0),
        response_headers(0, 0, "true"),
    ]


def test_a_response_before_any_request_leaves_envoys_defaults() -> None:
    assert exchange().receive(ResponseHeaders("401")) == [Record(Outcome.LOCAL_REPLY, 0, 0), Continue()]


def test_a_stream_that_ends_while_assembling_is_cancelled() -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    assert chat.receive(StreamEnded()) == [Record(Outcome.CANCELLED, 0, 0)]


def test_a_bug_after_the_decision_still_gives_true_headers() -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    chat.receive(Assembled("x", 1, 1))
    assert chat.receive(Failed()) == [Continue()]
    assert chat.receive(ResponseHeaders("200")) == [response_headers(0, 0, "true")]


def test_the_placement_is_the_policys() -> None:
    chat = exchange(Policy(placement=Placement.SYSTEM_FIRST))
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    _, forward = chat.receive(Assembled("x", 1, 1))
    assert isinstance(forward, Forward)
    assert forward.body is not None
    assert json.loads(forward.body)["messages"][0]["role"] == "system"


def test_an_answer_that_nobody_asked_for_is_the_drivers_bug() -> None:
    with pytest.raises(UnexpectedEvent):
        exchange().receive(Assembled("x", 1, 1))


REPLIES = (Continue, Forward, SetResponseHeaders)
MESSAGES = st.one_of(
    st.sampled_from(
        [
            headers(),
            headers(x_ibex_skip_memory="1"),
            replace(headers(), identity=None),
            RequestBody(BODY),
            RequestBody(b"{"),
            RequestBody(b""),
            ResponseHeaders("200"),
            ResponseHeaders("413"),
            OtherMessage(),
            Failed(),
        ]
    ),
)
ANSWERS = st.sampled_from([Assembled("memory", 1, 2), Assembled("", 0, 0), NotAssembled(Outcome.TIMEOUT), Failed()])


@given(messages=st.lists(MESSAGES, max_size=12), answers=st.lists(ANSWERS, min_size=12, max_size=12), cut=st.booleans())
def test_any_order_of_messages_gets_one_reply_each_and_one_outcome(
    messages: list[Event], answers: list[Event], cut: bool
) -> None:
    """`cut`: Envoy closes the stream while the engine is asked."""
    chat = exchange()
    records: list[Effect] = []
    for message, answer in zip(messages, answers, strict=False):
        effects = chat.receive(message)
        if isinstance(effects[-1], Assemble):
            assert len(effects) == 1
            if cut:
                break
            effects = chat.receive(answer)
        assert sum(isinstance(effect, REPLIES) for effect in effects) == 1
        assert isinstance(effects[-1], REPLIES)
        records += [effect for effect in effects if isinstance(effect, Record)]
    records += chat.receive(StreamEnded())
    assert len(records) == 1
    assert chat.receive(StreamEnded()) == []
