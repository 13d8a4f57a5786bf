"""A team's own Envoy with jwt_authn in place of our identity: a real filter and engine behind it, tokens made here."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from extproc.stack import envoy
from extproc.stack.envoy import Address, Provider
from tests.integration.conftest import StandIn, answers
from tests.integration.conftest import running as process_running
from tests.integration.gateway.gateway_side import fitting, running
from tests.integration.http_side import context

ISSUER = "https://login.example.com"
ORG_A, ORG_B = "11bbd6a4-0c9a-4d0f-8d52-6d2ab7a1f1aa", "22c1a6f0-5a7f-4a38-9a0e-5a4f7e1d92bb"
AGENT = "33d4f0b2-9d1c-4c57-b0b5-2f5c8f7f63cc"
"""The same id in both organisations."""
IDENTITY = {
    "IBEX_IDENTITY_ORG": "metadata:envoy.filters.http.jwt_authn/jwt_payload/org_id",
    "IBEX_IDENTITY_AGENT": "metadata:envoy.filters.http.jwt_authn/jwt_payload/agent_id",
    "IBEX_IDENTITY_USER": "metadata:envoy.filters.http.jwt_authn/jwt_payload/sub",
}
MEMORY = "The user's cat is called Miss Marple."
QUESTION = "What is my cat called?"


def encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


class Issuer:
    """RS256 tokens and the JWKS that belongs to them."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def jwks(self) -> dict[str, Any]:
        numbers = self._key.public_key().public_numbers()
        n, e = (encoded(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (numbers.n, numbers.e))
        return {"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "one", "n": n, "e": e}]}

    def token(self, *, algorithm: str = "RS256", **claims: Any) -> str:
        """Claims of org A, valid for five minutes, but for what is given; None leaves a claim out."""
        usual = {"iss": ISSUER, "aud": "ibex", "exp": int(time.time()) + 300, "org_id": ORG_A, "agent_id": AGENT}
        payload = {name: value for name, value in {**usual, "sub": "ada", **claims}.items() if value is not None}
        header = {"alg": algorithm, "typ": "JWT", "kid": "one"}
        signed = ".".join(encoded(json.dumps(part).encode()) for part in (header, payload))
        if algorithm == "none":
            return f"{signed}."
        return f"{signed}.{encoded(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


@dataclass(frozen=True)
class Team:
    client: httpx2.Client
    issuer: Issuer
    provider: StandIn

    def ask(self, token: str | None, headers: dict[str, str] | None = None) -> httpx2.Response:
        self.provider.clear()
        credential = {"authorization": f"Bearer {token}"} if token is not None else {}
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": QUESTION}]}
        return self.client.post("/v1/chat/completions", json=body, headers={**credential, **(headers or {})})

    def was_told(self) -> bool:
        return "Miss Marple" in self.provider.last().body.decode()


def remember(state: Path, org: str, text: str, user: str = "ada") -> None:
    owner = ["--org", org, "--agent", AGENT, "--user", user, "--data", str(state)]
    command = [sys.executable, "-m", "extproc", "memory", "add", text, *owner]
    subprocess.run(command, capture_output=True, timeout=90, check=True)


@contextmanager
def open_team(
    envoy_binary: Path, provider_process: StandIn, directory: Path, identity: dict[str, str]
) -> Iterator[Team]:
    state = directory / "state"
    issuer = Issuer()
    (directory / "jwks.json").write_text(json.dumps(issuer.jwks()))
    remember(state, ORG_A, MEMORY)
    engine, engine_admin, filter_, filter_admin = (Address("127.0.0.1", envoy.free_port()) for _ in range(4))

    def authenticate(config: envoy.Node) -> None:
        filters = envoy._http_managers(config)[0]["http_filters"]
        at = next(index for index, entry in enumerate(filters) if entry["name"] == envoy.IDENTITY_FILTER)
        filters[at] = envoy.load(envoy.shipped("dropin-jwt.yaml"))
        (theirs,) = filters[at]["typed_config"]["providers"].values()
        theirs["local_jwks"] = {"filename": str(directory / "jwks.json")}
        envoy._http_filter(config, "ibex.context")["typed_config"]["message_timeout"] = "1s"  # a busy machine

    with ExitStack() as stack:
        extproc = [sys.executable, "-m", "extproc"]
        command = [*extproc, "engine", "--listen", str(engine), "--admin", str(engine_admin), "--data", str(state)]
        stack.enter_context(process_running(command, answers(f"http://{engine_admin}/ready")))
        settings = ["env", *(f"{name}={value}" for name, value in identity.items()), "IBEX_BUDGET_MS=900"]
        command = [*settings, *extproc, "filter", "--listen", str(filter_), "--admin", str(filter_admin)]
        command += ["--engine", str(engine)]
        stack.enter_context(process_running(command, answers(f"http://{filter_admin}/ready")))
        plan = fitting(gates=[], filters=[filter_], provider=Provider(provider_process.address))
        file = envoy.shipped("dropin.yaml")
        gateway = stack.enter_context(running(envoy_binary, directory, plan, change=authenticate, file=file))
        del gateway.client.headers["authorization"]  # the gate's token, and there is no gate
        yield Team(gateway.client, issuer, provider_process)


@pytest.fixture(scope="module")
def shared_team(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Team]:
    with open_team(envoy_binary, provider_process, tmp_path_factory.mktemp("jwt"), IDENTITY) as one:
        yield one


@pytest.fixture
def team(shared_team: Team) -> Team:
    assert is_told(shared_team), "no memory for the right claims"
    return shared_team


def is_told(team: Team, headers: dict[str, str] | None = None, **claims: Any) -> bool:
    """The first request for a namespace may come back without memory, because it is being loaded: it asks for 5 s."""
    for _ in range(50):
        team.ask(team.issuer.token(**claims), headers)
        if team.was_told():
            return True
        time.sleep(0.1)
    return False


def test_with_the_line_that_the_file_names_clients_choose_the_agent(
    envoy_binary: Path, provider_process: StandIn, tmp_path: Path
) -> None:
    (line,) = re.findall(r"IBEX_IDENTITY_AGENT=(header:[a-z-]+)", envoy.shipped("dropin-jwt.yaml").read_text())
    identity = IDENTITY | {"IBEX_IDENTITY_AGENT": line}
    with open_team(envoy_binary, provider_process, tmp_path, identity) as team:
        theirs = {"x-ibex-agent-id": AGENT}
        assert is_told(team, theirs, agent_id=None)
        for headers, claims in ((theirs, {"org_id": ORG_B}), ({"x-ibex-agent-id": str(uuid.uuid4())}, {}), ({}, {})):
            team.ask(team.issuer.token(**claims), headers)
            assert not team.was_told()


class TestAllowed:
    def test_the_right_claims_give_memory(self, team: Team) -> None:
        response = team.ask(team.issuer.token())
        assert response.status_code == 200
        assert team.was_told()
        assert context(response)[0] == "1"

    def test_the_token_ends_at_the_gateway(self, team: Team) -> None:
        token = team.issuer.token()
        team.ask(token)
        assert token not in str(team.provider.last().headers)

    def test_another_orgs_claim_never_sees_it(self, team: Team) -> None:
        """Same agent, same user, and headers that say otherwise."""
        claims = team.issuer.token(org_id=ORG_B)
        forged = {"x-ibex-org-id": ORG_A, "x-ibex-agent-id": AGENT, "x-ibex-user-id": "ada"}
        for _ in range(3):
            assert team.ask(claims, forged).status_code == 200
            assert not team.was_told()

    def test_another_users_claim_does_not_either(self, team: Team) -> None:
        for _ in range(3):
            assert team.ask(team.issuer.token(sub="bob"), {"x-ibex-user-id": "ada"}).status_code == 200
            assert not team.was_told()

    def test_headers_change_nothing(self, team: Team) -> None:
        forged = {"x-ibex-org-id": ORG_B, "x-ibex-agent-id": str(uuid.uuid4()), "x-ibex-user-id": "bob"}
        assert team.ask(team.issuer.token(), forged).status_code == 200
        assert team.was_told()

    @pytest.mark.parametrize(
        "claims",
        [
            {"org_id": 7},
            {"org_id": [ORG_A]},
            {"org_id": {"id": ORG_A}},
            {"org_id": None},
            {"org_id": "acme"},
            {"org_id": f" {ORG_A}"},
            {"agent_id": True},
            {"agent_id": None},
            {"sub": "ada\n"},
            {"sub": "x" * 129},
        ],
        ids=str,
    )
    def test_a_claim_of_the_wrong_form_gives_no_identity(self, team: Team, claims: dict[str, Any]) -> None:
        spoofed = {"x-ibex-org-id": ORG_A, "x-ibex-agent-id": AGENT}
        response = team.ask(team.issuer.token(**claims), spoofed)
        assert response.status_code == 200
        assert not team.was_told()
        assert context(response)[:2] == ("0", "0")


class TestRefused:
    @pytest.mark.parametrize(
        "claims",
        [
            {"exp": 1_000_000_000},
            {"exp": None},
            {"nbf": 4_000_000_000},
            {"iss": "https://login.example.org"},
            {"algorithm": "none"},
        ],
        ids=str,
    )
    def test_a_token_that_is_not_in_order_is_a_401(self, team: Team, claims: dict[str, Any]) -> None:
        assert team.ask(team.issuer.token(**claims)).status_code == 401
        assert team.provider.received() == []

    @pytest.mark.parametrize("audience", ["another-service", None])
    def test_a_token_for_another_service_is_a_403(self, team: Team, audience: str | None) -> None:
        assert team.ask(team.issuer.token(aud=audience)).status_code == 403
        assert team.provider.received() == []

    @pytest.mark.parametrize("token", [None, "x", "a.b.c"])
    def test_no_token_is_a_401(self, team: Team, token: str | None) -> None:
        response = team.ask(token, {"x-ibex-org-id": ORG_A})
        assert response.status_code == 401
        assert context(response)[:2] == ("0", "0")
        assert team.provider.received() == []

    def test_a_forged_one_is_a_401(self, team: Team) -> None:
        assert team.ask(Issuer().token()).status_code == 401
        header, _, signature = team.issuer.token(org_id=ORG_B).split(".")
        claims = team.issuer.token().split(".")[1]
        assert team.ask(f"{header}.{claims}.{signature}").status_code == 401
        assert team.provider.received() == []
