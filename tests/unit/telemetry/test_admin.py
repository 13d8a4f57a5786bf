"""What `/ready` says of dependencies."""

from __future__ import annotations

import asyncio

import pytest

from extproc.telemetry import admin
from extproc.telemetry.admin import Readiness


async def is_well() -> bool:
    return True


async def is_ill() -> bool:
    return False


async def is_away() -> str:
    return "away for 12 s"


async def is_silent() -> bool:
    await asyncio.sleep(30)
    return True


async def test_each_dependency_is_ok_unavailable_or_what_its_check_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_CHECK_LIMIT_S", 0.05)
    readiness = Readiness({"a": is_well, "b": is_ill, "c": is_away, "d": is_silent}, needed=())
    readiness.is_serving = True
    assert await readiness.report() == (
        True,
        {"a": "ok", "b": "unavailable", "c": "away for 12 s", "d": "unavailable"},
    )


async def test_a_process_that_does_not_serve_is_not_ready() -> None:
    assert (await Readiness({}, needed=()).report())[0] is False


@pytest.mark.parametrize(("check", "is_ready"), [(is_well, True), (is_ill, False), (is_away, False)])
async def test_what_is_needed_must_be_ok(check: admin.Check, is_ready: bool) -> None:
    readiness = Readiness({"a": check}, needed=("a",))
    readiness.is_serving = True
    assert (await readiness.report())[0] is is_ready
