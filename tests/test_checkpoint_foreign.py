"""Files of other frameworks: named for what they are, with something that can be done; never taken for a checkpoint."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.package
from checkpoint_files import in_safetensors, saved, trained
from torch import nn

from batchnorm.checkpoint import format_of, read

onnx = pytest.importorskip("onnx")


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"expected .*, got .*\. .") as info:
        read(path)
    return str(info.value)


def varint(value: int) -> bytes:
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def number(field: int, value: int) -> bytes:
    """A field of a protocol buffer with a whole number."""
    return varint(field << 3) + varint(value)


def part(field: int, value: bytes) -> bytes:
    """A field of a protocol buffer with bytes, text or a message."""
    return varint(field << 3 | 2) + varint(len(value)) + value


def node(name: bytes, operation: bytes) -> bytes:
    """A node of TensorFlow: name, operation, input, attribute."""
    return part(1, name) + part(2, operation) + part(3, b"x") + part(5, part(1, b"T") + part(2, number(6, 1)))


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, mean=np.ones(3))
    return file.getvalue()


GRAPH = part(1, node(b"input", b"Placeholder")) + part(1, node(b"bn", b"FusedBatchNormV3")) + part(4, number(1, 440))
SAVED_MODEL = number(1, 1) + part(2, part(1, part(4, b"serve")) + part(2, GRAPH) + bytes(2000))
LAYER = part(1, b"bn1") + part(2, b"BatchNorm") + part(7, part(7, number(1, 4)) + bytes(400))
CORE_ML = number(1, 5) + part(2, part(1, part(1, b"image"))) + part(500, part(1, part(1, b"conv") + bytes(300)))
MINDSPORE = part(1, part(1, b"bn1.moving_mean") + part(2, number(1, 4) + part(2, b"Float32") + part(3, bytes(16))))
KERAS = b"".join(
    part(1, number(2, i) * bool(i) + part(3, b"root") + part(4, b"_tf_keras_layer") + part(5, b'{"name": "bn"}'))
    for i in range(3)
)
BLOBS = struct.pack("<II", 3, 2) + bytes(56) + struct.pack("<IIQQ", 0xDEADBEEF, 1, 6, 128) + bytes(99)
OBJECT = {"params": np.ones(2)}

# the file's name, its bytes, what it is called, and a part of what to do
FILES = {
    "SavedModel": ("x", SAVED_MODEL, "a TensorFlow SavedModel", "tf2onnx.convert --saved-model"),
    "SavedModel in onnx's clothes": ("x.onnx", SAVED_MODEL, "a TensorFlow SavedModel", "tf2onnx.convert"),
    "damaged SavedModel": ("saved_model.pb", SAVED_MODEL[:300], "a damaged TensorFlow SavedModel", "Copy"),
    "frozen graph": ("x.pb", GRAPH, "a frozen TensorFlow graph", "--graphdef"),
    "frozen graph without suffix": ("x", GRAPH, "a frozen TensorFlow graph", "--graphdef"),
    "damaged graph": ("x.pb", GRAPH[:-3], "a TensorFlow graph", "--graphdef"),
    "TFLite": ("x", b"\x1c\0\0\0TFL3" + bytes(400), "a TensorFlow Lite model", "--tflite"),
    "TensorFlow's index": ("m.index", b"\0\0\x02\x1c" + bytes(99), "the index of a TensorFlow checkpoint", "export"),
    "TensorFlow's list": ("checkpoint", b'model_checkpoint_path: "ckpt-1"\n', "TensorFlow checkpoints", "export"),
    "TensorFlow.js": ("x.json", b'{"modelTopology": {}, "weightsManifest": []}', "a TensorFlow.js model", "Give"),
    "Core ML": ("x", CORE_ML, "a Core ML model", "Give the torch checkpoint"),
    "damaged Core ML": ("x.mlmodel", CORE_ML[:-3], "a Core ML model", "Give the torch checkpoint"),
    "HDF5": ("x", b"\x89HDF\r\n\x1a\n" + bytes(400), "an HDF5 file, as Keras writes", "format='onnx'"),
    "HDF5 behind a block": ("x.h5", bytes(1024) + b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "format='onnx'"),
    "weights of Keras": ("m_weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "model.load_weights(path)"),
    "HDF5 of a Keras model": (
        "m.h5", b"\x89HDF\r\n\x1a\n" + bytes(99) + b"model_config\0", "a Keras model (HDF5)", "Load it in Keras and"),
    "Keras' settings": ("keras_metadata.pb", KERAS, "the settings of the Keras layers", "--saved-model"),
    "Core ML's weights": ("weight.bin", BLOBS, "the weights of a Core ML model", "Give the torch checkpoint"),
    "Keras": ("x.keras", archive("metadata.json", "config.json", "model.weights.h5"), "a Keras model", "format='onnx'"),
    "Keras' network": ("x.json", b'{"class_name": "Functional", "config": {}}', "a Keras network, without", "format"),
    "Flax": ("x", b"\x81\xa6params\x81\xa4conv\xc7" + bytes(99), "a MessagePack file, as Flax", "safetensors.numpy"),
    "Flax with a long name": ("x", b"\x82\xd9\x24" + b"a" * 36 + bytes(99), "a MessagePack file", "safetensors.numpy"),
    "GGUF": ("x", b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file", "Give the torch checkpoint"),
    "PaddlePaddle": (
        "x.pdparams", pickle.dumps({"bn.w_0": np.ones(2), "StructuredToParameterName@@": {}}, 2),
        "a PaddlePaddle state dict", "paddle.onnx.export"),
    "PaddlePaddle by its statistics": (
        "x.pdparams", pickle.dumps({"bn._mean": np.ones(2), "bn._variance": np.ones(2)}, 4),
        "a PaddlePaddle state dict", "paddle.onnx.export"),
    "PaddlePaddle's tuples": (
        "x.pdparams", pickle.dumps({"bn._mean": ("a", np.ones(2)), "bn._variance": ("b", np.ones(2))}, 4),
        "a PaddlePaddle state dict", "paddle.onnx.export"),
    "PaddlePaddle's program": ("x.pdmodel", part(1, number(1, 0) + bytes(30)), "a PaddlePaddle program", "paddle.onnx"),
    "OpenVINO": ("x", b'<?xml version="1.0"?>\n<net name="m" version="11">', "an OpenVINO model", "Give the torch"),
    "TensorRT": ("x", b"ftrt\0\0\0\0" + bytes(400), "a TensorRT engine", "Give the torch checkpoint"),
    "TensorRT by name": ("x.engine", b"\x03\x05\0\x07" + bytes(400), "a TensorRT engine", "Give the torch checkpoint"),
    "TensorRT's plan": ("x.plan", b"\x03\x05\0\x07" + bytes(400), "a TensorRT engine", "Give the torch checkpoint"),
    "MXNet": ("x", struct.pack("<QQ", 0x112, 0) + bytes(400), "a parameter file of MXNet", "export_model"),
    "MXNet's network": ("x.json", b'{"nodes": [], "arg_nodes": [0]}', "a network of MXNet", "export_model"),
    "Caffe": ("x", part(1, b"VGG") + part(100, LAYER), "a Caffe model", "Give the torch checkpoint"),
    "Caffe without a name": ("x", part(100, LAYER), "a Caffe model", "Give the torch checkpoint"),
    "old Caffe": ("x", part(1, b"VGG") + part(2, LAYER), "a Caffe model", "Give the torch checkpoint"),
    "damaged Caffe": ("x.caffemodel", part(100, LAYER)[:-3], "a Caffe model", "Give the torch checkpoint"),
    "MindSpore": ("x.ckpt", MINDSPORE, "a MindSpore checkpoint", "mindspore.export"),
    "R": ("x", gzip.compress(b"X\n\0\0\0\x03\0\x04\x02\0" + bytes(99)), "an R object", "Give the checkpoint"),
    "R unpacked": ("x.rds", b"X\n\0\0\0\x03\0\x04\x02\0" + bytes(99), "an R object", "Give the checkpoint"),
    "R's workspace": ("x.rda", gzip.compress(b"RDX3\nX\n" + bytes(99)), "an R object", "Give the checkpoint"),
    "gzip": ("x.pt.gz", gzip.compress(saved(trained().state_dict())), "a gzip file", "gunzip"),
    "bzip2": ("x", b"BZh91AY&SY" + bytes(99), "a bzip2 file", "bunzip2"),
    "index of parts": (
        "model.safetensors.index.json",
        json.dumps({"metadata": {"note": "a" * 999}, "weight_map": {"a": "one.safetensors"}}).encode(),
        "the index of a checkpoint in parts (one.safetensors)", "Give each of the files"),
    "NumPy's archive": ("x.npz", npz(), "a NumPy archive", "torch.from_numpy"),
    "NumPy's array": ("x.npy", b"\x93NUMPY\x01\0" + bytes(99), "a NumPy array", "torch.from_numpy"),
    "ExecuTorch": ("x.pte", b"\x1c\0\0\0ET12" + bytes(400), "an ExecuTorch program", "Give the torch checkpoint"),
    "ONNX Runtime": ("x.ort", b"\x1c\0\0\0ORTM" + bytes(400), "an ONNX Runtime model", "Give the .onnx file"),
    "Darknet": ("x.weights", b"\0\0\0\0\x02\0\0\0\x05" + bytes(400), "weights of Darknet", "Give the torch checkpoint"),
    "ncnn": ("x.param", b"7767517\n75 83\nInput data 0 1\n", "a network of ncnn", "Give the torch checkpoint"),
    "pickle of protocol 0": ("x.pkl", pickle.dumps(OBJECT, 0), "a pickle of protocol 0", "torch.save"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "kind", "remedy"), FILES.values(), ids=FILES)
def test_a_file_is_named_with_what_to_do(tmp_path, name, data, kind, remedy):
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name)
    assert f"got {kind}" in message or (kind.startswith("TensorFlow ch") and kind in message)
    assert remedy in message.partition(kind)[2]
    with pytest.raises(ValueError, match="expected a"):
        format_of(tmp_path / name) if not data.startswith((b"PK", b"\x80")) else read(tmp_path / name)


class Estimator:
    """Stands for one of another package."""


@pytest.mark.parametrize(
    "package", ["sklearn.linear_model", "joblib.numpy_pickle", "xgboost.sklearn", "lightgbm.basic"]
)
def test_models_of_other_packages_are_named(tmp_path, package):
    program = f"\x80\x04c{package}\nModel\n)\x81}}(X\x04\x00\x00\x00coefK\x01ub.".encode("latin-1")
    (tmp_path / "m.pkl").write_bytes(program)
    message = refused(tmp_path / "m.pkl")
    assert f"got an object of {package.partition('.')[0]}, {package}.Model. Give the checkpoint" in message


FOLDERS = {
    "SavedModel": (["saved_model.pb", "variables/variables.index"], "a TensorFlow SavedModel", "--saved-model"),
    "Core ML": (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "a Core ML package", "Give the torch"),
    "compiled Core ML": (["coremldata.bin", "model.mil"], "a compiled Core ML model", "Give the torch"),
    "distributed": ([".metadata", "__0_0.distcp"], "a distributed checkpoint", "dcp_to_torch"),
    "distributed without its index": (["__0_0.distcp"], "a distributed checkpoint", "dcp_to_torch"),
    "Orbax": (["_CHECKPOINT_METADATA", "d/0"], "an Orbax checkpoint", "safetensors.numpy"),
    "DeepSpeed": (["latest", "zero_to_fp32.py"], "a DeepSpeed checkpoint", "python zero_to_fp32.py"),
    "TensorFlow": (["checkpoint", "ckpt-1.index"], "a TensorFlow checkpoint", "tf2onnx"),
    "weights": (["config.json", "model.safetensors"], "a folder", "Give a file in it: model.safetensors."),
    "nothing": ([], "a folder", "Give the file that holds the weights."),
}


@pytest.mark.parametrize(("files", "kind", "remedy"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_named_with_what_to_do(tmp_path, files, kind, remedy):
    place = tmp_path / "model"
    place.mkdir()
    for name in files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    message = refused(place)
    assert f"expected a file, got {kind}. " in message
    assert remedy in message


def test_what_lies_beside_a_file_tells_what_it_is(tmp_path):
    (tmp_path / "m.bin").write_bytes(bytes(600))
    assert "bytes that begin with" in refused(tmp_path / "m.bin")
    (tmp_path / "m.xml").write_text("<net/>")
    assert "got the weights of an OpenVINO model" in refused(tmp_path / "m.bin")
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(600))
    (tmp_path / "m.index").write_bytes(b"x")
    assert "got a part of a TensorFlow checkpoint" in refused(tmp_path / "m.data-00000-of-00001")


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:TypedStorage is deprecated")
def test_programs_of_torch_are_named(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    torch.jit.save(torch.jit.trace(net, torch.ones(1, 3, 2, 2)), tmp_path / "script.pt")
    assert "got a TorchScript program. Save its weights with torch.save(" in refused(tmp_path / "script.pt")
    torch.export.save(torch.export.export(net, (torch.ones(1, 3, 2, 2),)), tmp_path / "program.pt2")
    assert "got a torch.export program. Save program.state_dict" in refused(tmp_path / "program.pt2")
    with torch.package.PackageExporter(tmp_path / "package.pt") as package:
        package.extern("**")
        package.save_pickle("model", "model.pkl", net)
    assert "got a torch.package archive. Load its model" in refused(tmp_path / "package.pt")


@pytest.mark.parametrize("name", ["m.onnx", "m.engine", "saved_model.pb", "m.bin", "m"])
def test_bytes_decide_before_the_name(tmp_path, name):
    empty = onnx.helper.make_graph([], "graph", [], [])
    (tmp_path / name).write_bytes(onnx.helper.make_model(empty).SerializeToString())
    assert format_of(tmp_path / name) == "onnx"
    (tmp_path / name).write_bytes(saved(trained().state_dict()))
    assert format_of(tmp_path / name) == "pt"
    (tmp_path / name).write_bytes(in_safetensors({}))
    assert format_of(tmp_path / name) == "safetensors"
