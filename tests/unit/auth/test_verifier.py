"""The verifier with a check that the test holds up, and the lane below it."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from extproc.auth import verifier as verifier_module
from extproc.auth.new_token import new_token
from extproc.auth.token import CHAT, Token, mint
from extproc.auth.verifier import Verifier
from extproc.memory.lane import Lane, LaneFull


def made() -> tuple[Token, str]:
    return new_token(
        id=str(uuid.uuid4()),
        now=datetime.now(UTC),
        hash_of=lambda plaintext: plaintext[::-1],
        org_id=str(uuid.UUID(int=1)),
        name="n",
        permissions=CHAT,
    )


class Checks:
    """In place of Argon2."""

    def __init__(self) -> None:
        self.count = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, encoded: str, plaintext: str) -> bool:
        self.count += 1
        assert self.may_go.wait(10)
        return encoded == plaintext[::-1]


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
async def lane(checks: Checks) -> AsyncIterator[Lane]:
    lane = Lane("test", threads=2, room=3)
    yield lane
    checks.may_go.set()
    lane.close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(lane: Lane, checks: Checks, clock: Clock) -> Verifier:
    return Verifier(lane, clock, checks)


async def test_a_genuine_token_is_computed_once(verifier: Verifier, checks: Checks) -> None:
    token, plaintext = made()
    assert [await verifier.is_genuine(token, plaintext) for _ in range(3)] == [True] * 3
    assert checks.count == 1


async def test_it_is_computed_again_after_a_while(verifier: Verifier, checks: Checks, clock: Clock) -> None:
    token, plaintext = made()
    await verifier.is_genuine(token, plaintext)
    clock.now = 299.0
    await verifier.is_genuine(token, plaintext)
    assert checks.count == 1
    clock.now = 300.0
    await verifier.is_genuine(token, plaintext)
    assert checks.count == 2


async def test_a_wrong_secret_is_not_remembered(verifier: Verifier, checks: Checks) -> None:
    token, _ = made()
    wrong = f"{token.prefix}_{'a' * 43}"
    assert [await verifier.is_genuine(token, wrong) for _ in range(2)] == [False] * 2
    assert checks.count == 2


async def test_what_is_remembered_is_of_this_hash(verifier: Verifier) -> None:
    from dataclasses import replace

    token, plaintext = made()
    assert await verifier.is_genuine(token, plaintext)
    assert not await verifier.is_genuine(replace(token, hash="another"), plaintext)


async def test_the_oldest_is_forgotten_when_there_are_too_many(
    verifier: Verifier, checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier_module, "_MOST_REMEMBERED", 2)
    tokens = [made() for _ in range(3)]
    for token, plaintext in tokens:
        await verifier.is_genuine(token, plaintext)
    for token, plaintext in tokens[1:]:
        await verifier.is_genuine(token, plaintext)
    assert checks.count == 3
    await verifier.is_genuine(*tokens[0])
    assert checks.count == 4


async def test_callers_with_one_token_share_one_computation(verifier: Verifier, checks: Checks) -> None:
    token, plaintext = made()
    checks.may_go.clear()
    callers = [asyncio.create_task(verifier.is_genuine(token, plaintext)) for _ in range(20)]
    await asyncio.sleep(0.05)
    checks.may_go.set()
    assert await asyncio.gather(*callers) == [True] * 20
    assert checks.count == 1


async def test_guesses_at_one_token_take_one_thread(verifier: Verifier, checks: Checks) -> None:
    token, _ = made()
    checks.may_go.clear()
    first = asyncio.create_task(verifier.is_genuine(token, mint()[0]))
    await asyncio.sleep(0)
    for _ in range(100):
        with pytest.raises(LaneFull):
            await verifier.is_genuine(token, mint()[0])
    other = asyncio.create_task(verifier.is_genuine(*made()))
    checks.may_go.set()
    assert await first is False
    assert await other is True


async def test_a_caller_that_goes_away_leaves_the_answer_to_the_next(verifier: Verifier, checks: Checks) -> None:
    token, plaintext = made()
    checks.may_go.clear()
    caller = asyncio.create_task(verifier.is_genuine(token, plaintext))
    await asyncio.sleep(0.05)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    checks.may_go.set()
    assert await verifier.is_genuine(token, plaintext)
    assert checks.count == 1


async def test_a_full_lane_refuses_at_once_and_takes_again_when_there_is_room(lane: Lane) -> None:
    may_go = threading.Event()
    running = [asyncio.create_task(lane.run(lambda: may_go.wait(10))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(LaneFull):
        await lane.run(lambda: True)
    may_go.set()
    assert await asyncio.gather(*running) == [True] * 3
    assert await lane.run(lambda: 7) == 7


async def test_a_place_is_free_when_its_thread_is_and_not_when_its_caller_goes(lane: Lane) -> None:
    may_go = threading.Event()
    running = [asyncio.create_task(lane.run(lambda: may_go.wait(10))) for _ in range(2)]
    await asyncio.sleep(0.05)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    waiting = asyncio.create_task(lane.run(lambda: True))
    await asyncio.sleep(0)
    with pytest.raises(LaneFull):
        await lane.run(lambda: True)
    may_go.set()
    assert await waiting


async def test_what_the_work_raises_is_raised(lane: Lane) -> None:
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 / 0)
