"""Files that are damaged, of another kind, or made to do harm: each is refused in words, and none of it runs."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import pickle
import random
import re
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from checkpoint_files import (
    Payload,
    in_safetensors,
    legacy,
    mean,
    number,
    numbers,
    saved,
    tensor,
    text,
    trained,
    zipped,
)
from hostile_pickles import nothing_but_reading, read_all
from torch import nn

from batchnorm.checkpoint import read


def reading(tmp_path, data: bytes):
    (tmp_path / "c.pt").write_bytes(data)
    return read(tmp_path / "c.pt")


def refused(tmp_path, data: bytes) -> str:
    with pytest.raises(ValueError, match=r"c\.pt: expected .*, got .*\. .*\.") as info:
        reading(tmp_path, data)
    return str(info.value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(2)


@pytest.mark.parametrize("write", [saved, legacy, lambda value: zipped(pickle.dumps(value)), pickle.dumps])
@pytest.mark.parametrize("nest", [lambda value: value, lambda value: {"a": [value]}, lambda value: {value: 1}])
def test_code_in_a_pickle_does_not_run(tmp_path, write, nest):
    sign = tmp_path / "ran"
    message = refused(tmp_path, write(nest(Payload(str(sign)))))
    assert "builtins.eval" in message
    assert not sign.exists()


OPCODES = {
    "GLOBAL REDUCE": b"cos\nsystem\n(X\x04\x00\x00\x00touctR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n)\x81.",
    "INST": b"\x80\x02(X\x01\x00\x00\x00aios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "attribute of a known name": b"\x80\x04ccollections\nOrderedDict.fromkeys\n.",
    "old module": b"\x80\x02c__builtin__\neval\n.",
}


@pytest.mark.parametrize("program", OPCODES.values(), ids=OPCODES)
def test_every_way_to_call_a_name_is_refused_by_name(tmp_path, program):
    message = refused(tmp_path, zipped(program))
    assert any(name in message for name in ("os.system", "OrderedDict.fromkeys", "builtins.eval"))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02\x82\x01.", "extension registry"),
        (b"\x80\x02)R.", "c.pt: expected"),
        (b"\x80\x02)}R.", "expected a known name and its arguments, got a tuple"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "got torch.float32"),
        (b"\x80\x02ctorch\nSize\n}b.", "a dict or a tensor that has attributes, got a Name"),
        (b"\x80\x02]}b.", "got a list"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "expected a storage as persistent id, got a"),
        (b"\x80\x02}]K\x01s.", "expected plain keys, got a list"),
        (b"\x80\x02K\x05.", "expected a dict of tensors, got 5"),
        (b"\x80\x05\x97.", "expected the opcodes of plain values, got b'\\x97'"),
        (b"\x80\x04ctorch\nfloat32\n)}\x92.", "expected a class and its arguments, got torch.float32"),
        (b"\x80\x04)N\x81.", "expected a class and its arguments, got a tuple"),
        (b"\x80\x02cm\nA\n)\x81]e.", "c.pt: expected"),
        (b"\x80\x02cm\nA\n)\x81X\x05\x00\x00\x00itemsK\x01sNa.", "expected an object's items, got 1"),
        (b"\x80\x02ccollections\nCounter\nK\x05\x85R.", "got collections.Counter of 5. Save the model's tensors"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "got torch._utils._rebuild_tensor_v2 of nothing. Save"),
        (b"\x80\x02cnumpy\nndarray\n.", "expected a dict of tensors, got numpy.ndarray"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R}b.", "a NumPy array's shape, type, order and bytes"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f", "integers of at most 256 bytes"),
        (b"\x80\x02X\xff\xff\xff\xff", "at most 268,435,456 bytes"),
        (b"\x80\x02X\xff\xff\xff\x07", "more bytes of a pickle"),
        (b"\x80\x02", "the end of the file"),
        (b"\x80\x02c" + b"a" * 5000, "a line of text"),
        (b"\x80\x02I" + b"1" * 900 + b"\n.", "expected a dict of tensors, got 1111"),
        (b"\x80\x02(lp", "opcodes"),
    ],
)
def test_programs_that_are_no_plain_values_are_refused(tmp_path, program, message):
    assert message in refused(tmp_path, zipped(program))


CALLS = {
    "function of its own": (b"cmine\nload\n(K\x01tR", "mine.load"),
    "function without arguments": (b"cmine\nload\n)R", "mine.load"),
    "class of Python": (b"csubprocess\nPopen\n(X\x02\x00\x00\x00lstR", "subprocess.Popen"),
    "class of Python without arguments": (b"cthreading\nThread\n)R", "threading.Thread"),
    "class of torch": (b"ctorch._C\nPyTorchFileWriter\n(X\x01\x00\x00\x00atR", "torch._C.PyTorchFileWriter"),
    "class of NumPy": (b"cnumpy\nMemmap\n(X\x01\x00\x00\x00atR", "numpy.Memmap"),
    "class of two arguments": (b"cmine\nRunner\n(K\x01K\x02tR", "mine.Runner"),
    "class of a tensor and a number": (b"cmine\nRunner\n(]K\x02K\x03tR", "mine.Runner"),
    "class of a list of a list": (b"cmine\nRunner\n(](]eK\x02tR", "mine.Runner"),
    "class of a function": (b"cmine\nLists\n(cos\nsystem\ntR", "mine.Lists"),
    "class of a class of Python": (b"cmine\nLists\n(csubprocess\nPopen\ntR", "mine.Lists"),
    "partial of a class of Python": (
        b"cfunctools\npartial\n(cbuiltins\ngetattr\n(csubprocess\nPopen\nX\x07\x00\x00\x00__new__tRtR)R",
        "functools.partial",
    ),
    "partial of another method": (
        b"cfunctools\npartial\n(cbuiltins\ngetattr\n(cmine\nA\nX\x04\x00\x00\x00loadtRtR)R",
        "functools.partial",
    ),
    "class of an object": (b"cmine\nRunner\n(cmine\nA\n)\x81tR", "mine.Runner"),
    "attribute": (b"cbuiltins\ngetattr\n(cos\npath\nX\x07\x00\x00\x00dirnametR)R", "os.path.dirname"),
    "attribute of builtins": (b"cbuiltins\ngetattr\n(cos\nX\nX\x06\x00\x00\x00systemtR(K\x01tR", "os.X.system"),
    "partial": (b"cfunctools\npartial\n(cos\nsystem\ntR(K\x01tR", "functools.partial"),
    "item": (b"c_operator\ngetitem\n(cos\nenviron\nX\x01\x00\x00\x00atR", "os.environ"),
    "reduce": (b"cfunctools\nreduce\n(cos\nsystem\n)tR", "os.system"),
    "object": (b"cmine\nA\n)\x81)R", "mine.A"),
    "class of Python 2": (b"ccommands\nPopen\n(X\x02\x00\x00\x00lstR", "subprocess.Popen"),
    "module of Python 2": (b"cSocketServer\nTCPServer\n(X\x02\x00\x00\x00lstR", "socketserver.TCPServer"),
    "INST": (b"(X\x01\x00\x00\x00aisubprocess\nPopen\n", "subprocess.Popen"),
    "OBJ": (b"(cos\nabort\no", "os.abort"),
}


@pytest.mark.parametrize(("program", "name"), CALLS.values(), ids=CALLS)
def test_a_call_of_what_is_not_known_is_refused_by_name_beside_a_state(tmp_path, program, name):
    value = tensor(numbers(4), numbers(1))
    data = b"\x80\x02}(" + text("bn.running_mean") + value + text("x") + program + b"u."
    message = refused(tmp_path, zipped(data, _0=bytes(16)))
    assert name in message
    assert "Copy or download" not in message  # the file is as it was written
    assert name in refused(tmp_path, zipped(b"\x80\x02" + program + b"."))


@pytest.mark.parametrize(
    "value", [argparse.Namespace(lr=0.1), pathlib.Path("x"), nn.MSELoss(), argparse.Namespace, {"f": print}]
)
@pytest.mark.parametrize("write", [saved, pickle.dumps])
def test_a_file_without_tensors_is_no_checkpoint(tmp_path, value, write):
    if write is saved and isinstance(value, dict):
        assert not reading(tmp_path, write(value)).layers
    else:
        assert "torch.save(model.state_dict(), path)" in refused(tmp_path, write(value))


def entry(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x")
    return file.getvalue()


OTHERS = {
    "empty": (b"", "an empty file. Copy or download it again."),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
    "text": (b"epoch,loss\n1,0.5\n", "text, 'epoch,loss"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer in place of the file. Run: git lfs pull.",
    ),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "index of a checkpoint in parts"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(300), "a tar file"),
    "zip": (entry("a.txt"), "a zip file without data.pkl"),
    "keras": (entry("model.weights.h5"), "a Keras model"),
    "scripted": (entry("net/constants.pkl"), "a TorchScript program"),
    "pickle": (pickle.dumps({"a": 1}), "a plain pickle of a dict"),
    "compressed": (zipped(pickle.dumps({}), compress=True), "compressed or encrypted"),
    "zeros": (bytes(600), "bytes that begin with 00 00"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip file"),
}


@pytest.mark.parametrize(("data", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_told_for_what_they_are(tmp_path, data, message):
    assert message in refused(tmp_path, data)


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: expected a file, got no such path\. Check"):
        read(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="expected a file, got a device or pipe"):
        read("/dev/zero")
    with pytest.raises(FileNotFoundError, match="no such path"):
        read("a\0b")
    with pytest.raises(ValueError, match="File name too long"):
        read("a" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_permission_error(tmp_path):
    (tmp_path / "c.pt").write_bytes(saved({}))
    (tmp_path / "c.pt").chmod(0)
    with pytest.raises(PermissionError, match=r"c\.pt"):
        read(tmp_path / "c.pt")


FOUR = numbers(4)
TENSORS = {
    "past its storage": (tensor(numbers(5), numbers(1)), "a tensor inside its storage of 16 bytes"),
    "offset past its storage": (tensor(FOUR, numbers(1), offset=number(3)), "a tensor that ends at 28"),
    "stride past its storage": (tensor(numbers(2), numbers(4)), "a tensor that ends at 20"),
    "negative offset": (tensor(FOUR, numbers(1), offset=number(-1)), "got -1"),
    "negative stride": (tensor(FOUR, numbers(-1)), "got -1"),
    "negative size": (tensor(numbers(-4), numbers(1)), "got -4"),
    "NaN stride": (tensor(FOUR, b"G" + struct.pack(">d", float("nan")) + b"\x85"), "got nan"),
    "huge size": (tensor(numbers(2**62), numbers(0)), "got 4611686018427387904"),
    "larger size": (tensor(numbers(2**1000), numbers(0)), "whole numbers from 0"),
    "huge by product": (tensor(numbers(*[2**40] * 60), numbers(*[0] * 60)), "values in batch norm layers, got"),
    "expanded": (tensor(numbers(2**23), numbers(0)), "at most 4,194,304 channels"),
    "far apart": (tensor(numbers(2), numbers(2**60)), "a tensor that ends at"),
    "fewer strides": (tensor(numbers(2, 2), numbers(1)), "a stride for each axis, got 1 for 2 axes"),
    "no sizes": (tensor(b"N", numbers(1)), "a tensor's storage, size and stride, got a Storage, None"),
    "no record": (tensor(FOUR, numbers(1), key="../0"), "expected a record ../0, got none"),
    "other record size": (tensor(FOUR, numbers(1), numel=5), "expected 20 bytes in record 0, got 16"),
    "no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))}tR", "got None, a tuple and a tuple"),
}


@pytest.mark.parametrize(("made", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_lie_are_refused(tmp_path, made, message):
    assert message in refused(tmp_path, zipped(mean(made), _0=bytes(16)))


def test_as_many_variances_as_means_are_needed(tmp_path):
    message = refused(tmp_path, saved({"bn.running_mean": torch.ones(2), "bn.running_var": torch.ones(3)}))
    assert "expected as many variances as means in layer bn, got 3 and 2" in message


def test_types_that_no_statistics_have_are_refused(tmp_path):
    message = refused(tmp_path, saved({"running_mean": torch.ones(2).to(torch.float8_e5m2)}))
    assert "got float8_e5m2. Convert the tensor to float32." in message


def test_a_changed_byte_of_a_statistic_is_noticed(tmp_path):
    data = saved({"bn.running_mean": torch.full((3,), 1.5)})
    at = data.index(torch.full((3,), 1.5).numpy().tobytes())
    changed = data[:at] + b"\x01" + data[at + 1 :]
    assert "expected CRC" in refused(tmp_path, changed)


def test_a_changed_byte_beside_a_statistic_in_a_large_storage_is_noticed(tmp_path):
    base = torch.arange(600_000.0)  # more than one chunk
    data = saved({"bn.running_mean": base[5:8], "bn.running_var": base[590_000:590_003]})
    stored = reading(tmp_path, data).layers["bn"]
    assert (stored.running_mean.tolist(), stored.running_var.tolist()) == ([5, 6, 7], [590_000, 590_001, 590_002])
    at = data.index(base[400_000:400_010].numpy().tobytes())
    assert "expected CRC" in refused(tmp_path, data[:at] + b"\x01" + data[at + 1 :])


def test_other_tensors_are_not_read(tmp_path):
    data = saved({"bn.running_mean": torch.ones(3), "w": torch.full((5000,), 2.5)})
    at = data.index(torch.full((2000,), 2.5).numpy().tobytes()) + 10_000
    assert list(reading(tmp_path, data[:at] + b"\x01" + data[at + 1 :]).layers) == ["bn"]


def test_structures_without_an_end_are_read(tmp_path):
    cycle: dict[str, object] = {"bn.running_mean": torch.ones(2)}
    cycle["self"] = cycle
    cycle["list"] = [cycle, (cycle,)]
    assert list(reading(tmp_path, saved(cycle)).layers) == ["bn"]
    doubled: dict[str, object] = {"bn.running_mean": torch.ones(2)}
    for _ in range(20):  # 2^20 paths
        doubled = {"a": doubled, "b": doubled}
    assert list(reading(tmp_path, saved(doubled)).layers) == ["bn"]


DEEP = 200_000
OBJECT = b"cm\nA\n)\x81"
# a module in a module in a module: _parameters, _buffers and _modules with one child, whose value comes next
MODULE = OBJECT + b"}(" + text("_parameters") + b"}" + text("_buffers") + b"}u" + text("_modules") + b"}" + text("a")


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        b"]" * DEEP + b"a" * (DEEP - 1),
        b"}" + (text("a") + b"}") * DEEP + b"s" * DEEP,
        b")" + b"\x85" * DEEP,
        b"}" + b")" + b"\x85" * DEEP + b"Ns",
        b"(" * DEEP,
        OBJECT * DEEP + b"}" + b"b" * (DEEP - 1),
        OBJECT * DEEP + b"a" * (DEEP - 1),
        (OBJECT + text("a")) * DEEP + b"N" + b"s" * DEEP,
        MODULE * DEEP + b"}" + (b"sb" * DEEP),
        b"]" + b"cnumpy.core.multiarray\n_reconstruct\n)Rq\x00" + b"(" * DEEP + b"h\x00" + b"l" * DEEP + b"a",
    ],
    ids=["lists", "dicts", "tuples", "key", "marks", "states", "items", "attributes", "modules", "array"],
)
def test_depth_does_no_harm(tmp_path, program):
    with contextlib.suppress(ValueError):
        assert reading(tmp_path, zipped(b"\x80\x02" + program + b".")).layers == {}


def test_calls_inside_calls_end_in_a_refusal(tmp_path):
    name = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    program = name + b"q\x00" + b"(h\x00N" * 3000 + b")" + b"t" * 3000 + b"R."
    assert "got RecursionError" in refused(tmp_path, zipped(b"\x80\x02" + program))


@pytest.mark.slow
def test_objects_without_an_end_are_read(tmp_path):
    """An object that is its own attribute, a module that is its own child, a dict of attributes for all."""
    own = OBJECT + b"q\x00}" + text("me") + b"h\x00sb"
    module = MODULE.replace(OBJECT, OBJECT + b"q\x01", 1) + b"h\x01ssb"
    assert reading(tmp_path, zipped(b"\x80\x02}(" + text("a") + own + text("b") + module + b"u.")).layers == {}
    doubled = nn.Sequential(nn.BatchNorm1d(2))
    for _ in range(30):  # 2^30 names
        doubled = nn.Sequential(doubled, doubled)
    assert "at most 262,144 tensors in pickled modules" in refused(tmp_path, saved({"model": doubled}))
    assert "at most 262,144 tensors in pickled modules" in refused(tmp_path, saved({"a": [doubled, doubled[0]]}))


def test_attributes_again_and_again_are_counted(tmp_path):
    many = b"}(" + b"".join(number(i) + b"N" for i in range(20_000)) + b"uq\x00"
    program = b"\x80\x02]" + many + b"a" + (OBJECT + b"h\x00ba") * 600 + b"."
    assert "at most 10,000,000 attributes of objects" in refused(tmp_path, zipped(program))


@pytest.mark.slow
def test_a_small_file_fills_no_memory(tmp_path):
    """One list of many pairs, asked for as a dict again and again; and storages declared at 2^60 elements."""
    pairs = b"](" + b"".join(b"(" + number(i) + b"Nt" for i in range(20_000)) + b"eq\x00a"
    again = b"\x80\x02]" + pairs + b"ccollections\nOrderedDict\nh\x00\x85Ra" * 1000 + b"."
    tracemalloc.start()
    assert reading(tmp_path, zipped(again)).layers == {}
    refused(tmp_path, zipped(mean(tensor(numbers(2**20), numbers(2**40), numel=2**60)), _0=bytes(16)))
    refused(tmp_path, in_safetensors({"running_mean": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


HEADERS = {
    "too long": (struct.pack("<Q", 1 << 30) + b"{}", "a header of at most 33,554,432 bytes"),
    "cut off": (struct.pack("<Q", 1000) + b"{}", "it was cut off"),
    "no JSON": (in_safetensors(b"{'a': 1}"), "got JSONDecodeError"),
    "deep": (in_safetensors(b'{"a":' + b"[" * 200_000), "got RecursionError"),
    "no entry": (in_safetensors({"a": 3}), "dtype, shape and data_offsets of a, got 3"),
    "negative": (in_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "whole numbers"),
    "no offsets": (in_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}), "two whole numbers"),
    "outside": (in_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "cut off or changed"),
    "before": (in_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "bytes -4 to 0"),
    "size": (
        in_safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        "expected 2 elements in a, got 4 bytes",
    ),
}


@pytest.mark.parametrize(("data", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors_that_lie_are_refused(tmp_path, data, message):
    assert message in refused(tmp_path, data)


def harmless(tmp_path, data: bytes) -> None:
    """Reads, or is refused in words; no other exception."""
    with contextlib.suppress(ValueError):
        reading(tmp_path, data)


def wholes() -> dict[str, bytes]:
    state = trained().state_dict()
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "zip": saved({"model": state, "ema": state, "epoch": 3}),
        "legacy": legacy({"model": state, "epoch": 3}),
        "safetensors": in_safetensors({"bn.running_mean": entry, "bn.running_var": entry}, bytes(8)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_changed_files_are_read_or_refused(tmp_path, kind):
    chance, whole = random.Random(kind), wholes()[kind]
    for _ in range(1200):
        data = bytearray(whole)
        for _ in range(chance.randint(0, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        harmless(tmp_path, bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_programs_are_read_or_refused(tmp_path, seed):
    chance = random.Random(seed)
    parts = [bytes([code]) for code in range(256)]
    parts += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"]
    parts += [b"(", b"]", b"}", b")", b"K\x01", b"N", text("running_mean"), b"R", b"Q", b"b", b"s", b"u", b"t"] * 15
    parts += [tensor(numbers(2), numbers(1)), tensor(numbers(2), numbers(0)), b"q\x00", b"h\x00", b"0", b"a", b"e"] * 10
    for _ in range(1500):
        program = b"".join(chance.choices(parts, k=chance.randint(1, 40)))
        harmless(tmp_path, zipped(b"\x80\x02" + program + b".", _0=bytes(16)))
        if chance.random() < 0.2:
            harmless(tmp_path, b"\x80\x02" + program + b".")


@pytest.mark.slow
def test_random_changes_of_a_pickle_are_read_or_refused(tmp_path):
    """Changed before the CRC is taken, so that the machine itself meets them."""
    chance, whole = random.Random(1), saved({"model": trained().state_dict(), "epoch": {1, 2}})
    archive = zipfile.ZipFile(io.BytesIO(whole))
    records = {n.rpartition("/")[2]: archive.read(n) for n in archive.namelist() if "/data/" in n}
    program = archive.read("archive/data.pkl")
    for _ in range(2000):
        data = bytearray(program)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        harmless(tmp_path, zipped(bytes(data), **{f"_{key}": value for key, value in records.items()}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_pickles_are_read_or_refused_and_nothing_is_run(tmp_path, seed):
    """``python tests/hostile_pickles.py 100000`` reads more of them."""
    outcomes = read_all(1000, seed, tmp_path)
    assert min(outcomes["read"], outcomes["refused"]) > 20


def test_the_watch_over_hostile_pickles_sees_what_code_does(tmp_path):
    for act in (lambda: eval("1"), lambda: os.system("true"), lambda: (tmp_path / "a").write_text("a")):
        with pytest.raises(AssertionError, match="reading did more than read"), nothing_but_reading():
            act()


def test_keys_chosen_for_one_hash_are_refused(tmp_path):
    pairs = b"".join(number((i + 16) * (2**61 - 1)) + b"N" for i in range(100))
    assert "expected plain keys, got" in refused(tmp_path, zipped(b"\x80\x02}(" + pairs + b"u."))


def test_a_million_steps_take_a_moment(tmp_path):
    start = time.perf_counter()
    refused(tmp_path, zipped(b"\x80\x02" + b"N0" * 500_000 + b"."))
    assert time.perf_counter() - start < 5


def test_a_counter_that_is_a_plain_number_is_read(tmp_path):
    state = {**Net().state_dict(), "bn.num_batches_tracked": 7}
    torch.save({"state_dict": state, "num_batches_tracked": 3}, tmp_path / "c.pt")
    assert [layer.num_batches_tracked for layer in read(tmp_path / "c.pt").layers.values()] == [7]


def test_statistics_of_two_shapes_are_refused(tmp_path):
    state = {"bn.running_mean": torch.zeros(4), "bn.running_var": torch.ones(2, 2)}
    assert "as many variances as means in layer bn, got 2 x 2 and 4" in refused(tmp_path, saved(state))
    state["bn.running_var"] = torch.ones(1, 4, 1, 1)
    assert reading(tmp_path, saved(state)).layers["bn"].channels == 4


ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"bn":{ENTRY % (0, 16)},"bn":{ENTRY % (16, 32)}}}', "each name once .* got bn twice"),
        (f'{{"a":{ENTRY % (0, 16)},"b":{ENTRY % (8, 24)}}}', "bytes of its own .* got a and b overlapping"),
    ],
)
def test_names_and_bytes_of_two_tensors_are_refused(tmp_path, header, message):
    assert re.search(message, refused(tmp_path, in_safetensors(header.encode(), bytes(32))))


def test_a_tensor_with_more_values_than_any_layer_has_says_what_is_possible(tmp_path):
    many = torch.zeros(1).expand((1 << 22) + 1)  # one number in the file
    message = refused(tmp_path, saved({"running_mean": many, "running_var": many}))
    assert "expected at most 4,194,304 channels in a layer, got 4194305. Load the file into its model" in message
    assert "batchnorm.doctor.examine(model)" in message
    assert "again" not in message
