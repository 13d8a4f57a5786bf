"""What reading and editing a body costs beside one copy of it: `python -m bench.splice [--json FILE]`.

All steps of a body are timed in turn in each round, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from extproc.chat import Directive, InjectionMode, Placement, ReadLimits, recognise

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"2 KB": 2_000, "220 KB": 220_000, "5 MB": 5_000_000}
BLOCK = "<recalled>\n" + '- "likes" green tea & long walks <id=42>\n' * 40 + "</recalled>"
"""About 1.6 KB, what a block of memories weighs."""
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Row:
    body: str
    size: str
    step: str
    best_us: float
    median_us: float
    times_copy: float
    """Best against the best plain copy."""


def words(size: int, seed: int = 7) -> str:
    pick = random.Random(seed)
    text = " ".join("".join(pick.choices("etaoinshrdlu", k=pick.randint(2, 9))) for _ in range(size // 6 + 1))
    return text[:size]


def one_string(size: int) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": words(size)}]


def many_messages(size: int) -> list[dict[str, Any]]:
    each = 400
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": words(each, n % 50)} for n in range(max(3, size // (each + 40)) | 1)]


def escaped_quotes(size: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": ('{"key": "value \\ path"}\n' * (size // 24))[: size * 3 // 4]}]


def base64_image(size: int) -> list[dict[str, Any]]:
    picture = base64.b64encode(random.Random(3).randbytes(size * 3 // 4)).decode()
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}}
    return [{"role": "user", "content": [url, {"type": "text", "text": "What is in this picture?"}]}]


BODIES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "one string": one_string,
    "many messages": many_messages,
    "escaped quotes": escaped_quotes,
    "base64 image": base64_image,
}


def steps(body: bytes) -> dict[str, Callable[[], object]]:
    chat = recognise("POST", PATH, "application/json")
    assert chat is not None
    limits = ReadLimits()
    request = chat.read_request(body, PATH, limits)
    view = memoryview(body)
    named: dict[str, Callable[[], object]] = {
        "copy": lambda: bytes(view),
        "read_request": lambda: chat.read_request(body, PATH, limits),
    }
    for placement in Placement:
        named[f"splice {placement}"] = partial(chat.splice, body, request, BLOCK, placement)
    for mode in InjectionMode:
        directive = Directive(BLOCK, mode)
        named[f"both {mode}"] = partial(chat.splice, body, request, BLOCK, Placement.LAST_USER, directive)
    named["read + splice"] = lambda: chat.splice(
        body, chat.read_request(body, PATH, limits), BLOCK, Placement.LAST_USER
    )
    return named


def measure(body: bytes, rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call, one figure for each step and round."""
    named = steps(body)
    taken: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, call in named.items():
            start = perf_counter()
            for _ in range(calls):
                call()
            taken[name].append((perf_counter() - start) / calls * 1e6)
    return taken


def rows() -> list[Row]:
    found = []
    for kind, build in BODIES.items():
        for size, length in SIZES.items():
            body = json.dumps({"model": "gpt-4o", "stream": True, "messages": build(length)}).encode()
            calls = max(1, 400_000 // len(body))
            taken = measure(body, rounds=25, calls=calls)
            copy = min(taken["copy"])
            found += [
                Row(kind, size, step, min(times), statistics.median(times), min(times) / copy)
                for step, times in taken.items()
            ]
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    measured = rows()
    print(f"{'body':16}{'size':8}{'step':26}{'best µs':>11}{'median µs':>11}{'× copy':>9}")
    for row in measured:
        figures = f"{row.best_us:11.1f}{row.median_us:11.1f}{row.times_copy:9.1f}"
        print(f"{row.body:16}{row.size:8}{row.step:26}{figures}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in measured], indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
