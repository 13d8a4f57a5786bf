from __future__ import annotations

from extproc.context.steps import Steps, advance, finish


def work(log: list[bool | None]) -> Steps[str]:
    first = yield
    second = yield
    log += [first, second]
    return "done"


def test_each_step_is_told_whether_time_is_up_and_the_last_one_gives_the_result() -> None:
    log: list[bool | None] = []
    steps = work(log)
    assert [advance(steps, late) for late in (None, False, True)] == [None, None, "done"]
    assert log == [False, True]


def test_at_once_it_is_never_late() -> None:
    log: list[bool | None] = []
    assert finish(work(log)) == "done"
    assert log == [False, False]
