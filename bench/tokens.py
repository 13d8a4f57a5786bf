"""How far the estimate of tokens is from the real counts: `python -m bench.tokens [--table FILE]`.

Texts of the length of memories, from what is free and already on the machine: Python's own sources and documents, the
system's message catalogues and licences. A kind whose source is absent is named and left out.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import json
import random
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING

import numpy as np
from bpe_openai import get_encoding  # type: ignore[import-untyped]  # ships no types

from extproc.memory.tokens import estimate_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LENGTHS = (60, 700)
"""Characters of a text: memories are seldom shorter or longer."""
TEXTS = 1_500
"""Of a kind, at most."""
STDLIB = Path(sysconfig.get_path("stdlib"))
CATALOGUES = Path("/usr/share/locale")
LANGUAGES = {
    "German": "de", "French": "fr", "Spanish": "es", "Portuguese": "pt_BR", "Italian": "it", "Dutch": "nl",
    "Swedish": "sv", "Finnish": "fi", "Polish": "pl", "Czech": "cs", "Hungarian": "hu", "Turkish": "tr",
    "Vietnamese": "vi", "Russian": "ru", "Ukrainian": "uk", "Greek": "el", "Hebrew": "he", "Arabic": "ar",
    "Hindi": "hi", "Thai": "th", "Chinese": "zh_CN", "Japanese": "ja", "Korean": "ko",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    texts: int
    ratios: dict[str, tuple[float, float, float]]
    """Estimate by count, for each vocabulary: 5th percentile, of all texts together, 95th percentile."""
    microseconds: float
    """For one text, CPU."""


def english() -> Iterator[str]:
    for path in sorted(STDLIB.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (words := ast.get_docstring(node)):
                yield from (" ".join(each.split()) for each in words.split("\n\n") if each[:1].isupper())


def documents() -> Iterator[str]:
    for package in distributions():
        yield from pieces(str(package.metadata.json.get("description", "")))
    for path in sorted(Path(__file__).parent.parent.glob("docs/**/*.md")):
        yield from pieces(path.read_text())


def python_code() -> Iterator[str]:
    for path in sorted(STDLIB.glob("*.py")):
        yield from pieces(path.read_text())


def c_code() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("include")).rglob("*.h")):
        yield from pieces(path.read_text())


def json_text() -> Iterator[str]:
    for number, package in enumerate(distributions()):
        yield from pieces(json.dumps(package.metadata.json, indent=2 if number % 2 else None))


def numbers() -> Iterator[str]:
    pick = random.Random(7)
    makers: tuple[Callable[[], str], ...] = (
        lambda: f"2026-{pick.randint(1, 12):02}-{pick.randint(1, 28):02}T{pick.randint(0, 23):02}:15:00Z",
        lambda: f"{pick.gauss(0, 1000):.2f}",
        lambda: str(pick.randint(0, 10**9)),
        lambda: f"+49 {pick.randint(100, 999)} {pick.randint(10**5, 10**7)}",
        lambda: ".".join(str(pick.randint(0, 255)) for _ in range(4)),
        lambda: f"{pick.randint(1, 99)}%",
    )
    for _ in range(TEXTS):
        make = pick.choice(makers)
        yield " ".join(make() for _ in range(pick.randint(8, 40)))


def keys() -> Iterator[str]:
    pick = random.Random(8)
    for _ in range(TEXTS):
        yield " ".join(f"{pick.getrandbits(128):032x}" for _ in range(pick.randint(2, 12)))


def translated(language: str) -> Iterator[str]:
    for path in sorted((CATALOGUES / language / "LC_MESSAGES").glob("*.mo")):
        try:
            with path.open("rb") as file:
                messages: dict[str, str] = vars(gettext.GNUTranslations(file))["_catalog"]
        except UnicodeDecodeError:  # an old one, in an encoding that it does not name
            continue
        for message in messages.values():
            yield " ".join(message.replace("_", "").split())


def pieces(text: str) -> Iterator[str]:
    """Whole lines together, as far as they fit."""
    piece = ""
    for line in textwrap.dedent(text).splitlines(keepends=True):
        if len(piece) + len(line) > LENGTHS[1]:
            yield piece
            piece = ""
        piece += line
        if len(piece) > LENGTHS[1] // 3 and not line.strip():
            yield piece
            piece = ""
    yield piece


def measured(kind: str, source: Iterable[str]) -> Row | None:
    texts = sorted({text.strip() for text in source if LENGTHS[0] <= len(text.strip()) <= LENGTHS[1]})
    random.Random(1).shuffle(texts)
    texts = texts[:TEXTS]
    if len(texts) < 50:
        return None
    began = process_time()
    estimates = np.array([estimate_tokens(text) for text in texts])
    microseconds = (process_time() - began) / len(texts) * 1e6
    ratios = {}
    for vocabulary in ("o200k_base", "cl100k_base"):
        encoding = get_encoding(vocabulary)
        counts = np.array([len(encoding.encode_ordinary(text)) for text in texts])
        low, high = np.percentile(estimates / counts, [5, 95])
        ratios[vocabulary] = (float(low), float(estimates.sum() / counts.sum()), float(high))
    return Row(kind, len(texts), ratios, microseconds)


def rows() -> Iterator[Row]:
    sources: dict[str, Iterable[str]] = {
        "English prose": english(),
        "README files, Markdown": documents(),
        "Python": python_code(),
        "C headers": c_code(),
        "JSON": json_text(),
        "numbers, dates": numbers(),
        "hexadecimal keys": keys(),
        **{name: translated(code) for name, code in LANGUAGES.items()},
    }
    for kind, source in sources.items():
        row = measured(kind, source)
        if row is None:
            sys.stderr.write(f"{kind}: LEFT OUT, too few texts of it on this machine\n")
        else:
            yield row


def table(lines: Iterable[Row]) -> str:
    head = f"| kind | texts | o200k 5 % | all | 95 % | cl100k 5 % | all | 95 % | µs |\n{'|---' * 9}|\n"
    return head + "".join(
        f"| {row.kind} | {row.texts} | "
        + " | ".join(f"{value:.2f}" for values in row.ratios.values() for value in values)
        + f" | {row.microseconds:.0f} |\n"
        for row in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--table", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    text = table(rows())
    sys.stdout.write(text)
    if arguments.table:
        arguments.table.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
