"""Each format a second time: bodies of it, and by plain reading of the parsed tree, what a splice must do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import strategies as st

from extproc.chat import (
    ChatFormat,
    Directive,
    InjectionMode,
    Placement,
    anthropic_messages,
    gemini,
    openai_chat,
    openai_responses,
)
from tests.unit.chat.odd_json import TELLING_TEXTS, Number, Pairs, Tree, any_value, numbers, obj, texts

_BLANKS = set(" \b\t\n\v\f\r")
_SYSTEM_ROLES = {"system", "developer"}

Writer = Callable[[str], None]
"""Puts a text into the tree, at a place that was chosen before."""


@dataclass(frozen=True)
class Format:
    chat: ChatFormat
    path: str
    messages: str
    content: str
    text_types: tuple[str | None, ...]
    bodies: st.SearchStrategy[Pairs]
    system_first: Callable[[Pairs], Writer | None]
    system_append: Callable[[Pairs], Writer | None]
    write_user: Callable[[str], Pairs]

    @property
    def name(self) -> str:
        return self.chat.name

    def query(self, tree: Pairs) -> str:
        found = self._last_user(tree)
        return "" if found is None else "\n".join(slot[1] for slot in found[1])

    def expected(self, tree: Pairs, block: str, placement: Placement, directive: Directive | None = None) -> Pairs:
        """The tree after the splice."""
        tree = copy.deepcopy(tree)
        write_directive = self._directive_writer(tree, directive.mode) if directive and directive.text else None
        write_block = self._block_writer(tree, placement)
        if write_block and block:
            write_block(block)
        if write_directive and directive:  # later, and at one place before the other
            write_directive(directive.text)
        return tree

    def _block_writer(self, tree: Pairs, placement: Placement) -> Writer | None:
        if placement is Placement.SYSTEM_FIRST and (writer := self.system_first(tree)):
            return writer
        found = self._last_user(tree)
        if found is None:
            return None
        index, slots = found
        array = tree.get(self.messages)
        if placement is Placement.BEFORE_LAST_USER and type(array) is list and not self._has_result(array[index]):
            return lambda block: array.insert(index, self.write_user(block))
        return _prefix(slots[-1])

    def _directive_writer(self, tree: Pairs, mode: InjectionMode) -> Writer | None:
        user = self._user_prepend(tree)
        match mode:
            case InjectionMode.SYSTEM_FIRST:
                return self.system_first(tree) or user
            case InjectionMode.SYSTEM_APPEND:
                return self.system_append(tree) or self.system_first(tree) or user
            case InjectionMode.USER_PREPEND:
                return user or self.system_first(tree)

    def _user_prepend(self, tree: Pairs) -> Writer | None:
        found = next(self._users(tree), None)
        if found is None:
            return None
        write = _prefix(found[1][0])
        return lambda text: write("[DIRECTIVE]: " + text)

    def _last_user(self, tree: Pairs) -> tuple[int, list[list[Tree]]] | None:
        return next(self._users(tree, -1), None)

    def _users(self, tree: Pairs, step: int = 1) -> Iterator[tuple[int, list[list[Tree]]]]:
        """User messages with text: index of the message, and the `[key, text]` entries with its texts."""
        entry = tree.entry(self.messages)
        assert entry is not None
        if isinstance(entry[1], str):
            if _is_text(entry[1]):
                yield 0, [entry]
            return
        array = [entry[1]] if isinstance(entry[1], Pairs) else entry[1]
        for index in range(len(array))[::step]:
            message = array[index]
            role = message.entry("role") or (["role", "user"] if self.chat is gemini else ["role", None])
            if role[1] == "user" and (slots := self._slots(message.entry(self.content))):
                yield index, slots

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


# Writers.


def _prefix(entry: list[Tree]) -> Writer:
    def write(text: str) -> None:
        entry[1] = text + "\n\n" + entry[1]

    return write


def _suffix(entry: list[Tree]) -> Writer:
    """An empty string has no end: its beginning is meant."""

    def write(text: str) -> None:
        entry[1] += "\n\n" + text

    return write if entry[1] else _prefix(entry)


def _first(array: list[Tree], element: Callable[[str], Tree]) -> Writer:
    return lambda text: array.insert(0, element(text))


def _last(array: list[Tree], element: Callable[[str], Tree]) -> Writer:
    return (lambda text: array.append(element(text))) if array else _first(array, element)


def _after(array: list[Tree], before: Tree, element: Callable[[str], Tree]) -> Writer:
    return lambda text: array.insert(next(n for n, each in enumerate(array) if each is before) + 1, element(text))


def _key(tree: Pairs, key: str, value: Callable[[str], Tree], slot: Callable[[Tree], list[Tree]]) -> Writer:
    """A new first key; where one text has made it, another goes before that."""

    def write(text: str) -> None:
        if entry := tree.entry(key):
            _prefix(slot(entry))(text)
        else:
            tree.insert(0, [key, value(text)])

    return write


def _after_leading(messages: Tree, role: str) -> Writer | None:
    leading = list(itertools.takewhile(lambda message: message.get("role") in _SYSTEM_ROLES, messages))
    return _after(messages, leading[-1], _system_message(role)) if leading else None


def _system_message(role: str) -> Callable[[str], Pairs]:
    return lambda text: obj(role=role, content=text)


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


def _chat_role(tree: Pairs) -> str:
    messages = tree.get("messages")
    return "developer" if messages and messages[0].get("role") == "developer" else "system"


def _chat_system(tree: Pairs) -> Writer:
    return _first(tree.get("messages"), _system_message(_chat_role(tree)))


def _chat_append(tree: Pairs) -> Writer | None:
    return _after_leading(tree.get("messages"), _chat_role(tree))


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


def _block(text: str) -> Pairs:
    return obj(type="text", text=text)


def _anthropic_system(tree: Pairs) -> Writer | None:
    entry = tree.entry("system")
    if entry is None:
        return _key(tree, "system", str, lambda entry: entry)
    if isinstance(entry[1], str):
        return _prefix(entry)
    return _first(entry[1], _block) if type(entry[1]) is list else None


def _anthropic_append(tree: Pairs) -> Writer | None:
    entry = tree.entry("system")
    if entry is not None and isinstance(entry[1], str):
        return _suffix(entry)
    return _last(entry[1], _block) if entry is not None and type(entry[1]) is list else None


_response_parts = objects({"type": _type("input_text"), "text": texts()}) | objects(
    {"type": _type("input_image"), "image_url": texts()}
)
_response_items = (
    objects(
        {"role": st.sampled_from(("user", "user", "assistant", "developer", "system"))},
        {"type": _type("message"), "content": texts() | st.lists(_response_parts, max_size=4)},
    )
    | objects({"type": _type("function_call_output"), "output": texts()})
    | objects({"type": _type("reasoning"), "content": st.just([])})
)
_response_bodies = objects(
    {"input": st.lists(_response_items, max_size=5)}, {"instructions": texts() | st.none(), "stream": _flags}
) | objects({"input": texts()}, {"instructions": texts() | st.none(), "max_output_tokens": _counts})


def _response_role(tree: Pairs) -> str:
    items = tree.get("input")
    return "system" if items and items[0].get("role") == "system" else "developer"


def _response_system(tree: Pairs) -> Writer | None:
    entry = tree.entry("instructions")
    if entry is None:
        return _key(tree, "instructions", str, lambda entry: entry)
    if isinstance(entry[1], str):
        return _prefix(entry)
    items = tree.get("input")
    return _first(items, _system_message(_response_role(tree))) if type(items) is list else None


def _response_append(tree: Pairs) -> Writer | None:
    items = tree.get("input")
    if type(items) is list and (writer := _after_leading(items, _response_role(tree))):
        return writer
    entry = tree.entry("instructions")
    return _suffix(entry) if entry is not None and isinstance(entry[1], str) else None


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


def _part(text: str) -> Pairs:
    return obj(text=text)


def _gemini_instructions(tree: Pairs) -> tuple[bool, Tree]:
    """Is it there, and its parts."""
    entries = [pair for pair in tree if pair[0] in {"systemInstruction", "system_instruction"}]
    instruction = entries[-1][1] if entries else None
    return bool(entries), instruction.get("parts") if isinstance(instruction, Pairs) else None


def _gemini_system(tree: Pairs) -> Writer | None:
    is_there, parts = _gemini_instructions(tree)
    if not is_there:
        return _key(
            tree, "systemInstruction", lambda text: obj(parts=[_part(text)]), lambda entry: entry[1][0][1][0][0]
        )
    if isinstance(parts, Pairs):
        entry = parts.entry("text")
        return None if entry is None else _prefix(entry)
    return None if parts is None else _first(parts, _part)


def _gemini_append(tree: Pairs) -> Writer | None:
    parts = _gemini_instructions(tree)[1]
    if isinstance(parts, Pairs):
        entry = parts.entry("text")
        return None if entry is None else _suffix(entry)
    return None if parts is None else _last(parts, _part)


def _chat_user(block: str) -> Pairs:
    return obj(role="user", content=block)


FORMATS = (
    Format(
        openai_chat,
        "/v1/chat/completions",
        "messages",
        "content",
        ("text",),
        _chat_bodies,
        _chat_system,
        _chat_append,
        _chat_user,
    ),
    Format(
        openai_responses,
        "/v1/responses",
        "input",
        "content",
        ("input_text", "output_text"),
        _response_bodies,
        _response_system,
        _response_append,
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
        _anthropic_append,
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
        _gemini_append,
        lambda block: obj(role="user", parts=[obj(text=block)]),
    ),
)
