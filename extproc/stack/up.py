"""`extproc up`: everything on one machine, as child processes of this one.

Start order: what needs nobody (queue, trace store, auth service, engine, provider), then who asks them (gate, filter,
observer, worker), then Envoy; each group together, and awaited until all of it answers. Stop order: the other way
round, group by group, so that nothing is asked that has gone. A child that ends is reported and left: what Envoy
does without it is what this filter is about.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import typer

from extproc.memory.demo import Demo, DemoError
from extproc.settings import ProcessSettings, StoreSettings, load
from extproc.stack import certs, envoy, keys, valkey
from extproc.stack.child import Child
from extproc.stack.loopback import fetch
from extproc.turns.trace_commands import URL_FILE

if TYPE_CHECKING:
    from extproc.memory.database import Database

__all__ = ["Stack", "StackError", "is_running", "run"]

_READY_LIMIT_S = 45.0
"""For those that start together."""
_STOP_LIMIT_S = 12.0
"""Above the drain of 5 s that our processes have, and what ClickHouse gives a query that runs."""
_POLL_S = 0.05
_AUTH_TIMEOUT_MS = "140"
"""Two calls fit into the 300 ms that Envoy waits: here the auth service shares a machine with everything else, and
hashing a token for the first time takes most of the usual 50 ms alone."""


class _Part(Protocol):
    """What was started, and is perhaps not ready yet."""

    @property
    def child(self) -> Child: ...

    def is_ready(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Started:
    """A part that is ready when this says so."""

    child: Child
    answers: Callable[[], bool]

    def is_ready(self) -> bool:
        return self.answers()


class StackError(Exception):
    """The stack cannot start; the message says why and what to do."""


@dataclass(slots=True)
class Stack:
    """The running parts. `stop` it, whatever happened."""

    lock: IO[str]
    """Held open: one stack for each state directory."""
    state_dir: Path
    demo: Demo
    database: str
    token: str | None = None
    """Of the demo org and agent, at the first start only: nobody can ever see it again."""
    gateway: str = ""
    ca_file: Path | None = None
    """What clients of an HTTPS gateway have to trust."""
    provider: str = ""
    admin: str = ""
    gate_admin: str = ""
    observer_admin: str = ""
    worker_admin: str | None = None
    envoy_admin: str = ""
    broker: str = ""
    traces: str = ""
    children: list[Child] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)
    """Where in `children` those begin that need the ones before them."""

    def describe(self) -> dict[str, Any]:
        """What scripts get. Keys whose parts do not exist yet are null."""
        pids = {child.name: [child.process.pid] for child in self.children}
        return {
            "gateway": self.gateway,
            "ca_file": str(self.ca_file) if self.ca_file else None,
            "provider": self.provider,
            "admin": self.admin,
            "gate_admin": self.gate_admin,
            "observer_admin": self.observer_admin,
            "worker_admin": self.worker_admin,
            "envoy_admin": self.envoy_admin,
            "broker": self.broker,
            "database": self.database,
            "traces": self.traces,
            "org_id": self.demo.org_id,
            "agent_id": self.demo.agent_id,
            "token": self.token,
            "state_dir": str(self.state_dir),
            "pids": {"up": [os.getpid()], **pids},
        }

    def stop(self) -> None:
        """Those that depend on others first; what does not depend on each other ends together."""
        for first, last in reversed(list(pairwise([*self.waves, len(self.children)]))):
            wave = self.children[first:last]
            for child in wave:
                child.ask_to_end()
            for child in wave:
                child.end(_STOP_LIMIT_S)
        self.lock.close()


def run(
    *,
    listen: str,
    provider: str | None,
    provider_key: str | None,
    tls: bool,
    otlp: str | None,
    data: Path | None,
    as_json: bool,
    has_worker: bool = True,
    engines: int = 1,
) -> None:
    """Start everything, say where it is, wait for SIGINT or SIGTERM. Raises StackError when a part does not start."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    stack = _prepare(load(StoreSettings, data=data))
    try:
        front = _Front(listen, provider, provider_key, tls, has_worker, engines)
        _start(stack, front, otlp, stopping)
        if stopping.is_set():
            return
        # Last, so that no start that fails keeps a token that nobody was shown.
        stack.token = _ensure_token(stack)
        typer.echo(json.dumps(stack.describe()) if as_json else _welcome(stack, has_stand_in=provider is None))
        if as_json and stack.token is None:
            typer.echo(f"extproc up: {_SHOWN_BEFORE} {_token_command(stack)}", err=True)
        sys.stdout.flush()
        _watch(stack, stopping)
    finally:
        stack.stop()


def _prepare(settings: StoreSettings) -> Stack:
    from extproc.auth.demo import ensure_demo_agent
    from extproc.memory.store import StoreError, open_store, store_url

    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(settings.data)
        open_store(settings).close()
        stack = Stack(lock, settings.data.resolve(), Demo.find_or_make(settings.data), store_url(settings))
        # Before the auth service starts, which then tells the gate that this org has no limit.
        _with_database(stack, ensure_demo_agent)
    except OSError as error:
        raise StackError(f"the state directory {settings.data} cannot be used: {error}") from None
    except (DemoError, StoreError) as error:
        raise StackError(str(error)) from None
    return stack


_Made = TypeVar("_Made")


def _with_database(stack: Stack, make: Callable[[Database, str, str], _Made]) -> _Made:
    """Raises StoreError."""
    from extproc.memory.database import Database

    database = Database(stack.database)
    try:
        return make(database, stack.demo.org_id, stack.demo.agent_id)
    finally:
        database.close()


def _ensure_token(stack: Stack) -> str | None:
    from extproc.auth.demo import ensure_demo
    from extproc.memory.store import StoreError

    try:
        return _with_database(stack, ensure_demo)
    except StoreError as error:
        raise StackError(str(error)) from None


def _lock(state_dir: Path) -> IO[str]:
    lock = (state_dir / "up.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StackError(f"another `extproc up` uses {state_dir}; stop it, or give this one its own --data") from None
    return lock


def is_running(state_dir: Path) -> bool:
    """Whether a stack holds this directory. Raises OSError where its lock cannot be opened."""
    try:
        with (state_dir / "up.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class _Front:
    """What is asked of the stack: where Envoy answers, how, for which provider; and whether somebody learns from it."""

    listen: str
    provider: str | None
    """URL; None: a stand-in."""
    provider_key: str | None
    """Variable that holds its key; None: the one that belongs to its host."""
    tls: bool
    has_worker: bool
    engines: int
    """How many; the filter gives each its turn."""


def _start(stack: Stack, front: _Front, otlp: str | None, stopping: threading.Event) -> None:
    try:
        gateway = envoy.Address.parse(front.listen)
        _check_free(gateway)
        provider, secrets_of_envoy = _provider(front)
        certificate = _certificate(stack, gateway) if front.tls else None
        binary = envoy.find_envoy(os.environ.get("IBEX_ENVOY"))
        auth, gate, filter_, filter_admin, observer, envoy_admin, stand_in = (_free_address() for _ in range(7))
        engines = [_free_address() for _ in range(front.engines)]
        endpoint = otlp or load(ProcessSettings).otlp_endpoint
        environment = {"IBEX_DATA": str(stack.state_dir)} | ({"IBEX_OTLP_ENDPOINT": endpoint} if endpoint else {})
        stack.provider = front.provider or f"http://{stand_in}"
        stack.waves.append(len(stack.children))
        alone = [
            _start_broker(stack),
            _start_traces(stack),
            _start_auth(stack, auth, environment),
            *(_start_engine(stack, number, engine, environment) for number, engine in enumerate(engines, start=1)),
            *([] if provider else [_start_stand_in(stack, stand_in)]),
        ]
        _wait(alone, stopping)
        directives = {"IBEX_REDIS_URL": stack.broker, "IBEX_DIRECTIVE_ADDRESS": str(auth)}
        stack.waves.append(len(stack.children))
        asking = [
            _start_gate(stack, gate, auth, environment),
            _start_filter(stack, filter_, filter_admin, engines, directives | environment),
            _start_observer(stack, observer, environment),
            *([_start_worker(stack, environment)] if front.has_worker else []),
        ]
        _wait(asking, stopping)
        plan = envoy.Plan(
            listen=gateway,
            admin=envoy_admin,
            filters=[filter_],
            gates=[gate],
            observers=[observer],
            provider=provider or envoy.Provider(stand_in),
            any_model=provider is not None,
            tls=certificate,
            collector=_collector(endpoint),
        )
        stack.waves.append(len(stack.children))
        _wait([_start_envoy(stack, binary, plan, secrets_of_envoy)], stopping)
    except (envoy.EnvoyError, valkey.ValkeyError, OSError, ValueError) as error:
        raise StackError(str(error)) from None


def _provider(front: _Front) -> tuple[envoy.Provider | None, dict[str, str]]:
    """The given provider with its key, and the variables that Envoy alone gets.

    Every key that we know of leaves our own environment, so that no other child inherits one.
    """
    provider, key = envoy.Provider.parse(front.provider) if front.provider else None, None
    if provider is not None:
        key = keys.key_for(provider.address.host, front.provider_key)
    value = keys.take(os.environ, key.variable) if key else None
    for variable in {known.variable for known in keys.BY_PROVIDER.values()} | {keys.OTHER_PROVIDER}:
        os.environ.pop(variable, None)
    if provider is None or key is None:
        return None, {}
    os.environ.pop(key.variable, None)
    if value is None:
        typer.echo(f"extproc up: {key.variable} is not set, so {provider.authority} gets no key", err=True)
        return provider, {}
    return replace(provider, key=key), {key.variable: value}


def _certificate(stack: Stack, gateway: envoy.Address) -> envoy.Certificate:
    is_everywhere = gateway.host in {"0.0.0.0", "::"}
    hosts = dict.fromkeys([*certs.LOOPBACK, *([] if is_everywhere else [gateway.host])])
    pair = certs.make_or_keep(stack.state_dir / "tls", list(hosts))
    stack.ca_file = pair.authority
    return envoy.Certificate(pair.chain, pair.key)


def _check_free(gateway: envoy.Address) -> None:
    """At once: Envoy, which listens there, is the last to start. Raises StackError."""
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    try:
        socket.create_server(gateway, family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StackError(f"cannot listen on {gateway}: {reason}; name another address with --listen") from None


def _free_address() -> envoy.Address:
    return envoy.Address("127.0.0.1", envoy.free_port())


def _start_broker(stack: Stack) -> _Part:
    started = valkey.start(stack.state_dir)
    stack.children.append(started.child)
    stack.broker = started.url
    return started


def _start_traces(stack: Stack) -> _Part:
    """Behind a password: whoever reaches it could read files of ours."""
    address, password = _free_address(), secrets.token_urlsafe(24)
    password_file = _private_file(stack.state_dir / "clickhouse.password", password)
    command = ["--listen", str(address), "--data", str(stack.state_dir / "clickhouse")]
    command += ["--password-file", str(password_file)]
    child = _start_child(stack, "clickhouse", ["-m", "extproc.stack.clickhouse", *command], {})
    stack.traces = f"http://default:{password}@{address}"
    _private_file(stack.state_dir / URL_FILE, stack.traces)
    return _Started(child, _answers(f"http://{address}/ping"))


def _private_file(file: Path, text: str) -> Path:
    file.touch(mode=0o600)
    file.write_text(f"{text}\n", encoding="utf-8")
    return file


def _start_auth(stack: Stack, address: envoy.Address, environment: dict[str, str]) -> _Part:
    admin = _free_address()
    command = ["auth", "--listen", str(address), "--admin", str(admin)]
    child = _start_child(stack, "auth", ["-m", "extproc", *command], {"IBEX_REDIS_URL": stack.broker, **environment})
    return _Started(child, _answers(f"http://{admin}/ready"))


def _start_gate(stack: Stack, address: envoy.Address, auth: envoy.Address, environment: dict[str, str]) -> _Part:
    admin = _free_address()
    command = ["gate", "--listen", str(address), "--admin", str(admin), "--auth", str(auth)]
    own = {
        "IBEX_REDIS_URL": stack.broker,
        "IBEX_AUTH_TIMEOUT_MS": os.environ.get("IBEX_AUTH_TIMEOUT_MS", _AUTH_TIMEOUT_MS),
    }
    own |= environment
    child = _start_child(stack, "gate", ["-m", "extproc", *command], own)
    stack.gate_admin = f"http://{admin}"

    def has_both() -> bool:
        ready = fetch(f"http://{admin}/ready")
        return ready is not None and set(json.loads(ready)["dependencies"].values()) == {"ok"}

    return _Started(child, has_both)


def _start_observer(stack: Stack, address: envoy.Address, environment: dict[str, str]) -> _Part:
    admin = _free_address()
    places = {"IBEX_STATE_DIR": str(stack.state_dir), "IBEX_BROKER_URL": stack.broker}
    # Envoy is stopped before it, so nobody needs a notice.
    own = {**places, "IBEX_CLICKHOUSE_URL": stack.traces, "IBEX_NOTICE_S": "0", **environment}
    command = ["observer", "--listen", str(address), "--admin", str(admin)]
    child = _start_child(stack, "observer", ["-m", "extproc", *command], own)
    stack.observer_admin = f"http://{admin}"
    return _Started(child, _answers(f"http://{admin}/ready"))


def _start_worker(stack: Stack, environment: dict[str, str]) -> _Part:
    admin = _free_address()
    own = {"IBEX_BROKER_URL": stack.broker, **environment}
    child = _start_child(stack, "worker", ["-m", "extproc", "worker", "--admin", str(admin)], own)
    stack.worker_admin = f"http://{admin}"
    return _Started(child, _answers(f"{stack.worker_admin}/ready"))


def _start_engine(stack: Stack, number: int, address: envoy.Address, environment: dict[str, str]) -> _Part:
    admin = _free_address()
    own = {"IBEX_NONCE_KEY": stack.demo.nonce_key, **environment}
    command = ["engine", "--listen", str(address), "--admin", str(admin)]
    name = "engine" if number == 1 else f"engine-{number}"
    child = _start_child(stack, name, ["-m", "extproc", *command], own)
    return _Started(child, _answers(f"http://{admin}/ready"))


def _start_filter(
    stack: Stack,
    address: envoy.Address,
    admin: envoy.Address,
    engines: Sequence[envoy.Address],
    environment: dict[str, str],
) -> _Part:
    target = str(engines[0]) if len(engines) == 1 else f"ipv4:{','.join(map(str, engines))}"
    command = ["filter", "--listen", str(address), "--admin", str(admin), "--engine", target]
    child = _start_child(stack, "filter", ["-m", "extproc", *command], environment)
    stack.admin = f"http://{admin}"

    def has_engine() -> bool:
        ready = fetch(f"http://{admin}/ready")
        return ready is not None and json.loads(ready)["dependencies"]["engine"] == "ok"

    return _Started(child, has_engine)


def _start_stand_in(stack: Stack, address: envoy.Address) -> _Part:
    child = _start_child(stack, "provider", ["-m", "extproc.stack.provider", "--listen", str(address)], {})
    return _Started(child, _answers(f"http://{address}/received"))


def _start_envoy(stack: Stack, binary: Path, plan: envoy.Plan, environment: dict[str, str]) -> _Part:
    config = envoy.render(envoy.load(envoy.shipped("envoy.yaml")), plan)
    file = envoy.write(config, stack.state_dir / "envoy.rendered.yaml")
    running = envoy.start(binary, file, plan.admin, state_dir=stack.state_dir, environment=environment)
    child = Child("envoy", running.process, running.log_file)
    stack.children.append(child)
    stack.gateway, stack.envoy_admin = f"http{'s' if plan.tls else ''}://{plan.listen}", f"http://{plan.admin}"
    return _Started(child, _answers(f"{stack.envoy_admin}/ready"))


def _start_child(stack: Stack, name: str, arguments: list[str], environment: dict[str, str]) -> Child:
    child = Child.start(name, [sys.executable, *arguments], stack.state_dir / f"{name}.log", environment)
    stack.children.append(child)
    return child


def _wait(parts: Sequence[_Part], stopping: threading.Event) -> None:
    """Until all of them answer, one ends, one takes too long, or somebody wants us to stop."""
    deadline = time.monotonic() + _READY_LIMIT_S
    waiting = list(parts)
    while not stopping.is_set() and (waiting := [part for part in waiting if not part.is_ready()]):
        for child in (part.child for part in waiting):
            if child.has_ended():
                code = child.process.returncode
                raise StackError(f"{child.name} ended at once with code {code}; its last words:\n{child.log_end()}")
        if time.monotonic() > deadline:
            slow = waiting[0].child
            raise StackError(f"{slow.name} did not answer within {_READY_LIMIT_S:.0f} s; see {slow.log_file}")
        stopping.wait(_POLL_S)


def _answers(url: str) -> Callable[[], bool]:
    return lambda: fetch(url) is not None


def _collector(endpoint: str) -> envoy.Address | None:
    """Where Envoy sends its spans: the same receiver as the others."""
    if not endpoint:
        return None
    scheme, _, rest = endpoint.rstrip("/").partition("://")
    if scheme != "http" or "/" in rest:
        raise StackError(f"the OTLP endpoint {endpoint!r} must be http://host:port here, such as http://127.0.0.1:4318")
    return envoy.Address.parse(rest)


_CONSEQUENCES = {
    "auth": "tokens that the gate does not remember are answered 503",
    "gate": "every request is answered 503",
    "engine": "requests go on without memory, or ask the other engines",
    "filter": "requests go on without memory",
    "observer": "requests go on, and nothing is written down of them",
    "worker": "nothing is learnt from turns until it runs again; their tasks wait in the queue",
    "valkey": "turns wait in the outbox, requests are not counted, and each asks the auth service",
    "clickhouse": "traces wait in the outbox",
    "provider": "requests are answered 503",
    "envoy": "nothing is answered any more",
}


def _consequence(name: str) -> str:
    return _CONSEQUENCES[name.partition("-")[0]]


def _watch(stack: Stack, stopping: threading.Event) -> None:
    """Report each child that ends, until it is time to stop."""
    running = list(stack.children)
    while not stopping.wait(0.2):
        for child in [child for child in running if child.has_ended()]:
            running.remove(child)
            typer.echo(
                f"extproc up: {child.name} ended with code {child.process.returncode}: {_consequence(child.name)}; "
                f"its log is {child.log_file}. Stop with Ctrl-C and run `extproc up` again.",
                err=True,
            )


_SHOWN_BEFORE = "The token was shown at the first start, once. Another one:"


def _token_command(stack: Stack) -> str:
    return f'{_shown_command()} token create "another" --agent {stack.demo.agent_id}{_data_option(stack)}'


def _shown_command() -> Path:
    """`extproc` as the user called it."""
    command = Path(sys.argv[0]) if Path(sys.argv[0]).name == "extproc" else Path("extproc")
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command


def _data_option(stack: Stack) -> str:
    is_default = stack.state_dir == load(StoreSettings).data.resolve()
    return "" if is_default else f" --data {stack.state_dir}"


def _welcome(stack: Stack, *, has_stand_in: bool) -> str:
    shown, where = _shown_command(), _data_option(stack)
    provider = "a stand-in, which answers with what it received" if has_stand_in else stack.provider
    token = stack.token or "$IBEX_TOKEN"
    another = "" if stack.token else f"  {_SHOWN_BEFORE}\n\n  IBEX_TOKEN=$({_token_command(stack)})\n\n"
    kept = "Keep it: it is shown this once." if stack.token else ""
    trust = f" --cacert {stack.ca_file}" if stack.ca_file else ""
    received = f"  What reached the provider:  curl {stack.provider}/received\n" if has_stand_in else ""
    return f"""
Envoy answers at {stack.gateway}; the provider is {provider}.

In another terminal, add a memory and ask for it:

  {shown} memory add "The user's name is Ada."{where}

{another}  curl -i{trust} {stack.gateway}/v1/chat/completions \\
    -H "Authorization: Bearer {token}" -H 'Content-Type: application/json' \\
    -d '{{"model":"gpt-4o-mini","messages":[{{"role":"user","content":"What is my name?"}}]}}'

  Any client works with this base URL and this token as its key. {kept}

{received}  Health, metrics:  {stack.admin}/ready  {stack.admin}/metrics  Envoy: {stack.envoy_admin}
  Logs and data:  {stack.state_dir}
  Org and agent:  {stack.demo.org_id}  {stack.demo.agent_id}

Ctrl-C ends it.
"""
