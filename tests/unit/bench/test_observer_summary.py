"""From slices to rows, differences, growth and aims."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench.observer.slices import EnvoySlice, MemorySample, ReaderSlice
from bench.observer.summary import Aim, aims, differences, growth, quantile, reader_rows

BARE = ReaderSlice(
    cell="paced",
    server="bare",
    round=0,
    chunks=1_000,
    streams=0,
    broken=0,
    seconds=2.0,
    cpu_us=40.0,
    load_cpu_us=50.0,
)
OBSERVER = replace(BARE, server="observer", cpu_us=48.0)
OFF = EnvoySlice(
    set_up="off",
    clients=1,
    round=0,
    streams=10,
    failures=0,
    first_p50_ms=1.0,
    first_p99_ms=2.0,
    gap_p50_ms=10.0,
    gap_p99_ms=12.0,
    chunks=500,
    envoy_cpu_us=80.0,
    observer_cpu_us=None,
    digests=("abc",),
)
OFF_AGAIN = replace(OFF, set_up="off again", first_p50_ms=0.9)
ON = replace(OFF, set_up="observer", first_p50_ms=1.05, envoy_cpu_us=110.0, observer_cpu_us=60.0)


def the_aim(text: str, *slices: EnvoySlice) -> Aim:
    [found] = [each for each in aims([], None, differences(slices), slices, "abc") if text in each.text]
    return found


def test_servers_are_compared_within_a_round_only() -> None:
    """A noisy round is noisy for both: the ratio holds where a ratio of medians would not."""
    slow = [replace(each, round=1, cpu_us=each.cpu_us * 3) for each in (BARE, OBSERVER)]
    bare, observer = reader_rows([BARE, OBSERVER, *slow])
    assert bare.ratio is None
    assert observer.ratio is not None
    assert (observer.ratio.least, observer.ratio.most) == pytest.approx((1.2, 1.2))
    assert observer.chunks == 2_000


@pytest.mark.parametrize(("cpu_us", "is_met"), [(48.0, True), (48.1, False)])
def test_the_observer_may_cost_a_fifth_more_than_reading(cpu_us: float, is_met: bool) -> None:
    rows = reader_rows([BARE, replace(OBSERVER, cpu_us=cpu_us)])
    [found] = [each for each in aims(rows, None, [], [], "") if "CPU" in each.text]
    assert found.is_met is is_met


def test_what_an_envoy_differs_from_itself_is_noise() -> None:
    assert the_aim("first byte p50", OFF, OFF_AGAIN, ON).is_met
    assert the_aim("first byte p50", OFF, OFF_AGAIN, replace(ON, first_p50_ms=1.2)).is_met is False


def test_a_difference_is_within_a_round() -> None:
    later = [replace(OFF, round=1, first_p50_ms=5.0), replace(ON, round=1, first_p50_ms=5.5)]
    [found] = [
        each
        for each in differences([OFF, ON, *later])
        if each.set_up == "observer" and each.quantity == "first byte p50, ms"
    ]
    assert (found.added.least, found.added.most) == pytest.approx((0.05, 0.5))


def test_a_body_that_differs_anywhere_is_a_miss() -> None:
    assert the_aim("byte for byte", OFF, ON).is_met
    assert the_aim("byte for byte", OFF, replace(ON, digests=("abc", "abd"))).is_met is False
    assert the_aim("byte for byte", OFF, replace(ON, failures=1)).is_met is False
    assert the_aim("byte for byte", replace(OFF, digests=()), replace(ON, digests=())).is_met is False


def test_memory_is_flat_from_a_tenth_of_the_streams_on() -> None:
    samples = [MemorySample(streams, rss) for streams, rss in ((0, 50), (120, 100), (600, 104), (1_000, 105))]
    found = growth(samples, 1_000)
    assert [each.streams for each in found.samples] == [0, 120, 600, 1_000]
    assert found.is_flat
    assert not growth([*samples[:-1], MemorySample(1_000, 106)], 1_000).is_flat


def test_memory_that_rose_and_fell_is_not_flat() -> None:
    samples = [MemorySample(streams, rss) for streams, rss in ((0, 50), (100, 100), (700, 200), (1_000, 100))]
    assert not growth(samples, 1_000).is_flat


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert {each.is_met for each in aims([], None, [], [], "")} == {None}


def test_a_quantile_is_the_nearest_rank() -> None:
    assert (quantile([1, 2, 3, 4], 0.5), quantile([1, 2, 3, 4], 0.99)) == (3, 4)
    assert math.isnan(quantile([], 0.5))
