"""Read a pickle without running it.

A pickle is a program for a small stack machine, and Python's own machine may be told to import and call anything
(https://docs.python.org/3/library/pickle.html, "Restricting Globals"). This one is written from the opcodes of
protocols 2 to 5 (PEP 307, 3154, 574) and has no instruction that imports, calls or looks anything up: what a file
wants built becomes a `Record` that holds the name, the arguments and the state, for the caller to look at.

It is our own machine and not a subclass of `pickle.Unpickler`, because overriding `find_class` leaves open what a
hostile file can do with plain values: lengths that are allocated before they are read, memo slots far apart, keys
that take for ever to hash. Here a length is compared with the bytes that are left, the memo grows one by one, keys are
strings, and the numbers of instructions and of containers are limited.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, cast

from cbtm.errors import DataError

# A vocabulary takes three or four instructions a word: this is one of ten million words.
_MOST_OPERATIONS = 40_000_000
# A fitted pipeline has some hundred lists, tuples and records; one with max_features has two more for each word.
_MOST_CONTAINERS = 2_000_000
# The longest integer in the files that are read here is the ten bytes that open a torch storage.
_LONGEST_INTEGER = 32
_LONGEST_NAME = 200
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Name:
    """A module and a name in it, as written in the file; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What the file wants built: `name(*arguments)`, with `state` set on the result. Nothing is built.

    Attributes:
        name: Class or function.
        arguments: What it would have been called with.
        state: What the result would have been given afterwards; None if nothing.
    """

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None


PERSISTENT_ID: Final = Name("", "persistent id")
"""Name of the record that stands for something stored outside of the pickle; the one argument is its id."""


def shown(value: object) -> str:
    """A short description of a value from a file, safe to print: no long text, no control characters, no cycles."""
    if isinstance(value, Name):
        return shown(str(value))[1:-1]
    if isinstance(value, Record):
        return f"a {shown(value.name)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return ascii(value if len(value) <= _SHOWN_CHARACTERS else value[:_SHOWN_CHARACTERS] + "…")
    if isinstance(value, tuple) and len(value) <= 4 and all(type(item) in (int, float, str, bool) for item in value):
        inside = ", ".join(map(shown, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f"a {type(value).__name__} of {len(cast(Any, value))}"


def read_pickle(
    data: memoryview, names: Collection[Name], *, source: str, start: int = 0, persistent_ids: bool = False
) -> tuple[Any, int]:
    """Read one pickle of protocol 2 to 5.

    Args:
        data: Bytes that hold the pickle. Byte strings in the result are views of it.
        names: Names that the pickle may use; any other is refused.
        source: Name of the file, for messages.
        start: Where in `data` the pickle begins.
        persistent_ids: Whether the pickle may point to things stored outside of it.

    Returns:
        The value, made of None, bool, int, float, str, memoryview (bytes), tuple, list, dict, set, frozenset, `Name`
        and `Record` only, and the offset of the first byte behind it. Lists and dicts may contain themselves.

    Raises:
        DataError: If the bytes are no such pickle, are cut short, use another name, call what is not a name, or
            exceed a limit of this module.
    """
    return _Machine(data, frozenset(names), source, start, persistent_ids).run()


class _Machine:
    """The state of one reading; every method below `run` is an instruction or a part of one."""

    def __init__(self, data: memoryview, names: frozenset[Name], source: str, start: int, persistent_ids: bool) -> None:
        self.data, self.names, self.source, self.position = data, names, source, start
        self.persistent_ids = persistent_ids
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.containers = 0

    def run(self) -> tuple[Any, int]:
        opening = bytes(self.data[self.position : self.position + 2])
        if len(opening) < 2 or opening[0] != _PROTO or not 2 <= opening[1] <= 5:
            raise self.refusal(f"begins with {opening!r}, which is no pickle of protocol 2 to 5")
        self.position += 2
        for _ in range(_MOST_OPERATIONS):
            if self.position >= len(self.data):
                raise self.refusal("ends in the middle of a pickle; the file is cut short, copy it again")
            opcode = self.data[self.position]
            self.position += 1
            if opcode == _STOP:
                return self.pop(), self.position
            instruction = _INSTRUCTIONS.get(opcode)
            if instruction is None:
                raise self.refusal(f"has the opcode {bytes([opcode])!r}, which no such file holds")
            instruction(self)
        raise self.refusal(f"has more than {_MOST_OPERATIONS} instructions")

    def refusal(self, why: str) -> DataError:
        return DataError(f"{self.source}: byte {self.position} of {len(self.data)}: the file {why}")

    # Reading from the file.

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, without a copy."""
        end = self.position + length
        if end > len(self.data):
            left = len(self.data) - self.position
            raise self.refusal(
                f"announces {length} bytes where {left} are left; it is cut short or damaged, copy it again"
            )
        self.position, taken = end, self.data[self.position : end]
        return taken

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        length = bytes(self.data[self.position : self.position + _LONGEST_NAME + 1]).find(b"\n")
        if length < 0:
            raise self.refusal(f"has a name without an end within {_LONGEST_NAME} bytes")
        text = self.decoded(self.take(length))
        self.take(1)
        return text

    def decoded(self, raw: memoryview) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.refusal("has a text that is not UTF-8; it is damaged, copy it again") from None

    # The stack and the memo.

    def pop(self) -> Any:
        if not self.stack:
            raise self.refusal("takes a value from an empty stack; it is damaged, copy it again")
        return self.stack.pop()

    def top(self) -> Any:
        self.stack.append(value := self.pop())
        return value

    def push_container(self, value: object) -> None:
        self.containers += 1
        if self.containers > _MOST_CONTAINERS:
            raise self.refusal(f"has more than {_MOST_CONTAINERS} lists, tuples, dicts and objects")
        self.stack.append(value)

    def mark(self) -> None:
        self.push_container(None)  # A mark costs a list, and is counted as one.
        self.stack.pop()
        self.below_marks.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self.below_marks:
            raise self.refusal("ends a group that was not begun; it is damaged, copy it again")
        group, self.stack = self.stack, self.below_marks.pop()
        return group

    def memoize(self, slot: int | None = None) -> None:
        value = self.top()
        if slot is None or slot == len(self.memo):
            self.memo.append(value)
        elif slot < len(self.memo):
            self.memo[slot] = value
        else:
            raise self.refusal(f"uses memo slot {slot} after {len(self.memo)} slots")

    def recall(self, slot: int) -> None:
        if slot >= len(self.memo):
            raise self.refusal(f"reads memo slot {slot} of {len(self.memo)}")
        self.stack.append(self.memo[slot])

    # Values.

    def push_integer(self, length: int) -> None:
        if length > _LONGEST_INTEGER:
            raise self.refusal(f"has an integer of {length} bytes, above the limit of {_LONGEST_INTEGER}")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def push_float(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def push_text(self, width: int) -> None:
        self.stack.append(self.decoded(self.take(self.unsigned(width))))

    def push_bytes(self, width: int) -> None:
        self.push_container(self.take(self.unsigned(width)))

    def push_tuple(self, length: int) -> None:
        self.push_container(tuple([self.pop() for _ in range(length)][::-1]))

    def target(self, kind: type) -> Any:
        """The container on top of the stack."""
        found = self.top()
        if type(found) is not kind:
            raise self.refusal(f"adds items to {shown(found)} as if it were a {kind.__name__}")
        return found

    def append(self, items: list[Any]) -> None:
        self.target(list).extend(items)

    def add(self, items: list[Any]) -> None:
        self.target(set).update(self.keys(items))

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise self.refusal("has a key without a value; it is damaged, copy it again")
        self.target(dict).update(zip(self.keys(items[::2]), items[1::2], strict=True))

    def keys(self, keys: list[Any]) -> list[str]:
        # Only texts: the hash of a nested tuple can take exponential time, and integers can be made to collide.
        if not all(type(key) is str for key in keys):
            other = next(key for key in keys if type(key) is not str)
            raise self.refusal(f"has {shown(other)} as a key of a dict or a member of a set; only texts can be")
        return keys

    def push_frozenset(self) -> None:
        self.push_container(frozenset(self.keys(self.pop_to_mark())))

    # Names, and what would be built with them.

    def push_name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refusal("has a name that is not a text")
        found = Name(module, name)
        if found not in self.names:
            raise self.refusal(
                f"uses {shown(found)}, which such a file has no need of; it was not run, do not trust this file"
            )
        self.push_container(found)

    def push_name_from_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_name(module, name)

    def push_record(self) -> None:
        arguments, name = self.pop(), self.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise self.refusal(f"calls {shown(name)} with {shown(arguments)}, which is no name with a tuple")
        self.push_container(Record(name, arguments))

    def set_state(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is not Record or target.state is not None:
            raise self.refusal(f"sets the state of {shown(target)}, which is no new object")
        target.state = state

    def push_outside_reference(self) -> None:
        if not self.persistent_ids:
            raise self.refusal("points to something outside of it")
        self.push_container(Record(PERSISTENT_ID, (self.pop(),)))


_PROTO, _STOP = 0x80, ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x95: lambda m: _ignore(m.take(8)),  # FRAME: a hint for buffered reading
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.unsigned(1)),
    ord("M"): lambda m: m.stack.append(m.unsigned(2)),
    ord("J"): lambda m: m.push_integer(4),
    0x8A: lambda m: m.push_integer(m.unsigned(1)),  # LONG1
    0x8B: lambda m: m.push_integer(m.unsigned(4)),  # LONG4
    ord("G"): _Machine.push_float,
    0x8C: lambda m: m.push_text(1),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.push_text(4),
    0x8D: lambda m: m.push_text(8),  # BINUNICODE8
    ord("C"): lambda m: m.push_bytes(1),
    ord("B"): lambda m: m.push_bytes(4),
    0x8E: lambda m: m.push_bytes(8),  # BINBYTES8
    0x96: lambda m: m.push_bytes(8),  # BYTEARRAY8
    ord(")"): lambda m: m.push_tuple(0),
    0x85: lambda m: m.push_tuple(1),
    0x86: lambda m: m.push_tuple(2),
    0x87: lambda m: m.push_tuple(3),
    ord("t"): lambda m: m.push_container(tuple(m.pop_to_mark())),
    ord("]"): lambda m: m.push_container([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("}"): lambda m: m.push_container({}),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    0x8F: lambda m: m.push_container(set()),  # EMPTY_SET
    0x90: lambda m: m.add(m.pop_to_mark()),  # ADDITEMS
    0x91: _Machine.push_frozenset,
    ord("q"): lambda m: m.memoize(m.unsigned(1)),
    ord("r"): lambda m: m.memoize(m.unsigned(4)),
    0x94: _Machine.memoize,
    ord("h"): lambda m: m.recall(m.unsigned(1)),
    ord("j"): lambda m: m.recall(m.unsigned(4)),
    ord("c"): lambda m: m.push_name(m.line(), m.line()),
    0x93: _Machine.push_name_from_stack,  # STACK_GLOBAL
    ord("R"): _Machine.push_record,
    0x81: _Machine.push_record,  # NEWOBJ: cls.__new__(cls, *arguments)
    ord("b"): _Machine.set_state,
    ord("Q"): _Machine.push_outside_reference,
}


def _ignore(_: object) -> None:
    """Turn an expression into an instruction without a result."""
