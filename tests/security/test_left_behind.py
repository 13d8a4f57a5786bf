"""After everything else: no token, provider's key or text of a conversation is in any log, trace, metric, admin page,
database or file of the whole run, but in the few places that the contract names. Last in this directory's order.

Each source shows first that it is read: it holds something that must be there.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

import httpx2
import pytest
from redis import Redis

from extproc.auth.token import mint
from tests.integration.conftest import StandIn
from tests.security.conftest import Evidence, Tenants, World
from tests.security.security_side import Secrets, eventually

Sources = Mapping[str, bytes]

TEXT_COLUMNS = {
    ("turns", "user_text"): {"question", "prompt", "memory of A", "memory of B", "memory of user U1"},
    ("turns", "assistant_text"): {
        "completion",
        "question",
        "prompt",
        "memory of A",
        "memory of B",
        "memory of user U1",
    },
    ("memories", "content"): {"memory of A", "memory of B", "memory of user U1"},
    ("directive_versions", "content"): {"directive"},
}
"""Where the contract wants which text; the stand-in's completions repeat what it got."""
OF_THE_RUN = ("token", "provider key", "unused provider key")
"""In no file at all. Texts are looked for in a database by column, in other files as everything else."""


def needles(secret: str) -> dict[str, bytes]:
    """A secret in the forms that logs, URLs, headers and databases could give it."""
    raw = secret.encode()
    forms = {
        "plain": raw,
        "URL": quote(secret, safe="").encode(),
        "form": quote_plus(secret).encode(),
        "every byte in percent": "".join(f"%{byte:02X}" for byte in raw).encode(),
        "hexadecimal": raw.hex().encode(),
        "JSON": json.dumps(secret)[1:-1].encode(),
        "HTML": secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").encode(),
        "UTF-16": secret.encode("utf-16-le"),
        "backwards": raw[::-1],
    }
    for offset, alphabet in itertools.product(range(3), ("standard", "URL-safe")):
        # In base64 a text has three looks, by where it begins; what its neighbours change is cut off.
        encode = base64.b64encode if alphabet == "standard" else base64.urlsafe_b64encode
        whole = encode(b"\0" * offset + raw)
        forms[f"base64 {alphabet} {offset}"] = whole[4 if offset else 0 : -4]
    return forms


def leaks(sources: Sources, secrets: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Where, what, in which form; never the secret itself."""
    found = []
    everything = b"\0".join(sources.values())
    for what, secret in secrets.items():
        forms = needles(secret)
        seen = {needle for needle in set(forms.values()) if needle in everything}
        for form in (form for form, needle in forms.items() if needle in seen):
            found += [(where, what, form) for where, content in sources.items() if forms[form] in content]
    return found


def token_secrets(secrets: Secrets) -> dict[str, str]:
    """By the secret part's end alone: a log that shortens tokens, or leaves out what is public, is no better."""
    return {f"token {number}": token[-24:] for number, token in enumerate(secrets.tokens)}


@pytest.fixture(scope="module")
def mark(world: World, shared_tenants: Tenants) -> str:
    """Id of one request with everything in it that must be nowhere, in every place where a client may put it."""
    caller, secrets = shared_tenants.a, world.secrets
    prompt, directive = secrets.texts["prompt"], secrets.texts["directive"]
    world.commands.run("directive", "set", directive, "--org", caller.org_id, "--agent", caller.agent_id)
    eventually(lambda: "canary directive" in caller.asked(question=prompt)[1].body.decode())
    elsewhere = {"x-api-key": caller.token, "cookie": f"session={caller.token}", "x-ibex-session-id": "of-the-mark"}
    path = f"/v1/chat/completions?key={caller.token}&note={quote(caller.token)}"

    def ask(stream: bool) -> httpx2.Response:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}], "stream": stream}
        return caller.gateway.client.post(path, json=body, headers=caller.headers | elsewhere)

    assert caller.gateway.patiently(lambda: ask(True)).status_code == 200
    response = caller.gateway.patiently(lambda: ask(False))
    assert response.status_code == 200
    for headers in ({"authorization": f"Bearer {secrets.token(mint()[0])}"}, {"x-ibex-user-id": caller.token}):
        caller.once(headers)
    caller.once({"x-ibex-session-id": caller.token, "x-ibex-agent-id": caller.token, "traceparent": caller.token})
    caller.gateway.client.get("/v1/models", headers={"x-goog-api-key": caller.token[:-1], "user-agent": "curl"})
    return response.headers["x-request-id"]


@pytest.fixture(scope="module")
def delivered(world: World, mark: str) -> str:
    """As `mark`, once its turn is where turns go and every process has sent its spans."""
    eventually(lambda: mark.encode() in traces(world), 30)
    eventually(lambda: mark.encode() in b"".join(world.evidence.spans.raw), 30)
    eventually(lambda: not rows_of(next(world.state.rglob("outbox*.db")), "entries"), 30)
    return mark


def logs(evidence: Evidence) -> Sources:
    return {str(file): file.read_bytes() for directory in evidence.directories for file in directory.rglob("*.log")}


def admin_pages(world: World) -> Sources:
    pages = [
        "/config_dump?include_eds",
        "/stats",
        "/stats/prometheus",
        "/clusters",
        "/listeners",
        "/server_info",
        "/runtime",
    ]
    found = {page: httpx2.get(world.described["envoy_admin"] + page, timeout=20).content for page in pages}
    for name in ("auth", "gate", "engine", "filter", "observer"):
        for page in ("/metrics", "/ready", "/health"):
            found[name + page] = httpx2.get(world.admin_of(name) + page, timeout=20).content
    return found


def traces(world: World) -> bytes:
    """All rows of all tables of ours in ClickHouse: none before the first one makes them."""
    response = httpx2.post(world.described["traces"], content=b"SELECT * FROM ibex.llm_traces FORMAT JSONEachRow")
    if "UNKNOWN_DATABASE" in response.text or "UNKNOWN_TABLE" in response.text:
        return b""
    assert response.status_code == 200, response.text
    return response.content


def redis(world: World) -> Sources:
    found = {}
    read = {b"string": "GET", b"list": "LRANGE", b"hash": "HGETALL", b"set": "SMEMBERS", b"zset": "ZRANGE"}
    with Redis.from_url(world.described["broker"], protocol=2) as client:
        keys = list(client.scan_iter("*"))
        client.response_callbacks.clear()  # answers as they come
        for key in keys:
            kind = client.execute_command("TYPE", key)
            span = ["0", "-1"] if kind in {b"list", b"zset"} else []
            value = client.execute_command(read[kind], key, *span)
            found[key.decode()] = key + b"\n" + repr(value).encode() + (value if isinstance(value, bytes) else b"")
    return found


def databases(evidence: Evidence) -> list[Path]:
    files = [file for directory in evidence.directories for file in directory.rglob("*.db")]
    return [file for file in files if file.read_bytes()[:15] == b"SQLite format 3"]


def rows_of(file: Path, table: str) -> list[tuple[object, ...]]:
    db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return db.execute(f'SELECT * FROM "{table}"').fetchall()
    finally:
        db.close()


def cells(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """Table, column and all values of each column of a database."""
    db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    db.text_factory = bytes
    try:
        tables = [name.decode() for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            cursor = db.execute(f'SELECT * FROM "{table}"')
            columns = [column[0] for column in cursor.description]
            rows = cursor.fetchall()
            for number, column in enumerate(columns):
                values = [row[number] for row in rows]
                yield table, column, b"\n".join(one if isinstance(one, bytes) else str(one).encode() for one in values)
    finally:
        db.close()


def other_files(evidence: Evidence) -> Sources:
    """Whatever else there is: rendered configurations, append-only files, ClickHouse's parts, keys, certificates."""
    found = {}
    for directory in evidence.directories:
        for file in directory.rglob("*"):
            if file.is_file():
                found[str(file)] = file.read_bytes()
    return found


def command_lines(world: World) -> Sources:
    pids = {name: pid for name, (pid, *_) in world.described["pids"].items()}
    return {f"command line of {name}": Path(f"/proc/{pid}/cmdline").read_bytes() for name, pid in pids.items()}


def everything_secret(secrets: Secrets) -> dict[str, str]:
    return token_secrets(secrets) | secrets.texts


def test_no_secret_is_in_a_log(world: World, delivered: str) -> None:
    sources = logs(world.evidence)
    for name in ("auth", "gate", "engine", "filter", "observer", "envoy", "clickhouse", "valkey"):
        assert any(name in Path(one).name for one in sources), (name, [*sources])
    access = b"".join(content for name, content in sources.items() if "envoy" in Path(name).name)
    assert delivered.encode() in access + b"".join(sources.values())
    assert leaks(sources, everything_secret(world.secrets)) == []


def test_no_secret_is_in_a_span(world: World, delivered: str) -> None:
    received = b"\n".join(world.evidence.spans.raw)
    services = {span.service for span in world.evidence.spans.spans}
    assert len(services) >= 4, services
    assert delivered.encode() in received
    assert leaks({"spans": received}, everything_secret(world.secrets)) == []


def test_no_secret_is_in_a_metric_or_on_an_admin_page(world: World, delivered: str) -> None:
    sources = admin_pages(world)
    assert b"ibex.gate" in sources["/config_dump?include_eds"]
    assert b"ibex_gate_checks_total" in sources["gate/metrics"]
    assert b"ext_authz" in sources["/stats"]
    assert leaks(sources, everything_secret(world.secrets)) == []


def test_no_secret_is_in_a_trace_row_and_no_organisation_is_a_label(world: World, delivered: str) -> None:
    rows = traces(world)
    assert delivered.encode() in rows
    assert leaks({"traces": rows}, everything_secret(world.secrets)) == []
    pages = b"".join(content for name, content in admin_pages(world).items() if name.endswith("/metrics"))
    orgs = {json.loads(row)["org_id"] for row in rows.splitlines()}
    assert orgs
    assert not [org for org in orgs if org.encode() in pages]


def test_redis_holds_a_directive_and_no_other_text(world: World, delivered: str, shared_tenants: Tenants) -> None:
    sources = redis(world)
    directive_key = f"{shared_tenants.a.org_id}:directive:{shared_tenants.a.agent_id}"
    secrets = everything_secret(world.secrets)
    del secrets["directive"]
    assert "extraction" in sources
    assert leaks(sources, secrets) == []
    tasks = b"".join(
        base64.b64decode(one) for one in re.findall(rb'"body": ?\\?"([A-Za-z0-9+/=]+)', sources["extraction"])
    )
    assert b"session_id" in tasks
    assert leaks({"tasks": tasks}, everything_secret(world.secrets)) == []
    holds_directive = {where for where, _, _ in leaks(sources, {"directive": world.secrets.texts["directive"]})}
    assert holds_directive <= {directive_key}


def test_text_is_in_the_columns_for_it_alone(world: World, delivered: str) -> None:
    tokens = token_secrets(world.secrets)
    allowed_and_found = set()
    for file in databases(world.evidence):
        for table, column, content in cells(file):
            where = f"{file.name} {table}.{column}"
            assert leaks({where: content}, tokens) == []
            allowed = TEXT_COLUMNS.get((table, column), set())
            for _, what, form in leaks({where: content}, world.secrets.texts):
                assert what in allowed, (where, what, form)
                allowed_and_found.add((table, column))
    assert allowed_and_found == set(TEXT_COLUMNS), "each is read, and has its text"


def test_no_file_and_no_command_line_holds_a_token_or_a_providers_key(world: World, delivered: str) -> None:
    sources = {**other_files(world.evidence), **command_lines(world)}
    assert any(name.endswith("envoy.rendered.yaml") for name in sources)
    keys = {name: text for name, text in world.secrets.texts.items() if name in OF_THE_RUN}
    assert leaks(sources, token_secrets(world.secrets) | keys) == []


def test_no_file_but_a_database_and_redis_own_holds_text(world: World, delivered: str) -> None:
    """Those were read above, by column and by key. The outboxes are among the files here: they are empty again, and
    what was erased is wiped from their logs every 10 s."""

    def read() -> Sources:
        return {
            name: content
            for name, content in other_files(world.evidence).items()
            if not Path(name).name.startswith("memories.db") and "appendonly" not in name
        }

    assert any("outbox" in name for name in read())
    eventually(lambda: not leaks(read(), world.secrets.texts), 40)


def test_a_planted_secret_is_seen_in_every_form_and_every_source(world: World, delivered: str, tmp_path: Path) -> None:
    for what, secret in {**world.secrets.texts, "token": world.secrets.tokens[0]}.items():
        for form, needle in needles(secret).items():
            assert (what, form) in {(one[1], one[2]) for one in leaks({"x": b"a" + needle + b"b"}, {what: secret})}
        wrapped = base64.b64encode(f'{{"x": "{secret}", "y": 1}}'.encode())
        assert leaks({"x": wrapped}, {what: secret})
    planted = {"planted": mint()[0][-24:]}
    text = planted["planted"]
    evidence = Evidence(world.evidence.spans, [tmp_path])
    (tmp_path / "some.log").write_text(f"token={text}")
    (tmp_path / "deep").mkdir()
    db = sqlite3.connect(tmp_path / "deep" / "x.db")
    with db:
        db.execute("CREATE TABLE t (a TEXT)")
        db.execute("INSERT INTO t VALUES (?)", (base64.b64encode(text.encode()).decode(),))
    db.close()
    with Redis.from_url(world.described["broker"], protocol=2) as client:
        client.rpush("planted", text)
        in_redis = leaks(redis(world), planted)
        client.delete("planted")
    httpx2.get(f"{world.described['envoy_admin']}/stats")
    # Paths are in the access log, and clients' names are in spans.
    world.gateway.client.get(f"/planted/{text}", headers={"authorization": "Bearer x", "user-agent": text})
    eventually(lambda: leaks(logs(world.evidence), planted), 10)
    eventually(lambda: leaks({"spans": b"".join(world.evidence.spans.raw)}, planted), 30)
    assert in_redis
    assert leaks(logs(evidence), planted)
    assert leaks(other_files(evidence), planted)
    assert [one for one in databases(evidence) for _, _, content in cells(one) if leaks({"x": content}, planted)]


def test_the_stand_in_provider_never_got_a_callers_token(
    world: World, provider_process: StandIn, delivered: str
) -> None:
    received = {"provider": json.dumps([one.headers for one in provider_process.received()]).encode()}
    received["paths"] = "\n".join(one.path for one in provider_process.received()).encode()
    assert b"authorization" in received["provider"]
    assert leaks(received, token_secrets(world.secrets)) == []
