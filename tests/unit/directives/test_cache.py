from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import Directive, InjectionMode
from extproc.directives.cache import _CHANGES, DirectiveCache
from extproc.directives.directive import ActiveDirective, Change

ORG, OTHER_ORG, AGENT = "org", "other-org", "agent"
OLD = ActiveDirective("v1", Directive("old", InjectionMode.SYSTEM_FIRST), 1)
NEW = ActiveDirective("v2", Directive("new", InjectionMode.SYSTEM_FIRST), 1)


def cache(entries: int = 100, most_bytes: int = 10**6, stale_s: float = 600.0, *, heard: bool = True) -> DirectiveCache:
    made = DirectiveCache(entries, most_bytes, stale_s)
    if heard:
        made.trust(0.0, 10_000.0)
    return made


def put(to: DirectiveCache, directive: ActiveDirective | None = OLD, now: float = 0.0, org: str = ORG) -> bool:
    return to.put(org, AGENT, directive, to.mark, now)


def state(of: DirectiveCache, now: float, org: str = ORG, agent: str = AGENT) -> str:
    kept = of.get(org, agent, now)
    return "gone" if kept is None else "fresh" if kept.is_fresh else "stale"


def test_an_entry_is_fresh_for_a_minute_while_changes_are_heard() -> None:
    directives = cache()
    assert put(directives)
    assert [state(directives, now) for now in (0.0, 59.9, 60.0, 599.9, 600.0)] == [
        "fresh",
        "fresh",
        "stale",
        "stale",
        "gone",
    ]
    assert len(directives) == directives.bytes == 0


def test_an_entry_is_fresh_for_two_seconds_while_they_are_not() -> None:
    directives = cache(heard=False)
    put(directives)
    assert [state(directives, now) for now in (0.0, 1.9, 2.0, 599.9)] == ["fresh", "fresh", "stale", "stale"]


def test_an_agent_without_a_directive_is_remembered_too() -> None:
    directives = cache()
    put(directives, None)
    kept = directives.get(ORG, AGENT, 1.0)
    assert kept is not None
    assert kept.directive is None
    assert kept.is_fresh


def test_without_staleness_nothing_old_is_served() -> None:
    directives = cache(stale_s=0.0)
    put(directives)
    assert [state(directives, now) for now in (59.9, 60.0)] == ["fresh", "gone"]


def test_a_change_takes_the_agents_entry_away() -> None:
    directives = cache()
    put(directives)
    put(directives, org=OTHER_ORG)
    directives.change(Change(ORG, AGENT))
    assert state(directives, 1.0) == "gone"
    assert state(directives, 1.0, OTHER_ORG) == "fresh"


def test_a_change_of_nobody_in_particular_makes_the_organisations_entries_stale() -> None:
    directives = cache()
    put(directives)
    put(directives, org=OTHER_ORG)
    directives.change(Change(ORG, None))
    assert state(directives, 1.0) == "stale"
    assert state(directives, 1.0, OTHER_ORG) == "fresh"
    assert put(directives, NEW, 1.0)
    assert state(directives, 1.1) == "fresh"


@pytest.mark.parametrize("agent", [AGENT, None])
def test_what_was_asked_before_a_change_is_not_kept_after_it(agent: str | None) -> None:
    directives = cache()
    mark = directives.mark
    directives.change(Change(ORG, agent))
    assert not directives.put(ORG, AGENT, OLD, mark, 0.0)
    assert state(directives, 0.1) == "gone"
    assert directives.put(ORG, AGENT, NEW, directives.mark, 0.1)
    assert state(directives, 0.2) == "fresh"


def test_the_change_of_another_agent_overtakes_nothing() -> None:
    directives = cache()
    mark = directives.mark
    directives.change(Change(ORG, "another"))
    directives.change(Change(OTHER_ORG, None))
    assert directives.put(ORG, AGENT, OLD, mark, 0.0)


def test_what_was_asked_before_changes_were_heard_is_fresh_for_two_seconds_only() -> None:
    directives = cache(heard=False)
    mark = directives.mark
    directives.trust(0.0, 10_000.0)
    assert directives.put(ORG, AGENT, OLD, mark, 0.0)
    assert state(directives, 1.9) == "fresh"
    assert state(directives, 2.0) == "stale"


def test_a_channel_that_was_lost_and_is_back_vouches_for_nothing_before() -> None:
    directives = cache()
    put(directives)
    directives.distrust()
    assert state(directives, 5.0) == "stale"
    directives.trust(5.0, 10_000.0)
    assert state(directives, 5.0) == "stale"
    put(directives, NEW, 5.0)
    assert state(directives, 60.0) == "fresh"


def test_a_trust_that_ran_out_unnoticed_vouches_for_nothing_before() -> None:
    directives = cache(heard=False)
    directives.trust(0.0, 1.5)
    put(directives, now=1.0)
    assert state(directives, 4.0) == "stale"
    directives.trust(4.0, 5.5)
    assert state(directives, 4.1) == "stale"


def test_a_trust_that_is_renewed_in_time_keeps_entries_fresh() -> None:
    directives = cache(heard=False)
    directives.trust(0.0, 1.5)
    put(directives)
    for second in range(1, 60):
        directives.trust(second, second + 1.5)
        assert state(directives, second) == "fresh"


def test_age_counts_from_when_it_was_asked() -> None:
    directives = cache()
    directives.put(ORG, AGENT, OLD, directives.mark, -55.0)
    assert state(directives, 4.9) == "fresh"
    assert state(directives, 5.0) == "stale"


def test_the_least_recently_used_make_room() -> None:
    directives = cache(entries=2)
    for agent in ("a", "b"):
        directives.put(ORG, agent, OLD, directives.mark, 0.0)
    assert state(directives, 1.0, agent="a") == "fresh"
    directives.put(ORG, "c", OLD, directives.mark, 0.0)
    assert [state(directives, 1.0, agent=agent) for agent in "abc"] == ["fresh", "gone", "fresh"]


def test_bytes_are_bounded() -> None:
    directives = cache(most_bytes=100_000)
    long = ActiveDirective("v", Directive("ä" * 16_000, InjectionMode.SYSTEM_FIRST), 1)
    for number in range(10):
        directives.put(ORG, str(number), long, directives.mark, 0.0)
    assert len(directives) == 3
    assert 96_000 <= directives.bytes <= 100_000
    directives.put(ORG, "9", None, directives.mark, 0.0)
    assert directives.bytes < 70_000


def test_changes_beyond_those_that_are_remembered_make_everything_stale_and_bring_nothing_old_back() -> None:
    directives = cache()
    put(directives, org=OTHER_ORG)
    mark = directives.mark
    directives.change(Change(ORG, AGENT))
    for number in range(_CHANGES):
        directives.change(Change(ORG, str(number)))
    assert not directives.put(ORG, AGENT, OLD, mark, 0.0)
    assert state(directives, 1.0, OTHER_ORG) == "stale"
    assert len(directives._changed) == _CHANGES


@given(st.lists(st.sampled_from(["ask", "answer", "change", "any", "lose", "hear", "wait"]), max_size=40))
def test_in_any_order_a_fresh_entry_while_changes_are_heard_is_the_current_one(steps: list[str]) -> None:
    """The store's version goes up before each message about it; an answer is what the store said when it was asked."""
    directives, now, version = cache(stale_s=600.0, heard=False), 0.0, 0
    asked: list[tuple[int, float, int]] = []
    is_heard, missed_at = False, float("-inf")
    for step in steps:
        now += 0.01
        match step:
            case "ask":
                asked.append((directives.mark, now, version))
            case "answer" if asked:
                mark, asked_at, said = asked.pop(0)
                one = ActiveDirective(str(said), Directive("x", InjectionMode.SYSTEM_FIRST), 1)
                directives.put(ORG, AGENT, one, mark, asked_at)
            case "change" | "any":
                version += 1
                if is_heard:
                    directives.change(Change(ORG, AGENT if step == "change" else None))
                else:
                    missed_at = now
            case "lose":
                is_heard = False
                directives.distrust()
            case "hear":
                is_heard = True
                directives.trust(now, now + 1000)
            case "wait":
                now += 3.0
            case _:
                pass
        kept = directives.get(ORG, AGENT, now)
        if kept is not None and kept.is_fresh and kept.directive is not None and now - missed_at > 2.0:
            assert kept.directive.version_id == str(version)
