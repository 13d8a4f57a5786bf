from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.worker.secrets import ALWAYS, PII, Kind, find_secrets, redact


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("key sk-proj-abcdEFGH1234567890abcdEFGH1234567890 ok", Kind.TOKEN),
        ("use ghp_abcdefghijklmnopqrstuvwxyz0123456789 here", Kind.TOKEN),
        ("AKIAIOSFODNN7EXAMPLE", Kind.TOKEN),
        ("token ibex_pat_0123456789abcdefghijklmnop", Kind.TOKEN),
        ("Authorization: Bearer abc.def123ghi456jkl789", Kind.TOKEN),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", Kind.TOKEN),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", Kind.PRIVATE_KEY),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn", Kind.PRIVATE_KEY),
        ("my password is hunter2-Tr0ub4dor", Kind.PASSWORD),
        ("password: correct-horse-battery", Kind.PASSWORD),
        ("mein Passwort ist Geheim99", Kind.PASSWORD),
        ("my pin is 4821", Kind.PASSWORD),
        ("postgres://me:p4ss@db.example.com:5432/x", Kind.CONNECTION),
        ("card 4111 1111 1111 1111, 04/29", Kind.CARD),
        ("card 5500-0000-0000-0004", Kind.CARD),
        ("IBAN GB82 WEST 1234 5698 7654 32", Kind.IBAN),
        ("SSN 078-05-1120", Kind.SOCIAL_SECURITY),
        ("my SSN is 078 05 1120", Kind.SOCIAL_SECURITY),
        ("social security number: 078051120", Kind.SOCIAL_SECURITY),
        ("card 4111.1111.1111.1111", Kind.CARD),
        ("card 4111  1111  1111  1111", Kind.CARD),
        ("card 4111\N{NO-BREAK SPACE}1111\N{NO-BREAK SPACE}1111\N{NO-BREAK SPACE}1111", Kind.CARD),
        ("card 4111 / 1111 / 1111 / 1111", Kind.CARD),
        ("card 4111\n1111\n1111\n1111", Kind.CARD),
        ("iban de89 3704 0044 0532 0130 00", Kind.IBAN),
        ("DE89 3704 0044 0532 0130 00 OK", Kind.IBAN),
        ("my pw is hunter2xyz9", Kind.PASSWORD),
        ("password hunter2xyz9!", Kind.PASSWORD),
        ("AWS secret wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", Kind.PASSWORD),
        ("mein Passwort lautet Geheim123", Kind.PASSWORD),
        ("passcode 882211", Kind.PASSWORD),
        ("Authorization: Basic dXNlcjpwYXNzd29yZDEy", Kind.PASSWORD),
        ("https://api.example.com/v1?key=AbC123456789xyzz", Kind.TOKEN),
    ],
)
def test_a_secret_is_taken_out(text: str, kind: Kind) -> None:
    redacted = redact(text)
    assert redacted.kinds == (kind,)
    assert f"[redacted: {kind}]" in redacted.text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to a.b+c@example.org", Kind.EMAIL),
        ("call +44 20 7946 0958", Kind.PHONE),
        ("call (555) 123-4567", Kind.PHONE),
    ],
)
def test_personal_identifiers_are_taken_out_where_configured(text: str, kind: Kind) -> None:
    assert redact(text).kinds == ()
    assert redact(text, ALWAYS | PII).kinds == (kind,)


@pytest.mark.parametrize(
    "text",
    [
        "7d2f4c1e-0b7a-4f0e-9f5e-1c2d3e4f5a6b",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "commit 9d30518, tag v1.2.3.4567",
        "order 1234-5678-9012 and invoice 20261118000123",
        "tracking 1Z999AA10123456784",
        "ISBN 978-3-16-148410-0",
        "from 192.168.100.100 at 2026-11-18 10:00:01.123",
        "1700000000000 ms",
        "1111 1111 1111 1111",
        "4111 1111 1111 1112",
        "the password is wrong",
        "my password is not working",
        "my token is expired",
        "the secret is patience",
        "the api key is in the vault",
        "a skateboarding-is-my-favourite-hobby trip",
        "the public-key idea, the pass, the pin",
        "https://example.com/a?b=c#d",
        "room 123-45, seats 6-7-8",
        "3.14159265358979323846",
        "the ratio is 16:9 and the score 3:2",
        "token base64-encoded, token ERC20, token limit 8192tokens",
        "I pass user_id2 to main2.py and pin 13 to pin 100",
        "basic vegetarian cooking, Basic authentication",
        "https://shop.example/p?code=summer-sale-campaign&key=abc",
        "the secret santa2026 party",
        "DE89 people came",
    ],
)
def test_everyday_text_stays(text: str) -> None:
    assert redact(text, ALWAYS | PII).text == text


SECRETS = st.sampled_from(
    ["sk-proj-abcdEFGH1234567890abcdEFGH", "4111111111111111", "SE3550000000054910000003", "AKIAIOSFODNN7EXAMPLE"]
)


@given(st.text(alphabet="ab ,.\n", max_size=40), SECRETS, st.text(alphabet="ab ,.\n", max_size=40))
def test_a_secret_is_found_in_any_surroundings(before: str, secret: str, after: str) -> None:
    assert secret not in redact(f"{before} {secret} {after}").text


@given(st.text(alphabet=st.sampled_from("ak-_@:/.=1234567890 password is Bearer eyJ sk-\n"), max_size=200))
def test_redacting_again_changes_nothing_and_places_do_not_overlap(text: str) -> None:
    every = ALWAYS | PII
    once = redact(text, every)
    assert redact(once.text, every).text == once.text
    ends = 0
    for secret in find_secrets(text, every):
        assert ends <= secret.start < secret.end
        ends = secret.end


@pytest.mark.parametrize(
    "text",
    [
        "a", "1 ", "password ", "token is ", "-----BEGIN A PRIVATE KEY-----", "a@", "x://a:", "eyJ", "A", "AB12 ",
        "+1 ", "sk-a-", "a.", "bearer ", "http://aaaa", "1-", "é",
    ],
)  # fmt: skip
def test_a_megabyte_takes_bounded_time(text: str) -> None:
    begun = time.process_time()
    redact(text * (1_000_000 // len(text)), ALWAYS | PII)
    assert time.process_time() - begun < 5


def test_what_was_taken_out_whole_leaves_nothing() -> None:
    assert redact("4111 1111 1111 1111").is_empty
    assert not redact("my card is 4111 1111 1111 1111").is_empty
