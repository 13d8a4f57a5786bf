"""What is sent and what is remembered: 1,000 memories of one user, and chat requests that ask for them.

Everything is drawn from fixed seeds, so that every process, run and set-up has the same bytes.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from typing import Any

__all__ = ["AGENT_ID", "BODY_SIZES", "MEMORIES", "ORG_ID", "USER_ID", "BodySize", "http_requests"]

ORG_ID = "0b6f3c52-6f0e-4a57-9a52-0f3f0c2f7a01"
AGENT_ID = "5d1f7a34-93a8-4a0d-8a3e-6d9f4f1b2c02"
USER_ID = "bench-user"


@dataclass(frozen=True, slots=True)
class BodySize:
    name: str
    body_bytes: int
    variants: int
    """Different bodies, sent in turn: an engine that kept answers by query would be measured as what it is not."""
    picture_bytes: int = 0
    """Base64 text of pictures within it. 5 MB of plain text would fill any model's context window, and the filter
    rightly adds nothing to such a request; with pictures 5 MB is an ordinary request, and memory is asked for."""


BODY_SIZES = {
    size.name: size
    for size in (
        BodySize("2 KB", 2_048, 50),
        BodySize("220 KB", 220_000, 20),
        BodySize("5 MB", 5_000_000, 4, picture_bytes=4_800_000),
    )
}

_PEOPLE = (
    "Ada Bruno Carla Dario Elena Farid Greta Hugo Ines Jonas Karin Leo Marta Nuno Olga Pedro Quinn Rosa Sven Tilda "
    "Umar Vera Wanda Xenia Yusuf Zoe Amir Bianca Cosmo Dilara Emil Fiona Goran Hanna Igor Julia Kofi Lucia Milan "
    "Nadia Oskar Paula Rafael Selma Tomas Ursula Viktor Wilma Yara Zeno"
)
_PLACES = "Lisbon Oslo Graz Turin Ghent Porto Krakow Bergen Leipzig Nantes"
_THINGS = "peanuts saffron lilies pottery rowing chess sourdough vinyl orchids kayaks"
_DAYS = ("3 March", "14 May", "22 June", "9 July", "30 August", "17 September", "5 October", "11 November")

_FACTS = (
    ("{who}'s birthday is on {day}.", "When is {who}'s birthday?"),
    ("{who} moved to {place} for a new job.", "Which city did {who} move to?"),
    ("{who} is allergic to {thing}, so dinners are planned without them.", "What is {who} allergic to?"),
    ("The project review with {who} is due on {day}.", "When is the project review with {who} due?"),
    ("{who} collects {thing} and keeps them in the attic.", "What does {who} collect in the attic?"),
    ("{who} asked for the quarterly report as a spreadsheet.", "How does {who} want the quarterly report?"),
    ("The contract with {who} ends on {day} and renews by itself.", "When does the contract with {who} end?"),
    ("{who}'s sister runs a bakery in {place}.", "Where is the bakery of {who}'s sister?"),
    ("{who} prefers short emails without greetings.", "Which style of emails does {who} prefer?"),
    ("The flight to {place} with {who} leaves on {day}.", "When does the flight with {who} leave?"),
    ("{who} plays the cello in an orchestra in {place}.", "Which instrument does {who} play in the orchestra?"),
    (
        "{who} reviews every database migration before release.",
        "Who reviews the database migration, {who} or somebody else?",
    ),
    ("The spare key of {who}'s house is with a neighbour.", "Where is the spare key of {who}'s house?"),
    ("{who} learnt about {thing} in a course in {place}.", "Where did {who} take the course about {thing}?"),
    ("{who}'s laptop was replaced on {day} after a broken screen.", "When was {who}'s laptop replaced?"),
    ("{who} votes against meetings before ten.", "What does {who} think of meetings before ten?"),
    ("The garden of {who} in {place} is full of {thing}.", "What is the garden of {who} full of?"),
    ("{who} ran the marathon of {place} in under four hours.", "Which marathon did {who} run?"),
    ("{who}'s team deploys on {day} with a feature freeze before.", "When does {who}'s team deploy?"),
    ("{who} lent the user a tent for the trip to {place}.", "For which trip did {who} lend the tent?"),
)


def _facts() -> list[tuple[str, str]]:
    """1,000 memories, each with the question that asks for it."""
    choose = random.Random(1).choice
    places, things = _PLACES.split(), _THINGS.split()
    return [
        (statement.format(**words), question.format(**words))
        for statement, question in _FACTS
        for who in _PEOPLE.split()
        for words in [{"who": who, "place": choose(places), "thing": choose(things), "day": choose(_DAYS)}]
    ]


_PAIRS = _facts()
MEMORIES: tuple[str, ...] = tuple(statement for statement, _ in _PAIRS)

_WORDS = (
    "the a of to and in that for with on is this be as are from at not have can which will one all when if there "
    "more request service latency memory index batch queue worker cluster config deploy error retry timeout schema "
    "table column value string number function return class module import result report customer order invoice "
    "price stock shipment meeting agenda decision owner deadline risk budget forecast region quarter growth margin "
    "team release feature"
)


def _prose(draw: random.Random, size: int) -> str:
    """About `size` characters of sentences, lines and quotation marks: what a body escapes."""
    words = _WORDS.split()
    pieces: list[str] = []
    length = 0
    while length < size:
        sentence = " ".join(draw.choices(words, k=draw.randint(6, 16))).capitalize()
        piece = f'He noted: "{sentence}."\n' if draw.random() < 0.15 else f"{sentence}. "
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces)[:size].rstrip()


def _chat_body(size: BodySize, variant: int) -> bytes:
    """One OpenAI chat request of `size.body_bytes` bytes, give or take a few."""
    draw = random.Random(f"{size.name} {variant}")
    question = _PAIRS[draw.randrange(len(_PAIRS))][1]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are the assistant of a small company."}]
    if size.picture_bytes:
        messages.append({"role": "user", "content": _pictures(draw, size.picture_bytes)})
        messages.append({"role": "assistant", "content": "Three pictures of the shelf, labels readable."})
    last = {"role": "user", "content": question}
    room = size.body_bytes - len(_encode([*messages, last]))
    turns = max(2, 2 * round(room / 8_000))
    for index in range(turns):
        role = ("user", "assistant")[index % 2]
        messages.append({"role": role, "content": _prose(draw, max(1, room // turns - 40))})
    messages.append(last)
    missing = size.body_bytes - len(_encode(messages))  # what the estimate of 40 bytes around each message left
    if missing > 0:
        messages[0]["content"] += " " * missing
    return _encode(messages)


def _pictures(draw: random.Random, size: int) -> list[dict[str, Any]]:
    raw_bytes = size // 3 * 3 // 4  # of each of the three
    urls = ["data:image/jpeg;base64," + base64.b64encode(draw.randbytes(raw_bytes)).decode() for _ in range(3)]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": "text", "text": "What do you see on these pictures?"}, *pictures]


def _encode(messages: list[dict[str, Any]]) -> bytes:
    body = {"messages": messages, "model": "gpt-4o", "temperature": 0.2, "max_tokens": 512}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def http_requests(size: BodySize) -> list[bytes]:
    """Whole HTTP/1.1 requests as an official client sends them, one for each variant of the body."""
    return [_http_request(_chat_body(size, variant), variant) for variant in range(size.variants)]


def _http_request(body: bytes, variant: int) -> bytes:
    draw = random.Random(variant)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        "host: api.example.com\r\n"
        "accept: application/json\r\n"
        "accept-encoding: gzip, deflate\r\n"
        "user-agent: OpenAI/Python 2.8.0\r\n"
        "authorization: Bearer sk-bench-0123456789abcdef0123456789abcdef\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "x-stainless-lang: python\r\n"
        "x-stainless-package-version: 2.8.0\r\n"
        "x-stainless-os: Linux\r\n"
        "x-stainless-runtime: CPython\r\n"
        "x-stainless-runtime-version: 3.11.9\r\n"
        "x-stainless-retry-count: 0\r\n"
        # Sampled: every request makes spans that are exported.
        f"traceparent: 00-{draw.getrandbits(128):032x}-{draw.getrandbits(64):016x}-01\r\n"
        f"x-ibex-user-id: {USER_ID}\r\n"
        f"x-ibex-session-id: bench-{variant}\r\n"
        "\r\n"
    )
    return head.encode() + body
