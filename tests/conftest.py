"""What holds for all tests: how they are shared out among processes, and how long Hypothesis looks.

Profiles of Hypothesis: `fast` for every run, `deep` for a search by hand (HYPOTHESIS_PROFILE=deep).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

TOGETHER = "tests/security/"

# Before gRPC is imported: a child that is started beside a gRPC server runs its fork handlers, and can die of them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# The tests start some hundred processes of ours: each would compile every module again, a third of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("fast", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file stays in one process, as what its tests share is started once. Ids must be the same in all.

    So does all of tests/security: its last file looks at what the others left behind.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return TOGETHER if file.startswith(TOGETHER) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
