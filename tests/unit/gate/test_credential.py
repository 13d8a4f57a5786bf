from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.gate.credential import CREDENTIAL_HEADERS, find_token, secret_parameters
from extproc.gate.verdict import INVALID_TOKEN, MISSING_TOKEN, Denial

TOKEN = "ibex_pat_0123456789abcdef"
OTHER = "ibex_pat_fedcba9876543210"


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}", f" Bearer {TOKEN} "])
def test_a_bearer_token_is_taken(value: str) -> None:
    assert find_token({"authorization": value}) == TOKEN


@pytest.mark.parametrize("name", ["x-api-key", "x-goog-api-key", "api-key"])
@pytest.mark.parametrize("value", [TOKEN, f"Bearer {TOKEN}"])
def test_other_clients_headers_carry_it_bare_or_with_its_scheme(name: str, value: str) -> None:
    assert find_token({name: value}) == TOKEN


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"x-api-key": " "}],
)
def test_nothing_is_a_missing_token(headers: dict[str, str]) -> None:
    assert find_token(headers) is MISSING_TOKEN


@pytest.mark.parametrize(
    "value",
    [
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer{TOKEN}",
        f"Bearer\t{TOKEN}",
        f"Bearer Bearer {TOKEN}",
        f"Bearer {TOKEN},Bearer {TOKEN}",
        f"Bearer {TOKEN}, Bearer {TOKEN}",
        f"Bearer {TOKEN} {TOKEN}",
        "Bearer ibex_pat_short",
        "Bearer sk-0123456789abcdef0123456789abcdef",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {TOKEN}\x00",
        f"Bearer {TOKEN}é",
        f"Bearer {TOKEN}{'x' * 500}",
    ],
)
def test_what_looks_like_no_token_is_invalid(value: str) -> None:
    assert find_token({"authorization": value}) is INVALID_TOKEN


def test_the_same_token_in_several_headers_is_one() -> None:
    assert find_token({"authorization": f"Bearer {TOKEN}", "x-api-key": TOKEN, "api-key": ""}) == TOKEN


@pytest.mark.parametrize("other", [OTHER, "rubbish", f"{TOKEN}x"])
def test_two_different_tokens_are_invalid(other: str) -> None:
    assert find_token({"authorization": f"Bearer {TOKEN}", "x-goog-api-key": other}) is INVALID_TOKEN


@given(
    st.dictionaries(
        st.sampled_from(sorted(CREDENTIAL_HEADERS)), st.text() | st.binary().map(lambda b: b.decode("latin-1"))
    )
)
def test_any_text_gives_a_token_or_a_denial(headers: dict[str, str]) -> None:
    found = find_token(headers)
    assert isinstance(found, Denial) or (found.startswith("ibex_pat_") and any(found in v for v in headers.values()))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/v1/models", []),
        ("/v1/models?", []),
        ("/v1/models?a=1&b", []),
        ("/v1/models?key=x&a=1&key=y", ["key"]),
        ("/v1/models?k%65y=x&KEY=y", ["k%65y", "KEY"]),
        ("/v1/models?access_token=x&api-key=y&api_key=z", ["access_token", "api-key", "api_key"]),
        (f"/v1/models?a=1&t={TOKEN}", ["t"]),
        (f"/v1/models?t=%69{TOKEN[1:]}", ["t"]),
    ],
)
def test_parameters_with_a_credential_are_found_as_they_are_spelled(path: str, names: list[str]) -> None:
    assert secret_parameters(path) == names


@given(st.text())
def test_any_path_can_be_searched(path: str) -> None:
    secret_parameters(path)
