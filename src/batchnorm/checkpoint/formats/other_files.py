"""Files that are no checkpoint of torch, named for what they are, and what to do with each.

Bytes decide where a format has a mark or a structure of its own; a name decides only where it has none. TensorFlow,
ONNX, Core ML and Caffe write protocol buffers without a mark: which fields a message has tells them apart.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.checkpoint.refusal import RESAVE, brief

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from batchnorm.checkpoint.pickled.unknown_classes import Saved

Named = tuple[str, str]  # what a file is, and what to do

_GIVE = "Give the checkpoint that torch saved."
_SOURCE = "Give the torch checkpoint that it was made from, or its ONNX export."
_EXPORT = "Give the torch checkpoint or ONNX model that it was made from: its own weights are folded and reordered."
_TENSORFLOW = "Convert it: python -m tf2onnx.convert --saved-model FOLDER --output model.onnx. Then give model.onnx."
_RESTORE = (
    "Load it into its model in TensorFlow, save that with model.export(FOLDER), and convert it: "
    "python -m tf2onnx.convert --saved-model FOLDER --output model.onnx."
)
_MINDSPORE = "Load it in MindSpore and export it: mindspore.export(net, x, file_name='model', file_format='ONNX')."
_GRAPH = (
    "Convert it: python -m tf2onnx.convert --graphdef model.pb --inputs NAME:0 --outputs NAME:0 --output model.onnx. "
    "Then give model.onnx."
)
_LITE = "Convert it: python -m tf2onnx.convert --tflite model.tflite --output model.onnx. Then give model.onnx."
_KERAS_WEIGHTS = (
    "Load them into their model in Keras and export that: model.load_weights(path); "
    "model.export('model.onnx', format='onnx'). Then give model.onnx."
)
_KERAS = "Load it in Keras and export it: model.export('model.onnx', format='onnx'). Then give model.onnx."
_PADDLE = "Load it in PaddlePaddle and export it: paddle.onnx.export(model, 'model', input_spec=[...])."
_MXNET = "Export it: mxnet.onnx.export_model('model-symbol.json', 'model-0000.params', shapes, types, 'model.onnx')."
_FLAX = (
    "Load it in JAX and save the numbers under torch's names: "
    "safetensors.numpy.save_file({'bn.running_mean': mean, 'bn.running_var': var}, 'model.safetensors')."
)
_SHARDS = (
    "Put it together: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt. "
    "Then give model.pt."
)
_ARRAYS = "Save its arrays: torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, 'arrays.pt')."
_PARTS = "Give each of the files that it names."

_MAGIC: dict[bytes, Named] = {
    b"\x89PNG": ("a PNG image", _GIVE),
    b"\xff\xd8\xff": ("a JPEG image", _GIVE),
    b"%PDF": ("a PDF document", _GIVE),
    b"\x93NUMPY": ("a NumPy array", _ARRAYS),
    b"GGUF": ("a GGUF file", _SOURCE),
    b"lmgg": ("a GGML file", _SOURCE),
    b"tjgg": ("a GGML file", _SOURCE),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "Unpack it: zstd -d."),
    b"BZh": ("a bzip2 file", "Unpack it: bunzip2."),
    b"\xfd7zXZ": ("an xz file", "Unpack it: unxz."),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "Unpack it: 7z x."),
    b"Rar!": ("a RAR archive", "Unpack it: unrar x."),
    b"PK\x05\x06": ("an empty zip file", "Copy or download it again."),
    b"PAR1": ("a Parquet table", _GIVE),
    b"ARROW1": ("an Arrow table", _GIVE),
    b"SQLite format 3": ("an SQLite database", _GIVE),
    b"\x7fELF": ("a compiled program", _GIVE),
    b"MZ": ("a Windows program", _GIVE),
    b"ftrt": ("a TensorRT engine", _EXPORT),
    b"ptrt": ("a TensorRT engine", _EXPORT),
    b"\x12\x01\0\0\0\0\0\0": ("a parameter file of MXNet", _MXNET),
    b"X\n\0\0\0": ("an R object", _GIVE),
    b"RDX": ("an R workspace", _GIVE),
    b"RKNN": ("an RKNN model", _EXPORT),
    b"version https://git-lfs": ("a Git LFS pointer in the file's place", "Run: git lfs pull."),
}
# FlatBuffers have theirs behind the first offset
_FLATBUFFERS: dict[bytes, Named] = {
    b"TFL3": ("a TensorFlow Lite model", _LITE),
    b"ET12": ("an ExecuTorch program", _EXPORT),
    b"ORTM": ("an ONNX Runtime model (.ort)", "Give the .onnx file that it was made from."),
    b"PTMF": ("a torch mobile program", "Give the checkpoint that it was made from."),
}
_SUFFIXES: dict[str, Named] = {
    ".engine": ("a TensorRT engine", _EXPORT),
    ".plan": ("a TensorRT engine", _EXPORT),
    ".trt": ("a TensorRT engine", _EXPORT),
    ".pdiparams": ("parameters of a PaddlePaddle program", _PADDLE),
    ".pdmodel": ("a PaddlePaddle program", _PADDLE),
    ".rds": ("an R object", _GIVE),
    ".rdata": ("an R workspace", _GIVE),
    ".tflite": ("a TensorFlow Lite model", _LITE),
    ".mlmodel": ("a Core ML model", _EXPORT),
    ".caffemodel": ("a Caffe model", _SOURCE),
    ".index": ("the index of a TensorFlow checkpoint", _RESTORE),
    ".pb": ("a TensorFlow graph", _GRAPH),
    ".weights": ("weights of Darknet", _SOURCE),
    ".mnn": ("an MNN model", _EXPORT),
    ".hef": ("a Hailo program", _EXPORT),
    ".msgpack": ("a MessagePack file, as Flax writes", _FLAX),
}
_OF_FOLDERS: dict[str, Named] = {
    "saved_model.pb": ("a TensorFlow SavedModel", _TENSORFLOW),
    "saved_model.pbtxt": ("a TensorFlow SavedModel", _TENSORFLOW),
    ".metadata": ("a distributed checkpoint", _SHARDS),
    "coremldata.bin": ("a compiled Core ML model", _EXPORT),
    "_CHECKPOINT_METADATA": ("an Orbax checkpoint", _FLAX),
    "_METADATA": ("an Orbax checkpoint", _FLAX),
    "zero_to_fp32.py": ("a DeepSpeed checkpoint", "Put it together, in that folder: python zero_to_fp32.py . whole"),
    "checkpoint": ("a TensorFlow checkpoint", _RESTORE),
}
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pkl")
# how zip files that are none of torch.save give themselves away
_ZIPPED: dict[str, Named] = {
    "/constants.pkl": ("a TorchScript program", "Save its weights with torch.save(program.state_dict(), path)."),
    "/serialized_exported_program.json": ("a torch.export program", "Save program.state_dict with torch.save."),
    "/models/model.json": ("a torch.export program", "Save program.state_dict with torch.save."),
    "/.data/extern_modules": ("a torch.package archive", "Load its model and save model.state_dict()."),
    "model.weights.h5": ("a Keras model", _KERAS),
    "/Manifest.json": ("a Core ML package", _EXPORT),
    ".npy": ("a NumPy archive", _ARRAYS),
    "/_skops_schema.json": ("a scikit-learn model", _GIVE),
}
# packages whose pickles hold no torch model
_PACKAGES = ("sklearn", "joblib", "xgboost", "lightgbm", "catboost", "statsmodels", "pandas", "jax", "flax", "keras")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PADDLES_NAMES = "StructuredToParameterName@@"
_MOST_FIELDS = 4096
_LONGEST_INDEX = 1 << 20  # bytes of a JSON file that are read


def of_folder(place: Path) -> Named:
    """What a folder is, by the files in it."""
    names = sorted(entry.name for entry in os.scandir(place))
    if place.suffix == ".mlpackage" or {"Manifest.json", "Data"} <= set(names):
        return "a Core ML package", _EXPORT
    known = next((named for name, named in _OF_FOLDERS.items() if name in names), None)
    if known is None and any(name.endswith(".distcp") for name in names):
        known = _OF_FOLDERS[".metadata"]
    if known is not None:
        return known[0], known[1].replace("FOLDER", brief(str(place)))
    inside = [name for name in names if name.endswith(_WEIGHTS)]
    return "a folder", f"Give a file in it: {brief(inside[0])}." if inside else "Give the file that holds the weights."


def of_content(file: BinaryIO, head: bytes) -> Named | None:
    """What a file is if its bytes say that it is another framework's; None if they do not."""
    named = next((named for magic, named in _MAGIC.items() if head.startswith(magic)), None)
    named = named or _FLATBUFFERS.get(head[4:8]) or _of_gzip(file, head) or _of_text(file, head)
    named = named or _of_hdf5(file) or _of_blobs(file)
    return named or _of_message(file) or _of_msgpack(head)


def of_name(file: BinaryIO) -> Named | None:
    """What a file is by its name, and the files beside it; None if they do not tell."""
    path = _path(file)
    if path.name == "saved_model.pb":
        return "a damaged TensorFlow SavedModel", "Copy or download it again."
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        return "the weights of an OpenVINO model", _EXPORT
    if ".data-" in path.name and path.with_name(f"{path.name.partition('.data-')[0]}.index").is_file():
        return "a part of a TensorFlow checkpoint", _RESTORE
    return _SUFFIXES.get(path.suffix.lower())


def has_graph(file: BinaryIO) -> bool:
    """Whether a protocol buffer has the field that an ONNX model has its graph in."""
    return any(number == 7 and kind == 2 for number, kind, _ in _fields(file))


def _path(file: BinaryIO) -> Path:
    return Path(str(getattr(file, "name", "")))


def of_bytes(head: bytes) -> Named:
    """What bytes of no known format look like."""
    if not head:
        return "an empty file", "Copy or download it again."
    if head.isascii() and b"\0" not in head:
        return f"text, {head[:40].decode()!a}", _GIVE
    return f"bytes that begin with {head[:8].hex(' ')}", _GIVE


def of_zip(names: Iterable[str]) -> Named | None:
    """What a zip file is, by the names in it; None if nothing tells."""
    return next((named for end, named in _ZIPPED.items() if any(f"/{name}".endswith(end) for name in names)), None)


def of_shards(name: str) -> Named:
    """A file in which several of torch.save follow each other."""
    return "a part of a distributed checkpoint", _SHARDS.replace("FOLDER", brief(str(Path(name).parent)))


def of_value(saved: Saved) -> Named | None:
    """What a pickle holds if it is another framework's; None if nothing tells."""
    if isinstance(saved, dict) and (_PADDLES_NAMES in saved or _is_paddles(saved)):
        return "a PaddlePaddle state dict", _PADDLE
    name = getattr(saved, "name", "")
    package = name.partition(".")[0]
    if name.startswith("torch.distributed.checkpoint.metadata."):
        return "the index of a distributed checkpoint", _SHARDS
    if package in _PACKAGES:
        return f"an object of {package}, {brief(name)}", _GIVE
    return None


def _is_paddles(saved: dict[Saved, Saved]) -> bool:
    """Whether statistics have PaddlePaddle's names: _mean and _variance."""
    names = {key for key in saved if isinstance(key, str)}
    return any(
        f"{name.removesuffix('_mean')}_variance" in names for name in names if name.rpartition(".")[2] == "_mean"
    )


def _of_hdf5(file: BinaryIO) -> Named | None:
    """A Keras model has its configuration as an attribute; HDF5 may begin behind a block of 512 bytes, or of more."""
    for start in (0, 512, 1024, 2048):
        file.seek(start)
        if file.read(len(_HDF5)) == _HDF5:
            is_model = b"model_config" in file.read(_LONGEST_INDEX)
            return ("a Keras model (HDF5)", _KERAS) if is_model else ("an HDF5 file, as Keras writes", _KERAS_WEIGHTS)
    return None


def _of_blobs(file: BinaryIO) -> Named | None:
    """Core ML keeps weights in a file of blobs: its version is 2, and a mark begins each blob, the first at 64."""
    file.seek(4)
    version = file.read(4)
    file.seek(64)
    is_blob = version == b"\x02\0\0\0" and file.read(4) == b"\xef\xbe\xad\xde"
    return ("the weights of a Core ML model", _EXPORT) if is_blob else None


def _of_gzip(file: BinaryIO, head: bytes) -> Named | None:
    """R packs its objects; other files are packed by a command."""
    if not head.startswith(b"\x1f\x8b"):
        return None
    try:
        inside = zlib.decompressobj(31).decompress(head, 64)
    except zlib.error:
        inside = b""
    if inside.startswith((b"X\n", b"RDX", b"A\n")) or _path(file).suffix.lower() in {".rds", ".rdata"}:
        return "an R object", _GIVE
    return "a gzip file", "Unpack it: gunzip."


def _of_text(file: BinaryIO, head: bytes) -> Named | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    start = text[:400].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "an HTML page, such as a download's error", "Download the file itself."
    if start.startswith((b"<?xml", b"<net ")) and b"<net" in start:
        return "an OpenVINO model", _EXPORT
    if text.startswith(b"{"):
        return _of_json(file)
    if text.startswith(b"model_checkpoint_path:"):
        return "the list of a folder of TensorFlow checkpoints", _RESTORE
    if text.startswith(b"7767517"):
        return "a network of ncnn", _EXPORT
    if text.startswith((b"(dp", b"ccollections\n", b"(lp")):
        return "a pickle of protocol 0", RESAVE
    return None


def _of_json(file: BinaryIO) -> Named | None:
    """The parts of a checkpoint, or a network without weights."""
    file.seek(0)
    data = file.read(_LONGEST_INDEX)
    if b'"weight_map"' in data:
        return f"the index of a checkpoint in parts{_parts(data)}", _PARTS
    if b'"weightsManifest"' in data or b'"modelTopology"' in data:
        return "a TensorFlow.js model", _SOURCE
    if b'"arg_nodes"' in data:
        return "a network of MXNet, without its weights", _MXNET
    if b'"class_name"' in data and b'"config"' in data:
        return "a Keras network, without its weights", _KERAS
    return None


def _parts(data: bytes) -> str:
    try:
        names = sorted({str(name) for name in json.loads(data)["weight_map"].values()})
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return ""
    return f" ({brief(', '.join(names))})"


def _of_message(file: BinaryIO) -> Named | None:
    """A protocol buffer that is no ONNX model, by the numbers of its fields."""
    file.seek(0)
    fields = list(_fields(file))
    numbers = {number for number, _, _ in fields}
    if not fields:
        return None
    number, kind, size = fields[0]
    if (number, kind) == (1, 0) and 7 not in numbers:
        if any(200 <= number <= 3000 for number in numbers):
            return "a Core ML model", _EXPORT
        if numbers == {1, 2} and any(number == 2 and size > 8 for number, _, size in fields):
            return "a TensorFlow SavedModel", _TENSORFLOW.replace("FOLDER", _folder(file))
    if 100 in numbers and numbers <= {*range(1, 9), 100}:
        return "a Caffe model", _SOURCE
    if (number, kind) == (1, 2) and 2 in numbers and size < 256 and _is_name(file):
        return "a Caffe model", _SOURCE
    if numbers == {1} and b"_tf_keras_" in _first(file):
        return "the settings of the Keras layers of a SavedModel", _TENSORFLOW.replace("FOLDER", _folder(file))
    if (number, kind) == (1, 2) and numbers <= {1, 2, 3, 4, 5}:
        return _of_pairs(file)
    return None


def _fields(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Number, wire type and size of each field of a message that takes all of the file, or none of a broken one."""
    end, at, found = file.seek(0, os.SEEK_END), 0, []
    while at < end and len(found) < _MOST_FIELDS:
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
        found.append((number, kind, size))
    yield from found


def _varint(data: bytes) -> tuple[int, int]:
    """A number and how many bytes it takes; 0 bytes if it does not end."""
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
    """By the first field: a node of TensorFlow is a name and an operation, MindSpore has a name and a tensor."""
    data = _first(file)
    size, used = _varint(data[1:])
    after = data[1 + used + size :]
    if data[:1] != b"\n" or after[:1] != b"\x12":
        return None
    _, used = _varint(after[1:])
    value = after[1 + used : 2 + used]
    if value.isalpha() or value == b"_":
        return "a frozen TensorFlow graph", _GRAPH
    return ("a MindSpore checkpoint", _MINDSPORE) if value in {b"\x08", b"\n", b"\x12"} else None


def _folder(file: BinaryIO) -> str:
    return brief(str(_path(file).parent))


def _of_msgpack(head: bytes) -> Named | None:
    """A map whose first key is text, as Flax and MessagePack write it."""
    start = 1 if 0x81 <= (head[0] if head else 0) <= 0x8F else 3 if head[:1] == b"\xde" else 0
    key = head[start : start + 1]
    if not start or not (b"\xa1" <= key <= b"\xbf" or key == b"\xd9"):
        return None
    size, begin = (
        (head[start + 1], start + 2) if key == b"\xd9" and len(head) > start + 1 else (key[0] - 0xA0, start + 1)
    )
    text = head[begin : begin + size]
    is_text = len(text) == size and text.isascii() and text.decode("latin-1").isprintable()
    return ("a MessagePack file, as Flax writes", _FLAX) if is_text else None
