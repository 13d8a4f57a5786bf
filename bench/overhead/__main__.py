"""The command: start everything, measure in rounds, print the tables, stop everything."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from bench.children import PartsError
from bench.load_process import LoadError, LoadProcess
from bench.overhead import report, summary
from bench.overhead.load import Order
from bench.overhead.measure import load_generator, measure
from bench.overhead.plan import FULL, QUICK, Cell, Plan
from bench.overhead.setups import TITLES, Parts, SetUp, start
from bench.overhead.slice import Slice

_SATURATED_BODY = "2 KB"
_WARM_UP = Cell("2 KB", 16, 2_000)


def main() -> int:
    options = _options()
    plan = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as directory:
        parts = Parts(Path(directory))
        known = report.conditions(plan, options.set_ups, options.bare_engine_ms)
        try:
            start(parts, options.set_ups, options.bare_engine_ms / 1000)
            closed, rate, opened = asyncio.run(asyncio.wait_for(_measure_all(plan, parts.set_ups), plan.limit_s))
        except (PartsError, LoadError, TimeoutError) as error:
            print(f"bench.overhead: {str(error) or 'the run took too long'}", file=sys.stderr)
            return 1
        finally:
            parts.stop()
        result = _summarise(known, closed, rate, opened, parts.spans_received())
    text = result.to_markdown()
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description="What the filter costs in Envoy.")
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds, in under 90 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every slice and the summary")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the printed Markdown")
    parser.add_argument(
        "--set-ups", default="ABC", metavar="KEYS", help=", ".join(f"{key}: {title}" for key, title in TITLES.items())
    )
    parser.add_argument(
        "--bare-engine-ms", type=float, default=0.0, metavar="MS", help="how long B's engine waits before it answers"
    )
    options = parser.parse_args()
    if not options.set_ups or set(options.set_ups) - set(TITLES) or len(set(options.set_ups)) < len(options.set_ups):
        parser.error(f"--set-ups takes letters of {''.join(TITLES)}, each once")
    return options


async def _measure_all(plan: Plan, set_ups: list[SetUp]) -> tuple[list[Slice], float, list[Slice]]:
    """The closed loop's slices, the rate of the open loop, and its slices (none without C)."""
    async with load_generator() as load:
        _check(await _slices(load, set_ups, _WARM_UP, plan.slice_s, None, 0))
        closed: list[Slice] = []
        for number in range(plan.rounds):
            _say(f"round {number + 1} of {plan.rounds}")
            for cell in plan.cells:
                closed += await _slices(load, _rotated(set_ups, number), cell, plan.slice_s, None, number)
        rate = summary.saturation(summary.rows(closed), "C", _SATURATED_BODY) / 2
        opened: list[Slice] = []
        cell = Cell(_SATURATED_BODY, plan.open_loop_connections)
        for number in range(plan.open_loop_rounds if rate else 0):
            _say(f"open loop {number + 1} of {plan.open_loop_rounds}, {rate:.0f} requests/s")
            opened += await _slices(load, _rotated(set_ups, number), cell, plan.open_loop_s, rate, number)
        return closed, rate, opened


def _check(warm_up: list[Slice]) -> None:
    """Raises PartsError where a set-up does not do what is to be measured: its numbers would look too good."""
    for each in warm_up:
        if "processor" in each.cpu_us and each.fallbacks == each.requests:
            raise PartsError(f"the processor of {each.set_up} answered none of {each.requests} requests")
        if each.set_up == "C" and not each.injected:
            raise PartsError("the filter put no memory into any request")


def _rotated(set_ups: list[SetUp], by: int) -> list[SetUp]:
    """Another one begins each round: what one leaves behind for the next hits all alike."""
    at = by % len(set_ups)
    return [*set_ups[at:], *set_ups[:at]]


async def _slices(
    load: LoadProcess, set_ups: list[SetUp], cell: Cell, seconds: float, rate: float | None, number: int
) -> list[Slice]:
    """The same slice of each set-up, one after the other."""
    orders = [Order(each.port, cell.body, cell.connections, seconds, rate, cell.max_requests) for each in set_ups]
    return [await measure(load, each, order, number) for each, order in zip(set_ups, orders, strict=True)]


def _summarise(
    known: dict[str, object], closed: list[Slice], rate: float, opened: list[Slice], spans: int | None
) -> report.Report:
    compared = summary.comparisons(closed)
    open_rows = summary.rows(opened)
    return report.Report(
        conditions=known,
        rows=summary.rows(closed),
        comparisons=compared,
        open_rate=rate,
        open_rows=open_rows,
        aims=summary.aims(compared, open_rows, _SATURATED_BODY),
        spans_received=spans,
        slices=[*closed, *opened],
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
