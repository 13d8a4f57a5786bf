"""`extproc worker`, in which some texts end the process that reads them, or take a while."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from typing_extensions import override

from extproc.cli import main
from extproc.worker import parts
from extproc.worker.extract import Extraction, Turn
from extproc.worker.rules import RuleExtractor

DEADLY = "This ends whoever reads it."
SLOW = "This takes a while."
SLOW_S = 2.0
BEGUN = "a slow extraction has begun"


class Marked(RuleExtractor):
    @override
    def extract(self, turns: Sequence[Turn]) -> Extraction:
        texts = [turn.user_text for turn in turns]
        if DEADLY in texts:
            os._exit(1)
        if SLOW in texts:
            print(BEGUN, flush=True)  # noqa: T201 - the test waits for it
            time.sleep(SLOW_S)
        return super().extract(turns)


if __name__ == "__main__":
    parts.RuleExtractor = Marked  # type: ignore[attr-defined]
    sys.argv = ["extproc", "worker"]
    main()
