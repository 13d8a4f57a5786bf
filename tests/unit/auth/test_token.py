from __future__ import annotations

import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.auth.hashing import HashUnusable, hash_token, is_its_hash
from extproc.auth.new_token import new_token
from extproc.auth.token import CHAT, Permission, Refusal, contains_token, mint, refusal_of, split
from extproc.memory.model import InvalidValue

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
ORG, AGENT = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


def asked(**given: object) -> dict[str, object]:
    fields = {"id": str(uuid.uuid4()), "now": NOW, "hash_of": lambda _: "h", "org_id": ORG, "name": "n"}
    return {**fields, "permissions": CHAT, **given}


class TestForm:
    def test_it_is_the_kind_a_public_part_and_a_secret(self) -> None:
        plaintext, prefix = mint()
        assert re.fullmatch(r"ibex_pat_[A-Za-z0-9]{12}_[A-Za-z0-9]{43}", plaintext)
        assert plaintext.startswith(f"{prefix}_")
        assert split(plaintext) == prefix

    def test_no_two_are_alike(self) -> None:
        assert len({mint() for _ in range(1000)}) == 1000

    @given(st.text())
    def test_what_is_no_token_has_no_prefix(self, text: str) -> None:
        assert split(text) is None

    @pytest.mark.parametrize(
        "change", [str.upper, lambda t: t + "a", lambda t: t[:-1], lambda t: t + "\n", lambda t: " " + t]
    )
    def test_nothing_else_is_taken_for_one(self, change: object) -> None:
        assert split(change(mint()[0])) is None  # type: ignore[operator]

    def test_digits_of_other_scripts_are_none(self) -> None:
        assert split(mint()[0][:-1] + "٣") is None

    def test_one_inside_a_text_is_found(self) -> None:
        assert contains_token(f"use {mint()[0]}!")
        assert not contains_token("use ibex_pat_…")

    def test_a_chat_needs_what_the_contract_says(self) -> None:
        assert CHAT == 196609


class TestValidity:
    def test_it_ends_with_its_expiry(self) -> None:
        token, _ = new_token(**asked(expires_at=NOW + timedelta(seconds=1)))  # type: ignore[arg-type]
        assert refusal_of(token, NOW) is None
        assert refusal_of(token, NOW + timedelta(seconds=1)) is Refusal.EXPIRED

    def test_it_ends_with_its_revocation_whatever_the_expiry(self) -> None:
        token, _ = new_token(**asked())  # type: ignore[arg-type]
        assert refusal_of(replace(token, revoked_at=NOW, expires_at=NOW), NOW) is Refusal.REVOKED

    def test_without_an_expiry_it_does_not_end(self) -> None:
        token, _ = new_token(**asked())  # type: ignore[arg-type]
        assert refusal_of(token, datetime.max.replace(tzinfo=UTC)) is None


class TestNewToken:
    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"org_id": "x"}, "org_id is not a UUID"),
            ({"agent_id": "x"}, "agent_id is not a UUID"),
            ({"name": ""}, "name is not"),
            ({"name": "a\nb"}, "name is not"),
            ({"name": "x" * 129}, "name is not"),
            ({"description": "x" * 1025}, "description is not"),
            ({"description": mint()[0]}, "description holds a token"),
            ({"name": mint()[0]}, "name holds a token"),
            ({"permissions": -1}, "permissions are not"),
            ({"permissions": 2**63}, "permissions are not"),
            ({"permissions": int(Permission.TOKEN_ADMIN), "agent_id": AGENT}, "bind the token to no agent"),
            ({"user_id": "a b"}, "user_id is not"),
            ({"expires_at": NOW}, "not in the future"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_is_hashed(self, given: dict[str, object], reason: str) -> None:
        def never(_plaintext: str) -> str:
            raise AssertionError

        with pytest.raises(InvalidValue, match=reason):
            new_token(**asked(**given, hash_of=never))  # type: ignore[arg-type]

    def test_its_row_shows_neither_secret_nor_hash(self) -> None:
        token, plaintext = new_token(**asked(hash_of=lambda plaintext: f"h-{plaintext}"))  # type: ignore[arg-type]
        assert plaintext.removeprefix(token.prefix) not in repr(token)


class TestHash:
    def test_it_is_argon2id_with_its_parameters(self) -> None:
        assert hash_token(mint()[0]).startswith("$argon2id$v=19$m=9216,t=2,p=1$")

    def test_it_fits_its_token_alone(self) -> None:
        plaintext, other = mint()[0], mint()[0]
        encoded = hash_token(plaintext)
        assert is_its_hash(encoded, plaintext)
        assert not is_its_hash(encoded, other)
        assert hash_token(plaintext) != encoded

    @pytest.mark.parametrize("encoded", ["", "x", "$argon2id$", "$argon2id$v=19$m=9216,t=2,p=1$AAAA$", "$2b$12$abc"])
    def test_what_is_no_hash_is_an_error_that_shows_nothing(self, encoded: str) -> None:
        with pytest.raises(HashUnusable) as caught:
            is_its_hash(encoded, mint()[0])
        assert "ibex_pat" not in str(caught.value)
