"""What the engine counts, for Prometheus. Organisations, agents and users are never labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from extproc.context.engine import Outcome, Stage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from extproc.context.admission import Admission
    from extproc.context.cache import NamespaceCache
    from extproc.memory.store import MemoryStore

__all__ = ["EngineMetrics"]

# From a warm small namespace to the wall and beyond.
_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.5)


class EngineMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "ibex_engine_requests",
            "Calls answered, by gRPC method and status code",
            ["method", "code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "ibex_engine_seconds", "Duration of calls", ["method"], buckets=_BUCKETS_S, registry=registry
        )
        outcomes = Counter("ibex_engine_assemblies", "Assembled contexts, by outcome", ["outcome"], registry=registry)
        self.outcomes = {outcome: outcomes.labels(outcome) for outcome in Outcome}
        stages = Histogram(
            "ibex_engine_stage_seconds",
            "Duration of each stage",
            ["stage"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.stages = {stage: stages.labels(stage) for stage in Stage}
        self.foreign = Counter(
            "ibex_engine_foreign_memories",
            "Memories of somebody else, dropped: always a bug",
            registry=registry,
        )
        self.lost_retrievals = Counter(
            "ibex_engine_lost_retrievals",
            "Retrievals that could not be written to the store",
            registry=registry,
        )
        self.loads_held_back = Counter(
            "ibex_engine_loads_held_back",
            "Partitions of namespaces that were asked for and not loaded: too many waited already",
            registry=registry,
        )
        self._cache_bytes = Gauge(
            "ibex_engine_cache_bytes", "Approximate size of the namespaces held", registry=registry
        )
        self._cache_partitions = Gauge(
            "ibex_engine_cache_partitions", "Partitions of namespaces held", registry=registry
        )
        self._inside = Gauge("ibex_engine_requests_inside", "Requests that wait or are worked on", registry=registry)

        self._away = Gauge(
            "ibex_engine_store_away_seconds",
            "For how long memories have been served without the database; 0: it is there",
            registry=registry,
        )

    def watch(self, cache: NamespaceCache, admission: Admission, store: MemoryStore) -> None:
        self._cache_bytes.set_function(lambda: cache.approximate_bytes)
        self._cache_partitions.set_function(lambda: len(cache))
        self._inside.set_function(lambda: admission.inside)
        self._away.set_function(store.away_s)
