"""Recognizes files that are no checkpoint of torch, and says what to do with each.

A format with a mark or a structure of its own is recognized by its bytes; other formats by the file's name. TensorFlow,
ONNX, Core ML and Caffe write protocol buffers without a mark: the numbers of their fields distinguish them.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.checkpoint.refusal import RESAVE, brief
from batchnorm.files.room_tables import room_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from batchnorm.checkpoint.pickled.unknown_classes import Saved

Named = tuple[str, str]  # what a file is, and what to do

_TABLES = room_table("checkpoint.formats", "other_files")


def _kind(kind: str) -> Named:
    """The name of a kind of file in ``other_files.toml``, and what to do with it."""
    entry = _TABLES["kinds"][kind]
    return entry["name"], _TABLES["remedies"].get(entry["remedy"], entry["remedy"])


def _kinds_by(mark: str) -> dict[str, Named]:
    """The kinds that have a mark of this sort ("begins", "suffixes", ...), by the mark."""
    return {value: _kind(kind) for kind, entry in _TABLES["kinds"].items() for value in entry.get(mark, ())}


def _as_bytes(named: dict[str, Named]) -> dict[bytes, Named]:
    return {text.encode("latin-1"): kind for text, kind in named.items()}


_MAGIC, _FLATBUFFERS = _as_bytes(_kinds_by("begins")), _as_bytes(_kinds_by("flatbuffer"))
_SUFFIXES, _OF_FOLDERS, _ZIPPED = _kinds_by("suffixes"), _kinds_by("in_folder"), _kinds_by("in_zip")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pkl")
# packages whose pickles are no torch models
_PACKAGES = ("sklearn", "joblib", "xgboost", "lightgbm", "catboost", "statsmodels", "pandas", "jax", "flax", "keras")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PADDLES_NAMES = "StructuredToParameterName@@"
_MOST_FIELDS = 4096
_LONGEST_INDEX = 1 << 20  # bytes of a JSON file that are read


def of_folder(place: Path) -> Named:
    """What a folder is, by the files in it."""
    names = sorted(entry.name for entry in os.scandir(place))
    if place.suffix == ".mlpackage" or {"Manifest.json", "Data"} <= set(names):
        return _kind("core_ml_package")
    known = next((named for name, named in _OF_FOLDERS.items() if name in names), None)
    if known is None and any(name.endswith(".distcp") for name in names):
        known = _kind("distributed_checkpoint")
    if known is not None:
        return _with_folder(known, place)
    inside = [name for name in names if name.endswith(_WEIGHTS)]
    return "a folder", f"Give a file in it: {brief(inside[0])}." if inside else "Give the file that holds the weights."


def _with_folder(named: Named, folder: Path) -> Named:
    """The same, with the folder's path in the command."""
    return named[0], named[1].replace("FOLDER", brief(str(folder)))


def of_content(file: BinaryIO, head: bytes) -> Named | None:
    """What a file is, if its bytes show that it is no checkpoint of torch; None if they do not show it."""
    named = next((named for magic, named in _MAGIC.items() if head.startswith(magic)), None)
    named = named or _FLATBUFFERS.get(head[4:8]) or _of_gzip(file, head) or _of_text(file, head)
    named = named or _of_hdf5(file) or _of_blobs(file)
    return named or _of_message(file) or _of_msgpack(head)


def of_name(file: BinaryIO) -> Named | None:
    """What a file is, by its name and the files beside it; None if they do not show it."""
    path = _path(file)
    if path.name == "saved_model.pb":
        return _kind("damaged_tensorflow_savedmodel")
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        return _kind("weights_of_an_openvino_model")
    if ".data-" in path.name and path.with_name(f"{path.name.partition('.data-')[0]}.index").is_file():
        return _kind("part_of_a_tensorflow_checkpoint")
    return _SUFFIXES.get(path.suffix.lower())


def has_graph(file: BinaryIO) -> bool:
    """Whether a protocol buffer has field 7, which is the graph of an ONNX model."""
    return any(number == 7 and kind == 2 for number, kind, _ in _fields(file))


def _path(file: BinaryIO) -> Path:
    return Path(str(getattr(file, "name", "")))


def of_bytes(head: bytes) -> Named:
    """A description of bytes that have no known format."""
    if not head:
        return _kind("empty_file")
    if head.isascii() and b"\0" not in head:
        return f"text, {head[:40].decode()!a}", _TABLES["remedies"]["give"]
    return f"bytes that begin with {head[:8].hex(' ')}", _TABLES["remedies"]["give"]


def of_zip(names: Iterable[str]) -> Named | None:
    """What a zip file is, by the names in it; None if no name shows it."""
    return next((named for end, named in _ZIPPED.items() if any(f"/{name}".endswith(end) for name in names)), None)


def of_shards(name: str) -> Named:
    """What a file is in which several files of torch.save follow each other."""
    return _with_folder(_kind("part_of_a_distributed_checkpoint"), Path(name).parent)


def of_value(saved: Saved) -> Named | None:
    """What a pickled value is, if it belongs to another framework; None if nothing shows that."""
    if isinstance(saved, dict) and (_PADDLES_NAMES in saved or _is_paddles(saved)):
        return _kind("paddlepaddle_state_dict")
    name = getattr(saved, "name", "")
    package = name.partition(".")[0]
    if name.startswith("torch.distributed.checkpoint.metadata."):
        return _kind("index_of_a_distributed_checkpoint")
    if package in _PACKAGES:
        return f"an object of {package}, {brief(name)}", _TABLES["remedies"]["give"]
    return None


def _is_paddles(saved: dict[Saved, Saved]) -> bool:
    """Whether two keys are PaddlePaddle's names of statistics: they end in _mean and _variance."""
    names = {key for key in saved if isinstance(key, str)}
    return any(
        f"{name.removesuffix('_mean')}_variance" in names for name in names if name.rpartition(".")[2] == "_mean"
    )


def _of_hdf5(file: BinaryIO) -> Named | None:
    """A Keras model if HDF5 has its configuration, else weights. HDF5 may begin behind a block of 512 bytes or more."""
    for start in (0, 512, 1024, 2048):
        file.seek(start)
        if file.read(len(_HDF5)) == _HDF5:
            is_model = b"model_config" in file.read(_LONGEST_INDEX)
            return _kind("keras_model_hdf5" if is_model else "keras_weights")
    return None


def _of_blobs(file: BinaryIO) -> Named | None:
    """Weights of Core ML: a file of blobs of version 2, where each blob begins with a mark, the first at byte 64."""
    file.seek(4)
    version = file.read(4)
    file.seek(64)
    is_blob = version == b"\x02\0\0\0" and file.read(4) == b"\xef\xbe\xad\xde"
    return _kind("weights_of_a_core_ml_model") if is_blob else None


def _of_gzip(file: BinaryIO, head: bytes) -> Named | None:
    """An object of R, which R compresses by gzip, or another gzip file."""
    if not head.startswith(b"\x1f\x8b"):
        return None
    try:
        inside = zlib.decompressobj(31).decompress(head, 64)
    except zlib.error:
        inside = b""
    if inside.startswith((b"X\n", b"RDX", b"A\n")) or _path(file).suffix.lower() in {".rds", ".rdata"}:
        return _kind("r_object")
    return _kind("gzip_file")


def _of_text(file: BinaryIO, head: bytes) -> Named | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    start = text[:400].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return _kind("html_page")
    if start.startswith((b"<?xml", b"<net ")) and b"<net" in start:
        return _kind("openvino_model")
    if text.startswith(b"{"):
        return _of_json(file)
    if text.startswith(b"model_checkpoint_path:"):
        return _kind("tensorflow_list")
    if text.startswith(b"7767517"):
        return _kind("network_of_ncnn")
    if text.startswith((b"(dp", b"ccollections\n", b"(lp")):
        return "a pickle of protocol 0", RESAVE
    return None


def _of_json(file: BinaryIO) -> Named | None:
    """What a JSON file is: the index of a checkpoint in parts, or a network without weights."""
    file.seek(0)
    data = file.read(_LONGEST_INDEX)
    if b'"weight_map"' in data:
        return f"the index of a checkpoint in parts{_parts(data)}", _TABLES["remedies"]["parts"]
    if b'"weightsManifest"' in data or b'"modelTopology"' in data:
        return _kind("tensorflow_js_model")
    if b'"arg_nodes"' in data:
        return _kind("mxnet_network")
    if b'"class_name"' in data and b'"config"' in data:
        return _kind("keras_network")
    return None


def _parts(data: bytes) -> str:
    try:
        names = sorted({str(name) for name in json.loads(data)["weight_map"].values()})
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return ""
    return f" ({brief(', '.join(names))})"


def _of_message(file: BinaryIO) -> Named | None:
    """What a protocol buffer is, by the numbers of its fields; None for an ONNX model or an unknown message."""
    file.seek(0)
    fields = list(_fields(file))
    numbers = {number for number, _, _ in fields}
    if not fields:
        return None
    number, kind, size = fields[0]
    if (number, kind) == (1, 0) and 7 not in numbers:
        if any(200 <= number <= 3000 for number in numbers):
            return _kind("core_ml_model")
        if numbers == {1, 2} and any(number == 2 and size > 8 for number, _, size in fields):
            return _with_folder(_kind("tensorflow_savedmodel"), _path(file).parent)
    if 100 in numbers and numbers <= {*range(1, 9), 100}:
        return _kind("caffe_model")
    if (number, kind) == (1, 2) and 2 in numbers and size < 256 and _is_name(file):
        return _kind("caffe_model")
    if numbers == {1} and b"_tf_keras_" in _first(file):
        return _with_folder(_kind("keras_metadata"), _path(file).parent)
    if (number, kind) == (1, 2) and numbers <= {1, 2, 3, 4, 5}:
        return _of_pairs(file)
    return None


def _fields(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Number, wire type and size of each field, if the file, or its first 4,096 fields, are a message; else nothing."""
    end, at, fields = file.seek(0, os.SEEK_END), 0, []
    while at < end and len(fields) < _MOST_FIELDS:
        file.seek(at)
        data = file.read(20)
        key, used = _varint(data)
        number, kind = key >> 3, key & 7
        size, more = _varint(data[used:]) if kind in {0, 2} else (0, {1: 8, 5: 4}.get(kind, 0))
        if not used or not more or not number:
            return
        size = size if kind == 2 else 0
        at += used + more + size
        if at > end:
            return
        fields.append((number, kind, size))
    yield from fields


def _varint(data: bytes) -> tuple[int, int]:
    """A number of variable length and its number of bytes; (0, 0) if its end is missing."""
    value = 0
    for i, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, i + 1
    return 0, 0


def _first(file: BinaryIO) -> bytes:
    """The beginning of a message's first field."""
    file.seek(0)
    data = file.read(300)
    size, used = _varint(data[1:])
    return data[1 + used : 1 + used + size]


def _is_name(file: BinaryIO) -> bool:
    text = _first(file)
    return text.isascii() and text.decode("latin-1").isprintable()


def _of_pairs(file: BinaryIO) -> Named | None:
    """TensorFlow or MindSpore, by the first field: a name and an operation, or a name and a tensor."""
    data = _first(file)
    size, used = _varint(data[1:])
    after = data[1 + used + size :]
    if data[:1] != b"\n" or after[:1] != b"\x12":
        return None
    _, used = _varint(after[1:])
    value = after[1 + used : 2 + used]
    if value.isalpha() or value == b"_":
        return _kind("frozen_tensorflow_graph")
    return _kind("mindspore_checkpoint") if value in {b"\x08", b"\n", b"\x12"} else None


def _of_msgpack(head: bytes) -> Named | None:
    """A MessagePack map whose first key is text, as Flax writes it; None for other bytes."""
    start = 1 if 0x81 <= (head[0] if head else 0) <= 0x8F else 3 if head[:1] == b"\xde" else 0
    key = head[start : start + 1]
    if not start or not (b"\xa1" <= key <= b"\xbf" or key == b"\xd9"):
        return None
    size, begin = (
        (head[start + 1], start + 2) if key == b"\xd9" and len(head) > start + 1 else (key[0] - 0xA0, start + 1)
    )
    text = head[begin : begin + size]
    is_text = len(text) == size and text.isascii() and text.decode("latin-1").isprintable()
    return _kind("flax_file") if is_text else None
