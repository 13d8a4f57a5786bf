"""The command: read LoCoMo, ask every question, print the tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

from bench.locomo.dataset import CATEGORIES, Conversation, load, rows
from bench.locomo.measure import BUDGETS, FIRST, Share, Store, blocks, generic_share, mean, recalls
from extproc.context.index import Index
from extproc.context.retrieve import Meanings
from extproc.context.score import DEFAULT_PARTS, Parts
from extproc.memory.embedding import StaticTable
from extproc.memory.features import Row, WindowIndexer
from extproc.memory.model import Namespace
from extproc.settings import EngineSettings
from extproc.settings import load as load_settings

PATH = "IBEX_LOCOMO"
NAMESPACE = Namespace("10c0a000-0000-4000-8000-000000000000", "10c0a000-0000-4000-8000-000000000001")
ALL = tuple(CATEGORIES)
ANSWERABLE = (1, 2, 3, 4)
GENERIC = Path(__file__).with_name("generic.txt")


def main() -> int:
    options = _options()
    if not options.file:
        print(
            f"bench.locomo: SKIPPED, nothing was measured: give LoCoMo's locomo10.json as FILE or in {PATH}.\n"
            "It is at github.com/snap-research/locomo, under CC BY-NC 4.0, and not part of this project.",
            file=sys.stderr,
        )
        return 0
    try:
        conversations = load(Path(options.file), NAMESPACE)
    except (OSError, ValueError) as error:
        print(f"bench.locomo: {error}", file=sys.stderr)
        return 1
    result = _measure(conversations, load_settings(EngineSettings), with_ablation=not options.quick)
    result["conditions"] = {
        "file": Path(options.file).name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": " ".join(sys.argv[1:]),
    }
    text = _markdown(result)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.locomo", description=__doc__)
    parser.add_argument("file", nargs="?", default=os.environ.get(PATH, ""), help=f"LoCoMo's JSON (or {PATH})")
    parser.add_argument("--quick", action="store_true", help="without the ablation")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--table", type=Path, help="write the tables to this file")
    return parser.parse_args()


def _measure(
    conversations: Sequence[Conversation], settings: EngineSettings, *, with_ablation: bool
) -> dict[str, object]:
    table = StaticTable.load()
    indexer = WindowIndexer(table, table)
    meanings = Meanings(table)

    def store(rows: Sequence[Row], its: Sequence[Conversation]) -> Store:
        return Store(Index(NAMESPACE, rows), its, indexer, meanings)

    rows_of = [rows([one], indexer) for one in conversations]
    alone = [store(its, [one]) for its, one in zip(rows_of, conversations, strict=True)]
    pooled = store([row for its in rows_of for row in its], conversations)

    each = [share for one in alone for share in recalls(one)]
    together = recalls(pooled)
    packed = [share for one in alone for share in blocks(one, settings)]
    prompts = GENERIC.read_text(encoding="utf-8").splitlines()
    gates = [generic_share(one, prompts, settings) for one in alone]
    result: dict[str, object] = {
        "memories": len(pooled.index),
        "questions": len(each),
        "embedder": indexer.version,
        "first": list(FIRST),
        "one_store_each": {"all five": mean(each, ALL), "1-4": mean(each, ANSWERABLE)},
        "by_category": {name: mean(each, [number]) for number, name in CATEGORIES.items()},
        "by_conversation": {
            one.name: mean([share for share in each if share.conversation == one.name], ALL) for one in conversations
        },
        "one_store_for_all": {"all five": mean(together, ALL), "1-4": mean(together, ANSWERABLE)},
        "budgets": list(BUDGETS),
        "in_block": {"1-4": mean(packed, ANSWERABLE), "all five": mean(packed, ALL)},
        "gate": {
            "generic prompts that get a block": 100 * sum(gate[0] for gate in gates) / len(gates),
            "questions that get a block": 100 * sum(gate[1] for gate in gates) / len(gates),
        },
    }
    if with_ablation:
        result["ablation"] = {name: _at(alone, parts) for name, parts in _ablations().items()}
    return result


def _at(alone: Sequence[Store], parts: Parts) -> list[float]:
    found: list[Share] = []
    for one in alone:
        found += recalls(replace(one, parts=parts))
    return mean(found, ALL)


def _ablations() -> dict[str, Parts]:
    names = [field.name for field in fields(Parts)]
    around = ("previous", "next", "before_previous")
    groups = {
        "everything": (),
        **{f"without {name}": (name,) for name in names if name not in around},
        "without neighbours": around,
        "without all structure": (*around, "named", "session", "dated"),
        "lexical alone": tuple(name for name in names if name != "lexical"),
        "soft alone": tuple(name for name in names if name != "soft"),
        "cosine alone": tuple(name for name in names if name != "cosine"),
    }
    return {label: replace(DEFAULT_PARTS, **dict.fromkeys(names, 0.0)) for label, names in groups.items()}


def _markdown(result: dict[str, object]) -> str:
    columns = [f"R@{k}" for k in FIRST]
    parts = [
        f"{result['memories']} memories, {result['questions']} questions, {result['embedder']}",
        _table("one store per conversation", columns, result["one_store_each"]),
        _table("by category", columns, result["by_category"]),
        _table("by conversation", columns, result["by_conversation"]),
        _table("all conversations in one store", columns, result["one_store_for_all"]),
        _table("evidence in a block of so many tokens", [str(tokens) for tokens in BUDGETS], result["in_block"]),
        _table("gate", ["%"], result["gate"]),
    ]
    if "ablation" in result:
        parts.append(_table("ablation, five categories", columns, result["ablation"]))
    return "\n\n".join(parts)


def _table(title: str, columns: Sequence[str], lines: object) -> str:
    assert isinstance(lines, dict)
    written = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, values in lines.items():
        numbers = values if isinstance(values, list) else [values]
        written.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in numbers)} |")
    return "\n".join(written)


if __name__ == "__main__":
    sys.exit(main())
