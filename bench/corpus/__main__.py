"""The command: ask every question of the project's own corpus, print the tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.corpus.dataset import NAMESPACE, conversations
from bench.corpus.measure import Group, by_kind, gate_by_language, in_block
from bench.recall.engine import open_stores, with_exact_tokens
from bench.recall.measure import BUDGETS, FIRST, GATES
from bench.recall.report import table
from extproc.memory.embedding import ModelUnusable
from extproc.settings import EngineSettings, load


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.corpus", description=__doc__)
    parser.add_argument("--exact", action="store_true", help="count tokens as with the extra `tokens`")
    parser.add_argument("--vectors", type=Path, help="keep a model's vectors in this .npz, and read them from it")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--table", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    try:
        result = _measure(load(EngineSettings), options.vectors, exact=options.exact)
    except (OSError, ModelUnusable) as error:
        print(f"bench.corpus: {error}", file=sys.stderr)
        return 1
    text = _markdown(result)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(settings: EngineSettings, vectors: Path | None, *, exact: bool) -> dict[str, Any]:
    corpus = [with_exact_tokens(one) for one in conversations()] if exact else conversations()
    alone, pooled = open_stores(corpus, NAMESPACE, settings, vectors)
    return {
        "memories": len(pooled.index),
        "embedder": pooled.indexer.version,
        "first": list(FIRST),
        "own_namespace": _named(by_kind(alone)),
        "pooled": _named(by_kind([pooled])),
        "budgets": list(BUDGETS),
        "in_block": _named(in_block(alone, settings.min_relevance)),
        "gate": {
            name: [[setting, *shares] for setting, *shares in zip(GATES, one.unrelated, one.asked, strict=True)]
            for name, one in gate_by_language(alone).items()
        },
    }


def _named(groups: dict[Group, list[float]]) -> dict[str, list[float]]:
    return {f"{its.language}, {its.kind}": values for its, values in groups.items()}


def _markdown(result: dict[str, Any]) -> str:
    first = [f"R@{k}" for k in FIRST]
    parts = [
        f"{result['memories']} memories, {result['embedder']}",
        table("own namespace", first, result["own_namespace"]),
        table("pooled", first, result["pooled"]),
        table("in a block of so many tokens, own namespace", map(str, BUDGETS), result["in_block"]),
    ]
    for name, curve in result["gate"].items():
        lines = {f"{row[0]:.2f}": row[1:] for row in curve[::2] if row[0] <= 0.3}
        parts.append(table(f"gate: {name}", ["generic prompts", "questions"], lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
