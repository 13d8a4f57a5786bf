"""`extproc memory search`, beside the other memory commands: it is here because it searches as the engine does."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from extproc.memory.commands import (
    AgentOption,
    DataOption,
    JsonOption,
    OrgOption,
    UserOption,
    app,
    json_text,
    opened,
    printable,
    whose,
)

__all__ = ["app"]


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="what a user would ask")],
    org: OrgOption = "",
    agent: AgentOption = "",
    user: UserOption = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="most memories to show")] = 10,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which memories the engine finds for a query, with score and relevance, best first."""
    from extproc.context.cache import load_index
    from extproc.context.engine import LEAST_FOUND
    from extproc.context.retrieve import Meanings, collect
    from extproc.context.score import rank
    from extproc.memory.features import open_indexer

    namespace = whose(org, agent, user, data)
    indexer = open_indexer()
    with opened(data) as store:
        indexes = [load_index(store, indexer, partition) for partition in namespace.partitions()]
    question = indexer.question(query)
    pool = collect(indexes, question, Meanings(indexer.table), datetime.now(UTC))
    ranking = rank(pool, question.query, limit)
    found = [one for one in ranking.scored if one.relevance >= LEAST_FOUND]
    if as_json:
        rows = [
            {
                "id": one.memory.id,
                "content": one.memory.content,
                "category": one.memory.category,
                "score": round(one.composite, 4),
                "relevance": round(one.relevance, 4),
                "recency": round(one.recency, 4),
                "usefulness": one.usefulness,
                "confidence": one.confidence,
            }
            for one in found
        ]
        typer.echo(json_text(rows, sys.stdout.encoding))
        return
    for one in found:
        typer.echo(f"{one.composite:.3f}  {one.relevance:.3f}  {one.memory.id}  {printable(one.memory.content)}")
    if not found:
        typer.echo("Nothing found: no memory here has to do with the query.", err=True)
