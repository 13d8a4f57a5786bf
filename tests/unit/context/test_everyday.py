"""What people ask and what they would miss, end to end through retrieval, score and gate. The rest of the quality is
measured by the benchmark; this says that nothing common is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from extproc.context.cache import load_index
from extproc.context.index import Index
from extproc.context.pack import Exclusion
from extproc.context.score import Ranking, required_relevance
from extproc.context.select import select
from extproc.memory.model import Memory, Namespace
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.text import parse_query
from extproc.settings import EngineSettings, load

from .conftest import Asking

PAIRS = [
    ("What is my name?", "The user's name is Ada."),
    ("what's my dog called?", "The user has a dog called Rex."),
    ("How old is my cat?", "The user's cat Milo is three years old."),
    ("Which town did I grow up in?", "The user grew up in the town of Hallstatt."),
    ("Where do I live now?", "The user lives in Lisbon."),
    ("Am I allergic to anything?", "The user has a peanut allergy."),
    ("What allergies do I have?", "Allergies: penicillin and cashews."),
    ("What language do I prefer to speak?", "The user's preferred language is Portuguese."),
    ("Which programming language do I prefer?", "The user prefers Rust as a programming language."),
    ("What is my job?", "The user's job is head nurse at a children's hospital."),
    ("Where do I work?", "The user works at Acme Robotics."),
    ("When is my deadline for the thesis?", "The thesis deadline is 14 March."),
    ("when is the report for Karin due", "The quarterly report for Karin is due on Friday."),
    ("When is my birthday?", "The user's birthday is 3 August."),
    ("What's my wife's name?", "The user's wife is named Joana."),
    ("How many children do I have?", "The user has two children, Tom and Eva."),
    ("What is my favourite colour?", "Favorite color: teal."),
    ("What car do I drive?", "The user drives a red Volvo."),
    ("Which database does our team use?", "The team uses PostgreSQL 16 as its database."),
    ("What's the name of our product?", "The product's name is Skylark."),
    ("Who is my manager?", "The user's manager is Priya Nair."),
    ("When did I last go to the dentist?", "The user went to the dentist on 2 May."),
    ("What instrument do I play?", "The user plays an instrument: the cello."),
    ("Which editor do I use for coding?", "The user's editor is Helix."),
    ("What size are my shoes?", "Shoe size: 42."),
    ("When does my flight to Oslo leave?", "The flight to Oslo leaves at 7:40 on Monday."),
    ("What timezone am I in?", "The user's timezone is Europe/Lisbon."),
    ("Which gym do I go to?", "The user goes to the gym on Rua Augusta."),
    ("What was the budget for the kitchen renovation?", "The kitchen renovation budget is 12,000 euros."),
    ("Remind me what tone I want in emails", "The user wants a formal tone in emails."),
]

PARAPHRASES = [
    ("What pets do I have?", "The user has a dog called Rex."),
    ("What do I do for a living?", "The user's job is head nurse at a children's hospital."),
    ("Which foods must I avoid?", "The user has a peanut allergy."),
    ("What is my home town?", "The user grew up in Hallstatt."),
    ("Am I married?", "The user's wife is named Joana."),
    ("Who am I?", "The user's name is Ada."),
]
"""Hardly a word in common: meanings find them."""

GENERIC = [
    "write a haiku",
    "fix this python error",
    "Fix this Python error",
    "Write a haiku about autumn leaves.",
    "Explain the difference between TCP and UDP.",
    "Summarize the following article in three bullet points.",
    "Translate 'good morning' into French.",
    "What is the capital of France?",
    "Write a function that reverses a linked list in Rust.",
    "How do I center a div?",
    "Give me five ideas for a birthday party.",
    "Tell me a joke.",
    "What is 17 times 23?",
    "Convert 10 miles to kilometers.",
    "Who won the world cup in 1998?",
    "Refactor this class to use dataclasses.",
    "Generate a regex for email addresses.",
    "hello",
    "thanks, that worked!",
    "continue",
    "Explain quantum entanglement like I'm five.",
    "List the planets of the solar system.",
    "What's the weather like?",
    "Proofread this paragraph, please.",
    "Write unit tests for this code.",
    "How does photosynthesis work?",
    "Make it shorter.",
    "Why is the sky blue?",
    "Draft an SQL query that counts orders per day.",
    "What does the error 'index out of range' mean?",
    "Write a polite email that declines a meeting.",
]

TINY = [
    ("What should I cook for dinner tonight? Is there anything that I am allergic to?", "allergic to peanuts"),
    ("Where do I live?", "lives in Lisbon"),
    ("What is my dog called?", "dog called Rex"),
    ("Who is my employer?", "works at Acme Robotics"),
    ("When is my deadline?", "deadline of the grant report is 12 May"),
    ("How do I like my coffee?", "prefers coffee without sugar"),
    ("I have an hour before the train leaves and it rains. What did I say about my dog?", "dog called Rex"),
]
"""Asked in namespaces of three, of ten and, where one memory answers, of one."""
MARGIN = 0.25
"""By how much of itself a gate is passed, so that no rounding may close it."""

UNRELATED = [
    f"{who} {what} {where}."
    for who in ("The customer", "Marta", "The release train", "Our supplier in Turin", "The night shift")
    for what in ("asked for an invoice about", "wrote a long note on", "prefers Python for", "blames the weather for")
    for where in ("the garden fence", "shipment 4411", "the quarterly audit", "a broken scanner", "the blue ink")
]
"""A hundred memories that share words with the prompts above."""


MakeMemory = Callable[..., Memory]


IndexOf = Callable[[Iterable[str]], Index]
Found = Callable[[str, Index], list[str]]


@pytest.fixture(scope="module")
def found(asking: Asking) -> Found:
    """What the engine would inject with the default settings and no budget, best first."""

    def ask(question: str, index: Index) -> list[str]:
        packed = select(
            asking.rank(question, index, limit=64),
            parse_query(question),
            min_relevance=load(EngineSettings).min_relevance,
            tokens=100_000,
            max_memories=64,
        )
        return [one.scored.memory.content for one in packed if one.exclusion is Exclusion.INCLUDED]

    return ask


@pytest.fixture(scope="module")
def index_of(asking: Asking, make: MakeMemory) -> IndexOf:
    return lambda contents: asking.index(*map(make, contents))


@pytest.fixture(scope="module")
def everything(index_of: IndexOf) -> Index:
    return index_of(dict.fromkeys([*(memory for _, memory in [*PAIRS, *PARAPHRASES]), *UNRELATED]))


@pytest.mark.parametrize(("question", "memory"), PAIRS)
def test_a_question_finds_its_memory_alone_and_among_many(
    question: str, memory: str, everything: Index, index_of: IndexOf, found: Found
) -> None:
    assert found(question, index_of([memory])) == [memory]
    assert memory in found(question, everything)[:3]


def turns() -> list[tuple[int, str, dict[str, object]]]:
    """What a worker makes of three turns: each turn nearly verbatim, and the facts that it states."""
    user: dict[str, object] = {"speaker": "user"}
    return [
        (0, "I moved to Lisbon in March and I'm allergic to peanuts", user),
        (0, "The user lives in Lisbon (moved in March (2026-03)).", {"subject": "user"}),
        (0, "The user is allergic to peanuts.", {"subject": "user"}),
        (1, "My dog Rex sleeps all day", user),
        (1, "The user has a dog called Rex.", {"subject": "user"}),
        (2, "I work at Acme Robotics and the grant report is due on 12 May", user),
        (2, "The user works at Acme Robotics.", {"subject": "user"}),
        (2, "The user's deadline of the grant report is 12 May.", {"subject": "user"}),
        (3, "no sugar in my coffee please", user),
        (3, "The user prefers coffee without sugar.", {"subject": "user"}),
    ]


def gate_and_best(asking: Asking, question: str, index: Index) -> tuple[float, Ranking]:
    ranking = asking.rank(question, index)
    required = required_relevance(
        parse_query(question),
        load(EngineSettings).min_relevance,
        names_subject=ranking.names_subject,
        evaluated=ranking.evaluated,
    )
    return required, ranking


@pytest.mark.parametrize(("question", "answer"), TINY)
def test_the_gate_opens_wide_in_a_tiny_namespace(
    question: str, answer: str, asking: Asking, make: MakeMemory, tmp_path: Path, agent: Namespace
) -> None:
    every = turns()
    turn = next(turn for turn, text, _ in every if answer in text)
    sizes = {
        1: [one for one in every if answer in one[1]][-1:],
        3: [one for one in every if one[0] == turn],
        10: every,
    }
    for size, said in sizes.items():
        found = set()
        for attempt in range(3):
            store = SqliteMemoryStore.open(f"sqlite:///{tmp_path}/{size}-{attempt}.db", asking.indexer)
            try:
                store.add_many(
                    [make(text, session_id="s", turn_index=at, metadata=metadata) for at, text, metadata in said]
                )
                required, ranking = gate_and_best(asking, question, load_index(store, asking.indexer, agent))
            finally:
                store.close()
            assert ranking.best_relevance > (1 + MARGIN) * required
            assert any(answer in one.memory.content for one in ranking.scored[:3])
            found.add(tuple(sorted((one.memory.content, round(one.composite, 6)) for one in ranking.scored)))
        assert len(found) == 1  # whatever the ids


@pytest.mark.parametrize("prompt", GENERIC)
def test_a_prompt_that_needs_no_memory_gets_none_in_a_tiny_namespace(
    prompt: str, asking: Asking, make: MakeMemory
) -> None:
    memories = [make(text, session_id="s", turn_index=turn, metadata=metadata) for turn, text, metadata in turns()]
    for count in (1, 3, 10):
        required, ranking = gate_and_best(asking, prompt, asking.index(*memories[:count]))
        assert ranking.best_relevance < required


@pytest.mark.parametrize("prompt", GENERIC)
def test_a_prompt_that_needs_no_memory_gets_none(prompt: str, everything: Index, found: Found) -> None:
    assert found(prompt, everything) == []


@pytest.mark.parametrize(("question", "memory"), PARAPHRASES)
def test_a_paraphrase_finds_its_memory(question: str, memory: str, everything: Index, found: Found) -> None:
    assert memory in found(question, everything)[:3]


def test_a_question_behind_a_long_message_finds_its_memory(everything: Index, found: Found) -> None:
    chatter = (
        "Yesterday the harbour was crowded, gulls circled above trawlers and nobody could park near the lighthouse. "
        "Fishermen mended torn nets, tourists photographed rusty anchors, and a brass orchestra rehearsed marches. "
    )
    assert "The user's cat Milo is three years old." in found(chatter + "Anyway, how old is my cat Milo?", everything)
