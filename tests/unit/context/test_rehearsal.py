"""The rehearsal goes the whole way."""

from __future__ import annotations

import subprocess
import sys

from extproc.context.rehearsal import rehearse
from extproc.memory.features import WindowIndexer

LEFT_OVER = """
import sys
from extproc.context.rehearsal import rehearse
from extproc.memory.features import open_indexer
indexer = open_indexer()
rehearse(indexer)
before = set(sys.modules)
rehearse(indexer)
assert not set(sys.modules) - before
assert "numpy.ma" in before
"""


def test_it_ends_in_a_block_with_the_memory(indexer: WindowIndexer) -> None:
    question, block = rehearse(indexer)
    assert question.vector is not None
    assert "Rex" in block


def test_what_a_request_imports_is_there_afterwards() -> None:
    subprocess.run([sys.executable, "-c", LEFT_OVER], check=True, timeout=50)
