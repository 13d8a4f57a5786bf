"""Every variant of the shipped files is a valid configuration for every Envoy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extproc.stack import certs, envoy, keys
from extproc.stack.envoy import Address, Provider
from tests.integration.gateway.gateway_side import fitting

ROOT = Path(__file__).parents[3]
OBSERVER = Address("127.0.0.1", 9103)


def https(directory: Path) -> envoy.Node:
    pair = certs.make(directory)
    return rendered(tls=envoy.Certificate(pair.chain, pair.key))


def https_by_hand(directory: Path) -> envoy.Node:
    """As the comment says: the `#` taken away, files named."""
    pair = certs.make(directory)
    lines = envoy.shipped("envoy.yaml").read_text(encoding="utf-8").splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("    # - transport_socket_connect_timeout"))
    end = lines.index("    - filters:")
    freed = [line.replace("# ", "", 1).partition("  # ")[0] for line in lines[begin:end]]
    text = "\n".join([*lines[:begin], *freed, *lines[end + 1 :]])
    for shipped, ours in (("/etc/envoy/tls/tls.crt", pair.chain), ("/etc/envoy/tls/tls.key", pair.key)):
        assert shipped in text
        text = text.replace(shipped, str(ours))
    file = directory / "by-hand.yaml"
    file.write_text(text, encoding="utf-8")
    return envoy.load(file)


def key_files(directory: Path) -> envoy.Node:
    for name in keys.BY_PROVIDER:
        keys.write(directory, name, "sk-of-a-test")
    return rendered(key_files=directory)


def remote_provider(_: Path) -> envoy.Node:
    provider = Provider.parse("https://models.example.com/base/v1")
    return rendered(provider=provider, any_model=True)


def selfhosted_over_tls(_: Path) -> envoy.Node:
    """As the comment at its cluster says."""
    config = rendered()
    openai, selfhosted = (envoy._cluster(config, f"provider_{name}") for name in ("openai", "selfhosted"))
    selfhosted["transport_socket"] = openai["transport_socket"]
    (options,), (theirs,) = (one["typed_extension_protocol_options"].values() for one in (selfhosted, openai))
    del options["explicit_http_config"]
    options["auto_config"] = theirs["auto_config"]
    for route in envoy._routes(config):
        if route.get("route", {}).get("cluster") == "provider_selfhosted":
            route["route"]["regex_rewrite"] = {"pattern": {"regex": "^/"}, "substitution": "/the-path/"}
    return config


def rendered(**given: Any) -> envoy.Node:
    return envoy.render(envoy.load(envoy.shipped("envoy.yaml")), fitting(observers=[OBSERVER], **given))


@pytest.mark.parametrize("version", ["1.36.4", "1.37.0", "1.38.3", "1.39.3", "1.40.0"])
@pytest.mark.parametrize("variant", [https, https_by_hand, key_files, remote_provider, selfhosted_over_tls])
def test_a_variant_is_valid(variant: Callable[[Path], envoy.Node], version: str, tmp_path: Path) -> None:
    binaries = ROOT.glob(f".envoy/{version}/lib/python*/site-packages/envoy/_bin/envoy")
    binary = next(binaries, None)
    if binary is None:
        assert not os.environ.get("CI"), f"Envoy {version} is missing: run `make setup-envoys`"
        pytest.skip(f"Envoy {version} is not installed (`make setup-envoys`)")
    file = envoy.write(variant(tmp_path), tmp_path / "envoy.yaml")
    command = [str(binary), "--mode", "validate", "--config-path", str(file), "--disable-hot-restart"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert checked.returncode == 0, checked.stderr[-2000:]
    assert "deprecated" not in checked.stderr.lower()
