from __future__ import annotations

import pytest

from extproc.gate.agent_cache import AgentCache
from extproc.gate.verdict import AgentVerdict

KEY = (b"d", "a1")


@pytest.mark.parametrize("verdict", [AgentVerdict.ACTIVE, AgentVerdict.INACTIVE, AgentVerdict.NOT_AUTHORIZED])
def test_a_verdict_is_kept_for_its_time_whatever_it_is(verdict: AgentVerdict) -> None:
    agents = AgentCache(2)
    agents.put(KEY, verdict, 0)
    assert agents.get(KEY, 1.9) is verdict
    assert agents.get(KEY, 2.0) is None


@pytest.mark.parametrize("verdict", [AgentVerdict.UNAVAILABLE, AgentVerdict.TOKEN_INVALID, AgentVerdict.BUSY])
def test_what_says_nothing_about_the_agent_is_not_kept(verdict: AgentVerdict) -> None:
    agents = AgentCache(2)
    agents.put(KEY, AgentVerdict.ACTIVE, 0)
    agents.put(KEY, verdict, 0)
    assert agents.get(KEY, 0) is None


def test_the_last_word_counts() -> None:
    agents = AgentCache(2)
    agents.put(KEY, AgentVerdict.ACTIVE, 0)
    agents.put(KEY, AgentVerdict.INACTIVE, 1)
    assert agents.get(KEY, 1.5) is AgentVerdict.INACTIVE


def test_another_token_has_to_ask_itself() -> None:
    agents = AgentCache(2)
    agents.put(KEY, AgentVerdict.ACTIVE, 0)
    assert agents.get((b"e", "a1"), 0) is None


def test_made_up_agents_push_out_no_real_one() -> None:
    agents = AgentCache(2)
    agents.put(KEY, AgentVerdict.ACTIVE, 0)
    for number in range(20_000):
        agents.put((b"d", str(number)), AgentVerdict.NOT_AUTHORIZED, 0)
    assert agents.get(KEY, 1) is AgentVerdict.ACTIVE
