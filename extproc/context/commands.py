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
    from extproc.context.retrieve import Document, Index
    from extproc.context.retrieve import search as retrieve
    from extproc.context.score import score
    from extproc.memory.text import parse_query

    namespace = whose(org, agent, user, data)
    indexes = []
    with opened(data) as store:
        for partition in namespace.partitions():
            with store.snapshot(partition) as snapshot:
                indexes.append(Index(Document.of(memory) for batch in snapshot.active() for memory in batch))
    hits = retrieve(indexes, parse_query(query), limit, datetime.now(UTC)).hits
    found = score(hits, max((hit.memory.created_at for hit in hits), default=datetime.now(UTC)))
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
        typer.echo("Nothing found: no memory here shares a word with the query.", err=True)
