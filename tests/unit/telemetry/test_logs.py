from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest
import structlog

from extproc.telemetry.logs import LineWriter, configure_logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


def test_a_line_is_one_json_object_with_what_was_bound() -> None:
    stream = io.BytesIO()
    writer = configure_logs("filter", "info", stream)
    log = structlog.get_logger("x")
    log.info("request", outcome="injected", memories=2)
    log.debug("not shown")
    logging.getLogger("library").warning("from %s", "elsewhere")
    writer.close()
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["process"], first["event"], first["outcome"], first["level"]) == (
        "filter",
        "request",
        "injected",
        "info",
    )
    assert second["event"] == "from elsewhere"


def test_a_traceback_has_no_local_variables() -> None:
    stream = io.BytesIO()
    writer = configure_logs("filter", "info", stream)
    prompt = "the client's secret"
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("x").exception("bug")
    writer.close()
    line = json.loads(stream.getvalue())
    assert line["exception"][0]["exc_type"] == "ValueError"
    assert prompt not in json.dumps(line)


def test_a_reader_that_stopped_costs_lines_and_no_time() -> None:
    reader, writer_end = os.pipe()
    with os.fdopen(writer_end, "wb", buffering=0) as stream:
        writer = LineWriter(stream)
        for _ in range(50_000):  # a pipe holds 64 KiB and nobody reads: 10,000 lines are kept at most, the rest dropped
            writer.put(b"x" * 100)
        os.close(reader)
        writer.close()


def test_an_exceptions_own_words_are_not_logged_and_its_place_is() -> None:
    stream = io.BytesIO()
    writer = configure_logs("test", "info", stream)
    try:
        try:
            raise ValueError("canary-cause")
        except ValueError as cause:
            raise KeyError("canary-prompt") from cause
    except KeyError:
        structlog.get_logger("test").exception("a bug")
    writer.close()
    line = stream.getvalue().decode()
    assert "canary" not in line
    assert "KeyError" in line
    assert "test_logs.py" in line
