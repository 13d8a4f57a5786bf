from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from extproc.context.order import chronological
from extproc.context.pack import Exclusion, pack
from extproc.context.score import Scored
from extproc.memory.model import Memory

MakeMemory = Callable[..., Memory]


def candidates(make: MakeMemory, *sizes: int, composite: float = 0.5, **given: object) -> list[Scored]:
    return [
        Scored(replace(make("x", **given), content_tokens=size), composite, 0.5, 0.5, 0.5, 0.5, 0.8) for size in sizes
    ]


def fates(scored: list[Scored], tokens: int, most: int = 50, required: float = 0.0) -> list[str]:
    packed = pack(scored, tokens=tokens, max_memories=most, required=required, cost=lambda one: one.content_tokens + 1)
    return [str(one.exclusion) for one in packed]


def test_what_does_not_fit_is_skipped_and_a_smaller_one_goes_in(make: MakeMemory) -> None:
    assert fates(candidates(make, 9, 20, 4), tokens=15) == ["included", "budget", "included"]


def test_the_tags_count(make: MakeMemory) -> None:
    assert fates(candidates(make, 10), tokens=10) == ["budget"]
    assert fates(candidates(make, 10), tokens=11) == ["included"]


def test_no_more_than_asked_for(make: MakeMemory) -> None:
    assert fates(candidates(make, 1, 1, 1), tokens=99, most=2) == ["included", "included", "budget"]


def test_below_the_gate_is_filtered(make: MakeMemory) -> None:
    assert fates(candidates(make, 1, composite=0.3), tokens=99, required=0.31) == ["filter"]
    assert fates(candidates(make, 1, composite=0.3), tokens=99, required=0.3) == ["included"]


@given(
    st.lists(st.integers(1, 60), max_size=20),
    st.integers(-5, 200),
    st.integers(1, 10),
    st.sampled_from([0.4, 0.5, 0.6]),
)
def test_never_over_the_budget_and_nothing_left_out_that_fits(
    make: MakeMemory, sizes: list[int], tokens: int, most: int, required: float
) -> None:
    packed = pack(
        candidates(make, *sizes),
        tokens=tokens,
        max_memories=most,
        required=required,
        cost=lambda m: m.content_tokens + 24,
    )
    included = [one.tokens for one in packed if one.exclusion is Exclusion.INCLUDED]
    left = tokens - sum(included)
    assert len(packed) == len(sizes)
    assert left >= 0 or not included
    assert len(included) <= most
    if required <= 0.5 and len(included) < most:
        skipped = [one.scored.memory.content_tokens + 24 for one in packed if one.exclusion is Exclusion.BUDGET]
        assert all(cost > left for cost in skipped)


def test_the_first_of_a_session_and_day_pays_for_the_date_line(make: MakeMemory) -> None:
    scored = [
        *candidates(make, 10, 10, session_id="a"),
        *candidates(make, 10, session_id="b"),
        *candidates(make, 10, 10),
    ]
    packed = pack(scored, tokens=99, max_memories=9, required=0, cost=lambda one: one.content_tokens, group_cost=7)
    assert [one.tokens for one in packed] == [17, 10, 17, 17, 10]


def test_what_stands_has_a_small_share_of_its_own_and_the_rest_competes(make: MakeMemory) -> None:
    standing = candidates(make, 10, 10, composite=0.0)
    scored = candidates(make, 60, 30)
    packed = pack(
        [*scored, standing[1]],
        tokens=100,
        max_memories=9,
        required=0.4,
        cost=lambda one: one.content_tokens,
        standing=standing,
    )
    assert [(one.scored.memory.content_tokens, str(one.exclusion)) for one in packed] == [
        (10, "included"), (60, "included"), (30, "included"), (10, "filter"),
    ]  # fmt: skip


def test_sessions_stay_together_in_order_of_time(make: MakeMemory) -> None:
    born = make("x").created_at

    def at(hour: int, session: str | None, turn: int = 0) -> Memory:
        return make(
            f"{hour}{session}{turn}", created_at=born + timedelta(hours=hour), session_id=session, turn_index=turn
        )

    expected = [at(1, "b"), at(4, "b", 1), at(4, "b", 2), at(2, None), at(6, None), at(3, "a"), at(5, "a")]
    shuffled = [expected[n] for n in (4, 3, 0, 5, 2, 6, 1)]
    assert chronological(shuffled) == expected
