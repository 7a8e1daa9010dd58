"""A pickle read as data: a stack machine for the opcodes that plain values and tensors need, and no others.

Python's own Unpickler runs what a file names, and its C code hashes and frees whatever a file nests. Here a name is
looked up in ``known`` and never imported, every size is checked against the bytes that are there, and steps are
counted. The opcodes are those of ``pickletools``, protocols 1 to 5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, final

from batchnorm.checkpoint import known
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

LARGEST = 1 << 28  # bytes of a pickle; that of a network of 100,000 tensors has 2^24
_MOST_STEPS = 10_000_000  # opcodes; one may allocate 100 bytes
_LONGEST_LINE = 1000
_LONGEST_INTEGER = 256  # bytes
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def load(file: BinaryIO, storages: dict[str, known.Storage] | None = None) -> Any:
    """The value of the pickle that starts where ``file`` stands; the file then stands after it.

    Args:
        file: Open for reading.
        storages: Filled with each storage of the pickle by its key, as it is named first.
    """
    machine = _Machine(file, {} if storages is None else storages)
    for _ in range(_MOST_STEPS):
        code = file.read(1)
        if code == b".":
            return machine.stack.pop()
        step = _STEPS.get(code)
        if step is None:
            raise RefusalError(
                "the opcodes of plain values", f"{code!r}" if code else "the end of the file: it was cut off"
            )
        step(machine)
    raise RefusalError(f"at most {_MOST_STEPS:,} values", "more", RESAVE)


@final
class _Machine:
    """Stack, marks and memo of a pickle. Values are None, numbers, text, containers and those of ``known``."""

    __slots__ = ("file", "left", "marks", "memo", "stack", "storages")

    def __init__(self, file: BinaryIO, storages: dict[str, known.Storage]) -> None:
        self.file = file
        self.storages = storages
        self.left = LARGEST
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise RefusalError(f"a pickle of at most {LARGEST:,} bytes", "a larger one", RESAVE)
        data = self.file.read(size)
        if len(data) < size:
            raise RefusalError(f"{size} more bytes of a pickle", f"{len(data)}: it was cut off")
        return data

    def counted(self, width: int) -> bytes:
        return self.take(self.unsigned(width))

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        data = self.file.readline(_LONGEST_LINE)
        if not data.endswith(b"\n"):
            raise RefusalError("a line of text", f"{brief(data.decode('latin-1'))} without an end")
        return data[:-1].decode()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def last(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise RefusalError(f"a {kind.__name__}", brief(self.stack[-1]))
        return self.stack[-1]


def _mark(machine: _Machine) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def _integer(machine: _Machine) -> int | bool:
    text = machine.line()
    return text == "01" if text in {"00", "01"} else int(text)  # how protocol 1 writes booleans


def _long(machine: _Machine, width: int) -> int:
    size = machine.unsigned(width)
    if size > _LONGEST_INTEGER:
        raise RefusalError(f"integers of at most {_LONGEST_INTEGER} bytes", f"{size}")
    return int.from_bytes(machine.take(size), "little", signed=True)


def _text(machine: _Machine, width: int) -> str:
    return machine.counted(width).decode("utf-8", "surrogatepass")


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.last(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not known.is_key(key):
            raise RefusalError("plain keys", brief(key))
        target[key] = value


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine, [key, value])


def _dict(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    _set_items(machine, items)


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.last(list).append(value)


def _add_items(machine: _Machine) -> None:
    machine.since_mark()  # a set's elements say nothing about batch norm
    machine.last(known.Opaque)


def _tuple(machine: _Machine, size: int) -> None:
    if len(machine.stack) < size:
        raise RefusalError(f"{size} values on the stack", f"{len(machine.stack)}")
    start = len(machine.stack) - size
    machine.stack[start:] = [tuple(machine.stack[start:])]


def _find(machine: _Machine, module: object, name: object) -> known.Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusalError("a module and a name", f"{brief(module)} and {brief(name)}")
    whole = not machine.stack and not machine.marks
    return known.find(f"{_OLD_MODULES.get(module, module)}.{name}", whole=whole)


def _global(machine: _Machine) -> known.Name:
    return _find(machine, machine.line(), machine.line())


def _stack_global(machine: _Machine) -> known.Name:
    name, module = machine.stack.pop(), machine.stack.pop()
    return _find(machine, module, name)


def _call(machine: _Machine) -> Any:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    return known.call(function, arguments)


def _instance(machine: _Machine) -> Any:
    arguments = tuple(machine.since_mark())
    return known.call(_global(machine), arguments)


def _object(machine: _Machine) -> Any:
    function, *arguments = machine.since_mark()
    return known.call(function, tuple(arguments))


def _storage(machine: _Machine) -> known.Storage:
    storage = known.storage(machine.stack.pop())
    machine.storages.setdefault(storage.key, storage)
    return storage


def _build(machine: _Machine) -> None:
    """Attributes of a value, such as a state dict's ``_metadata``, are left out."""
    machine.stack.pop()
    if not isinstance(machine.stack[-1], dict | known.Opaque | known.Tensor):
        raise RefusalError("a dict or a tensor that has attributes", brief(machine.stack[-1]))


def _extension(_: _Machine) -> None:
    raise RefusalError("names in full", "a number of copyreg's extension registry", RESAVE)


def _memoize(machine: _Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


def _pushing(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        # the value first: it may exchange the stack
        made = value(machine)
        machine.stack.append(made)

    return step


_VALUES: dict[bytes, Callable[[_Machine], Any]] = {
    b"N": lambda _: None,
    b"\x88": lambda _: True,
    b"\x89": lambda _: False,
    b"I": _integer,
    b"L": lambda m: int(m.line().removesuffix("L")),
    b"J": lambda m: int.from_bytes(m.take(4), "little", signed=True),
    b"K": lambda m: m.unsigned(1),
    b"M": lambda m: m.unsigned(2),
    b"\x8a": lambda m: _long(m, 1),
    b"\x8b": lambda m: _long(m, 4),
    b"G": lambda m: struct.unpack(">d", m.take(8))[0],
    b"X": lambda m: _text(m, 4),
    b"\x8c": lambda m: _text(m, 1),
    b"\x8d": lambda m: _text(m, 8),
    # text of Python 2
    b"T": lambda m: m.counted(4).decode("utf-8", "backslashreplace"),
    b"U": lambda m: m.counted(1).decode("utf-8", "backslashreplace"),
    b"B": lambda m: m.counted(4),
    b"C": lambda m: m.counted(1),
    b"\x8e": lambda m: m.counted(8),
    b"\x96": lambda m: m.counted(8),
    b"]": lambda _: [],
    b"l": lambda m: m.since_mark(),
    b")": lambda _: (),
    b"t": lambda m: tuple(m.since_mark()),
    b"}": lambda _: {},
    b"\x8f": lambda _: known.Opaque("builtins.set"),
    b"\x91": lambda m: (m.since_mark(), known.Opaque("builtins.frozenset"))[1],
    b"2": lambda m: m.stack[-1],
    b"h": lambda m: m.memo[m.unsigned(1)],
    b"j": lambda m: m.memo[m.unsigned(4)],
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _call,
    b"i": _instance,
    b"o": _object,
    b"Q": _storage,
}
_STEPS: dict[bytes, Callable[[_Machine], Any]] = {code: _pushing(value) for code, value in _VALUES.items()} | {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: m.since_mark(),
    b"a": _append,
    b"e": lambda m: (items := m.since_mark(), m.last(list).extend(items)),
    b"d": _dict,
    b"s": _set_item,
    b"u": lambda m: _set_items(m, m.since_mark()),
    b"\x90": _add_items,
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"q": lambda m: _memoize(m, m.unsigned(1)),
    b"r": lambda m: _memoize(m, m.unsigned(4)),
    b"\x94": lambda m: _memoize(m, len(m.memo)),
    b"b": _build,
    b"\x82": _extension,
    b"\x83": _extension,
    b"\x84": _extension,
}
