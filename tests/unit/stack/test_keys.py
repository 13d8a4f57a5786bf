"""Providers' keys: which one, from where, in which header."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from extproc.stack import envoy, keys
from extproc.stack.keys import Key, UnusableKey


class TestKeyFor:
    @pytest.mark.parametrize(
        ("host", "variable", "header"),
        [
            ("api.openai.com", "OPENAI_API_KEY", "authorization"),
            ("API.OpenAI.com", "OPENAI_API_KEY", "authorization"),
            ("api.anthropic.com", "ANTHROPIC_API_KEY", "x-api-key"),
            ("generativelanguage.googleapis.com", "GEMINI_API_KEY", "x-goog-api-key"),
        ],
    )
    def test_a_known_host_has_its_own(self, host: str, variable: str, header: str) -> None:
        key = keys.key_for(host)
        assert (key.variable, key.header) == (variable, header)

    @pytest.mark.parametrize("host", ["api.openai.com.example.org", "openai.com", "localhost", "127.0.0.1"])
    def test_any_other_gets_no_companys_key(self, host: str) -> None:
        assert keys.key_for(host) == Key("IBEX_PROVIDER_KEY")

    def test_another_variable_keeps_the_header(self) -> None:
        assert keys.key_for("api.anthropic.com", "MY_KEY").value == "%ENVIRONMENT(MY_KEY)%"
        assert keys.key_for("models.lan", "MY_KEY").value == "Bearer %ENVIRONMENT(MY_KEY)%"

    @pytest.mark.parametrize("variable", ["", "A B", "A)%", "1A", "sk-secret"])
    def test_what_is_no_variable_is_an_error(self, variable: str) -> None:
        with pytest.raises(UnusableKey, match="environment variable"):
            keys.key_for("localhost", variable)


class TestTake:
    def test_a_newline_at_the_end_is_no_part_of_it(self) -> None:
        assert keys.take({"K": "sk-1\n"}, "K") == "sk-1"

    @pytest.mark.parametrize("environment", [{}, {"K": ""}, {"K": " "}])
    def test_nothing_is_none(self, environment: dict[str, str]) -> None:
        assert keys.take(environment, "K") is None

    @pytest.mark.parametrize("value", ["sk secret", "sk\nsecret", "sk-sécret", "sk\x00secret"])
    def test_what_no_header_can_hold_is_an_error_that_does_not_show_it(self, value: str) -> None:
        with pytest.raises(UnusableKey, match="K holds characters") as caught:
            keys.take({"K": value}, "K")
        assert "secret" not in str(caught.value)


class TestWrite:
    def test_a_file_for_envoy_that_is_ours_alone(self, tmp_path: Path) -> None:
        file = keys.write(tmp_path / "keys", "openai", "sk-1")
        assert file == tmp_path / "keys" / "openai.yaml"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        (resource,) = yaml.safe_load(file.read_text())["resources"]
        assert resource["name"] == "provider_openai"
        assert resource["generic_secret"] == {"secret": {"inline_string": "Bearer sk-1"}}

    def test_it_is_replaced_in_one_step(self, tmp_path: Path) -> None:
        before = keys.write(tmp_path, "anthropic", "one").stat().st_ino
        file = keys.write(tmp_path, "anthropic", "two")
        assert file.stat().st_ino != before
        assert [one.name for one in tmp_path.iterdir()] == ["anthropic.yaml"]
        assert '"two"' in file.read_text()

    @pytest.mark.parametrize(("provider", "key"), [("openai", ""), ("openai", "a b"), ("nobody", "sk"), ("../x", "sk")])
    def test_what_cannot_be_is_an_error(self, tmp_path: Path, provider: str, key: str) -> None:
        with pytest.raises(UnusableKey):
            keys.write(tmp_path, provider, key)
        assert not list(tmp_path.iterdir())


def test_the_table_is_that_of_the_shipped_file() -> None:
    config = envoy.load(envoy.shipped("envoy.yaml"))
    for name, key in keys.BY_PROVIDER.items():
        credentials = envoy._credentials(envoy._cluster(config, f"provider_{name}"))
        assert credentials is not None
        header = credentials["mutations"]["request_mutations"][0]["append"]["header"]
        assert header == {"key": key.header, "value": key.value}
