"""The Celery application: its settings, its broker, and which messages it can read. Nobody is reached."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretStr

from extproc.settings import SettingsError, WorkerSettings, load
from extproc.turns.broker import Broker
from extproc.turns.celery_message import TASK, encode_message
from extproc.turns.sinks import ExtractionTask
from extproc.worker.app import make_app, place_of
from extproc.worker.parts import open_extractor
from extproc.worker.task import longest_wait_s, wait_s
from extproc.worker.transport import DELIVERIES_HEADER, SentinelTransport, _Reading, deliveries, is_readable

MESSAGE: dict[str, Any] = json.loads(encode_message(ExtractionTask("id", "session", "org"), "tag"))


def settings(**given: Any) -> WorkerSettings:
    return load(WorkerSettings, broker_url=SecretStr("redis://127.0.0.1:6379/3"), **given)


def test_it_has_the_task_of_the_contract() -> None:
    assert TASK in make_app(settings()).tasks


def test_two_of_a_process_have_a_task_each() -> None:
    first, second = make_app(settings()), make_app(settings())
    assert first.tasks[TASK] is not second.tasks[TASK]
    assert [app.tasks[TASK].app for app in (first, second)] == [first, second]


def test_a_task_is_acknowledged_after_its_work_and_comes_again_when_its_worker_is_lost() -> None:
    conf = make_app(settings()).conf
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert (conf.worker_prefetch_multiplier, conf.accept_content) == (1, ["json"])


@pytest.mark.parametrize("limit_s", [2.0, 120.0, 3600.0])
def test_a_task_does_not_count_as_lost_while_it_runs_or_waits(limit_s: float) -> None:
    conf = make_app(settings(worker_limit_s=limit_s)).conf
    assert conf.task_soft_time_limit < conf.task_time_limit
    assert conf.broker_transport_options["visibility_timeout"] > conf.task_time_limit + longest_wait_s(limit_s)


def test_waits_grow_and_end_growing() -> None:
    waits = [wait_s(attempts, 120.0) for attempts in range(1, 12)]
    assert 0.5 <= waits[0] <= 1.0
    assert all(30 <= wait <= 60 for wait in waits[7:])


def test_without_a_broker_it_does_not_start() -> None:
    with pytest.raises(SettingsError, match="IBEX_BROKER_URL"):
        make_app(load(WorkerSettings, broker_url=SecretStr("")))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:p%40ss@h:1/2", "redis://:p%40ss@h:1/2"),
        ("unix:///run/v.sock?db=4", "redis+socket:///run/v.sock?virtual_host=4"),
        ("redis+sentinel://a:1,b:2/main/5", "sentinel://a:1/5;sentinel://b:2/5"),
    ],
)
def test_a_brokers_url_in_celerys_words(url: str, expected: str) -> None:
    assert place_of(Broker.parse(url)).url == expected


def test_sentinels_are_asked_for_the_primary() -> None:
    place = place_of(Broker.parse("redis+sentinel://a:1/main/5"))
    assert (place.transport, place.options["master_name"]) == (SentinelTransport, "main")


def test_sentinels_are_reached_with_tls_where_the_primary_is() -> None:
    secured = place_of(Broker.parse("rediss+sentinel://a:1/main/5?ssl_ca_certs=/ca.pem&sentinel_password=s"))
    plain = place_of(Broker.parse("redis+sentinel://a:1/main/5"))
    expected = {"ssl": True, "ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": "required", "password": "s"}
    assert expected.items() <= secured.options["sentinel_kwargs"].items()  # type: ignore[attr-defined]
    assert "ssl" not in plain.options["sentinel_kwargs"]  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["redis+cluster", "rediss+cluster"])
def test_a_worker_cannot_wait_on_a_cluster(scheme: str) -> None:
    with pytest.raises(SettingsError, match="IBEX_BROKER_URL: a worker needs one server, or Sentinels"):
        make_app(load(WorkerSettings, broker_url=SecretStr(f"{scheme}://a:1,b:2")))


def test_a_model_needs_a_place_and_less_time_than_its_task() -> None:
    with pytest.raises(SettingsError, match="IBEX_LLM_URL"):
        open_extractor(settings(extractor="llm"))
    with pytest.raises(SettingsError, match="IBEX_LLM_TIMEOUT_S"):
        open_extractor(settings(extractor="llm", llm_url="http://h/v1", llm_model="m", llm_timeout_s=200))


def test_the_observers_messages_are_readable() -> None:
    assert is_readable(MESSAGE)


@pytest.mark.parametrize("name", ["body", "properties"])
def test_a_message_without_its_envelope_is_not_readable(name: str) -> None:
    assert not is_readable({key: value for key, value in MESSAGE.items() if key != name})


@pytest.mark.parametrize("message", [None, [], "text", 5, {}, {**MESSAGE, "body": "x"}, {**MESSAGE, "headers": 3}])
def test_what_is_no_message_is_not_readable(message: object) -> None:
    assert not is_readable(message)


class Channel:
    """The end of kombu's restoring."""

    def _do_restore_message(self, payload: Any, *_: Any) -> None:
        self.restored = payload


class CountingChannel(_Reading, Channel):
    pass


def test_a_message_that_is_put_back_counts_how_often() -> None:
    channel = CountingChannel()
    message = {**MESSAGE, "headers": dict(MESSAGE["headers"])}
    for _ in range(3):
        channel._do_restore_message(message, "", "extraction", None)
    assert deliveries(channel.restored["headers"][DELIVERIES_HEADER]) == 3


def test_what_a_closing_channel_gives_back_does_not_count() -> None:
    channel = CountingChannel()
    channel.is_giving_back = True
    channel._do_restore_message({**MESSAGE, "headers": {}}, "", "extraction", None)
    assert channel.restored["headers"] == {}


def test_a_process_that_dies_while_the_worker_stops_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery.worker.state.should_stop", 0)
    channel = CountingChannel()
    channel._do_restore_message({**MESSAGE, "headers": {}}, "", "extraction", None)
    assert channel.restored["headers"] == {}


@pytest.mark.parametrize("payload", [None, [], {}, {"headers": None}])
def test_what_has_no_headers_is_put_back_all_the_same(payload: object) -> None:
    channel = CountingChannel()
    channel._do_restore_message(payload, "", "extraction", None)
    assert channel.restored == payload


@pytest.mark.parametrize("header", [None, "3", -1, 0, True, 2.5, 10**9, [], {}])
def test_what_is_no_count_counts_as_none(header: object) -> None:
    assert deliveries(header) == 0
