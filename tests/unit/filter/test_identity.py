from __future__ import annotations

import pytest

from extproc.filter.identity import Identity, IdentitySources, SourceError

ORG = "11111111-1111-4111-8111-111111111111"
AGENT = "22222222-2222-4222-8222-222222222222"


def identify(
    sources: IdentitySources,
    headers: dict[str, str] | None = None,
    metadata: dict[tuple[str, tuple[str, ...]], str] | None = None,
) -> Identity | None:
    return sources.identify((headers or {}).get, lambda namespace, path: (metadata or {}).get((namespace, path)))


HEADERS = IdentitySources("header:X-Org", "header:x-agent", "header:x-user")


def test_headers_name_org_agent_and_user() -> None:
    found = identify(HEADERS, {"x-org": ORG.upper(), "x-agent": AGENT, "x-user": "ada@example.org"})
    assert found == Identity(ORG, AGENT, "ada@example.org")


def test_the_user_may_be_absent() -> None:
    assert identify(HEADERS, {"x-org": ORG, "x-agent": AGENT}) == Identity(ORG, AGENT, None)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-agent": AGENT},
        {"x-org": ORG},
        {"x-org": "acme", "x-agent": AGENT},
        {"x-org": f"{ORG},{ORG}", "x-agent": AGENT},
        {"x-org": ORG, "x-agent": AGENT + "\n"},
        {"x-org": ORG, "x-agent": AGENT, "x-user": ""},
        {"x-org": ORG, "x-agent": AGENT, "x-user": "a b"},
        {"x-org": ORG, "x-agent": AGENT, "x-user": "u" * 129},
        {"x-org": ORG, "x-agent": AGENT, "x-user": "mäx"},
    ],
    ids=["no org", "no agent", "org no UUID", "header twice", "newline", "empty", "blank", "too long", "not ASCII"],
)
def test_anything_missing_or_malformed_is_no_identity(headers: dict[str, str]) -> None:
    assert identify(HEADERS, headers) is None


def test_dynamic_metadata_is_read_by_namespace_and_path() -> None:
    sources = IdentitySources("metadata:envoy.filters.http.jwt_authn/payload/org", "metadata:a/agent", "")
    metadata = {("envoy.filters.http.jwt_authn", ("payload", "org")): ORG, ("a", ("agent",)): AGENT}
    assert identify(sources, metadata=metadata) == Identity(ORG, AGENT, None)


def test_the_first_source_that_is_present_counts_even_when_it_is_malformed() -> None:
    sources = IdentitySources(f"value:{ORG}", f"header:x-agent, value:{AGENT}", "")
    assert identify(sources) == Identity(ORG, AGENT, None)
    assert identify(sources, {"x-agent": "spoilt"}) is None


def test_a_claim_of_the_wrong_type_does_not_hand_over_to_the_clients_header() -> None:
    sources = IdentitySources(f"value:{ORG}", f"value:{AGENT}", "metadata:jwt/user,header:x-user")
    assert identify(sources, {"x-user": "victim"}, {("jwt", ("user",)): ""}) is None
    assert identify(sources, {"x-user": "u1"}) == Identity(ORG, AGENT, "u1")


def test_no_source_means_no_identity() -> None:
    assert identify(IdentitySources("", f"value:{AGENT}", "")) is None


@pytest.mark.parametrize("setting", ["x-org", "cookie:org", "header:", "metadata:ns", "metadata:/k", "metadata:ns//k"])
def test_a_setting_that_is_no_source_is_refused_by_name(setting: str) -> None:
    with pytest.raises(SourceError, match="IBEX_IDENTITY_AGENT"):
        IdentitySources("", setting, "")
