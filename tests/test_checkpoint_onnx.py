"""Batch norm layers of ONNX files."""

from __future__ import annotations

import contextlib
import random
import sys

import numpy as np
import pytest

from batchnorm.checkpoint import Checkpoint, read

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

PARTS = ("weight", "bias", "running_mean", "running_var")


def initializers(name: str = "layer1.0.bn1", dtype: type = np.float32, channels: int = 3) -> list:
    return [
        numpy_helper.from_array((np.arange(channels) + i + 0.5).astype(dtype), f"{name}.{part}")
        for i, part in enumerate(PARTS)
    ]


def node(name: str = "layer1.0.bn1", outputs: tuple[str, ...] = ("y",), **attributes: object):
    inputs = ["x", *(f"{name}.{part}" for part in PARTS)]
    return helper.make_node("BatchNormalization", inputs, outputs, name="node0", **attributes)


def model(nodes: list, tensors: list, opset: int = 17):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def reading(tmp_path, made) -> Checkpoint:
    (tmp_path / "m.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return read(tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_layer_has_its_tensors_values_and_torchs_momentum(tmp_path, dtype):
    other = numpy_helper.from_array(np.ones(2, np.float32), "conv.weight")
    made = model([node(epsilon=1e-3, momentum=0.99)], [*initializers(dtype=dtype), other])
    result = reading(tmp_path, made)
    stored = result.layers["layer1.0.bn1"]
    assert [getattr(stored, part).tolist() for part in PARTS] == [[i + 0.5, i + 1.5, i + 2.5] for i in range(4)]
    assert stored.dtypes == dict.fromkeys(PARTS, np.dtype(dtype).name)
    assert stored.eps == 1e-3
    assert stored.momentum == pytest.approx(0.01)
    assert stored.num_batches_tracked is None
    assert (result.format, result.names, result.in_train_mode) == ("onnx", ("conv.weight",), ())
    assert result.keys["layer1.0.bn1"] == tuple(f"layer1.0.bn1.{part}" for part in PARTS)


def test_attributes_that_are_left_out_have_onnx_defaults(tmp_path):
    stored = reading(tmp_path, model([node()], initializers())).layers["layer1.0.bn1"]
    assert (stored.eps, stored.momentum) == (1e-5, pytest.approx(0.1))


TYPED = {
    "float": (TensorProto.FLOAT, [1.5, 2.5]),
    "double": (TensorProto.DOUBLE, [1.5, 2.5]),
    "float16": (TensorProto.FLOAT16, [1.5, 2.5]),
    "bfloat16": (TensorProto.BFLOAT16, [1.5, 2.5]),
}


@pytest.mark.parametrize(("kind", "values"), TYPED.values(), ids=TYPED)
def test_values_in_typed_fields_are_read(tmp_path, kind, values):
    tensors = [helper.make_tensor(f"bn.{part}", kind, [2], values) for part in PARTS]
    assert not tensors[0].raw_data
    assert reading(tmp_path, model([node("bn")], tensors)).layers["bn"].running_var.tolist() == values


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes", "training"),
    [
        (17, ("y",), {}, False),
        (17, ("y", "m", "v"), {"training_mode": 1}, True),
        (14, ("y",), {"training_mode": 0}, False),
        (9, ("y",), {}, False),
        (9, ("y", "m", "v", "sm", "sv"), {}, True),
        (7, ("y", "", ""), {}, False),
        (6, ("y",), {"is_test": 1}, False),
        (6, ("y",), {}, True),
        (1, ("y",), {"is_test": 1, "consumed_inputs": [0, 0, 0, 1, 1]}, False),
    ],
)
def test_training_mode_is_told_in_every_version(tmp_path, opset, outputs, attributes, training):
    result = reading(tmp_path, model([node(outputs=outputs, **attributes)], initializers(), opset))
    assert result.in_train_mode == (("layer1.0.bn1",) if training else ())


def test_layers_without_telling_tensors_have_the_nodes_name(tmp_path):
    tensors = [numpy_helper.from_array(np.ones(2, np.float32), f"t{i}") for i in range(4)]
    made = helper.make_node("BatchNormalization", ["x", "t0", "t1", "t2", "t3"], ["y"], name="bn_7")
    assert list(reading(tmp_path, model([made], tensors)).layers) == ["bn_7"]


def test_tensors_behind_identity_and_constant_nodes_are_found(tmp_path):
    mean = numpy_helper.from_array(np.full(3, 8, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["layer1.0.bn1.running_mean"], value=mean),
        helper.make_node("Identity", ["other"], ["layer1.0.bn1.running_var"]),
        node(),
    ]
    tensors = [*initializers()[:2], numpy_helper.from_array(np.full(3, 9, np.float32), "other")]
    stored = reading(tmp_path, model(nodes, tensors)).layers["layer1.0.bn1"]
    assert (stored.running_mean.tolist(), stored.running_var.tolist()) == ([8] * 3, [9] * 3)


def test_layers_inside_a_branch_are_found(tmp_path):
    branch = helper.make_graph([node()], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    made = model([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)], initializers())
    assert list(reading(tmp_path, made).layers) == ["layer1.0.bn1"]


def test_a_layer_that_is_called_twice_is_one(tmp_path):
    result = reading(tmp_path, model([node(), node(outputs=("z",))], initializers()))
    assert list(result.layers) == ["layer1.0.bn1"]


def test_layers_of_one_name_get_numbers(tmp_path):
    tensors = [numpy_helper.from_array(np.ones(2, np.float32), f"t{i}") for i in range(5)]
    nodes = [helper.make_node("BatchNormalization", ["x", f"t{i}", "t2", "t3", "t4"], ["y"], name="n") for i in (0, 1)]
    assert list(reading(tmp_path, model(nodes, tensors)).layers) == ["n", "n (2)"]


def test_names_that_are_no_initializers_leave_none(tmp_path):
    stored = reading(tmp_path, model([node()], initializers()[:2])).layers["layer1.0.bn1"]
    assert (stored.running_mean, stored.channels) == (None, 3)


def test_external_data_is_refused_with_a_remedy(tmp_path):
    tensors = initializers()
    tensors[2].ClearField("raw_data")
    tensors[2].data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError, match=r"m\.onnx: expected tensors inside the file.*Save it in one file"):
        reading(tmp_path, model([node()], tensors))


def test_sizes_that_contradict_each_other_are_refused(tmp_path):
    tensors = initializers()
    tensors[2].dims[0] = 5
    with pytest.raises(ValueError, match=r"expected 5 values in layer1\.0\.bn1\.running_mean, got 3"):
        reading(tmp_path, model([node()], tensors))
    with pytest.raises(ValueError, match=r"expected one size of all tensors of layer layer1\.0\.bn1"):
        reading(tmp_path, model([node()], [*initializers()[:3], initializers(channels=4)[3]]))


def test_integers_are_refused_as_statistics(tmp_path):
    with pytest.raises(ValueError, match=r"expected floats in layer1\.0\.bn1\.weight, got ONNX data type 7"):
        reading(tmp_path, model([node()], initializers(dtype=np.int64)))


def test_without_onnx_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'batchnorm\[onnx\]'"):
        reading(tmp_path, model([node()], initializers()))


def test_damaged_models_are_refused_and_nothing_else_is_raised(tmp_path):
    chance = random.Random(0)
    whole = model([node()], initializers()).SerializeToString()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            reading(tmp_path, bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
