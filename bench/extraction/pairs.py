"""The labelled pairs: something said, and something said later, through extraction and consolidation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from bench.extraction.labels import SAID_AT
from extproc.memory.model import Namespace
from extproc.worker.consolidate import Add, Candidate, Decision, Known, Merge, Supersede, consolidate, memory_id
from extproc.worker.extract import Extractor, Turn

PAIRS = Path(__file__).parents[2] / "tests" / "extraction" / "pairs.jsonl"
BETWEEN = timedelta(days=90)
NAMESPACE = Namespace("0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d", "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090", "u")


@dataclass(frozen=True)
class Pair:
    id: str
    expect: str
    """`supersede`: something of the earlier holds no longer; `merge`: said again; `add`: both hold."""
    earlier: str
    later: str


@dataclass
class PairScore:
    wrong: list[Pair] = field(default_factory=list)
    """Superseded something that holds."""
    missed: list[Pair] = field(default_factory=list)
    """Left something that holds no longer."""
    unmerged: list[Pair] = field(default_factory=list)
    right: int = 0
    merged: int = 0

    @property
    def precision(self) -> float:
        return self.right / (self.right + len(self.wrong))

    @property
    def recall(self) -> float:
        return self.right / (self.right + len(self.missed))


def read_pairs(path: Path = PAIRS) -> list[Pair]:
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def decide(pair: Pair, extractor: Extractor) -> list[Decision]:
    """What becomes of the later turn beside the memories of the earlier one."""
    first = consolidate(_candidates("earlier", pair.earlier, extractor, SAID_AT - BETWEEN), [])
    known = [as_known(decision.candidate) for decision in first if isinstance(decision, Add | Supersede)]
    return consolidate(_candidates("later", pair.later, extractor, SAID_AT), known)


def as_known(candidate: Candidate) -> Known:
    new = candidate.extracted
    return Known(
        candidate.id, new.content, new.at, new.confidence, new.subject, new.slot, new.value, new.polarity,
        new.valid_from,
    )  # fmt: skip


def judge_pairs(pairs: list[Pair], extractor: Extractor) -> PairScore:
    score = PairScore()
    for pair in pairs:
        decisions = decide(pair, extractor)
        supersedes = any(isinstance(decision, Supersede) for decision in decisions)
        if supersedes:
            score.right += pair.expect == "supersede"
            score.wrong += [pair] if pair.expect != "supersede" else []
        elif pair.expect == "supersede":
            score.missed.append(pair)
        elif pair.expect == "merge":
            is_merged = any(isinstance(decision, Merge) for decision in decisions)
            score.merged += is_merged
            score.unmerged += [] if is_merged else [pair]
    return score


def _candidates(session: str, text: str, extractor: Extractor, at: datetime) -> list[Candidate]:
    turn = Turn(session, 0, text, "", at)
    return [Candidate(memory_id(NAMESPACE, session, one), one) for one in extractor.extract([turn]).memories]
