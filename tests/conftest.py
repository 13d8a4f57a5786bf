"""What holds for all tests: how they are shared out among processes, and how long Hypothesis looks.

Profiles of Hypothesis: `fast` for every run, `deep` for a search by hand (HYPOTHESIS_PROFILE=deep).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent

# Before gRPC is imported: a child that is started beside a gRPC server runs its fork handlers, and can die of them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# The tests start some hundred processes of ours: each would compile every module again, a third of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("fast", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup` a file stays in one process, as what its tests share is started once.

    So does all of tests/security: its last file looks at what the others left behind.
    """
    for item in items:
        together = item.path.parent if item.path.parent == HERE / "security" else item.path
        item.add_marker(pytest.mark.xdist_group(str(together.relative_to(HERE))))
