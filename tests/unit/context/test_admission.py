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


async def test_between_two_steps_who_has_had_less_of_the_cpu_goes_first() -> None:
    admission, log = Admission(99), list[str]()
    admission.use("flood", 1.0)

    async def work(org: str) -> None:
        with admission.room(org):
            async with admission.turn(org, later()) as turn:
                for step in range(3):
                    log.append(f"{org}{step}")
                    await turn.step()

    flood = [asyncio.create_task(work("flood")) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.gather(*flood, asyncio.create_task(work("quiet")))
    assert [one for one in log if one.startswith("quiet")] == ["quiet0", "quiet1", "quiet2"]
    began = log.index("quiet0")
    assert began < 3
    assert log[began : began + 3] == ["quiet0", "quiet1", "quiet2"]
    assert log[began + 3 :][: 3 - began] == [f"flood{step}" for step in range(began, 3)]  # what had begun ends first


async def test_what_was_used_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = Admission(99)
    admission.use("a", 1.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    admission.use("b", 0.1)
    assert list(admission._used_s) == ["b"]


async def test_a_turn_that_does_not_come_back_in_time_ends_the_work() -> None:
    admission = Admission(99)
    admission.use("flood", 1.0)

    async def hold() -> None:
        async with admission.turn("quiet", later()):
            await asyncio.sleep(0.05)

    async def work() -> None:
        async with admission.turn("flood", later(0.02)) as turn:
            await turn.step()

    working = asyncio.create_task(work())
    holding = asyncio.create_task(hold())
    with pytest.raises(Overloaded):
        await working
    await holding
    async with admission.turn("c", later(0.5)):
        pass


async def test_a_cancelled_request_stops_at_its_next_step() -> None:
    admission, log = Admission(99), list[int]()

    async def work() -> None:
        async with admission.turn("a", later()) as turn:
            for step in range(100):
                log.append(step)
                await turn.step()

    task = asyncio.create_task(work())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert 0 < len(log) < 10
    async with admission.turn("b", later(0.5)):
        pass
