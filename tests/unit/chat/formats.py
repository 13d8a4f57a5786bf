"""Each format a second time: bodies of it, and by plain reading of the parsed tree, what a splice must do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import strategies as st

from extproc.chat import ChatFormat, Placement, anthropic_messages, gemini, openai_chat, openai_responses
from tests.unit.chat.odd_json import TELLING_TEXTS, Number, Pairs, Tree, any_value, numbers, obj, texts

_BLANKS = set(" \b\t\n\v\f\r")


@dataclass(frozen=True)
class Format:
    chat: ChatFormat
    path: str
    messages: str
    content: str
    text_types: tuple[str | None, ...]
    bodies: st.SearchStrategy[Pairs]
    place_system: Callable[[Pairs, str], bool]
    """Change the tree as SYSTEM_FIRST should; False: there is no place."""
    write_user: Callable[[str], Pairs]

    @property
    def name(self) -> str:
        return self.chat.name

    def query(self, tree: Pairs) -> str:
        found = self._last_user(tree)
        return "" if found is None else "\n".join(slot[1] for slot in found[1])

    def expected(self, tree: Pairs, block: str, placement: Placement) -> Pairs:
        """The tree after the splice."""
        tree = copy.deepcopy(tree)
        found = self._last_user(tree)
        if placement is Placement.SYSTEM_FIRST and self.place_system(tree, block):
            return tree
        if found is None:
            return tree
        index, slots = found
        array = tree.get(self.messages)
        if placement is Placement.BEFORE_LAST_USER and type(array) is list and not self._has_result(array[index]):
            array.insert(index, self.write_user(block))
        else:
            slots[-1][1] = block + "\n\n" + slots[-1][1]
        return tree

    def _last_user(self, tree: Pairs) -> tuple[int, list[list[Tree]]] | None:
        """Index of the message, and the `[key, text]` entries with its texts."""
        entry = tree.entry(self.messages)
        assert entry is not None
        if isinstance(entry[1], str):
            return (0, [entry]) if _is_text(entry[1]) else None
        array = [entry[1]] if isinstance(entry[1], Pairs) else entry[1]
        for index in range(len(array) - 1, -1, -1):
            message = array[index]
            role = message.entry("role") or (["role", "user"] if self.chat is gemini else ["role", None])
            if role[1] == "user" and (slots := self._slots(message.entry(self.content))):
                return index, slots
        return None

    def _slots(self, content: list[Tree] | None) -> list[list[Tree]]:
        if content is None:
            return []
        if isinstance(content[1], str):
            return [content] if _is_text(content[1]) else []
        parts = [content[1]] if isinstance(content[1], Pairs) else content[1]
        if type(parts) is not list:
            return []
        slots = [part.entry("text") for part in parts if part.get("type") in self.text_types]
        return [slot for slot in slots if slot is not None and _is_text(slot[1])]

    def _has_result(self, message: Pairs) -> bool:
        content = message.get(self.content)
        parts = content if type(content) is list else []
        return any(
            part.get("type") == "tool_result" or part.entry("functionResponse") or part.entry("function_response")
            for part in parts
        )


def _is_text(value: Tree) -> bool:
    return isinstance(value, str) and not isinstance(value, Number) and not set(value) <= _BLANKS


# Bodies. Keys of an object come in any order, with unknown ones between them; an earlier duplicate may precede any key.


def objects(
    required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]] | None = None
) -> st.SearchStrategy[Pairs]:
    kinds = {**(optional or {}), **required}

    @st.composite
    def build(draw: st.DrawFn) -> Pairs:
        shape = Random(
            draw(st.integers(0, 2**16))
        )  # one draw for all of it: many small ones take most of a test's time
        keys = [*required, *(key for key in optional or {} if shape.random() < 0.5)]
        if keys and shape.random() < 0.2:
            keys.append(shape.choice(keys))
        shape.shuffle(keys)
        pairs = [[key, draw(kinds[key])] for key in keys]
        for _ in range(shape.choice((0, 0, 1, 2))):
            pairs.insert(shape.randint(0, len(pairs)), ["x-" + shape.choice(TELLING_TEXTS), any_value(shape)])
        return Pairs(pairs)

    return build()


def _type(name: str) -> st.SearchStrategy[str]:
    return st.just(name)


_flags = st.none() | st.booleans()
_counts = numbers() | st.sampled_from([Number("1"), Number("4096")]) | st.none()


def _chat_messages(parts: st.SearchStrategy[Tree], roles: tuple[str, ...]) -> st.SearchStrategy[list[Pairs]]:
    contents = texts() | st.lists(parts, max_size=4) | st.none() | numbers()
    role = st.sampled_from(("user", "user", *roles))
    return st.lists(objects({"role": role}, {"content": contents, "name": texts(4)}), max_size=5)


_chat_parts = (
    objects({"type": _type("text"), "text": texts()})
    | objects({"type": _type("text")}, {"text": st.none() | numbers()})
    | objects({"type": _type("image_url"), "image_url": objects({"url": texts()})})
)
_chat_bodies = objects(
    {"messages": _chat_messages(_chat_parts, ("assistant", "system", "developer", "tool"))},
    {"model": texts(8) | st.none(), "stream": _flags, "max_tokens": _counts, "max_completion_tokens": _counts},
)


def _chat_system(tree: Pairs, block: str) -> bool:
    messages = tree.get("messages")
    first = messages[0].get("role") if messages else "system"
    messages.insert(0, obj(role="developer" if first == "developer" else "system", content=block))
    return True


_anthropic_parts = (
    objects({"type": _type("text"), "text": texts()}, {"cache_control": objects({"type": _type("ephemeral")})})
    | objects({"type": _type("tool_result"), "tool_use_id": texts(4)}, {"content": texts()})
    | objects({"type": _type("image"), "source": objects({"type": _type("base64"), "data": texts()})})
)
_anthropic_bodies = objects(
    {"messages": _chat_messages(_anthropic_parts, ("assistant",))},
    {
        "system": texts() | st.none() | st.lists(objects({"type": _type("text"), "text": texts()}), max_size=2),
        "model": texts(8),
        "max_tokens": _counts,
        "stream": _flags,
    },
)


def _prefix(entry: list[Tree], block: str) -> bool:
    entry[1] = block + "\n\n" + entry[1]
    return True


def _anthropic_system(tree: Pairs, block: str) -> bool:
    entry = tree.entry("system")
    if entry is None:
        tree.insert(0, ["system", block])
        return True
    if isinstance(entry[1], str):
        return _prefix(entry, block)
    if type(entry[1]) is list:
        entry[1].insert(0, obj(type="text", text=block))
        return True
    return False


_response_parts = objects({"type": _type("input_text"), "text": texts()}) | objects(
    {"type": _type("input_image"), "image_url": texts()}
)
_response_items = (
    objects(
        {"role": st.sampled_from(("user", "user", "assistant", "developer"))},
        {"type": _type("message"), "content": texts() | st.lists(_response_parts, max_size=4)},
    )
    | objects({"type": _type("function_call_output"), "output": texts()})
    | objects({"type": _type("reasoning"), "content": st.just([])})
)
_response_bodies = objects(
    {"input": st.lists(_response_items, max_size=5)}, {"instructions": texts() | st.none(), "stream": _flags}
) | objects({"input": texts()}, {"instructions": texts() | st.none(), "max_output_tokens": _counts})


def _response_system(tree: Pairs, block: str) -> bool:
    entry = tree.entry("instructions")
    if entry is None:
        tree.insert(0, ["instructions", block])
        return True
    return isinstance(entry[1], str) and _prefix(entry, block)


_gemini_parts = (
    objects({"text": texts()})
    | objects({"inlineData": objects({"data": texts()})})
    | objects({"functionResponse": objects({"name": texts(4)})}, {"text": texts()})
)
_gemini_contents = objects(
    {"parts": st.lists(_gemini_parts, max_size=4)}, {"role": st.sampled_from(("user", "user", "model"))}
) | objects({"parts": objects({"text": texts()})})
_gemini_instruction = (
    objects({"parts": st.lists(objects({"text": texts()}), max_size=2)}, {"role": _type("user")})
    | objects({"parts": objects({"text": texts()})})
    | objects({"role": _type("system")})
    | st.none()
)
_gemini_bodies = objects(
    {"contents": st.lists(_gemini_contents, max_size=5)},
    {
        "systemInstruction": _gemini_instruction,
        "system_instruction": _gemini_instruction,
        "generationConfig": st.none() | objects({"maxOutputTokens": _counts}),
    },
) | objects({"contents": _gemini_contents}, {"systemInstruction": _gemini_instruction})


def _gemini_system(tree: Pairs, block: str) -> bool:
    entries = [pair for pair in tree if pair[0] in {"systemInstruction", "system_instruction"}]
    if not entries:
        tree.insert(0, ["systemInstruction", obj(parts=[obj(text=block)])])
        return True
    instruction = entries[-1][1]
    parts = instruction.get("parts") if isinstance(instruction, Pairs) else None
    if isinstance(parts, Pairs):
        entry = parts.entry("text")
        return entry is not None and _prefix(entry, block)
    if parts is None:
        return False
    parts.insert(0, obj(text=block))
    return True


def _chat_user(block: str) -> Pairs:
    return obj(role="user", content=block)


FORMATS = (
    Format(
        openai_chat, "/v1/chat/completions", "messages", "content", ("text",), _chat_bodies, _chat_system, _chat_user
    ),
    Format(
        openai_responses,
        "/v1/responses",
        "input",
        "content",
        ("input_text", "output_text"),
        _response_bodies,
        _response_system,
        _chat_user,
    ),
    Format(
        anthropic_messages,
        "/v1/messages",
        "messages",
        "content",
        ("text",),
        _anthropic_bodies,
        _anthropic_system,
        _chat_user,
    ),
    Format(
        gemini,
        "/v1beta/models/gemini-2.5-flash:generateContent",
        "contents",
        "parts",
        (None,),
        _gemini_bodies,
        _gemini_system,
        lambda block: obj(role="user", parts=[obj(text=block)]),
    ),
)
