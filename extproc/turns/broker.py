"""The broker's URL, read: which Redis or Valkey takes the extraction tasks, and how it is reached. Pure: no I/O.

    redis://[USER:PASSWORD@]HOST[:PORT][/DB]
    unix://[USER:PASSWORD@]/PATH[?db=DB]
    redis+sentinel://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT]…/MASTER[/DB]
    redis+cluster://[USER:PASSWORD@]HOST[:PORT],HOST[:PORT]…

`rediss` in place of `redis` means TLS, to every server that is named, with the options of `_TLS_OPTIONS`. User and
password are those of the servers that hold the queue; a Sentinel's own are options (`_SENTINEL_OPTIONS`). IPv6
addresses stand in brackets.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn
from urllib.parse import parse_qsl, unquote

__all__ = ["Broker", "BrokerUrlError", "Mode"]

REDIS_PORT = 6379
SENTINEL_PORT = 26379

_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
"""redis-py's and Celery's names: three files; `required` (default), `optional`, `none`; `true` (default), `false`."""
_SENTINEL_OPTIONS = {"sentinel_username", "sentinel_password"}
_HOST = re.compile(r"(?!.{254})[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_MASTER = re.compile(r"[A-Za-z0-9._-]{1,200}")
"""As Sentinel itself allows it."""


class BrokerUrlError(ValueError):
    """The URL cannot be used. The message shows no part of it: any part may belong to a password."""


class _Refusal(Exception):
    """Why, in words that show no part of the URL."""


class Mode(Enum):
    SERVER = auto()
    SOCKET = auto()
    SENTINEL = auto()
    CLUSTER = auto()


_SCHEMES = {
    "redis": (Mode.SERVER, False),
    "rediss": (Mode.SERVER, True),
    "unix": (Mode.SOCKET, False),
    "redis+sentinel": (Mode.SENTINEL, False),
    "rediss+sentinel": (Mode.SENTINEL, True),
    "redis+cluster": (Mode.CLUSTER, False),
    "rediss+cluster": (Mode.CLUSTER, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    mode: Mode
    addresses: tuple[tuple[str, int], ...] = ()
    """Host and port: of the server, of the Sentinels, or of some nodes of the cluster."""
    path: str = ""
    """Of the Unix socket."""
    master: str = ""
    """The primary's name, as the Sentinels know it."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: Mapping[str, str | bool] | None = None
    """redis-py's `ssl_` arguments; None: no TLS."""

    @classmethod
    def parse(cls, url: str, variable: str = "IBEX_BROKER_URL") -> Broker:
        """Raises BrokerUrlError, which names the setting that the URL stands in."""
        try:
            return cls._parse(url)
        except _Refusal as refusal:
            hint = "in a user or password, percent-encode what is neither a letter nor a digit"
            raise BrokerUrlError(f"{variable} cannot be used: {refusal}; {hint}") from None

    @classmethod
    def _parse(cls, url: str) -> Broker:
        """Raises _Refusal."""
        scheme, _, rest = url.partition("://")
        if "://" not in url or scheme.lower() not in _SCHEMES:
            _refuse(f"it must begin with one of {', '.join(f'{name}://' for name in _SCHEMES)}")
        mode, is_tls = _SCHEMES[scheme.lower()]
        location, _, query = rest.partition("?")
        if "#" in url:
            _refuse("`#` has no meaning in it")
        authority, _, path = location.partition("/")
        user, _, hosts = authority.rpartition("@")
        options = _options(query, mode, is_tls=is_tls)
        username, password = _credentials(user)
        db, master = _place(mode, path, options)
        return cls(
            mode=mode,
            addresses=_addresses(mode, hosts),
            path=_socket(path) if mode is Mode.SOCKET else "",
            master=master,
            db=db,
            username=username,
            password=password,
            sentinel_username=options.get("sentinel_username"),
            sentinel_password=options.get("sentinel_password"),
            tls=_tls(options) if is_tls else None,
        )

    @property
    def where(self) -> str:
        """For people: addresses, no credentials."""
        hosts = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.addresses)
        match self.mode:
            case Mode.SERVER:
                return hosts
            case Mode.SOCKET:
                return self.path
            case Mode.SENTINEL:
                return f"{self.master!r} of the Sentinels {hosts}"
            case Mode.CLUSTER:
                return f"the cluster of {hosts}"


def _refuse(reason: str) -> NoReturn:
    raise _Refusal(reason) from None


def _credentials(user: str) -> tuple[str | None, str | None]:
    username, _, password = user.partition(":")
    return unquote(username) or None, unquote(password) or None


def _addresses(mode: Mode, hosts: str) -> tuple[tuple[str, int], ...]:
    match mode:
        case Mode.SOCKET:
            if hosts:
                _refuse("unix:// names no host; the socket's path begins with a third slash")
            return ()
        case Mode.SERVER:
            if "," in hosts:
                _refuse("redis:// names one host; several belong to redis+sentinel:// or redis+cluster://")
            # Without a host: this machine, as for Celery and redis-py.
            return (_address(f"localhost{hosts}" if hosts.startswith(":") else hosts or "localhost", REDIS_PORT),)
        case Mode.SENTINEL:
            return tuple(_address(host, SENTINEL_PORT) for host in hosts.split(","))
        case Mode.CLUSTER:
            return tuple(_address(host, REDIS_PORT) for host in hosts.split(","))


def _address(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, str(default_port)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        _refuse("a port is no number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(unquote(host[1:-1]))), int(port)
        except ValueError:
            _refuse("an address in brackets is no IPv6 address")
    if not _HOST.fullmatch(host):
        _refuse("a host is missing or malformed; an IPv6 address stands in brackets")
    return host, int(port)


def _place(mode: Mode, path: str, options: Mapping[str, str]) -> tuple[int, str]:
    """Number of the database, and name of the primary."""
    first, _, second = path.strip("/").partition("/")
    match mode:
        case Mode.SERVER:
            if second:
                _refuse("after the host comes the number of a database and nothing else")
            return _db(first), ""
        case Mode.SOCKET:
            return _db(options.get("db", "")), ""
        case Mode.SENTINEL:
            if not _MASTER.fullmatch(first):
                _refuse("after the Sentinels comes the primary's name, as in redis+sentinel://HOST:PORT/MASTER/DB")
            return _db(second), first
        case Mode.CLUSTER:
            if _db(path.strip("/")):
                _refuse("a cluster has database 0 only")
            return 0, ""


def _db(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        _refuse("the database is no number")
    return int(text)


def _socket(path: str) -> str:
    if not path:
        _refuse("unix:// needs the path of a socket, as in unix:///run/valkey.sock")
    return f"/{unquote(path)}"


def _options(query: str, mode: Mode, *, is_tls: bool) -> dict[str, str]:
    allowed = (_TLS_OPTIONS if is_tls else set()) | (_SENTINEL_OPTIONS if mode is Mode.SENTINEL else set())
    allowed |= {"db"} if mode is Mode.SOCKET else set()
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError:
        _refuse("what follows `?` is no list of options")
    if not options.keys() <= allowed:
        _refuse(f"of options it may have {', '.join(sorted(allowed)) or 'none'}")
    return options


def _tls(options: Mapping[str, str]) -> dict[str, str | bool]:
    tls: dict[str, str | bool] = {
        name: options[name] for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if name in options
    }
    # Celery writes CERT_REQUIRED for what redis-py calls required; both are taken.
    verify = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    checks_host = options.get("ssl_check_hostname", "true").lower()
    if verify not in {"required", "optional", "none"}:
        _refuse("ssl_cert_reqs is one of required, optional, none")
    if checks_host not in {"true", "false"}:
        _refuse("ssl_check_hostname is true or false")
    return tls | {"ssl_cert_reqs": verify, "ssl_check_hostname": checks_host == "true"}
