"""Pickles that are damaged, mixed or made up, and whether reading them does anything but read.

    python tests/hostile_pickles.py 100000

Each is written as torch's zip format, as the format before it or as a plain pickle, and read. It may be read or be
refused; any other exception is a fault, and so is every import, call or opened file that Python's audit hooks report.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import io
import pathlib
import pickle
import pickletools
import random
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from checkpoint_files import number, numbers, optimizer, saved, tensor, text, trained, zipped
from torch import nn

from batchnorm.checkpoint import read

if TYPE_CHECKING:
    from collections.abc import Iterator

# what a reader of data has no reason to do, by the names of Python's audit events
_FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "pickle.", "socket.", "shutil.", "ctypes.", "marshal.")
_watching = False
_seen: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    writes = event == "open" and len(arguments) > 1 and arguments[1] not in {"rb", "r", None}
    if writes or event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_but_reading() -> Iterator[None]:
    """Raise for whatever was imported, run or written inside."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    if _seen:
        raise AssertionError(f"reading did more than read: {_seen[:3]}")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, eps=1e-3)
        self.args = argparse.Namespace(lr=0.1)


def values() -> list[object]:
    """What people save."""
    state = trained().state_dict()
    arrays = {name: value.numpy() for name, value in state.items()}
    wide = {name: np.asfortranarray(np.broadcast_to(value, (2, *value.shape))) for name, value in arrays.items()}
    return [
        {"model": state, "epoch": {1, 2}, "best": np.float64(0.5)},
        {"model": Block(), "ema": nn.Sequential(Block(), nn.ReLU(), Block())},
        {"state": state, "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")), "optimizer": optimizer()},
        {"model": arrays, "wide": wide, "rng": np.random.RandomState(1).get_state(), "r": np.random.default_rng(1)},
        {"a": collections.OrderedDict(a=1), "b": collections.defaultdict(list, {"a": [1]}), "model": [state, (state,)]},
        {"meta": nn.BatchNorm1d(2).to("meta").state_dict(), "objects": np.array([1, None], dtype=object), "s": state},
    ]


def programs(value: object) -> Iterator[tuple[bytes, dict[str, bytes]]]:
    """The pickle of a file of torch.save and its records; then the same as plain pickles."""
    for protocol in (2, 4, 5):
        archive = zipfile.ZipFile(io.BytesIO(saved(value, pickle_protocol=protocol)))
        records = {f"_{name.rpartition('/')[2]}": archive.read(name) for name in archive.namelist() if "/data/" in name}
        yield archive.read("archive/data.pkl"), records
        yield pickle.dumps(value, protocol), {}


PARTS = [
    *([bytes([code]) for code in range(256)]),
    *([b"(", b"]", b"}", b")", b"K\x01", b"N", text("running_mean"), b"R", b"Q", b"b", b"s", b"u", b"t", b"\x81"] * 12),
    *([b"q\x00", b"h\x00", b"\x94", b"0", b"2", b"a", b"e", b"\x85", b"\x86", b"\x87", b"\x90", b"\x92", b"o"] * 8),
    *([b"cm\nA\n)\x81", b"cm\nA\n)\x81}b", b"ccopyreg\n_reconstructor\n", b"cfunctools\npartial\n"] * 8),
    *([text(key) + b"}s" for key in ("_modules", "_parameters", "_buffers", "__dict__", "items", "state")] * 6),
    *([tensor(numbers(2), numbers(1)), tensor(numbers(2), numbers(0)), text("eps"), number(2**63)] * 8),
    *([b"cnumpy.core.multiarray\n_reconstruct\n)Rq\x01", b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R", b"C\x04abcd"] * 8),
    *([b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_wrapper_subclass\n"] * 4),
    *([b"ctorch.storage\n_load_from_bytes\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n"] * 4),
    *([b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"csubprocess\nPopen\n"] * 4),
    *([text("import os; os.system('true')"), text("system"), text("__reduce__"), b"cos\nX\n", b"(ios\nabort\n"] * 4),
    *([b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n", b"cm\nload\n"] * 4),
]  # fmt: skip


# values that leave the stack as it was, between two opcodes
BALANCED = [
    value + b"0"
    for value in (
        b"cm\nA\n)\x81", b"cm\nA\n)\x81}" + text("a") + b"h\x01sb", b"cm\nA\n(K\x01tR", b"cos\nsystem\n",
        b"h\x01", b"h\x05}b",
        b"h\x02)\x81", b"h\x03N\x85R", b"h\x04" + text("running_var") + b"h\x06s", b"]h\x07a", b"\x8f(h\x01h\x02\x90",
        b"cbuiltins\ngetattr\n(h\x01" + text("a") + b"tR", tensor(numbers(2), numbers(1)), b"h\x01h\x02\x86",
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x02\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x08abcdefghtb",
    )
]  # fmt: skip


def placed(chance: random.Random, program: bytes) -> bytes:
    """A program with values put in between its opcodes."""
    starts = [place for _, _, place in pickletools.genops(program)][1:]
    for at in sorted(chance.sample(starts, min(len(starts), 3)), reverse=True):
        program = program[:at] + chance.choice(BALANCED) + program[at:]
    return program


def mutated(chance: random.Random, program: bytes, other: bytes) -> bytes:
    """A program with bytes changed, parts put in, cut out or taken from another one."""
    data = bytearray(program)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.random()
        if kind < 0.4 and data:
            data[at % len(data)] = chance.randrange(256)
        elif kind < 0.7:
            data[at:at] = b"".join(chance.choices(PARTS, k=chance.randint(1, 6)))
        elif kind < 0.8:
            del data[at : at + chance.randint(1, 40)]
        elif kind < 0.95:
            start = chance.randrange(len(other))
            data[at : at + chance.choice([0, 20])] = other[start : start + chance.randint(1, 200)]
        else:
            del data[at:]
    return bytes(data)


def files(count: int, seed: int) -> Iterator[bytes]:
    """Files to read; every fourth is made up from parts."""
    chance = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = [program for value in values() for program in programs(value)]
    for i in range(count):
        program, records = chance.choice(whole)
        if i % 4 == 1:
            data = placed(chance, program)
        elif i % 4:
            data = mutated(chance, program, chance.choice(whole)[0])
        else:
            data = b"\x80\x02" + b"".join(chance.choices(PARTS, k=chance.randint(1, 60))) + b"."
            records = {"_0": bytes(16)}
        yield zipped(data, **records) if records and chance.random() < 0.9 else data


def read_all(count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """How many were read and how many refused."""
    path = folder / "hostile.pt"
    path.write_bytes(saved(trained().state_dict()))
    read(path)  # imports what reading needs
    codecs.lookup("cp437")  # of names in zip files
    outcomes: collections.Counter[str] = collections.Counter()
    for i, data in enumerate(files(count, seed)):
        path.write_bytes(data)
        outcome = "read"
        with nothing_but_reading():
            try:
                read(path)
            except ValueError as error:
                outcome = "refused"
                if not str(error).startswith(f"{path}: expected "):
                    raise AssertionError(f"file {i} of seed {seed}: {error}") from error
            except BaseException as error:
                raise AssertionError(f"file {i} of seed {seed} raised {error!r}") from error
        outcomes[outcome] += 1
    return outcomes


if __name__ == "__main__":
    started = time.perf_counter()
    number_of_files = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as place:
        found = dict(read_all(number_of_files, 0, Path(place)))
        sys.stdout.write(f"{found} in {time.perf_counter() - started:.0f} s\n")
