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
from typing import Any

from bench.locomo.dataset import ANSWERABLE, CATEGORIES, load
from bench.recall.engine import open_stores, with_exact_tokens
from bench.recall.measure import (
    BUDGETS,
    FIRST,
    GATES,
    Conversation,
    Store,
    answers,
    at_share,
    blocks,
    gate,
    mean,
    ndcg,
    recalls,
)
from bench.recall.report import plot, table
from extproc.context.score import DEFAULT_PARTS, Parts
from extproc.memory.embedding import ModelUnusable
from extproc.memory.model import Namespace
from extproc.settings import EngineSettings
from extproc.settings import load as load_settings

PATH = "IBEX_LOCOMO"
NAMESPACE = Namespace("10c0a000-0000-4000-8000-000000000000", "10c0a000-0000-4000-8000-000000000001")
GENERIC = Path(__file__).with_name("generic.txt")
KEPT = 95.0
"""Percent of the questions that a gate must keep."""


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
        if options.exact:
            conversations = [with_exact_tokens(one) for one in conversations]
        result = _measure(conversations, load_settings(EngineSettings), options.vectors, quick=options.quick)
    except (OSError, ValueError, ModelUnusable) as error:
        print(f"bench.locomo: {error}", file=sys.stderr)
        return 1
    result["conditions"] = {
        "file": Path(options.file).name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "tokens": "counted" if options.exact else "estimated",
    }
    text = _markdown(result)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        options.plot.write_text(_plot(result), encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.locomo", description=__doc__)
    parser.add_argument("file", nargs="?", default=os.environ.get(PATH, ""), help=f"LoCoMo's JSON (or {PATH})")
    parser.add_argument("--quick", action="store_true", help="without the ablation")
    parser.add_argument("--exact", action="store_true", help="count tokens as with the extra `tokens`")
    parser.add_argument("--vectors", type=Path, help="keep a model's vectors in this .npz, and read them from it")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--table", type=Path, help="write the tables to this file")
    parser.add_argument("--plot", type=Path, help="draw the share of the evidence by budget into this SVG")
    return parser.parse_args()


def _measure(
    conversations: Sequence[Conversation], settings: EngineSettings, vectors: Path | None, *, quick: bool
) -> dict[str, Any]:
    alone, pooled = open_stores(conversations, NAMESPACE, settings, vectors)
    each = answers(alone, recalls)
    together = answers([pooled], recalls)
    packed = answers(alone, blocks(settings.min_relevance))
    packed_together = answers([pooled], blocks(settings.min_relevance))
    result: dict[str, Any] = {
        "memories": len(pooled.index),
        "questions": len(each),
        "embedder": pooled.indexer.version,
        "first": list(FIRST),
        "one_store_each": {"all five": mean(each), "1-4": mean(each, ANSWERABLE)},
        "by_category": {name: mean(each, [name]) for name in CATEGORIES.values()},
        "by_conversation": {
            one.name: mean([share for share in each if share.conversation == one.name]) for one in conversations
        },
        "one_store_for_all": {"all five": mean(together), "1-4": mean(together, ANSWERABLE)},
        "ndcg_at_10": {
            "one store each": [*mean(answers(alone, ndcg)), *mean(answers(alone, ndcg), ANSWERABLE)],
            "one store for all": [*mean(answers([pooled], ndcg)), *mean(answers([pooled], ndcg), ANSWERABLE)],
        },
        "budgets": list(BUDGETS),
        "in_block": {
            "one store each, 1-4": mean(packed, ANSWERABLE),
            "one store each, all five": mean(packed),
            "one store for all, 1-4": mean(packed_together, ANSWERABLE),
        },
        **_gate(alone, settings),
    }
    if not quick:
        result["ablation"] = {name: _without(parts, alone, pooled) for name, parts in _ablations().items()}
    return result


def _gate(alone: Sequence[Store], settings: EngineSettings) -> dict[str, Any]:
    """The mean over the conversations."""
    prompts = GENERIC.read_text(encoding="utf-8").splitlines()
    gates = [
        gate(one, prompts, [asked.text for asked in one.conversations[0].questions if asked.kind in ANSWERABLE])
        for one in alone
    ]
    curve = [
        [setting, *(sum(values) / len(gates) for values in zip(*its, strict=True))]
        for setting, *its in zip(GATES, *([*zip(one.unrelated, one.asked, strict=True)] for one in gates), strict=True)
    ]
    strictest = max((row for row in curve if row[2] >= KEPT), default=curve[0], key=lambda row: row[0])
    default = min(curve, key=lambda row: abs(row[0] - settings.min_relevance))
    each = [at_share(one, KEPT)[1] for one in gates]
    return {
        "gate": {
            "min_relevance as set": default,
            "strictest that keeps 95 % of the questions": strictest,
            "worst conversation at its own 95 %": [0.0, max(each), KEPT],
        },
        "gate_curve": curve,
    }


def _without(parts: Parts, alone: Sequence[Store], pooled: Store) -> list[float]:
    """R@5 and R@10 of each setting, five categories."""
    each = mean(answers([one.with_parts(parts) for one in alone], recalls))
    together = mean(answers([pooled.with_parts(parts)], recalls))
    return [*each[:2], *together[:2]]


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


def _markdown(result: dict[str, Any]) -> str:
    columns = [f"R@{k}" for k in FIRST]
    parts = [
        f"{result['memories']} memories, {result['questions']} questions, {result['embedder']}",
        table("one store per conversation", columns, result["one_store_each"]),
        table("by category", columns, result["by_category"]),
        table("by conversation", columns, result["by_conversation"]),
        table("all conversations in one store", columns, result["one_store_for_all"]),
        table("nDCG@10", ["all five", "1-4"], result["ndcg_at_10"]),
        table("evidence in a block of so many tokens", map(str, BUDGETS), result["in_block"]),
        _gate_table("gate", result["gate"]),
        _gate_table("gate by setting", {f"{row[0]:.2f}": row for row in result["gate_curve"][::2]}),
    ]
    if "ablation" in result:
        parts.append(
            table("ablation, five categories", ["R@5", "R@10", "pooled R@5", "pooled R@10"], result["ablation"])
        )
    return "\n\n".join(parts)


def _gate_table(title: str, lines: dict[str, list[float]]) -> str:
    return "\n".join(
        [
            f"| {title} | setting | generic prompts that get a block, % | questions that get one, % |",
            "|---|---|---|---|",
            *(f"| {name} | {row[0]:.2f} | {row[1]:.1f} | {row[2]:.1f} |" for name, row in lines.items()),
        ]
    )


def _plot(result: dict[str, Any]) -> str:
    curves = {name: list(zip(BUDGETS, shares, strict=True)) for name, shares in result["in_block"].items()}
    return plot("LoCoMo: evidence inside the block", "tokens of the block", "% of evidence", curves, BUDGETS, least=40)


if __name__ == "__main__":
    sys.exit(main())
