"""Providers' keys: each reaches its own provider, and nobody else is ever shown one; clients' own never pass."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from extproc.stack import envoy, keys
from extproc.stack.envoy import Address, Provider
from tests.integration.conftest import StandIn
from tests.integration.gateway.conftest import TlsProvider
from tests.integration.gateway.gateway_side import MODELS, Running, as_shipped_to, eventually, fitting, running
from tests.integration.http_side import AUTHORIZED, HEALTHY, TOKEN, check_envelope, context
from tests.integration.processor import Processor, serve

CANARIES = {key.variable: f"sk-canary-{name}" for name, key in keys.BY_PROVIDER.items()}
"""What each provider is to get; `sk-canary` must be nowhere else."""
EXPECTED = {
    "openai": {"authorization": "Bearer sk-canary-openai"},
    "anthropic": {"x-api-key": "sk-canary-anthropic"},
    "gemini": {"x-goog-api-key": "sk-canary-gemini"},
    "selfhosted": {"authorization": "Bearer sk-canary-selfhosted"},
}
CARRIERS = ("authorization", "proxy-authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie")
GEMINI = "/v1beta/models/gemini-2.5-flash:generateContent"
GEMINI_BODY = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}


@pytest.fixture(scope="module")
def observed() -> Iterator[tuple[Processor, Address]]:
    """An observer that keeps every message."""
    address, processor = Address("127.0.0.1", envoy.free_port()), Processor()
    server = serve(processor, str(address))
    yield processor, address
    server.stop(0).wait(10)


@pytest.fixture
def gateway(
    envoy_binary: Path,
    tmp_path: Path,
    tls_provider: TlsProvider,
    processor: Processor,
    processor_address: Address,
    observed: tuple[Processor, Address],
) -> Iterator[Running]:
    """As shipped, keys from the environment, with a filter and an observer that remember what they are shown."""
    observed[0].reset()
    redirect = as_shipped_to(tls_provider.address, tls_provider.ca_file, tls_provider.stand_in.address)

    def change(config: envoy.Node) -> None:
        redirect(config)
        envoy._cluster(config, envoy.OBSERVER_CLUSTER).pop("health_checks")  # the recorder has no health service

    plan = fitting(filters=[processor_address], observers=[observed[1]])
    with running(envoy_binary, tmp_path, plan, change=change, environment=CANARIES) as one:
        yield one


def ask(gateway: Running, provider: str, query: str = "", **arguments: object) -> httpx2.Response:
    if provider == "gemini":
        return gateway.client.post(GEMINI + query, json=GEMINI_BODY, **arguments)  # type: ignore[arg-type]  # tests' own
    return gateway.chat(MODELS[provider], "/v1/chat/completions" + query, **arguments)


def credentials(stand_in: StandIn) -> dict[str, str]:
    return {name: value for name, value in stand_in.last().headers if name in CARRIERS}


class TestFromTheEnvironment:
    @pytest.mark.parametrize("provider", EXPECTED)
    def test_each_provider_gets_its_own_and_no_other(
        self, gateway: Running, tls_provider: TlsProvider, provider: str
    ) -> None:
        response = ask(gateway, provider)
        assert response.status_code == 200
        assert context(response) == HEALTHY
        assert credentials(tls_provider.stand_in) == EXPECTED[provider]

    @pytest.mark.parametrize("provider", EXPECTED)
    def test_a_clients_own_credentials_never_pass(
        self, gateway: Running, tls_provider: TlsProvider, provider: str
    ) -> None:
        """The token, wherever it is taken from, and what the gate does not look at."""
        theirs = dict.fromkeys(("x-api-key", "x-goog-api-key", "api-key"), TOKEN)
        theirs |= dict.fromkeys(("proxy-authorization", "cookie"), "theirs") | AUTHORIZED
        query = "?key=theirs&alt=json&k%65y=theirs&access_token=theirs&key=theirs"
        assert ask(gateway, provider, query, headers=theirs).status_code == 200
        assert credentials(tls_provider.stand_in) == EXPECTED[provider]
        received = tls_provider.stand_in.last()
        assert received.path.partition("?")[2] == "alt=json"
        assert "theirs" not in str(received.headers)
        assert TOKEN not in str(received)

    def test_other_parameters_keep_their_values(self, gateway: Running, tls_provider: TlsProvider) -> None:
        assert ask(gateway, "openai", "?a=%26%3D%20%2B&b=c%2Fd&key=x&monkey=1").status_code == 200
        query = tls_provider.stand_in.last().path.partition("?")[2]
        assert dict(httpx2.QueryParams(query)) == {"a": "&= +", "b": "c/d", "monkey": "1"}

    @pytest.mark.parametrize("theirs", [None, "2024-01-01"])
    def test_anthropic_gets_a_version_if_the_client_names_none(
        self, gateway: Running, tls_provider: TlsProvider, theirs: str | None
    ) -> None:
        headers = {"anthropic-version": theirs} if theirs else {}
        assert ask(gateway, "anthropic", headers=headers).status_code == 200
        assert dict(tls_provider.stand_in.last().headers)["anthropic-version"] == (theirs or "2023-06-01")

    def test_nobody_else_is_shown_one(
        self,
        gateway: Running,
        tls_provider: TlsProvider,
        processor: Processor,
        observed: tuple[Processor, Address],
        tmp_path: Path,
    ) -> None:
        """Filter, observer, both logs, every page of the admin interface, and the client."""
        answers = [ask(gateway, provider) for provider in EXPECTED]
        answers += [ask(gateway, provider, headers={"x-standin-status": "401"}) for provider in EXPECTED]
        line = gateway.access_log(answers[-1].headers["x-request-id"])
        assert line["status"] == 401
        recorder = observed[0]
        assert eventually(lambda: sum("response_body" in stream.kinds for stream in recorder.streams) == len(answers))
        assert len(processor.streams) == len(answers)
        shown = str([stream.messages for stream in (*processor.streams, *recorder.streams)])
        assert "response_headers" in shown
        pages = ("/config_dump?include_eds", "/server_info", "/stats", "/clusters", "/listeners", "/certs", "/runtime")
        seen = {page: gateway.admin(page) for page in pages}
        seen |= {"messages": shown, "headers of answers": str([answer.headers for answer in answers])}
        # The log is written every 200 ms.
        time.sleep(0.5)
        seen |= {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
        assert [where for where, text in seen.items() if "sk-canary" in text] == []

    def test_one_that_is_not_set_is_refused_by_the_provider(
        self, envoy_binary: Path, tmp_path: Path, tls_provider: TlsProvider
    ) -> None:
        change = as_shipped_to(tls_provider.address, tls_provider.ca_file)
        with running(envoy_binary, tmp_path, fitting(), change=change) as one:
            assert ask(one, "openai").status_code == 200
        assert credentials(tls_provider.stand_in) == {"authorization": "Bearer -"}


class TestFromFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        directory = tmp_path / "keys"
        for name in keys.BY_PROVIDER:
            keys.write(directory, name, f"sk-canary-{name}")
        return directory

    @pytest.fixture
    def from_files(
        self, envoy_binary: Path, tmp_path: Path, directory: Path, tls_provider: TlsProvider
    ) -> Iterator[Running]:
        change = as_shipped_to(tls_provider.address, tls_provider.ca_file, tls_provider.stand_in.address)
        with running(envoy_binary, tmp_path, fitting(key_files=directory), change=change) as one:
            yield one

    @pytest.mark.parametrize("provider", EXPECTED)
    def test_each_provider_gets_its_own_and_no_other(
        self, from_files: Running, tls_provider: TlsProvider, provider: str
    ) -> None:
        assert ask(from_files, provider, "?key=theirs", headers={"x-api-key": TOKEN}).status_code == 200
        assert credentials(tls_provider.stand_in) == EXPECTED[provider]
        assert tls_provider.stand_in.last().path.partition("?")[2] == ""

    def test_a_new_one_counts_at_once(self, from_files: Running, directory: Path, tls_provider: TlsProvider) -> None:
        ask(from_files, "openai")
        keys.write(directory, "openai", "sk-canary-second")

        def has_the_second() -> bool:
            assert ask(from_files, "openai").status_code == 200
            return credentials(tls_provider.stand_in) == {"authorization": "Bearer sk-canary-second"}

        assert eventually(has_the_second)

    def test_a_broken_one_changes_nothing(
        self, from_files: Running, directory: Path, tls_provider: TlsProvider
    ) -> None:
        for text in ("{", "{}", json.dumps({"resources": []})):
            fresh = directory / ".new"
            fresh.write_text(text)
            fresh.replace(directory / "openai.yaml")
            time.sleep(0.5)
            assert ask(from_files, "openai").status_code == 200
            assert credentials(tls_provider.stand_in) == EXPECTED["openai"]

    def test_none_in_the_file_is_a_501(
        self, envoy_binary: Path, tmp_path: Path, directory: Path, tls_provider: TlsProvider
    ) -> None:
        (directory / "openai.yaml").write_text(json.dumps({"resources": []}))
        change = as_shipped_to(tls_provider.address, tls_provider.ca_file)
        with running(envoy_binary, tmp_path, fitting(key_files=directory), change=change) as one:
            check_envelope(ask(one, "openai"), 501, "PROVIDER_NOT_CONFIGURED")
            assert ask(one, "anthropic").status_code == 200
        assert len(tls_provider.stand_in.received()) == 1

    def test_no_file_is_said_when_envoy_starts(
        self, envoy_binary: Path, tmp_path: Path, directory: Path, tls_provider: TlsProvider
    ) -> None:
        (directory / "gemini.yaml").unlink()
        with (
            pytest.raises(envoy.EnvoyError, match=r"gemini\.yaml' does not exist"),
            running(envoy_binary, tmp_path, fitting(key_files=directory)),
        ):
            pass

    def test_the_admin_interface_hides_it(self, from_files: Running) -> None:
        assert ask(from_files, "openai").status_code == 200
        assert "sk-canary" not in from_files.admin("/config_dump?include_eds")


class TestOfAGivenProvider:
    """`extproc up --provider URL`."""

    def test_it_gets_its_key_for_every_model(
        self, envoy_binary: Path, tmp_path: Path, tls_provider: TlsProvider
    ) -> None:
        key = keys.key_for("localhost", "SOME_KEY")
        provider = Provider(tls_provider.address, tls=True, ca_file=tls_provider.ca_file, key=key)
        plan = fitting(provider=provider, any_model=True)
        environment = CANARIES | {"SOME_KEY": "sk-theirs"}
        with running(envoy_binary, tmp_path, plan, environment=environment) as one:
            for model in (*MODELS.values(), "llama3"):
                assert one.chat(model, headers={"x-api-key": TOKEN}).status_code == 200
                assert credentials(tls_provider.stand_in) == {"authorization": "Bearer sk-theirs"}

    def test_without_a_key_it_gets_none(self, envoy_binary: Path, tmp_path: Path, provider: StandIn) -> None:
        plan = fitting(provider=Provider(provider.address))
        with running(envoy_binary, tmp_path, plan, environment=CANARIES) as one:
            assert one.chat().status_code == 200
        assert credentials(provider) == {}
