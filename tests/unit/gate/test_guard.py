from __future__ import annotations

import pytest

from extproc.gate.guard import Admission, Budgets, Guard, group_of


def digest(number: int) -> bytes:
    return b"%032d" % number


def is_asked(guard: Guard, number: int, address: str, now: float, *, is_valid: bool) -> bool:
    """One question from beginning to end; whether it reached the auth service."""
    if guard.admit(digest(number), address, now) is not Admission.ASK:
        return False
    guard.settle(digest(number), address, now, is_valid=is_valid)
    return True


def test_a_wrong_token_is_not_asked_again_for_a_while() -> None:
    guard = Guard()
    assert is_asked(guard, 1, "a", 0, is_valid=False)
    assert guard.admit(digest(1), "a", 4.9) is Admission.WRONG
    assert guard.admit(digest(1), "a", 5.0) is Admission.ASK


def test_ten_thousand_wrong_tokens_are_a_few_questions() -> None:
    guard = Guard()
    asked = sum(is_asked(guard, number, "10.0.0.1", number / 1000, is_valid=False) for number in range(10_000))
    assert asked <= 50 + 10 * 10 + 1


def test_from_a_thousand_addresses_they_are_not_many_more() -> None:
    guard = Guard()
    asked = sum(
        is_asked(guard, number, f"10.0.{number % 10}.{number % 100}", number / 1000, is_valid=False)
        for number in range(10_000)
    )
    assert asked <= 200 + 50 * 10 + 1


def test_a_flood_from_one_address_leaves_the_others_alone() -> None:
    guard = Guard()
    for number in range(10_000):
        is_asked(guard, number, "10.0.0.1", number / 1000, is_valid=False)
    assert is_asked(guard, 77_777, "10.0.0.2", 10, is_valid=True)


def test_a_token_that_was_good_before_passes_any_flood() -> None:
    guard = Guard()
    assert is_asked(guard, 77_777, "10.0.0.1", 0, is_valid=True)
    for number in range(10_000):
        is_asked(guard, number, "10.0.0.1", 1, is_valid=False)
    assert is_asked(guard, 77_777, "10.0.0.1", 1, is_valid=True)


def test_a_good_token_never_seen_passes_a_flood_from_its_own_address_when_it_comes_again() -> None:
    guard = Guard()
    for number in range(1006):
        is_asked(guard, number, "10.0.0.1", number / 1000, is_valid=False)
    assert not is_asked(guard, 99_999, "10.0.0.1", 1.01, is_valid=True)
    assert not is_asked(guard, 99_999, "10.0.0.1", 1.02, is_valid=True), "that is no second try"
    for number in range(1006, 3001):
        is_asked(guard, number, "10.0.0.1", number / 1000, is_valid=False)
    assert is_asked(guard, 99_999, "10.0.0.1", 3.01, is_valid=True)


def test_a_flood_that_repeats_itself_is_bounded_too() -> None:
    guard = Guard()
    asked = sum(is_asked(guard, number % 2000, "10.0.0.1", number / 1000, is_valid=False) for number in range(10_000))
    assert asked <= 50 + 10 * 10 + 20 + 10 * 10 + 1


def test_good_tokens_use_nothing_up() -> None:
    guard = Guard()
    assert all(is_asked(guard, number, "10.0.0.1", 0, is_valid=True) for number in range(1000))


def test_few_unproven_questions_are_on_their_way_at_once() -> None:
    guard = Guard()
    admitted = [guard.admit(digest(number), "a", 0) for number in range(20)]
    assert admitted.count(Admission.ASK) == 16
    assert admitted[16:] == [Admission.WAIT] * 4
    guard.abandon(digest(0))
    assert guard.admit(digest(30), "a", 0) is Admission.ASK


def test_a_good_token_that_goes_bad_loses_its_way_in() -> None:
    guard = Guard()
    is_asked(guard, 1, "a", 0, is_valid=True)
    is_asked(guard, 1, "a", 1, is_valid=False)
    assert guard.admit(digest(1), "a", 1) is Admission.WRONG


def test_a_budget_fills_again() -> None:
    budgets: Budgets[str] = Budgets(2, 1.0, 10)
    for _ in range(2):
        budgets.charge("a", 0)
    assert not budgets.has_left("a", 0.9)
    assert budgets.has_left("a", 1.0)
    assert budgets.has_left("b", 0)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:0db8:0:0:ffff::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "", True),
        ("::nonsense", "::rubbish", False),
    ],
)
def test_an_ipv6_network_counts_as_one_address(one: str, other: str, is_same: bool) -> None:
    assert (group_of(one) == group_of(other)) is is_same
