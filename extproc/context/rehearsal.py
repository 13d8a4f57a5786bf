"""One request before the first: what is loaded and made at first use is then there (16 to 63 ms of a wall of 35)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from extproc.context.index import Index
from extproc.context.order import chronological
from extproc.context.pack import Exclusion
from extproc.context.render import nonce, render
from extproc.context.retrieve import Meanings, collect
from extproc.context.score import DEFAULT_WEIGHTS, rank
from extproc.context.select import select
from extproc.memory.features import Row, open_indexer
from extproc.memory.model import Namespace, new_memory

if TYPE_CHECKING:
    from extproc.memory.features import Question, WindowIndexer

__all__ = ["NOBODY", "rehearse"]

_NIL = "00000000-0000-0000-0000-000000000000"
NOBODY = Namespace(_NIL, _NIL, _NIL)
"""Has no memories in any store."""
_QUESTION = "What was the name of my dog in May 2024?"
_MEMORY = "The user's dog is called Rex."
_NOW = datetime(2025, 1, 1, tzinfo=UTC)
_TOKENS = 1024


def rehearse(indexer: WindowIndexer) -> tuple[Question, str]:
    """From a question to its block, over one memory, by the package's own word table. Blocks.

    Another embedder is only asked for the question's vector, once; one that does not answer is no failure.
    """
    words = indexer if indexer.is_quick else open_indexer()
    memory = new_memory(NOBODY, _MEMORY, id=_NIL, now=_NOW)
    index = Index(NOBODY, [Row(memory, features) for features in words.features([memory], [()])])
    question = words.question(_QUESTION)
    pool = collect([index], question, Meanings(words.table), _NOW)
    ranking = rank(pool, question.query, 1, DEFAULT_WEIGHTS)
    packed = select(ranking, question.query, min_relevance=0.0, tokens=_TOKENS, max_memories=1)
    included = [one.scored.memory for one in packed if one.exclusion is Exclusion.INCLUDED]
    block = render(chronological(included), nonce(b"rehearsal", NOBODY, ""))
    return question if indexer.is_quick else indexer.question(_QUESTION), block
