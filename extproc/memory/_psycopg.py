"""psycopg's connection with an end to every wait: a server that stands still keeps its connections open for ever.

PostgreSQL's own `statement_timeout` is of no use there, for it is the server that would have to notice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["ImpatientConnection"]

T = TypeVar("T")


class ImpatientConnection(psycopg.Connection):
    """Raises OperationalError and is closed when the server has not answered a statement for `answer_limit_s`."""

    answer_limit_s = 5.0

    @override
    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        return super().wait(self._within_limit(gen), *arguments, **options)

    def _within_limit(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """`gen`, as psycopg runs it: it yields what it waits for, and gets 0 each time that nothing came for 100 ms."""
        try:
            awaited = next(gen)
            deadline = time.monotonic() + self.answer_limit_s
            while True:
                ready = yield awaited
                if not ready and time.monotonic() > deadline:
                    self.close()  # an answer that comes later must not be taken for that of another question
                    raise psycopg.OperationalError("the server does not answer")
                awaited = gen.send(ready)
        except StopIteration as ended:
            result: T = ended.value
            return result
