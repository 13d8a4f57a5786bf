from __future__ import annotations

import asyncio
import time

import pytest

from extproc.context.admission import Admission, Overloaded

LONG_S = 10.0


def later(seconds: float = LONG_S) -> float:
    return time.monotonic() + seconds


async def visits(admission: Admission, orgs: str, log: list[str]) -> list[asyncio.Task[None]]:
    """Tasks that take a turn each, in the order in which they came."""

    async def visit(org: str) -> None:
        async with admission.turn(org, later()):
            log.append(org)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(visit(org)) for org in orgs]
    await asyncio.sleep(0)
    return tasks


def test_a_full_house_refuses_at_once_and_one_org_never_fills_it() -> None:
    admission = Admission(4)
    with admission.room("a"), admission.room("a"):
        with pytest.raises(Overloaded), admission.room("a"):
            pass
        with admission.room("b"), admission.room("c"), pytest.raises(Overloaded), admission.room("d"):
            pass
    assert admission.inside == 0
    with admission.room("a"):
        assert admission.inside == 1


async def test_organisations_take_turns() -> None:
    admission, log = Admission(99), list[str]()
    async with admission.turn("x", later()):
        tasks = await visits(admission, "aaaabc", log)
    await asyncio.gather(*tasks)
    assert "".join(log) == "abcaaa"


async def test_who_waits_too_long_or_leaves_is_not_waited_for() -> None:
    admission, log = Admission(99), list[str]()
    async with admission.turn("x", later()):
        with pytest.raises(Overloaded):
            async with admission.turn("a", later(0.01)):
                raise AssertionError
        left, stays = await visits(admission, "ab", log)
        left.cancel()
        await asyncio.sleep(0)
    await stays
    assert log == ["b"]
    async with admission.turn("a", later()):
        pass


async def test_a_turn_that_comes_to_one_who_is_gone_goes_on() -> None:
    admission, log = Admission(99), list[str]()
    async with admission.turn("x", later()):
        gone, stays = await visits(admission, "ab", log)
    gone.cancel()  # its turn has come, and it has not run since
    await asyncio.gather(gone, stays, return_exceptions=True)
    assert log[-1] == "b"
    async with admission.turn("c", later(0.5)):
        pass


async def test_a_failure_inside_gives_the_turn_back() -> None:
    admission = Admission(99)
    with pytest.raises(ZeroDivisionError):
        async with admission.turn("a", later()):
            raise ZeroDivisionError
    async with admission.turn("a", later(0.5)):
        pass
