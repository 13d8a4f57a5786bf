"""Memories that nobody said: sentences from a small grammar, with rare names among them; the same for the same seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from extproc.memory.features import Features, Row, WindowIndexer
from extproc.memory.model import Memory, Namespace, content_hash, new_memory

__all__ = ["questions", "rows"]

WHO = [
    "I",
    "My sister",
    "Our team",
    "The customer",
    "My neighbour",
    "Our landlord",
    "The supplier",
    "My daughter",
    "The new manager",
    "A friend",
]
DOES = [
    "moved",
    "painted",
    "repaired",
    "ordered",
    "sold",
    "forgot",
    "planned",
    "measured",
    "photographed",
    "borrowed",
    "returned",
    "planted",
    "cancelled",
    "reviewed",
    "translated",
    "deployed",
    "tested",
    "rewrote",
    "scheduled",
    "cooked",
]
WHAT = [
    "the kitchen table",
    "a red bicycle",
    "the quarterly report",
    "our holiday in Norway",
    "the piano lesson",
    "a database migration",
    "the garden fence",
    "two concert tickets",
    "the birthday cake",
    "an old camera",
    "the login page",
    "a pair of hiking boots",
    "the dentist appointment",
    "the tax return",
    "a vegetarian lasagne",
    "the backup server",
    "the school play",
    "a rescue dog",
    "the search index",
    "a watercolour course",
]
WHY = [
    "because the rain would not stop",
    "before the guests arrived",
    "after a long talk with the bank",
    "to save some money",
    "although nobody had asked",
    "while the children were asleep",
    "since the deadline is near",
    "for the spring festival",
    "when the power came back",
    "as the doctor had advised",
]
WHEN = [
    "yesterday",
    "last Friday",
    "in the morning",
    "on the train",
    "two weeks ago",
    "at the weekend",
    "over lunch",
    "late at night",
]

BASES = 4_000
"""Different sentences whose features are made; every other memory is one of them with rare names of its own."""
TURNS = 20
"""Of a session."""
_NAMES = 200_000
_NOISE = 0.5
"""Length of what is added to a base's vector of length 1."""
_BEGAN = datetime(2024, 1, 1, tzinfo=UTC)


def rows(
    count: int, namespace: Namespace, indexer: WindowIndexer, seed: int = 1, batch: int = 2_000
) -> Iterator[list[Row]]:
    """So many rows, in batches."""
    chance = random.Random(seed)
    noise = np.random.default_rng(seed)
    bases = [_base(namespace, chance) for _ in range(min(BASES, count))]
    features = indexer.features(bases, [()] * len(bases))
    for first in range(0, count, batch):
        size = min(batch, count - first)
        picked = [chance.randrange(len(bases)) for _ in range(size)]
        vectors = np.stack([np.frombuffer(features[at].vector, "<f2") for at in picked]).astype(np.float32)
        vectors += noise.normal(0, _NOISE / vectors.shape[1] ** 0.5, vectors.shape).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield [
            _row(first + n, bases[at], features[at], vectors[n].astype("<f2").tobytes(), chance)
            for n, at in enumerate(picked)
        ]


def questions(count: int, seed: int = 2) -> list[str]:
    chance = random.Random(seed)
    forms = (
        "When did {who} {does} {what}?",
        "What happened with {what} {why}?",
        "Do you remember who {does} {what}?",
        "What did n{name} say about {what}?",
        "Tell me about my {word} and {what}",
    )
    return [
        chance.choice(forms).format(
            who=chance.choice(WHO).lower(),
            does=chance.choice(DOES),
            what=chance.choice(WHAT),
            why=chance.choice(WHY),
            word=chance.choice(WHAT).split()[-1],
            name=_name(chance),
        )
        for _ in range(count)
    ]


def _base(namespace: Namespace, chance: random.Random) -> Memory:
    words = [chance.choice(part) for part in (WHO, DOES, WHAT, WHY, WHEN)]
    role = chance.choice(("user", "assistant"))
    return new_memory(
        namespace,
        " ".join(words) + ".",
        id=_id(chance),
        now=_BEGAN,
        metadata={"role": role},
        session_id="s",
        turn_index=0,
    )


def _row(number: int, base: Memory, features: Features, vector: bytes, chance: random.Random) -> Row:
    names = f"n{_name(chance)} n{_name(chance)}"
    content = f"{base.content} {names}"
    memory = replace(
        base,
        id=_id(chance),
        content=content,
        content_hash=content_hash(content),
        content_tokens=base.content_tokens + 6,
        created_at=_BEGAN + timedelta(minutes=number),
        session_id=f"s{number // TURNS}",
        turn_index=number % TURNS,
    )
    return Row(memory, replace(features, stems=f"{names} {features.stems}", vector=vector))


def _name(chance: random.Random) -> int:
    """Few are common, most are rare."""
    return int(_NAMES ** chance.random())


def _id(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128)))
