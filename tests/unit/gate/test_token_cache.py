from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from extproc.gate.token_cache import TokenCache
from extproc.gate.verdict import CHAT_PERMISSIONS, Claims

CLAIMS = Claims("0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d", CHAT_PERMISSIONS, None, None, "t1", None)
WALL = 1_795_000_000.0


def cache(entries: int = 10, keep_s: float = 30.0) -> TokenCache:
    """Trusted from 0 to 1,000."""
    made = TokenCache(entries, keep_s)
    made.trust(0, 1000)
    return made


def put(to: TokenCache, digest: bytes = b"d", claims: Claims = CLAIMS, now: float = 1.0) -> None:
    to.put(digest, claims, to.epoch, now, WALL + now)


def get(of: TokenCache, digest: bytes = b"d", now: float = 1.0) -> Claims | None:
    return of.get(digest, now, WALL + now)


def test_what_was_put_is_found_for_its_time() -> None:
    tokens = cache()
    put(tokens)
    assert get(tokens, now=30.9) == CLAIMS
    assert get(tokens, now=31.0) is None
    assert len(tokens) == 0


def test_nothing_is_served_in_the_last_five_seconds_before_expiry() -> None:  # 1.6, 2.8
    tokens = cache()
    put(tokens, claims=replace(CLAIMS, expires_at=WALL + 20))
    assert get(tokens, now=14.9) is not None
    assert get(tokens, now=15.0) is None


@pytest.mark.parametrize("expires_in_s", [-100, 0, 5, 6])
def test_a_token_about_to_expire_is_not_kept(expires_in_s: float) -> None:
    tokens = cache()
    put(tokens, claims=replace(CLAIMS, expires_at=WALL + expires_in_s))
    assert len(tokens) == 0


def test_a_wall_clock_that_jumps_back_keeps_nothing_alive() -> None:
    tokens = cache()
    put(tokens)
    assert tokens.get(b"d", 40, WALL - 10_000) is None


def test_a_revoked_token_is_gone() -> None:  # 7.2
    tokens = cache()
    put(tokens)
    put(tokens, b"other", replace(CLAIMS, token_id="t2"))
    tokens.revoke("T1", 2)
    assert get(tokens, now=2) is None
    assert get(tokens, b"other", now=2) is not None


def test_a_validation_that_a_revocation_overtook_is_not_kept() -> None:
    tokens = cache()
    epoch = tokens.epoch
    tokens.revoke("t1", 1)
    tokens.put(b"d", CLAIMS, epoch, 1.01, WALL)
    assert get(tokens) is None
    assert tokens.is_revoked(CLAIMS, 1.01)


def test_a_tombstone_lasts_a_minute() -> None:
    tokens = cache()
    tokens.revoke("t1", 1)
    assert tokens.is_revoked(CLAIMS, 60.9)
    assert not tokens.is_revoked(CLAIMS, 61.1)


def test_without_a_channel_nothing_is_kept() -> None:  # 7.3
    tokens = TokenCache(10, 30)
    put(tokens)
    assert len(tokens) == 0
    assert get(tokens) is None


def test_a_channel_that_was_silent_empties_the_cache() -> None:
    tokens = TokenCache(10, 30)
    tokens.trust(0, 2)
    put(tokens)
    assert get(tokens, now=1.9) is not None
    assert get(tokens, now=2.0) is None
    tokens.trust(2.1, 4)
    assert get(tokens, now=2.2) is None


def test_a_silence_that_nobody_looked_at_empties_it_too() -> None:
    tokens = TokenCache(10, 30)
    tokens.trust(0, 2)
    put(tokens)
    tokens.trust(3, 5)
    assert get(tokens, now=3.1) is None


def test_what_was_asked_before_a_silence_is_not_kept_after_it() -> None:
    tokens = TokenCache(10, 30)
    tokens.trust(0, 2)
    epoch = tokens.epoch
    tokens.distrust()
    tokens.trust(1, 3)
    tokens.put(b"d", CLAIMS, epoch, 1.5, WALL)
    assert get(tokens, now=1.6) is None


def test_trust_goes_on_without_a_gap() -> None:
    tokens = TokenCache(10, 30)
    tokens.trust(0, 2)
    put(tokens)
    tokens.trust(1.5, 3)
    assert get(tokens, now=2.5) is not None


def test_a_token_without_an_id_is_never_kept() -> None:
    tokens = cache()
    put(tokens, claims=replace(CLAIMS, token_id=None))
    assert len(tokens) == 0


def test_the_least_recently_used_makes_room() -> None:
    tokens = cache(entries=2)
    for name in ("a", "b"):
        put(tokens, name.encode(), replace(CLAIMS, token_id=name))
    get(tokens, b"a")
    put(tokens, b"c", replace(CLAIMS, token_id="c"))
    assert [get(tokens, name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]


def test_no_entries_is_no_cache() -> None:
    tokens = cache(entries=0)
    put(tokens)
    assert len(tokens) == 0


def test_tombstones_are_bounded_and_the_lost_one_still_keeps_its_token_out() -> None:
    tokens = cache()
    epoch = tokens.epoch
    tokens.revoke("t1", 1)
    for number in range(10_001):
        tokens.revoke(f"x{number}", 1)
    tokens.put(b"d", CLAIMS, epoch, 1.1, WALL)
    assert get(tokens) is None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["trust", "distrust", "begin", "finish", "revoke", "get", "wait"]),
        st.sampled_from(["a", "b", "c"]),
    ),
    max_size=40,
)


@given(STEPS)
def test_in_any_order_no_token_is_served_after_its_revocation_was_heard(steps: list[tuple[str, str]]) -> None:
    tokens = TokenCache(2, 30)
    now, revoked, begun = 0.0, set[str](), dict[str, int]()
    for step, name in steps:
        digest, claims = name.encode(), replace(CLAIMS, token_id=name)
        match step:
            case "trust":
                tokens.trust(now, now + 1.5)
            case "distrust":
                tokens.distrust()
            case "begin":
                begun[name] = tokens.epoch
            case "finish" if name in begun:
                tokens.put(digest, claims, begun.pop(name), now, WALL + now)
            case "revoke":
                tokens.revoke(name, now)
                revoked.add(name)
            case "get":
                assert tokens.get(digest, now, WALL + now) is None or name not in revoked
            case "wait":
                now += 0.4
