"""Scripts with directives: every outcome, with one and without."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import Directive, InjectionMode
from extproc.directives.directive import ActiveDirective
from extproc.filter.exchange import (
    Assemble,
    Assembled,
    Continue,
    DirectiveKnown,
    Effect,
    Event,
    Exchange,
    Failed,
    Forward,
    LookUpDirective,
    NotAssembled,
    Policy,
    PrepareDirective,
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
SILENT = json.dumps({"model": "m", "messages": [{"role": "assistant", "content": "Hello"}]}).encode()
"""No user message carries text."""
POLICY = Policy(has_directives=True)


def directive(text: str = "Be brief.", mode: InjectionMode = InjectionMode.SYSTEM_FIRST) -> ActiveDirective:
    return ActiveDirective("v1", Directive(text, mode), 5)


def headers(**changes: str) -> RequestHeaders:
    base = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "x-ibex-session-id": "s1",
    }
    return RequestHeaders(base | {name.replace("_", "-"): value for name, value in changes.items()}, IDENTITY, False)


def exchange(policy: Policy = POLICY) -> Exchange:
    return Exchange(policy, lambda: "minted")


def asked(
    found: ActiveDirective | None, body: bytes = BODY, policy: Policy = POLICY, **sent: str
) -> tuple[Exchange, list[Effect]]:
    """An exchange whose look-up has answered, and what it orders then."""
    chat = exchange(policy)
    assert chat.receive(headers(**sent)) == [PrepareDirective(IDENTITY), Continue()]
    assert chat.receive(RequestBody(body)) == [LookUpDirective(IDENTITY)]
    return chat, chat.receive(DirectiveKnown(found))


def messages(effects: list[Effect]) -> list[dict[str, Any]]:
    forward = effects[-1]
    assert isinstance(forward, Forward)
    assert forward.body is not None
    assert forward.content_length == len(forward.body)
    found: list[dict[str, Any]] = json.loads(forward.body)["messages"]
    return found


DIRECTIVE_MESSAGE = {"role": "system", "content": "Be brief."}


def said(chat: Exchange) -> tuple[str, str, str]:
    """Memories, tokens and fallback in the response's headers."""
    [effect] = chat.receive(ResponseHeaders("200"))
    assert isinstance(effect, SetResponseHeaders)
    values = dict(effect.headers)
    return values["x-ibex-memories-injected"], values["x-ibex-context-tokens"], values["x-ibex-context-fallback"]


def test_directive_and_memories_go_in_together() -> None:
    chat, [assemble] = asked(directive())
    assert isinstance(assemble, Assemble)
    assert assemble.directive_version_id == "v1"
    effects = chat.receive(Assembled("The name is Ada.", 1, 7))
    assert effects[0] == Record(Outcome.INJECTED, 1, 12, "v1")
    first, last = messages(effects)
    assert first == DIRECTIVE_MESSAGE
    assert last["content"].startswith("The name is Ada.")
    assert said(chat) == ("1", "12", "false")


def test_its_tokens_are_not_there_for_memories() -> None:
    _, [without] = asked(None)
    _, [with_one] = asked(directive())
    assert isinstance(without, Assemble)
    assert isinstance(with_one, Assemble)
    assert with_one.available_tokens == without.available_tokens - 5
    assert without.directive_version_id == ""


def test_an_agent_without_a_directive_is_as_without_directives() -> None:
    chat, [assemble] = asked(None)
    assert isinstance(assemble, Assemble)
    effects = chat.receive(Assembled("The name is Ada.", 1, 7))
    assert effects[0] == Record(Outcome.INJECTED, 1, 7)
    assert len(messages(effects)) == 1


@pytest.mark.parametrize("mode", InjectionMode)
def test_each_mode_reaches_its_place(mode: InjectionMode) -> None:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi you"}]}
    ).encode()
    chat, _ = asked(directive(mode=mode), body)
    contents = [message["content"] for message in messages(chat.receive(Assembled("", 0, 0)))]
    match mode:
        case InjectionMode.SYSTEM_FIRST:
            assert contents == ["Be brief.", "Own.", "Hi you"]
        case InjectionMode.SYSTEM_APPEND:
            assert contents == ["Own.", "Be brief.", "Hi you"]
        case InjectionMode.USER_PREPEND:
            assert contents == ["Own.", "[DIRECTIVE]: Be brief.\n\nHi you"]


def test_nothing_found_leaves_the_directive_and_is_no_fallback() -> None:
    chat, _ = asked(directive())
    effects = chat.receive(Assembled("", 0, 0))
    assert effects[0] == Record(Outcome.NOTHING_FOUND, 0, 5, "v1")
    assert messages(effects)[0] == DIRECTIVE_MESSAGE
    assert said(chat) == ("0", "5", "false")


def test_a_request_that_fills_the_window_gets_the_directive_all_the_same() -> None:
    _, effects = asked(directive(), policy=replace(POLICY, context_window_tokens=4096))
    assert effects[0] == Record(Outcome.NOTHING_FOUND, 0, 5, "v1")
    assert messages(effects)[0] == DIRECTIVE_MESSAGE


def test_a_request_without_a_question_gets_the_directive() -> None:
    chat, effects = asked(directive(), SILENT)
    assert effects[0] == Record(Outcome.NO_QUERY, 0, 5, "v1")
    assert messages(effects)[0] == DIRECTIVE_MESSAGE
    assert said(chat) == ("0", "5", "false")


def test_without_the_place_that_the_mode_names_the_bytes_are_the_clients() -> None:
    body = json.dumps({"model": "m", "messages": []}).encode()
    chat, effects = asked(directive(mode=InjectionMode.USER_PREPEND), body)
    if effects == [Record(Outcome.NO_QUERY, 0, 0), Forward(None, None)]:
        assert said(chat) == ("0", "0", "false")
    else:  # the format has put it elsewhere: then it counts
        assert effects[0] == Record(Outcome.NO_QUERY, 0, 5, "v1")


@pytest.mark.parametrize("reason", [Outcome.TIMEOUT, Outcome.ENGINE_UNAVAILABLE, Outcome.ENGINE_ERROR])
def test_an_engine_that_fails_leaves_the_directive_that_is_at_hand(reason: Outcome) -> None:
    chat, _ = asked(directive())
    effects = chat.receive(NotAssembled(reason))
    assert effects[0] == Record(reason, 0, 5, "v1")
    assert messages(effects) == [DIRECTIVE_MESSAGE, {"role": "user", "content": "What is my name?"}]
    assert said(chat) == ("0", "5", "true")


def test_an_engine_that_fails_without_a_directive_leaves_the_clients_bytes() -> None:
    chat, _ = asked(None)
    assert chat.receive(NotAssembled(Outcome.TIMEOUT)) == [Record(Outcome.TIMEOUT, 0, 0), Forward(None, None)]


def test_where_both_are_too_large_the_directive_goes_in_alone() -> None:
    chat, _ = asked(directive(), policy=replace(POLICY, max_body_bytes=len(BODY) + 100))
    effects = chat.receive(Assembled("x" * 100, 1, 30))
    assert effects[0] == Record(Outcome.BODY_TOO_LARGE, 0, 5, "v1")
    assert messages(effects)[0] == DIRECTIVE_MESSAGE
    assert said(chat) == ("0", "5", "true")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Assembled("memory", 1, 3), Outcome.BODY_TOO_LARGE),
        (Assembled("", 0, 0), Outcome.BODY_TOO_LARGE),
        (NotAssembled(Outcome.TIMEOUT), Outcome.TIMEOUT),
    ],
)
def test_a_directive_that_is_too_large_leaves_the_clients_bytes_and_says_fallback(
    answer: Event, outcome: Outcome
) -> None:
    chat, _ = asked(directive("x" * 1000), policy=replace(POLICY, max_body_bytes=len(BODY) + 100))
    assert chat.receive(answer) == [Record(outcome, 0, 0), Forward(None, None)]
    assert said(chat) == ("0", "0", "true")


def test_a_client_that_wants_no_memory_gets_no_directive_unless_the_operator_wants_it() -> None:
    chat = exchange()
    assert chat.receive(headers(x_ibex_skip_memory="1")) == [Record(Outcome.SKIPPED, 0, 0), Continue()]
    assert chat.receive(RequestBody(BODY)) == [Forward(None, None)]

    chat, effects = asked(directive(), policy=replace(POLICY, keeps_directive_on_skip=True), x_ibex_skip_memory="yes")
    assert effects[0] == Record(Outcome.SKIPPED, 0, 5, "v1")
    assert messages(effects)[0] == DIRECTIVE_MESSAGE
    assert said(chat) == ("0", "5", "false")


def test_skipped_without_a_directive_is_skipped() -> None:
    policy = replace(POLICY, keeps_directive_on_skip=True)
    _, effects = asked(None, policy=policy, x_ibex_skip_memory="yes")
    assert effects == [Record(Outcome.SKIPPED, 0, 0), Forward(None, None)]
    nobody = replace(headers(x_ibex_skip_memory="1"), identity=None)
    assert exchange(policy).receive(nobody) == [Record(Outcome.SKIPPED, 0, 0), Continue()]


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (headers(**{":path": "/v1/models"}), Outcome.NOT_CHAT),
        (replace(headers(), identity=None), Outcome.NO_IDENTITY),
        (headers(content_encoding="gzip"), Outcome.ENCODED_BODY),
        (replace(headers(), end_of_stream=True), Outcome.UNREADABLE_BODY),
    ],
)
def test_what_the_headers_decide_asks_for_no_directive(event: RequestHeaders, outcome: Outcome) -> None:
    assert exchange().receive(event) == [Record(outcome, 0, 0), Continue()]


def test_a_route_without_memory_has_no_directive() -> None:
    chat = exchange(replace(POLICY, is_enabled=False))
    assert chat.receive(headers()) == [Record(Outcome.DISABLED, 0, 0), Continue()]


@pytest.mark.parametrize("body", [b"{", b"x" * 2000])
def test_a_body_that_is_not_read_is_the_clients_own(body: bytes) -> None:
    chat = exchange(replace(POLICY, max_body_bytes=1000))
    chat.receive(headers())
    record, forward = chat.receive(RequestBody(body))
    assert isinstance(record, Record)
    assert record.directive_version_id == ""
    assert forward == Forward(None, None)


def test_a_bug_takes_the_directive_back_too() -> None:
    chat, _ = asked(directive())
    chat.receive(NotAssembled(Outcome.TIMEOUT))
    assert chat.receive(Failed()) == [Continue()]
    assert said(chat) == ("0", "0", "true")


def test_a_stream_that_ends_while_it_is_looked_for_is_cancelled() -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    assert chat.receive(StreamEnded()) == [Record(Outcome.CANCELLED, 0, 0)]


@pytest.mark.parametrize("event", [RequestBody(BODY), ResponseHeaders("200"), Assembled("x", 1, 1)])
def test_while_it_is_looked_for_nothing_else_can_come(event: Event) -> None:
    chat = exchange()
    chat.receive(headers())
    chat.receive(RequestBody(BODY))
    with pytest.raises(UnexpectedEvent):
        chat.receive(event)


def test_a_directive_that_nobody_asked_for_is_the_drivers_bug() -> None:
    with pytest.raises(UnexpectedEvent):
        exchange().receive(DirectiveKnown(directive()))


REPLIES = (Continue, Forward, SetResponseHeaders)
MESSAGES = st.sampled_from(
    [
        headers(),
        headers(x_ibex_skip_memory="1"),
        RequestBody(BODY),
        RequestBody(SILENT),
        RequestBody(b"{"),
        ResponseHeaders("200"),
        Failed(),
    ]
)
KNOWN = st.sampled_from(
    [DirectiveKnown(None), DirectiveKnown(directive()), DirectiveKnown(directive("x" * 500)), Failed()]
)
ANSWERS = st.sampled_from([Assembled("memory", 1, 2), Assembled("", 0, 0), NotAssembled(Outcome.TIMEOUT), Failed()])


@given(
    script=st.lists(st.tuples(MESSAGES, KNOWN, ANSWERS), max_size=12),
    always=st.booleans(),
    cut=st.sampled_from([None, LookUpDirective, Assemble]),
)
def test_any_order_of_messages_gets_one_reply_each_and_one_outcome(
    script: list[tuple[Event, Event, Event]], always: bool, cut: type | None
) -> None:
    """`cut`: Envoy closes the stream while this is done."""
    policy = replace(POLICY, keeps_directive_on_skip=always, max_body_bytes=len(BODY) + 100)
    chat = exchange(policy)
    records: list[Record] = []
    for message, known, answer in script:
        effects = chat.receive(message)
        is_cut = False
        for order, event in ((LookUpDirective, known), (Assemble, answer)):
            if isinstance(effects[-1], order):
                assert len(effects) == 1
                if is_cut := cut is order:
                    break
                effects = chat.receive(event)
        if is_cut:
            break
        assert sum(isinstance(effect, REPLIES) for effect in effects) == 1
        assert isinstance(effects[-1], REPLIES)
        if isinstance(effects[-1], Forward) and effects[-1].body is not None:
            assert len(effects[-1].body) <= policy.max_body_bytes
        records += [effect for effect in effects if isinstance(effect, Record)]
    records += [effect for effect in chat.receive(StreamEnded()) if isinstance(effect, Record)]
    assert len(records) == 1
    assert (records[0].directive_version_id == "") or records[0].tokens >= 5
