from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from extproc.chat import InjectionMode
from extproc.directives.store import DirectiveStore, NoDirective, Standing, parse_content, parse_mode
from extproc.memory.database import Database
from extproc.memory.model import InvalidValue
from extproc.memory.store import StoreError

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'memories.db'}")
    yield made
    made.close()


@pytest.fixture
def store(database: Database) -> DirectiveStore:
    return DirectiveStore(database)


@pytest.fixture
def org() -> str:
    return str(uuid4())


@pytest.fixture
def agent() -> str:
    return str(uuid4())


def put(store: DirectiveStore, org: str, agent: str, content: str, mode: InjectionMode | None = None) -> Standing:
    return store.set(org, agent, content, mode, (str(uuid4()), str(uuid4())), NOW)


def active(store: DirectiveStore, org: str, agent: str) -> str | None:
    found = store.active(org, agent)
    return None if found is None else found[1]


class TestDirectives:
    def test_the_first_version_counts_at_once(self, store: DirectiveStore, org: str, agent: str) -> None:
        standing = put(store, org, agent, "Be brief.")
        assert (standing.version, standing.injection_mode, standing.is_active) == (1, "system_first", True)
        assert standing.content_hash == hashlib.sha256(b"Be brief.").hexdigest()
        assert store.active(org, agent) == (standing, "Be brief.")
        assert store.standing(org, agent) == standing

    def test_a_new_version_takes_its_place_and_the_old_one_stays(
        self, store: DirectiveStore, org: str, agent: str
    ) -> None:
        first, second = put(store, org, agent, "One."), put(store, org, agent, "Two.", InjectionMode.USER_PREPEND)
        assert (second.version, second.injection_mode) == (2, "user_prepend")
        assert active(store, org, agent) == "Two."
        assert [(one.version, one.content, one.id) for one in store.history(org, agent, 10)] == [
            (2, "Two.", second.version_id),
            (1, "One.", first.version_id),
        ]
        assert [one.version for one in store.history(org, agent, 10, before=2)] == [1]
        assert put(store, org, agent, "Three.").injection_mode == "user_prepend", "as it was"

    def test_the_text_that_counts_makes_no_version(self, store: DirectiveStore, org: str, agent: str) -> None:
        first = put(store, org, agent, "One.")
        again = put(store, org, agent, "One.", InjectionMode.SYSTEM_APPEND)
        assert (again.version_id, again.injection_mode) == (first.version_id, "system_append")
        put(store, org, agent, "Two.")
        assert put(store, org, agent, "One.").version == 3, "one that counted before is a new decision"

    def test_switched_off_it_goes_nowhere_until_it_is_on_or_set(
        self, store: DirectiveStore, org: str, agent: str
    ) -> None:
        put(store, org, agent, "One.")
        assert not store.switch(org, agent, NOW, on=False).is_active
        assert active(store, org, agent) is None
        assert store.switch(org, agent, NOW, on=True).version == 1
        assert active(store, org, agent) == "One."
        store.switch(org, agent, NOW, on=False)
        assert put(store, org, agent, "One.").is_active

    def test_roll_back_goes_to_the_version_before_or_a_named_one(
        self, store: DirectiveStore, org: str, agent: str
    ) -> None:
        for content in ("One.", "Two.", "Three."):
            put(store, org, agent, content)
        assert store.roll_back(org, agent, None, NOW).version == 2
        assert store.roll_back(org, agent, None, NOW).version == 1
        with pytest.raises(NoDirective, match="no version 0"):
            store.roll_back(org, agent, None, NOW)
        assert store.roll_back(org, agent, 3, NOW).version == 3
        assert active(store, org, agent) == "Three."
        assert put(store, org, agent, "Four.").version == 4

    def test_the_mode_changes_alone(self, store: DirectiveStore, org: str, agent: str) -> None:
        first = put(store, org, agent, "One.")
        changed = store.set_mode(org, agent, InjectionMode.SYSTEM_APPEND, NOW)
        assert (changed.injection_mode, changed.version_id) == ("system_append", first.version_id)

    def test_who_has_none_is_told_so(self, store: DirectiveStore, org: str, agent: str) -> None:
        assert store.active(org, agent) is None
        assert store.history(org, agent, 10) == []
        with pytest.raises(NoDirective):
            store.standing(org, agent)
        with pytest.raises(NoDirective):
            store.switch(org, agent, NOW, on=True)
        with pytest.raises(NoDirective):
            store.set_mode(org, agent, InjectionMode.SYSTEM_FIRST, NOW)
        with pytest.raises(NoDirective):
            store.roll_back(org, agent, 1, NOW)

    def test_organisations_with_the_same_agent_share_nothing(self, store: DirectiveStore, org: str, agent: str) -> None:
        other = str(uuid4())
        put(store, org, agent, "Ours.")
        assert store.active(other, agent) is None
        assert store.all_of(other, 10) == []
        with pytest.raises(NoDirective):
            store.roll_back(other, agent, 1, NOW)
        put(store, other, agent, "Theirs.")
        store.switch(other, agent, NOW, on=False)
        assert active(store, org, agent) == "Ours."
        assert [one.content for one in store.history(org, agent, 10)] == ["Ours."]

    def test_all_of_an_organisation_come_in_pages(self, store: DirectiveStore, org: str) -> None:
        made = sorted(str(uuid4()) for _ in range(5))
        for one in made:
            put(store, org, one, "Text.")
        assert [one.agent_id for one in store.all_of(org, 3)] == made[:3]
        assert [one.agent_id for one in store.all_of(org, 3, made[2])] == made[3:]

    @pytest.mark.parametrize("content", ["x", "x" * 32_768, "ä" * 16_384, "日本語\n\n'; DROP TABLE directives; --\t🙂"])
    def test_any_text_of_the_right_size_comes_back(
        self, store: DirectiveStore, org: str, agent: str, content: str
    ) -> None:
        put(store, org, agent, parse_content(content))
        assert active(store, org, agent) == content

    @pytest.mark.parametrize("content", ["", "x" * 32_769])
    def test_the_database_holds_the_size_too(self, store: DirectiveStore, org: str, agent: str, content: str) -> None:
        with pytest.raises(StoreError):
            put(store, org, agent, content)
        assert store.active(org, agent) is None

    def test_writers_at_the_same_time_make_a_version_each(self, store: DirectiveStore, org: str, agent: str) -> None:
        errors: list[Exception] = []

        def write(number: int) -> None:
            try:
                put(store, org, agent, f"Text {number}.")
            except Exception as error:  # noqa: BLE001 - shown below
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert errors == []
        assert sorted(one.version for one in store.history(org, agent, 20)) == list(range(1, 9))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("x" * 32_769, "32,769 bytes; the most is 32,768"),
        ("ä" * 16_385, "32,770 bytes"),
        ("a\0b", "NUL"),
        ("a\ud800", "not UTF-8"),
    ],
)
def test_what_cannot_be_a_directive_is_refused_with_a_word(content: str, problem: str) -> None:
    with pytest.raises(InvalidValue, match=problem):
        parse_content(content)


def test_only_the_three_modes_are_taken() -> None:
    assert parse_mode("user_prepend") is InjectionMode.USER_PREPEND
    with pytest.raises(InvalidValue, match="system_first, system_append, user_prepend"):
        parse_mode("first")
