from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import pytest

from extproc.gate.guard import Admission, Budgets, Guard, group_of, network_of


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


FLOOD_PER_S = 1000
FLOOD_S = 12
Arrival = tuple[float, int, str, bool]
"""When, which token, from where, whether it is a right one."""


def flood(addresses: int, sends: int) -> Iterator[Arrival]:
    """Wrong tokens, each sent so often, 0.6 s apart."""
    waiting: list[Arrival] = []
    for number in range(FLOOD_S * FLOOD_PER_S // sends):
        first = number * sends / FLOOD_PER_S
        address = f"6.{number % addresses // 200}.{number % 200}.9"
        for one in range(sends):
            heapq.heappush(waiting, (first + 0.6 * one, number, address, False))
        while waiting and waiting[0][0] <= first:
            yield heapq.heappop(waiting)


def clients(addresses: Iterable[str]) -> list[Arrival]:
    """One after the other through the flood, each with a new token that it sends up to three times, as the SDKs do."""
    starts = [(0.2 + number * (FLOOD_S - 4) / 100, 100_000 + number) for number in range(100)]
    each = [(start, number, address) for (start, number), address in zip(starts, addresses, strict=False)]
    return sorted((start + wait, number, address, True) for start, number, address in each for wait in (0, 0.9, 2.5))


def play(guard: Guard, arrivals: Iterable[Arrival]) -> tuple[int, set[int]]:
    """How many wrong tokens were asked, and which right ones."""
    wrong, right = 0, set()
    for at, number, address, is_valid in arrivals:
        if is_asked(guard, number, address, at, is_valid=is_valid):
            if is_valid:
                right.add(number)
            else:
                wrong += 1
    return wrong, right


MOST_ASKED = 3 * 100 + 8 * 10 + FLOOD_S * (3 * 20 + 8 * 2)


@pytest.mark.parametrize("sends", [1, 2, 3])
@pytest.mark.parametrize("addresses", [1, 20, 100])
def test_in_a_flood_clients_elsewhere_get_in_within_three_tries(addresses: int, sends: int) -> None:
    elsewhere = [f"9.{number}.0.1" for number in range(100)]
    asked, served = play(Guard(), heapq.merge(flood(addresses, sends), clients(elsewhere)))
    assert len(served) == 100
    assert asked <= MOST_ASKED


@pytest.mark.parametrize("addresses", [400, 1000])
def test_and_from_the_start_where_each_address_sends_little(addresses: int) -> None:
    elsewhere = [f"9.{number}.0.1" for number in range(100)]
    asked, served = play(Guard(), heapq.merge(flood(addresses, 2), clients(elsewhere)))
    assert len(served) == 100
    assert asked <= MOST_ASKED


@pytest.mark.parametrize("sends", [1, 2])
@pytest.mark.parametrize("addresses", [1, 20, 400])
def test_and_those_at_an_address_of_the_flood_nearly_all(addresses: int, sends: int) -> None:
    there = [f"6.0.{number % addresses % 200}.9" for number in range(100)]
    asked, served = play(Guard(), heapq.merge(flood(addresses, sends), clients(there)))
    assert len(served) >= 90
    assert asked <= MOST_ASKED


def test_an_address_does_not_make_others_pay_for_the_tokens_it_shows_first() -> None:
    def shown_twice() -> Iterator[Arrival]:
        for at, number, _, is_valid in flood(1, 1):
            yield at, number, "6.6.6.6", is_valid
            yield at, number, f"6.{number % 20}.0.9", is_valid

    guard = Guard()
    asked, _ = play(guard, shown_twice())
    assert asked <= MOST_ASKED
    assert is_asked(guard, 77_777, "9.9.9.9", FLOOD_S, is_valid=True)


def test_many_networks_of_one_provider_are_soon_suspected_together() -> None:
    guard = Guard()
    asked, _ = play(guard, ((number / 1000, number, f"2001:db8:1:{number:x}::1", False) for number in range(5000)))
    assert asked <= 2 * 100 + 5 * 2 * 20 + 1
    assert is_asked(guard, 77_777, "2001:db8:2::1", 5, is_valid=True)


@pytest.mark.parametrize("addresses", [1, 200])
def test_an_office_whose_new_tokens_prove_right_is_not_suspected(addresses: int) -> None:
    guard = Guard()
    play(guard, flood(20, 2))
    office = [(100_000 + number, f"9.9.9.{number % addresses}") for number in range(500)]
    assert all(is_asked(guard, number, address, FLOOD_S, is_valid=True) for number, address in office)


def test_an_address_that_right_tokens_come_from_gets_in_beside_its_own_broken_client() -> None:
    guard = Guard()
    assert is_asked(guard, 77_777, "9.9.9.9", 0, is_valid=True)
    play(guard, ((number, 200_000 + number, "9.9.9.9", False) for number in range(-60, 0)))
    play(guard, flood(20, 2))
    assert is_asked(guard, 88_888, "9.9.9.9", FLOOD_S, is_valid=True)


def test_a_question_without_an_answer_is_no_try_more() -> None:
    guard = Guard()
    for at in (0.0, 0.1, 0.2):
        assert guard.admit(digest(1), "a", at) is Admission.ASK
        guard.abandon(digest(1))
    attempt = guard._unproven[digest(1)]
    assert (attempt.tries, attempt.suspicion) == (1, 1)


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
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
    ],
)
def test_an_ipv6_network_counts_as_one_address(one: str, other: str, is_same: bool) -> None:
    assert (group_of(one) == group_of(other)) is is_same


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0"),
        ("2001:db8:1:2::1", "2001:0db8:0001"),
        ("", ""),
        ("host", "host"),
        ("::nonsense", ":"),
    ],
)
def test_addresses_belong_to_networks(address: str, network: str) -> None:
    assert network_of(group_of(address)) == network
