"""Scripts: these events in, these effects out. The cases' numbers are those of contract section 8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from extproc.gate.passage import (
    AgentChecked,
    Allow,
    Arrived,
    Count,
    Counted,
    Deny,
    Effect,
    Event,
    Failed,
    LimiterDown,
    NeedAgent,
    NeedToken,
    NotLimited,
    Passage,
    TokenChecked,
)
from extproc.gate.verdict import CHAT_PERMISSIONS, AgentVerdict, Claims, Quota, TokenVerdict

TOKEN = "ibex_pat_0123456789abcdef"
ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
OTHER = "11111111-1111-4111-8111-111111111111"
CLAIMS = Claims(ORG, CHAT_PERMISSIONS, None, None, "t1", None)
WITHIN = Quota(True, 60, 59, 1_795_375_440, 30)
BEYOND = Quota(False, 60, 0, 1_795_375_440, 30)


def arrived(**changes: str | None) -> Arrived:
    """A good request's headers; a change to None removes one."""
    base: dict[str, str | None] = {"authorization": f"Bearer {TOKEN}", "x-ibex-agent-id": AGENT}
    base |= {name.replace("_", "-"): value for name, value in changes.items()}
    return Arrived({name: value for name, value in base.items() if value is not None})


def run(*events: Event, denies_uncounted: bool = False) -> Effect:
    """The last effect."""
    passage = Passage(denies_uncounted=denies_uncounted)
    return [passage.receive(event) for event in events][-1]


def denial(*events: Event, denies_uncounted: bool = False) -> tuple[int, str]:
    effect = run(*events, denies_uncounted=denies_uncounted)
    assert isinstance(effect, Deny)
    return effect.denial.status, effect.denial.code.value


ACTIVE = AgentChecked(AgentVerdict.ACTIVE)


def test_a_good_request_is_asked_for_in_order_and_allowed() -> None:
    passage = Passage(denies_uncounted=False)
    effects = [passage.receive(event) for event in (arrived(), TokenChecked(CLAIMS, True), ACTIVE, Counted(WITHIN))]
    assert effects == [
        NeedToken(TOKEN),
        NeedAgent(TOKEN, ORG, AGENT),
        Count(ORG, AGENT),
        Allow(CLAIMS, AGENT, None, True, WITHIN),
    ]


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "MISSING_TOKEN"),  # 1.1
        ("Bearer ", "MISSING_TOKEN"),  # 1.2
        ("Bearer nonsense", "INVALID_TOKEN"),  # 1.3
    ],
)
def test_without_a_token_nobody_is_asked(authorization: str | None, code: str) -> None:
    assert denial(arrived(authorization=authorization)) == (401, code)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (TokenVerdict.INVALID, (401, "INVALID_TOKEN")),  # 1.4, 1.5, 1.6
        (TokenVerdict.UNAVAILABLE, (503, "SERVICE_DEGRADED")),  # 2.8
        (TokenVerdict.BUSY, (503, "SERVICE_DEGRADED")),
    ],
)
def test_a_token_that_is_not_confirmed_does_not_pass(verdict: TokenVerdict, expected: tuple[int, str]) -> None:
    assert denial(arrived(), TokenChecked(verdict)) == expected


@pytest.mark.parametrize("permissions", [0, 1, 1 << 16, 1 << 17, 1 | 1 << 17, CHAT_PERMISSIONS - 1, 1 << 18])
def test_a_token_without_all_permissions_is_refused_before_its_agent_is_looked_at(permissions: int) -> None:  # 5.x
    claims = replace(CLAIMS, permissions=permissions)
    for agent in (AGENT, "nonsense", None):
        result = denial(arrived(x_ibex_agent_id=agent), TokenChecked(claims))
        assert result == (403, "INSUFFICIENT_PERMISSIONS")


def test_more_permissions_do_no_harm() -> None:
    claims = replace(CLAIMS, permissions=CHAT_PERMISSIONS | 1 << 18)
    assert isinstance(run(arrived(), TokenChecked(claims)), NeedAgent)


@pytest.mark.parametrize("agent", [None, ""])
def test_no_agent_is_a_400(agent: str | None) -> None:  # 2.1
    assert denial(arrived(x_ibex_agent_id=agent), TokenChecked(CLAIMS)) == (400, "MISSING_AGENT_ID")


@pytest.mark.parametrize(
    "agent", ["x", f"{AGENT},{AGENT}", f"{AGENT}, {OTHER}", f" {AGENT}", AGENT[:-1], f"{{{AGENT}}}"]
)
def test_an_agent_that_is_no_uuid_is_a_400(agent: str) -> None:  # 2.2
    effect = run(arrived(x_ibex_agent_id=agent), TokenChecked(CLAIMS))
    assert isinstance(effect, Deny)
    assert (effect.denial.status, effect.denial.code) == (400, "VALIDATION_ERROR")
    assert [error.field for error in effect.denial.field_errors] == ["X-IBEX-Agent-ID"]


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (AgentVerdict.NOT_AUTHORIZED, (403, "AGENT_NOT_AUTHORIZED")),  # 2.3, 2.4
        (AgentVerdict.INACTIVE, (403, "AGENT_SUSPENDED")),  # 2.5, 2.6
        (AgentVerdict.TOKEN_INVALID, (401, "INVALID_TOKEN")),
        (AgentVerdict.UNAVAILABLE, (503, "SERVICE_DEGRADED")),
        (AgentVerdict.BUSY, (503, "SERVICE_DEGRADED")),
    ],
)
def test_an_agent_that_is_not_confirmed_does_not_pass(verdict: AgentVerdict, expected: tuple[int, str]) -> None:
    assert denial(arrived(), TokenChecked(CLAIMS), AgentChecked(verdict)) == expected


def test_a_bound_token_needs_no_agent_header_and_its_agent_is_checked_all_the_same() -> None:
    bound = replace(CLAIMS, agent_id=AGENT)
    for sent in (None, "", AGENT, AGENT.upper()):
        assert run(arrived(x_ibex_agent_id=sent), TokenChecked(bound)) == NeedAgent(TOKEN, ORG, AGENT)


def test_a_bound_token_with_another_agent_is_refused_at_once() -> None:  # 2.9
    bound = replace(CLAIMS, agent_id=OTHER)
    assert denial(arrived(), TokenChecked(bound)) == (403, "AGENT_NOT_AUTHORIZED")


def test_a_made_up_agent_is_not_repeated_as_known() -> None:
    effect = run(arrived(), TokenChecked(CLAIMS), AgentChecked(AgentVerdict.NOT_AUTHORIZED))
    assert isinstance(effect, Deny)
    assert (effect.org_id, effect.agent_id) == (ORG, "")


@pytest.mark.parametrize("user", ["", " ", "ibex_pat_x", "u-ibex_pat_x", "x" * 129, "a b", "u1, u2", "é", "a\x00", "�"])
def test_a_malformed_user_is_a_400(user: str) -> None:
    effect = run(arrived(x_ibex_user_id=user), TokenChecked(CLAIMS))
    assert isinstance(effect, Deny)
    assert (effect.denial.status, effect.denial.code) == (400, "VALIDATION_ERROR")
    assert [error.field for error in effect.denial.field_errors] == ["X-IBEX-User-ID"]


@pytest.mark.parametrize(
    ("bound", "sent", "expected"),
    [(None, None, None), (None, "u1", "u1"), ("u2", None, "u2"), ("u2", "u1", "u2"), (None, "x" * 128, "x" * 128)],
)
def test_the_tokens_user_wins_over_the_header(bound: str | None, sent: str | None, expected: str | None) -> None:
    effect = run(arrived(x_ibex_user_id=sent), TokenChecked(replace(CLAIMS, user_id=bound)), ACTIVE, NotLimited())
    assert isinstance(effect, Allow)
    assert effect.user_id == expected


def test_beyond_the_limit_is_a_429_with_the_seconds_to_wait() -> None:  # 4.2
    effect = run(arrived(), TokenChecked(CLAIMS), ACTIVE, Counted(BEYOND))
    assert isinstance(effect, Deny)
    assert (effect.denial.status, effect.denial.code, effect.denial.retry_after_s) == (429, "RATE_LIMITED", 30)
    assert (effect.org_id, effect.agent_id, effect.quota) == (ORG, AGENT, BEYOND)


def test_without_a_limiter_the_setting_decides() -> None:  # 4.6
    events = (arrived(), TokenChecked(CLAIMS), ACTIVE, LimiterDown())
    assert run(*events) == Allow(CLAIMS, AGENT, None, False, None)
    effect = run(*events, denies_uncounted=True)
    assert isinstance(effect, Deny)
    assert (effect.denial.status, effect.denial.code, effect.denial.retry_after_s) == (503, "SERVICE_DEGRADED", 5)


def test_nothing_that_is_shown_holds_the_token() -> None:
    assert TOKEN not in repr((arrived(), run(arrived()), run(arrived(), TokenChecked(CLAIMS))))


CLAIMS_DRAWN = st.builds(
    Claims,
    st.just(ORG),
    st.sampled_from([0, 1, CHAT_PERMISSIONS, -1, CHAT_PERMISSIONS | 1 << 18]),
    st.sampled_from([None, AGENT, OTHER]),
    st.sampled_from([None, "u"]),
    st.none(),
    st.none(),
)
VALUES = st.sampled_from([f"Bearer {TOKEN}", TOKEN, AGENT, OTHER, "u1", ""]) | st.text()
EVENTS = st.one_of(
    st.builds(
        Arrived,
        st.dictionaries(
            st.sampled_from(["authorization", "x-api-key", "api-key", "x-ibex-agent-id", "x-ibex-user-id"]), VALUES
        ),
    ),
    st.just(arrived()),
    st.builds(TokenChecked, CLAIMS_DRAWN | st.sampled_from(TokenVerdict), st.booleans()),
    st.builds(AgentChecked, st.sampled_from(AgentVerdict)),
    st.sampled_from([Counted(WITHIN), Counted(BEYOND), NotLimited(), LimiterDown(), Failed()]),
)


@given(st.lists(EVENTS, max_size=8), st.booleans())
def test_in_any_order_nothing_passes_without_token_permissions_agent_and_count(
    events: list[Event], denies_uncounted: bool
) -> None:
    passage = Passage(denies_uncounted=denies_uncounted)
    for index, event in enumerate(events):
        effect = passage.receive(event)
        if isinstance(effect, Allow):
            assert index == 3
            first, token, agent, count = events[:4]
            assert isinstance(first, Arrived)
            assert isinstance(token, TokenChecked)
            assert token.result == effect.claims
            assert effect.claims.permissions & CHAT_PERMISSIONS == CHAT_PERMISSIONS
            assert effect.claims.agent_id in {None, effect.agent_id}
            assert agent == ACTIVE
            assert count in ([Counted(WITHIN), NotLimited()] + ([] if denies_uncounted else [LimiterDown()]))


@given(st.lists(EVENTS, max_size=8))
def test_once_denied_a_request_stays_denied(events: list[Event]) -> None:
    passage = Passage(denies_uncounted=False)
    effects = [passage.receive(event) for event in events]
    denied = next((index for index, effect in enumerate(effects) if isinstance(effect, Deny)), len(effects))
    assert all(isinstance(effect, Deny) for effect in effects[denied:])


@given(CLAIMS_DRAWN, st.sampled_from([None, AGENT, OTHER]), st.sampled_from([None, "u1"]), st.booleans(), st.booleans())
def test_what_was_admitted_once_is_settled_like_a_passage_of_its_own(
    claims: Claims, agent: str | None, user: str | None, is_cached: bool, denies_uncounted: bool
) -> None:
    for count in (Counted(WITHIN), Counted(BEYOND), NotLimited(), LimiterDown(), Failed(), ACTIVE):
        passage = Passage(denies_uncounted=denies_uncounted)
        for event in (arrived(x_ibex_agent_id=agent, x_ibex_user_id=user), TokenChecked(claims, is_cached), ACTIVE):
            passage.receive(event)
        admitted = passage.admitted
        if admitted is not None:
            assert passage.receive(count) == admitted.settle(count, denies_uncounted=denies_uncounted)
        assert isinstance(passage.receive(count), Deny)


def test_nobody_is_admitted_before_token_and_agent_are_known() -> None:
    passage = Passage(denies_uncounted=False)
    for event in (arrived(), TokenChecked(CLAIMS)):
        passage.receive(event)
        assert passage.admitted is None
    passage.receive(AgentChecked(AgentVerdict.INACTIVE))
    assert passage.admitted is None
