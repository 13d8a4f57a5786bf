"""Every form of the broker's URL, and that nothing of a URL that cannot be used is ever shown."""

from __future__ import annotations

import traceback
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.turns.broker import Broker, BrokerUrlError, Mode

SECRET = "s3cr3t-Passw0rd"


def parsed(url: str) -> dict[str, Any]:
    """What differs from a broker without user, TLS and database."""
    broker, plain = Broker.parse(url), Broker(mode=Broker.parse(url).mode)
    values = {name: getattr(broker, name) for name in Broker.__slots__}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://broker", {"addresses": (("broker", 6379),)}),
        ("redis://broker:6380", {"addresses": (("broker", 6380),)}),
        ("redis://broker:6380/", {"addresses": (("broker", 6380),)}),
        ("redis://broker/2", {"addresses": (("broker", 6379),), "db": 2}),
        ("REDIS://broker", {"addresses": (("broker", 6379),)}),
        ("redis://", {"addresses": (("localhost", 6379),)}),
        ("redis:///3", {"addresses": (("localhost", 6379),), "db": 3}),
        ("redis://:6380", {"addresses": (("localhost", 6380),)}),
        ("redis://my_broker.svc.cluster.local.", {"addresses": (("my_broker.svc.cluster.local.", 6379),)}),
        ("redis://10.0.0.1:1", {"addresses": (("10.0.0.1", 1),)}),
        ("redis://[::1]", {"addresses": (("::1", 6379),)}),
        ("redis://[2001:DB8::1]:6380/1", {"addresses": (("2001:db8::1", 6380),), "db": 1}),
        ("redis://[fe80::1%25eth0]", {"addresses": (("fe80::1%eth0", 6379),)}),
        ("redis://:pw@b", {"addresses": (("b", 6379),), "password": "pw"}),
        ("redis://ada:pw@b", {"addresses": (("b", 6379),), "username": "ada", "password": "pw"}),
        ("redis://ada@b", {"addresses": (("b", 6379),), "username": "ada"}),
        ("redis://:p%40s%2Fs%3Aw%C3%B6@b", {"addresses": (("b", 6379),), "password": "p@s/s:wö"}),
        ("redis://:a@b:c@b", {"addresses": (("b", 6379),), "password": "a@b:c"}),
        ("unix:///run/valkey.sock", {"path": "/run/valkey.sock"}),
        ("unix:///run/valkey.sock?db=4", {"path": "/run/valkey.sock", "db": 4}),
        ("unix://:pw@/run/my%20valkey.sock", {"path": "/run/my valkey.sock", "password": "pw"}),
        ("redis+sentinel://a/main", {"addresses": (("a", 26379),), "master": "main"}),
        (
            "redis+sentinel://u:p@a:1,[::1]:2,c/main.one-1_x/5",
            {
                "addresses": (("a", 1), ("::1", 2), ("c", 26379)),
                "master": "main.one-1_x",
                "db": 5,
                "username": "u",
                "password": "p",
            },
        ),
        (
            "redis+sentinel://a/m?sentinel_username=w&sentinel_password=x%26y",
            {"addresses": (("a", 26379),), "master": "m", "sentinel_username": "w", "sentinel_password": "x&y"},
        ),
        ("redis+cluster://a:1,b:2", {"addresses": (("a", 1), ("b", 2))}),
        ("redis+cluster://a/0", {"addresses": (("a", 6379),)}),
    ],
)
def test_every_form_is_read(url: str, expected: dict[str, Any]) -> None:
    assert parsed(url) == expected


@pytest.mark.parametrize(
    ("url", "mode"),
    [
        ("redis://a", Mode.SERVER),
        ("rediss://a", Mode.SERVER),
        ("unix:///a", Mode.SOCKET),
        ("redis+sentinel://a/m", Mode.SENTINEL),
        ("rediss+sentinel://a/m", Mode.SENTINEL),
        ("redis+cluster://a", Mode.CLUSTER),
        ("rediss+cluster://a", Mode.CLUSTER),
    ],
)
def test_the_scheme_says_what_stands_there_and_whether_it_speaks_tls(url: str, mode: Mode) -> None:
    broker = Broker.parse(url)
    assert broker.mode is mode
    assert (broker.tls is not None) == url.startswith("rediss")


@pytest.mark.parametrize(
    ("query", "tls"),
    [
        ("", {"ssl_cert_reqs": "required", "ssl_check_hostname": True}),
        ("?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none", "ssl_check_hostname": True}),
        ("?ssl_cert_reqs=optional", {"ssl_cert_reqs": "optional", "ssl_check_hostname": True}),
        ("?ssl_check_hostname=False", {"ssl_cert_reqs": "required", "ssl_check_hostname": False}),
        (
            "?ssl_ca_certs=/ca&ssl_certfile=%2Fc&ssl_keyfile=/k",
            {
                "ssl_ca_certs": "/ca",
                "ssl_certfile": "/c",
                "ssl_keyfile": "/k",
                "ssl_cert_reqs": "required",
                "ssl_check_hostname": True,
            },
        ),
    ],
)
def test_tls_verifies_unless_told_otherwise(query: str, tls: dict[str, object]) -> None:
    assert Broker.parse(f"rediss://a/0{query}").tls == tls


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "begin with one of"),
        ("redis", "begin with one of"),
        ("localhost:6379", "begin with one of"),
        (f"http://:{SECRET}@a", "begin with one of"),
        (f"amqp://u:{SECRET}@a", "begin with one of"),
        (f"sentinel://:{SECRET}@a", "begin with one of"),
        (SECRET, "begin with one of"),
        (f"redis://u:{SECRET}/x@a", "percent-encode"),
        (f"redis://u:12/{SECRET}@a", "database"),
        (f"redis://u:12/3/{SECRET}@a", "nothing else"),
        (f"redis://u:{SECRET}?x@a", "percent-encode"),
        (f"redis://a?{SECRET}", "list of options"),
        (f"redis://a?{SECRET}=1", "options"),
        (f"redis://u:{SECRET}#x@a", "`#`"),
        (f"redis://u:{SECRET}@a:port", "port"),
        (f"redis://u:{SECRET}@a:0", "port"),
        (f"redis://u:{SECRET}@a:65536", "port"),
        (f"redis://u:{SECRET}@a:٣", "port"),
        (f"redis://u:{SECRET}@a:", "port"),
        (f"redis://u:{SECRET}@::1", "host"),
        (f"redis://u:{SECRET}@[::1:6379", "host"),
        (f"redis://u:{SECRET}@[nope]:6379", "IPv6"),
        (f"redis://u:{SECRET}@a b", "host"),
        (f"redis://u:{SECRET}@a..b", "host"),
        (f"redis://u:{SECRET}@{'a' * 64}", "host"),
        (f"redis://u:{SECRET}@a,b", "one host"),
        (f"redis://u:{SECRET}@a/-1", "database"),
        (f"redis://u:{SECRET}@a?ssl_cert_reqs=none", "options"),
        (f"rediss://u:{SECRET}@a?ssl_cert_reqs={SECRET}", "ssl_cert_reqs"),
        (f"rediss://u:{SECRET}@a?ssl_check_hostname={SECRET}", "ssl_check_hostname"),
        (f"rediss://u:{SECRET}@a?password={SECRET}", "options"),
        (f"unix://u:{SECRET}@host/run/a.sock", "no host"),
        (f"unix://u:{SECRET}@", "path of a socket"),
        ("unix:///run/a.sock?db=x", "database"),
        (f"redis+sentinel://u:{SECRET}@a", "primary's name"),
        (f"redis+sentinel://u:{SECRET}@a/", "primary's name"),
        (f"redis+sentinel://u:{SECRET}@a/m/x", "database"),
        (f"redis+sentinel://u:{SECRET}@a,/m", "host"),
        (f"redis+sentinel://u:12/{SECRET}@a/m", "primary's name"),
        (f"redis+cluster://u:{SECRET}@a/1", "database 0"),
        (f"redis+cluster://u:{SECRET}@", "host"),
    ],
)
def test_what_cannot_be_used_is_refused_without_showing_it(url: str, problem: str) -> None:
    with pytest.raises(BrokerUrlError) as refused:
        Broker.parse(url)
    assert str(refused.value).startswith("IBEX_BROKER_URL")
    with pytest.raises(BrokerUrlError, match=r"^IBEX_REDIS_URL cannot be used: "):
        Broker.parse(url, "IBEX_REDIS_URL")
    assert problem in str(refused.value)
    assert SECRET not in "".join(traceback.format_exception(refused.value))


@given(st.text(max_size=60), st.sampled_from(["", "redis://", "rediss://", "unix://", "redis+sentinel://"]))
def test_any_text_is_read_or_refused(text: str, scheme: str) -> None:
    with suppress(BrokerUrlError):
        assert Broker.parse(scheme + text).where


@pytest.mark.parametrize(
    ("url", "where"),
    [
        (f"redis://u:{SECRET}@a:1/2", "a:1"),
        (f"redis://u:{SECRET}@[::1]", "[::1]:6379"),
        (f"unix://u:{SECRET}@/run/a.sock", "/run/a.sock"),
        (f"redis+sentinel://u:{SECRET}@a,b:2/m?sentinel_password={SECRET}", "'m' of the Sentinels a:26379, b:2"),
        (f"rediss+cluster://u:{SECRET}@a,b:2", "the cluster of a:6379, b:2"),
    ],
)
def test_a_broker_is_shown_without_credentials(url: str, where: str) -> None:
    broker = Broker.parse(url)
    assert broker.where == where
    assert SECRET not in repr(broker)
