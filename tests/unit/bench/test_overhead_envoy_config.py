"""The benchmark's Envoy says whose requests they are, in the place where a filter looks by default."""

from __future__ import annotations

from bench.overhead.envoy_config import config
from bench.overhead.payload import AGENT_ID, ORG_ID, USER_ID
from extproc.filter.identity import Identity, IdentitySources
from extproc.settings import FilterSettings, load


def test_a_filter_with_the_default_settings_knows_whose_requests_they_are() -> None:
    (listener,) = config(1, 2, 3, 4)["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (said,) = filters[0]["typed_config"]["metadata"]
    defaults = load(FilterSettings)
    sources = IdentitySources(defaults.identity_org, defaults.identity_agent, defaults.identity_user)
    found = sources.identify(
        lambda _: None,
        lambda namespace, path: said["value"].get(*path) if namespace == said["metadata_namespace"] else None,
    )
    assert found == Identity(ORG_ID, AGENT_ID, USER_ID)
