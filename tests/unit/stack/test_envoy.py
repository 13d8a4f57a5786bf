"""Fitting the shipped configuration to one machine, and finding, starting and stopping Envoy."""

from __future__ import annotations

import copy
import os
import signal
import socket
import ssl
import stat
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from extproc.stack import envoy
from extproc.stack.envoy import Address, EnvoyError, Plan, Provider
from extproc.stack.keys import Key

FILES: tuple[Literal["envoy.yaml"], Literal["dropin.yaml"]] = ("envoy.yaml", "dropin.yaml")
LISTEN, ADMIN = Address("127.0.0.1", 18080), Address("127.0.0.1", 19901)


@pytest.fixture(params=FILES)
def config(request: pytest.FixtureRequest) -> envoy.Node:
    return envoy.load(envoy.shipped(request.param))


@pytest.fixture
def gateway() -> envoy.Node:
    return envoy.load(envoy.shipped("envoy.yaml"))


def plan(**given: Any) -> Plan:
    return Plan(LISTEN, ADMIN, **given)


def endpoints(config: envoy.Node, cluster: str) -> list[tuple[str, int]]:
    assignment = envoy._cluster(config, cluster)["load_assignment"]["endpoints"]
    addresses = [entry["endpoint"]["address"]["socket_address"] for entry in assignment[0]["lb_endpoints"]]
    return [(address["address"], address["port_value"]) for address in addresses]


def provider_clusters(config: envoy.Node) -> list[envoy.Node]:
    return [cluster for cluster in envoy._clusters(config) if cluster["name"].startswith("provider_")]


class TestShipped:
    def test_both_files_use_the_standard_ports(self, config: envoy.Node) -> None:
        assert config["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
        listener = config["static_resources"]["listeners"][0]["address"]["socket_address"]
        assert listener == {"address": "127.0.0.1", "port_value": 8080}
        assert endpoints(config, "extproc_filter") == [("127.0.0.1", 9101)]

    def test_both_files_ask_the_filter_alike(self) -> None:
        """A fix in one file belongs in the other."""
        both = []
        for name in FILES:
            config = envoy.load(envoy.shipped(name))
            context = envoy._http_filter(config, "ibex.context")
            context.pop("disabled", None)
            strip = envoy._http_filter(config, "strip")
            removed = strip["typed_config"]["mutations"]["request_mutations"]
            # The edge alone removes x-envoy-*; behind another proxy they may be that one's.
            removed[:] = [one for one in removed if one != {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}}]
            both.append((context, strip, envoy._cluster(config, "extproc_filter")))
        assert both[0] == both[1]

    def test_the_gate_fails_closed_and_comes_before_whatever_reads_a_body(self, gateway: envoy.Node) -> None:
        gate = envoy._http_filter(gateway, "ibex.gate")["typed_config"]
        assert gate["failure_mode_allow"] is False
        assert gate["status_on_error"] == {"code": "ServiceUnavailable"}
        assert "disabled" not in envoy._http_filter(gateway, "ibex.gate")
        assert "ibex.gate" not in str(envoy._routes(gateway)), "no route goes round it"
        names = [entry["name"] for entry in envoy._http_managers(gateway)[0]["http_filters"]]
        order = ["query_credentials", "ibex.observer", "ibex.gate", "body", "model", "ibex.context", "strip"]
        assert [name for name in names if name in order] == order
        cluster = envoy._cluster(gateway, "extproc_gate")
        assert cluster["common_lb_config"] == {"healthy_panic_threshold": {"value": 0}}

    def test_the_gate_of_your_own_envoy_is_the_same_one(self, gateway: envoy.Node) -> None:
        """dropin.yaml shows it in comments."""
        lines = [line.strip() for line in envoy.shipped("dropin.yaml").read_text(encoding="utf-8").splitlines()]
        start = lines.index("# - name: ibex.gate")
        shown = takewhile(lambda line: line.startswith("#"), lines[start:])
        plain = {entry["name"]: entry for entry in yaml.safe_load("\n".join(line[2:] for line in shown))}
        assert plain["ibex.gate"] == envoy._http_filter(gateway, "ibex.gate")
        assert plain["extproc_gate"] == envoy._cluster(gateway, "extproc_gate")

    def test_no_answer_is_cut_off(self, config: envoy.Node) -> None:
        actions = [route["route"] for route in envoy._routes(config) if "route" in route]
        assert actions
        assert all(action["timeout"] == "0s" for action in actions)

    def test_a_request_is_sent_again_only_while_nobody_can_have_read_it(self, config: envoy.Node) -> None:
        hosts = [host for manager in envoy._http_managers(config) for host in manager["route_config"]["virtual_hosts"]]
        policies = [place["retry_policy"] for place in hosts if "retry_policy" in place]
        assert not any("retry_policy" in route.get("route", {}) for route in envoy._routes(config))
        for policy in policies:
            assert policy["retry_on"] == "connect-failure,refused-stream,reset-before-request"

    def test_no_cluster_runs_into_envoys_default_limits(self, config: envoy.Node) -> None:
        """1,024 streams for each cluster: fewer than a gateway has chats."""
        for cluster in [*provider_clusters(config), envoy._cluster(config, "extproc_filter")]:
            (limits,) = cluster["circuit_breakers"]["thresholds"]
            assert min(limits["max_connections"], limits["max_pending_requests"], limits["max_requests"]) >= 20_000
            assert cluster["per_connection_buffer_limit_bytes"] == 10 * 1024 * 1024

    @pytest.mark.parametrize("name", FILES)
    def test_the_filter_fails_open_within_100_ms(self, name: Literal["envoy.yaml", "dropin.yaml"]) -> None:
        context_filter = envoy._http_filter(envoy.load(envoy.shipped(name)), "ibex.context")["typed_config"]
        assert context_filter["failure_mode_allow"] is True
        assert context_filter["message_timeout"] == "0.1s"
        assert context_filter["processing_mode"]["request_body_mode"] == "BUFFERED"

    @pytest.mark.parametrize("name", FILES)
    def test_comments_fit_the_screen(self, name: Literal["envoy.yaml", "dropin.yaml"]) -> None:
        lines = envoy.shipped(name).read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 120] == []

    def test_an_installation_without_the_file_says_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(envoy, "__file__", str(tmp_path / "site" / "extproc" / "stack" / "envoy.py"))
        with pytest.raises(EnvoyError, match="incomplete"):
            envoy.shipped("envoy.yaml")
        installed = tmp_path / "site" / "extproc" / "stack" / "shipped" / "envoy.yaml"
        installed.parent.mkdir(parents=True)
        installed.write_text("{}")
        assert envoy.shipped("envoy.yaml") == installed


class TestHttps:
    def test_the_lines_to_take_the_hash_from_are_those_that_are_tested(self, gateway: envoy.Node) -> None:
        lines = envoy.shipped("envoy.yaml").read_text(encoding="utf-8").splitlines()
        begin = next(at for at, line in enumerate(lines) if line.startswith("    # - transport_socket_connect_timeout"))
        end = next(at for at, line in enumerate(lines) if line.startswith("    #   filters:"))
        assert lines[end + 1] == "    - filters:"
        freed = [line.replace("# ", "", 1) for line in lines[begin : end + 1]]
        (chain,) = yaml.safe_load("\n".join([*lines[:begin], *freed, *lines[end + 2 :]]))["static_resources"][
            "listeners"
        ][0]["filter_chains"]
        certificate = envoy.Certificate(Path("/etc/envoy/tls/tls.crt"), Path("/etc/envoy/tls/tls.key"))
        rendered = envoy.render(gateway, plan(tls=certificate, observers=[LISTEN], collector=LISTEN))
        (ours,) = rendered["static_resources"]["listeners"][0]["filter_chains"]
        names = ("transport_socket", "transport_socket_connect_timeout")
        assert {name: chain[name] for name in names} == {name: ours[name] for name in names}
        assert chain["filters"][0]["name"] == ours["filters"][0]["name"]

    def test_without_a_certificate_it_is_plain(self, config: envoy.Node) -> None:
        assert "DownstreamTlsContext" not in str(envoy.render(config, plan()))


class TestKeys:
    def test_with_key_files_nothing_comes_from_the_environment(self, gateway: envoy.Node) -> None:
        rendered = envoy.render(gateway, plan(key_files=Path("/keys")))
        assert "%ENVIRONMENT(" not in str(rendered)
        for name in ("openai", "anthropic", "gemini", "selfhosted"):
            cluster = envoy._cluster(rendered, f"provider_{name}")
            (options,) = cluster["typed_extension_protocol_options"].values()
            order = [entry["name"] for entry in options["http_filters"]]
            assert order == ["credentials", "key", "envoy.filters.http.upstream_codec"]
            assert f"/keys/{name}.yaml" in str(options["http_filters"][1])

    def test_the_key_of_a_given_provider_is_the_only_one(self, gateway: envoy.Node) -> None:
        rendered = envoy.render(gateway, plan(provider=Provider(LISTEN, key=Key("ONE"))))
        assert str(rendered).count("%ENVIRONMENT(ONE)%") == len(provider_clusters(rendered))
        assert str(rendered).count("%ENVIRONMENT(") == len(provider_clusters(rendered))

    @pytest.mark.parametrize("url", ["http://api.openai.com", "http://10.0.0.1:8000", "http://127.0.0.1.example.org"])
    def test_a_key_never_leaves_this_machine_in_the_clear(self, url: str) -> None:
        with pytest.raises(EnvoyError, match="over plain HTTP"):
            replace(Provider.parse(url), key=Key("ONE"))

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost", "https://10.0.0.1"])
    def test_on_this_machine_or_over_tls_it_may(self, url: str) -> None:
        assert replace(Provider.parse(url), key=Key("ONE")).key == Key("ONE")

    def test_a_provider_without_a_key_gets_none(self, gateway: envoy.Node) -> None:
        rendered = envoy.render(gateway, plan(provider=Provider(LISTEN)))
        assert "%ENVIRONMENT(" not in str(rendered)
        assert "anthropic-version" in str(rendered)

    def test_no_credential_of_a_caller_passes(self, gateway: envoy.Node) -> None:
        (host,) = envoy._http_managers(gateway)[0]["route_config"]["virtual_hosts"]
        assert {"authorization", "proxy-authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie"} <= set(
            host["request_headers_to_remove"]
        )

    def test_the_shipped_providers_are_checked_and_named(self, gateway: envoy.Node) -> None:
        for cluster in provider_clusters(gateway):
            (address,) = endpoints(gateway, cluster["name"])
            assert ("transport_socket" in cluster) == (address[1] == 443)
            if "transport_socket" in cluster:
                tls = cluster["transport_socket"]["typed_config"]
                assert tls["auto_host_sni"] is tls["auto_sni_san_validation"] is True
                assert "trusted_ca" in tls["common_tls_context"]["validation_context"]


class TestLoad:
    @pytest.mark.parametrize("text", ["", "[]", "a: [", "\x00"])
    def test_what_is_no_configuration_is_an_error(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "x.yaml"
        file.write_text(text)
        with pytest.raises(EnvoyError, match=r"x\.yaml"):
            envoy.load(file)

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EnvoyError, match=r"x\.yaml"):
            envoy.load(tmp_path / "x.yaml")


class TestRender:
    def test_the_given_configuration_stays_as_it_is(self, config: envoy.Node) -> None:
        before = copy.deepcopy(config)
        envoy.render(config, plan(filters=[LISTEN], provider=Provider(LISTEN)))
        assert config == before

    def test_without_an_observer_nothing_is_left_of_it(self, config: envoy.Node) -> None:
        assert "observer" in str(config)
        assert "ibex.observer" not in str(envoy.render(config, plan()))
        assert "extproc_observer" not in str(envoy.render(config, plan()))

    def test_the_observers_endpoints_are_those_of_the_plan(self, config: envoy.Node) -> None:
        observers = [Address("127.0.0.1", 7001), Address("127.0.0.1", 7002)]
        rendered = envoy.render(config, replace(plan(), observers=observers))
        cluster = next(one for one in rendered["static_resources"]["clusters"] if one["name"] == "extproc_observer")
        endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        ports = [each["endpoint"]["address"]["socket_address"]["port_value"] for each in endpoints]
        assert ports == [7001, 7002]

    def test_changes_nothing_but_addresses_observer_and_tracing(self, config: envoy.Node) -> None:
        rendered = envoy.render(config, plan())
        envoy.set_admin(rendered, Address("127.0.0.1", 9901))
        envoy.set_listener(rendered, Address("127.0.0.1", 8080))
        assert rendered["static_resources"]["listeners"][0].pop("enable_reuse_port") is False
        envoy.drop_tracing(config)
        envoy.drop_observer(config)
        assert rendered == config

    def test_addresses(self, config: envoy.Node) -> None:
        filters = [Address("127.0.0.1", 1), Address("::1", 2)]
        rendered = envoy.render(config, plan(filters=filters, provider=Provider(Address("127.0.0.1", 3))))
        assert rendered["admin"]["address"]["socket_address"]["port_value"] == ADMIN.port
        assert rendered["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"] == LISTEN.port
        assert endpoints(rendered, "extproc_filter") == [("127.0.0.1", 1), ("::1", 2)]
        for cluster in provider_clusters(rendered):
            assert endpoints(rendered, cluster["name"]) == [("127.0.0.1", 3)]
            assert cluster["type"] == "STATIC"

    def test_identity(self) -> None:
        """Of the configuration without a gate."""
        config = envoy.load(envoy.shipped("dropin.yaml"))
        shipped = envoy._http_filter(config, "identity")["typed_config"]["metadata"][0]["value"]
        rendered = envoy.render(config, plan(org_id="org"))
        value = envoy._http_filter(rendered, "identity")["typed_config"]["metadata"][0]["value"]
        assert value == {"org_id": "org", "agent_id": shipped["agent_id"]}

    def test_tracing_goes_without_a_collector(self, gateway: envoy.Node) -> None:
        rendered = envoy.render(gateway, plan())
        assert "otel_collector" not in yaml.dump(rendered)
        kept = envoy.render(gateway, plan(collector=Address("127.0.0.1", 5)))
        assert endpoints(kept, "otel_collector") == [("127.0.0.1", 5)]
        assert "tracing" in envoy._http_managers(kept)[0]

    def test_a_name_that_is_not_there_is_an_error(self, gateway: envoy.Node) -> None:
        with pytest.raises(EnvoyError, match="no cluster named 'nobody'; it has: extproc_filter"):
            envoy.set_cluster(gateway, "nobody", [LISTEN])
        with pytest.raises(EnvoyError, match="no HTTP filter named 'identity'"):
            envoy.render(gateway, plan(org_id="o"))
        gateway["static_resources"]["listeners"] *= 2
        with pytest.raises(EnvoyError, match="2 listeners"):
            envoy.set_listener(gateway, LISTEN)
        del gateway["admin"]
        with pytest.raises(EnvoyError, match="admin"):
            envoy.set_admin(gateway, ADMIN)

    def test_a_configuration_without_providers_is_an_error(self, gateway: envoy.Node) -> None:
        gateway["static_resources"]["clusters"] = []
        with pytest.raises(EnvoyError, match="provider_"):
            envoy.set_provider(gateway, Provider(LISTEN))

    def test_the_file_is_ours_alone_and_reads_back(self, config: envoy.Node, tmp_path: Path) -> None:
        rendered = envoy.render(config, plan(provider=Provider(LISTEN)))
        file = envoy.write(rendered, tmp_path / "state" / "envoy.yaml")
        assert envoy.load(file) == rendered
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "&id" not in file.read_text()


class TestRemoteProvider:
    def test_https(self, config: envoy.Node, tmp_path: Path) -> None:
        ca_file = tmp_path / "ca.pem"
        rendered = envoy.render(config, plan(provider=Provider.parse("https://api.example.com/v1", ca_file)))
        for cluster in provider_clusters(rendered):
            assert endpoints(rendered, cluster["name"]) == [("api.example.com", 443)]
            assert cluster["type"] == "STRICT_DNS"
            tls = cluster["transport_socket"]["typed_config"]
            assert tls["sni"] == "api.example.com"
            validation = tls["common_tls_context"]["validation_context"]
            assert validation["trusted_ca"] == {"filename": str(ca_file)}
            assert validation["match_typed_subject_alt_names"] == [
                {"san_type": "DNS", "matcher": {"exact": "api.example.com"}}
            ]
        actions = [route["route"] for route in envoy._routes(rendered) if "route" in route]
        assert actions
        for action in actions:
            assert action["host_rewrite_literal"] == "api.example.com"
            assert "regex_rewrite" not in action

    def test_http_with_a_port_and_a_path(self, config: envoy.Node) -> None:
        rendered = envoy.render(config, plan(provider=Provider.parse("http://models.lan:8000/openai/v1/")))
        for cluster in provider_clusters(rendered):
            assert "transport_socket" not in cluster
        for action in (route["route"] for route in envoy._routes(rendered) if "route" in route):
            assert action["host_rewrite_literal"] == "models.lan:8000"
            assert action["regex_rewrite"] == {"pattern": {"regex": "^/"}, "substitution": "/openai/"}

    @pytest.mark.parametrize(
        ("url", "address", "authority"),
        [
            ("http://h", ("h", 80), "h"),
            ("https://h:443", ("h", 443), "h"),
            ("https://h:80", ("h", 80), "h:80"),
            ("http://127.0.0.1:9", ("127.0.0.1", 9), "127.0.0.1:9"),
            ("https://[::1]", ("::1", 443), "[::1]"),
            ("HTTPS://Example.COM", ("example.com", 443), "example.com"),
        ],
    )
    def test_authority(self, url: str, address: tuple[str, int], authority: str) -> None:
        provider = Provider.parse(url)
        assert provider.address == address
        assert provider.authority == authority

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "api.example.com",
            "ftp://h",
            "https://",
            "https://h:x",
            "https://h:99999",
            "http://u:p@h",
            "http://h?x=1",
        ],
    )
    def test_a_url_that_is_none_is_an_error(self, url: str) -> None:
        with pytest.raises(EnvoyError, match="provider URL"):
            Provider.parse(url)

    def test_an_address_is_no_server_name(self, tmp_path: Path) -> None:
        tls = envoy._tls(Provider.parse("https://127.0.0.1", tmp_path))["typed_config"]
        assert "sni" not in tls
        san = tls["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"][0]
        assert san == {"san_type": "IP_ADDRESS", "matcher": {"exact": "127.0.0.1"}}

    def test_trusts_what_the_machine_trusts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        own = tmp_path / "own.pem"
        own.touch()
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert envoy.system_ca_file() == own
        monkeypatch.delenv("SSL_CERT_FILE")
        monkeypatch.setattr(envoy, "CA_FILES", ())
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: DEFAULT_PATHS)
        with pytest.raises(EnvoyError, match="SSL_CERT_FILE"):
            envoy.system_ca_file()


class DefaultPaths:
    openssl_cafile_env = "SSL_CERT_FILE"
    cafile = None


DEFAULT_PATHS = DefaultPaths()


class TestAddress:
    @pytest.mark.parametrize(
        ("text", "host", "port"), [("a:1", "a", 1), ("[::1]:65535", "::1", 65535), ("0.0.0.0:0", "0.0.0.0", 0)]
    )
    def test_round_trip(self, text: str, host: str, port: int) -> None:
        address = Address.parse(text)
        assert address == (host, port)
        assert str(address) == text

    @pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:x", "a:-1", "a:65536", "a:1000000", "a:٣"])
    def test_anything_else_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match="host:port"):
            Address.parse(text)


def executable(file: Path, text: str = "#!/bin/sh\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


class TestFindEnvoy:
    def test_the_configured_one_comes_first(self, tmp_path: Path) -> None:
        binary = executable(tmp_path / "my-envoy")
        assert envoy.find_envoy(str(binary), root=tmp_path) == binary

    def test_a_configured_one_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EnvoyError, match="IBEX_ENVOY"):
            envoy.find_envoy(str(tmp_path / "nothing"))

    def test_then_the_checkouts_then_the_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        with pytest.raises(EnvoyError, match="make setup"):
            envoy.find_envoy(root=tmp_path)
        on_path = executable(tmp_path / "bin" / "envoy")
        assert envoy.find_envoy(root=tmp_path) == on_path
        place = ".envoy/1.39.3/lib/python3.11/site-packages/envoy/_bin/envoy"
        beside = executable(tmp_path / place)
        assert envoy.find_envoy(None, "1.39.3", root=tmp_path) == beside
        assert envoy.find_envoy(None, "1.40.0", root=tmp_path) == on_path


class TestProcess:
    def test_a_binary_that_cannot_run_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EnvoyError, match="cannot be started"):
            envoy.start(tmp_path / "nothing", tmp_path, ADMIN, state_dir=tmp_path)

    def test_one_that_ends_shows_its_log(self, tmp_path: Path) -> None:
        binary = executable(tmp_path / "envoy", "#!/bin/sh\necho bad configuration >&2\nexit 3\n")
        running = envoy.start(binary, tmp_path, ADMIN, state_dir=tmp_path)
        with pytest.raises(EnvoyError, match=r"code 3\.\nbad configuration"):
            running.wait_ready(5)
        running.stop()

    def test_one_that_never_gets_ready_is_stopped_even_when_it_will_not(self, tmp_path: Path) -> None:
        binary = executable(tmp_path / "envoy", "#!/bin/sh\ntrap '' TERM\necho up\nexec sleep 60\n")
        running = envoy.start(binary, tmp_path, Address("127.0.0.1", envoy.free_port()), state_dir=tmp_path)
        with pytest.raises(EnvoyError, match=r"not ready within 0\.3 s"):
            running.wait_ready(0.3)
        for _ in range(100):
            if running.access_log_file.read_text():
                break
            time.sleep(0.05)
        running.stop(grace_s=0.2)
        assert running.process.returncode == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.kill(running.process.pid, 0)


def test_a_port_is_given_once_and_a_server_gets_it() -> None:
    ports = [envoy.free_port() for _ in range(1000)]  # of some 14,000; at random, about 35 would come twice
    assert len(set(ports)) == len(ports)
    socket.create_server(("127.0.0.1", ports[0])).close()
