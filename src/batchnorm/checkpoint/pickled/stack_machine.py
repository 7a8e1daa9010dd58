"""A pickle read as data: a stack machine for the opcodes that plain values and tensors need, and no others.

Python's own Unpickler runs the functions that a file names, and its C code can crash on deeply nested values. Here a
name is looked up in ``allowed_names`` and never imported. Every size is compared with the bytes that follow, and steps
are counted. The opcodes are those of ``pickletools``, protocols 1 to 5. An object of an unknown class becomes a dict of
its attributes. Long runs of bytes stay in the file.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import BinaryIO, final

from batchnorm.checkpoint.file_tensors import Span, Storage, Tensor
from batchnorm.checkpoint.pickled import allowed_names
from batchnorm.checkpoint.pickled.name import Name, in_words
from batchnorm.checkpoint.pickled.numpy_arrays import Dtype, Unbuilt
from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque, Saved, settle
from batchnorm.checkpoint.refusal import RESAVE, RefusalError, brief

# the action of an opcode; it may return a value, which is then put on the stack
Step = Callable[["_Machine"], Saved]

LARGEST = 1 << 28  # bytes of a pickle; the pickle of a network with 100,000 tensors has 2^24
_MOST_STEPS = 10_000_000  # opcodes; one opcode may allocate 100 bytes
_MOST_ATTRIBUTES = 10_000_000  # of all objects; a pickle may use one dict of attributes for many objects
_SHORTEST_SPAN = 1 << 12  # bytes; a run of at least this many stays in the file
_LONGEST_LINE = 1000
_LONGEST_INTEGER = 256  # bytes


def load(
    file: BinaryIO,
    storages: dict[str, Storage] | None = None,
    nested: Callable[[bytes | str | Span], Storage] | None = None,
) -> Saved:
    """The value of the pickle that starts at the position of ``file``; the position is then behind the pickle.

    Args:
        file: Open for reading.
        storages: Filled with each storage of the pickle by its key; the first mention of a key counts.
        nested: Reads a storage that is a file of torch.save inside of the pickle. None: such storages are refused.

    Raises:
        RefusalError: If the pickle is cut off or too large, has an opcode of no plain value, or calls a function that
            is not known to be harmless. Damaged bytes may raise other built-in errors.
    """
    machine = _Machine(file, {} if storages is None else storages, nested)
    for _ in range(_MOST_STEPS):
        code = file.read(1)
        if code == b".":
            return settle(machine.stack.pop())
        step = _STEPS.get(code)
        if step is None:
            raise RefusalError(
                "the opcodes of plain values", f"{code!r}" if code else "the end of the file: it was cut off"
            )
        step(machine)
    raise RefusalError(f"at most {_MOST_STEPS:,} values", "more", RESAVE)


@final
class _Machine:
    """Stack, marks and memo of a pickle. Values: None, numbers, text, containers, and results of ``allowed_names``."""

    __slots__ = ("attributes", "file", "left", "marks", "memo", "names", "nested", "stack", "storages")

    def __init__(
        self, file: BinaryIO, storages: dict[str, Storage], nested: Callable[[bytes | str | Span], Storage] | None
    ) -> None:
        self.file = file
        self.storages = storages
        self.nested = nested
        self.left = LARGEST
        self.attributes = _MOST_ATTRIBUTES
        self.names: dict[str, Name] = {}
        self.stack: list[Saved] = []
        self.marks: list[list[Saved]] = []
        self.memo: dict[int, Saved] = {}

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

    def stretch(self, width: int) -> bytes | Span:
        """The bytes whose number is in the next ``width`` bytes; 4,096 bytes or more stay in the file, as a Span."""
        size = self.unsigned(width)
        if size < _SHORTEST_SPAN:
            return self.take(size)
        start = self.file.tell()
        self.file.seek(start + size - 1)
        if not self.file.read(1):
            raise RefusalError(f"{size} more bytes of a pickle", "fewer: it was cut off")
        return Span(self.file, start, size)

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        data = self.file.readline(_LONGEST_LINE)
        if not data.endswith(b"\n"):
            raise RefusalError("a line of text", f"{brief(data.decode('latin-1'))} without an end")
        return data[:-1].decode()

    def since_mark(self) -> list[Saved]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def last(self, kind: type) -> Saved:
        if type(self.stack[-1]) is not kind:
            raise RefusalError(f"a {kind.__name__}", in_words(self.stack[-1]))
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
    return text == "01" if text in {"00", "01"} else int(text)  # protocol 1 writes booleans so


def _long(machine: _Machine, width: int) -> int:
    size = machine.unsigned(width)
    if size > _LONGEST_INTEGER:
        raise RefusalError(f"integers of at most {_LONGEST_INTEGER} bytes", f"{size}", RESAVE)
    return int.from_bytes(machine.take(size), "little", signed=True)


def _text(machine: _Machine, width: int) -> str:
    return machine.counted(width).decode("utf-8", "surrogatepass")


def _set_items(machine: _Machine, items: list[Saved]) -> None:
    target = machine.stack[-1] if isinstance(machine.stack[-1], Object) else machine.last(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[allowed_names.key(key)] = value


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine, [key, value])


def _dict(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    _set_items(machine, items)


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    _items(machine).append(value)


def _items(machine: _Machine) -> list[Saved]:
    """The list on top of the stack, or the list of items of an object (of a subclass of list)."""
    if not isinstance(machine.stack[-1], Object):
        return machine.last(list)
    items = machine.stack[-1].setdefault("items", [])
    if type(items) is not list:
        raise RefusalError("an object's items", in_words(items))
    return items


def _add_items(machine: _Machine) -> None:
    machine.since_mark()  # a set's elements say nothing about batch norm
    if not isinstance(machine.stack[-1], Object):
        machine.last(Opaque)


def _tuple(machine: _Machine, size: int) -> None:
    if len(machine.stack) < size:
        raise RefusalError(f"{size} values on the stack", f"{len(machine.stack)}")
    start = len(machine.stack) - size
    machine.stack[start:] = [tuple(machine.stack[start:])]


def _find(machine: _Machine, module: object, name: object) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusalError("a module and a name", f"{brief(module)} and {brief(name)}")
    # names of Python 2 are translated as Python's own reader does: commands.Popen is subprocess.Popen
    module, name = NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)
    name = f"{module}.{name}"
    if name not in machine.names:  # one Name object for each name
        machine.names[name] = allowed_names.find(name)
    return machine.names[name]


def _global(machine: _Machine) -> Name:
    return _find(machine, machine.line(), machine.line())


def _stack_global(machine: _Machine) -> Name:
    name, module = machine.stack.pop(), machine.stack.pop()
    return _find(machine, module, name)


def _call(machine: _Machine) -> Saved:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if machine.nested and isinstance(function, Name) and function.name == "torch.storage._load_from_bytes":
        return machine.nested(*arguments)
    return allowed_names.call(function, arguments)


def _new(machine: _Machine) -> Saved:
    arguments, kind = machine.stack.pop(), machine.stack.pop()
    return allowed_names.new(kind, arguments)


def _new_ex(machine: _Machine) -> Saved:
    machine.stack.pop()  # keyword arguments, which no tensor needs
    return _new(machine)


def _instance(machine: _Machine) -> Saved:
    arguments = tuple(machine.since_mark())
    return allowed_names.call(_global(machine), arguments)


def _object(machine: _Machine) -> Saved:
    function, *arguments = machine.since_mark()
    return allowed_names.call(function, tuple(arguments))


def _persistent(machine: _Machine) -> Storage | Name:
    """A storage; in torch's format before 1.6 also the class of a module, with its source code."""
    identity = machine.stack.pop()
    if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) == 4:
        return identity[1]
    storage = allowed_names.storage(identity)
    machine.storages.setdefault(storage.key, storage)
    return storage


def _build(machine: _Machine) -> None:
    """Set the attributes of an object. Of a dict's attributes only ``_metadata``, the modules' versions, is stored."""
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, Dtype | Unbuilt):
        built = machine.stack[-1] = target.build(state)
        if isinstance(target, Unbuilt) and target.place is not None:
            machine.memo[target.place] = built
    elif isinstance(target, Object):
        _fill(machine, target, state)
    elif isinstance(target, dict):
        if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
            target[allowed_names.VERSIONS] = state["_metadata"]
    elif not isinstance(target, Opaque | Tensor):
        raise RefusalError("a dict or a tensor that has attributes", brief(target))


def _fill(machine: _Machine, target: Object, state: Saved) -> None:
    """Fill an object with its ``__dict__``, and with its slots if given; any other state becomes the item "state"."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    if not all(part is None or isinstance(part, dict) for part in parts):
        target["state"] = state
        return
    for part in parts:
        machine.attributes -= len(part or ())
        if machine.attributes < 0:
            raise RefusalError(f"at most {_MOST_ATTRIBUTES:,} attributes of objects", "more", RESAVE)
        target.update(part or {})


def _extension(_: _Machine) -> None:
    raise RefusalError("names in full", "a number of copyreg's extension registry", RESAVE)


def _memoize(machine: _Machine, place: int) -> None:
    value = machine.memo[place] = machine.stack[-1]
    if isinstance(value, Unbuilt):
        value.place = place


def _pushing(value: Step) -> Step:
    def step(machine: _Machine) -> None:
        # computed first, because this may replace the stack
        made = value(machine)
        machine.stack.append(made)

    return step


_VALUES: dict[bytes, Step] = {
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
    b"B": lambda m: m.stretch(4),
    b"C": lambda m: m.stretch(1),
    b"\x8e": lambda m: m.stretch(8),
    b"\x96": lambda m: m.stretch(8),
    b"]": lambda _: [],
    b"l": lambda m: m.since_mark(),
    b")": lambda _: (),
    b"t": lambda m: tuple(m.since_mark()),
    b"}": lambda _: {},
    b"\x8f": lambda _: Opaque("builtins.set"),
    b"\x91": lambda m: (m.since_mark(), Opaque("builtins.frozenset"))[1],
    b"2": lambda m: m.stack[-1],
    b"h": lambda m: m.memo[m.unsigned(1)],
    b"j": lambda m: m.memo[m.unsigned(4)],
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _new,
    b"\x92": _new_ex,
    b"i": _instance,
    b"o": _object,
    b"Q": _persistent,
}
_STEPS: dict[bytes, Step] = {code: _pushing(value) for code, value in _VALUES.items()} | {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: m.since_mark(),
    b"a": _append,
    b"e": lambda m: (items := m.since_mark(), _items(m).extend(items)),
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
