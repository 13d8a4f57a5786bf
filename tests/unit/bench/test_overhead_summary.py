"""From slices to rows, comparisons and aims."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.overhead.slice import Slice
from bench.overhead.summary import aims, comparisons, rows, saturation

SLICE = Slice(
    set_up="C",
    body="2 KB",
    connections=1,
    round=0,
    rate=None,
    requests=100,
    seconds=1.0,
    p50_ms=3.0,
    p99_ms=9.0,
    cpu_us={"envoy": 200.0, "processor": 900.0, "engine": 600.0},
    rss_bytes={"envoy": 1, "processor": 2, "engine": 3},
    fallbacks=0,
    injected=100,
    failures=0,
    lost=0,
)
BARE = replace(SLICE, set_up="B", p50_ms=2.0, cpu_us={"envoy": 200.0, "processor": 600.0, "engine": 400.0})
ALONE = replace(SLICE, set_up="A", p50_ms=0.5, p99_ms=1.0, cpu_us={"envoy": 50.0}, rss_bytes={"envoy": 1})


def test_a_row_is_the_median_of_its_rounds_and_the_sum_of_its_counts() -> None:
    slices = [replace(SLICE, round=number, p50_ms=p50, lost=1) for number, p50 in enumerate((1.0, 9.0, 2.0))]
    [row] = rows(slices)
    assert (row.p50_ms, row.requests, row.failures) == (2.0, 300, 3)


def test_set_ups_are_compared_within_a_round_only() -> None:
    """A noisy round is noisy for both: the ratio holds where a ratio of medians would not."""
    slow = [replace(each, round=1, p50_ms=each.p50_ms * 10) for each in (BARE, SLICE)]
    found = {each.name: each for each in comparisons([BARE, SLICE, *slow])}
    assert (found["p50, C / B"].least, found["p50, C / B"].most) == (1.5, 1.5)
    assert "p50, B / A" not in found


def test_a_set_up_without_an_engine_is_not_compared_by_one() -> None:
    names = {each.name for each in comparisons([ALONE, BARE])}
    assert names == {"Envoy CPU, B / A", "p50, B / A", "added p50 ms, B − A"}


def test_saturation_counts_requests_that_did_not_fall_back() -> None:
    overloaded = replace(SLICE, connections=64, requests=400, fallbacks=360)
    assert saturation(rows([SLICE, overloaded]), "C", "2 KB") == 100.0
    assert saturation([], "C", "2 KB") == 0.0


@pytest.mark.parametrize(("processor_us", "is_met"), [(900.0, True), (901.0, False)])
def test_the_filter_may_cost_half_as_much_again_as_a_bare_processor(processor_us: float, is_met: bool) -> None:
    mine = replace(SLICE, cpu_us=SLICE.cpu_us | {"processor": processor_us})
    [aim] = [each for each in aims(comparisons([BARE, mine]), [], "2 KB") if each.text.startswith("filter CPU")]
    assert aim.is_met is is_met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert {each.is_met for each in aims(comparisons([ALONE, BARE]), [], "2 KB")} == {None}


@pytest.mark.parametrize("lacking", [{"fallbacks": 1}, {"failures": 1}, {"lost": 1}])
def test_half_the_saturation_rate_bears_no_request_without_context(lacking: dict[str, int]) -> None:
    well, ill = rows([SLICE]), rows([replace(SLICE, **lacking)])  # type: ignore[arg-type]  # counts only
    assert aims([], well, "2 KB")[-1].is_met
    assert not aims([], ill, "2 KB")[-1].is_met
