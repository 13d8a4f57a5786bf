"""Memories on PostgreSQL: everything that holds on SQLite, and what only a server has."""

from __future__ import annotations

from tests.unit.memory.test_store import (
    TestCandidates,
    TestCounts,
    TestFeatures,
    TestIsolation,
    TestKnown,
    TestPinning,
    TestReindexing,
    TestRows,
    TestThePast,
    TestVersions,
    test_a_text_with_nul_is_kept_without_it,
    test_many_at_once_are_forgotten_batch_by_batch,
    test_statistics_can_be_had_for_any_organisation,
)

__all__ = [
    "TestCandidates",
    "TestCounts",
    "TestFeatures",
    "TestIsolation",
    "TestKnown",
    "TestPinning",
    "TestReindexing",
    "TestRows",
    "TestThePast",
    "TestVersions",
    "test_a_text_with_nul_is_kept_without_it",
    "test_many_at_once_are_forgotten_batch_by_batch",
    "test_statistics_can_be_had_for_any_organisation",
]
