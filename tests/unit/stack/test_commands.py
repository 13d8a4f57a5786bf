"""`extproc envoy`."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from extproc.stack import envoy
from extproc.stack.commands import app
from tests.unit.stack.test_envoy import plan

DOCS = Path(__file__).parents[3] / "docs" / "gateway.md"
run = CliRunner().invoke


class TestCerts:
    def test_it_says_what_clients_have_to_trust(self, tmp_path: Path) -> None:
        done = run(app, ["certs", str(tmp_path), "--host", "gateway.lan"])
        assert done.exit_code == 0
        assert f"{tmp_path}/ca.pem" in done.output
        assert (tmp_path / "tls.key").is_file()

    def test_it_replaces_nothing_unasked(self, tmp_path: Path) -> None:
        (tmp_path / "tls.crt").write_text("theirs")
        done = run(app, ["certs", str(tmp_path)])
        assert done.exit_code == 1
        assert "--force" in done.output
        assert (tmp_path / "tls.crt").read_text() == "theirs"
        assert run(app, ["certs", str(tmp_path), "--force"]).exit_code == 0

    def test_a_host_that_is_none_is_said(self, tmp_path: Path) -> None:
        done = run(app, ["certs", str(tmp_path), "--host", "münchen.example"])
        assert done.exit_code == 1
        assert done.output.startswith("extproc envoy certs: ")


class TestKey:
    def test_it_is_read_from_standard_input_and_never_shown(self, tmp_path: Path) -> None:
        done = run(app, ["key", "openai", str(tmp_path)], input="sk-secret\n")
        assert done.exit_code == 0
        assert "sk-secret" not in done.output
        assert "Bearer sk-secret" in (tmp_path / "openai.yaml").read_text()

    def test_none_is_an_error(self, tmp_path: Path) -> None:
        assert run(app, ["key", "openai", str(tmp_path)], input="").exit_code == 1
        done = run(app, ["key", "nobody", str(tmp_path)], input="sk-secret\n")
        assert done.exit_code == 1
        assert "openai, anthropic, gemini, selfhosted" in done.output


def test_the_page_shows_what_is_tested() -> None:
    config = envoy.render(envoy.load(envoy.shipped("envoy.yaml")), plan(key_files=Path("/etc/envoy/keys")))
    (options,) = envoy._cluster(config, "provider_openai")["typed_extension_protocol_options"].values()
    block = DOCS.read_text(encoding="utf-8").split("```yaml\n- name: key\n")[1].split("```")[0]
    assert yaml.safe_load(f"- name: key\n{block}") == [options["http_filters"][1]]
