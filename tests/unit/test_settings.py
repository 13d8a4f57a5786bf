from __future__ import annotations

from pathlib import Path

import pytest

from extproc.settings import (
    AuthSettings,
    EngineSettings,
    FilterSettings,
    GateSettings,
    ObserverSettings,
    SettingsError,
    StoreSettings,
    load,
    reference,
    unknown_variables,
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("IBEX_")]:
        monkeypatch.delenv(name)


def test_an_option_wins_over_the_environment_and_none_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_FILTER_LISTEN", "127.0.0.1:1")
    assert load(FilterSettings, filter_listen="127.0.0.1:2").filter_listen == "127.0.0.1:2"
    assert load(FilterSettings, filter_listen=None).filter_listen == "127.0.0.1:1"


def test_all_mistakes_are_reported_together_by_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_BUDGET_MS", "-1")
    monkeypatch.setenv("IBEX_PLACEMENT", "secret-value")
    with pytest.raises(SettingsError) as caught:
        load(FilterSettings)
    message = str(caught.value)
    assert "IBEX_BUDGET_MS" in message
    assert "IBEX_PLACEMENT" in message
    assert "secret-value" not in message


def test_a_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_BUGDET_MS", "45")
    monkeypatch.setenv("IBEX_DATA", "/x")
    assert unknown_variables(FilterSettings, EngineSettings, StoreSettings) == ["IBEX_BUGDET_MS"]


@pytest.mark.parametrize("kind", [FilterSettings, ObserverSettings, EngineSettings, StoreSettings])
def test_every_setting_explains_itself(kind: type[FilterSettings]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_the_readmes_table_is_made_from_the_code() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert reference() in readme, "run `make settings`"


def test_all_processes_start_on_one_machine_as_they_are() -> None:
    servers = (FilterSettings, ObserverSettings, EngineSettings, GateSettings, AuthSettings)
    fields = [(name, field.default) for kind in servers for name, field in kind.model_fields.items()]
    places = [default for name, default in fields if name.endswith("_listen")]
    assert len(places) >= 2 * len(servers)
    assert len(set(places)) == len(places)
