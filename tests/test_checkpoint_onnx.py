"""Batch norm layers of ONNX files."""

from __future__ import annotations

import contextlib
import random
import sys

import numpy as np
import pytest

from batchnorm.checkpoint import Checkpoint, read
from batchnorm.doctor import examine

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


def test_names_that_are_no_initializers_are_unread_with_the_reason(tmp_path):
    stored = reading(tmp_path, model([node()], initializers()[:2])).layers["layer1.0.bn1"]
    assert (stored.running_mean, stored.channels) == (None, 3)
    assert stored.unread["running_mean"].startswith("nothing in the file is called layer1.0.bn1.running_mean. Export")


def chain(operation: str, *inputs: str, part: str = "running_var", **attributes: object):
    """A node that makes one of the layer's tensors."""
    return helper.make_node(operation, inputs, [f"layer1.0.bn1.{part}"], **attributes)


def tensor(values: object, name: str, kind: type = np.float32):
    return numpy_helper.from_array(np.array(values, kind), name)


INT8 = [tensor([10, -20, 30], "q", np.int8), tensor(0.5, "s")]
ROWS = tensor([[1, 2, 3]], "r")
CHAINS = {
    "Cast": ([chain("Cast", "h", to=TensorProto.FLOAT)], [tensor([0.1, -2, 3], "h", np.float16)],
             np.float16([0.1, -2, 3]), "float32"),
    "Cast to half": ([chain("Cast", "h", to=TensorProto.FLOAT16)], [tensor([0.1, -2, 1e6], "h")],
                     np.float16([0.1, -2, np.inf]), "float16"),
    "Cast to bfloat16": ([chain("Cast", "h", to=TensorProto.BFLOAT16)], [tensor([1 + 2**-9, -2, 3], "h")],
                         [1, -2, 3], "bfloat16"),
    "Cast of double": ([chain("Cast", "h", to=TensorProto.FLOAT)], [tensor([0.1, 2, 3], "h", np.float64)],
                       np.float32([0.1, 2, 3]), "float32"),
    "Cast of whole numbers": ([chain("Cast", "h", to=TensorProto.FLOAT)], [tensor([1, -2, 3], "h", np.int64)],
                              [1, -2, 3], "float32"),
    "CastLike": ([chain("CastLike", "h", "like")], [tensor([1, 2, 3], "h"), tensor(0, "like", np.float64)],
                 [1, 2, 3], "float64"),
    "DequantizeLinear": ([chain("DequantizeLinear", "q", "s")], INT8, [5, -10, 15], "float32"),
    "DequantizeLinear with a zero point": (
        [chain("DequantizeLinear", "q", "s", "z")], [*INT8, tensor(2, "z", np.int8)], [4, -11, 14], "float32"),
    "DequantizeLinear with an unsigned zero point": (
        [chain("DequantizeLinear", "u", "s", "z")],
        [tensor([1, 200, 128], "u", np.uint8), INT8[1], tensor(128, "z", np.uint8)], [-63.5, 36, 0], "float32"),
    "DequantizeLinear along an axis": (
        [chain("DequantizeLinear", "q", "a", "z", axis=0)],
        [INT8[0], tensor([1, 2, 3], "a"), tensor([0, 1, 2], "z", np.int8)], [10, -42, 84], "float32"),
    "DequantizeLinear along the last axis of more": (
        [helper.make_node("DequantizeLinear", ["q", "a"], ["f"], axis=-1), chain("Squeeze", "f")],
        [tensor([[10, -20, 30]], "q", np.int8), tensor([1, 2, 3], "a")], [10, -40, 90], "float32"),
    "QuantizeLinear and back": (
        [helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"]), chain("DequantizeLinear", "q", "s", "z")],
        [tensor([0.75, -1.24, 1e3], "f"), INT8[1], tensor(0, "z", np.int8)], [1, -1, 63.5], "float32"),
    "several Identity and Cast": (
        [helper.make_node("Identity", ["h"], ["i"]), helper.make_node("Cast", ["i"], ["j"], to=1),
         chain("Identity", "j")],
        [tensor([1, 2, 3], "h", np.float16)], [1, 2, 3], "float32"),
    "Constant of floats": ([chain("Constant", value_floats=[1.0, 2.0, 3.0])], [], [1, 2, 3], "float32"),
    "Reshape": ([chain("Reshape", "r", "to")], [ROWS, tensor([-1], "to", np.int64)], [1, 2, 3], "float32"),
    "Reshape that keeps an axis": (
        [chain("Reshape", "r", "to")], [tensor([[1], [2], [3]], "r"), tensor([0, 1], "to", np.int64)],
        [1, 2, 3], "float32"),
    "Flatten": ([chain("Flatten", "r")], [ROWS], [1, 2, 3], "float32"),
    "Squeeze": ([chain("Squeeze", "r", "axes")], [ROWS, tensor([0], "axes", np.int64)], [1, 2, 3], "float32"),
    "Squeeze of all": ([chain("Squeeze", "r")], [ROWS], [1, 2, 3], "float32"),
    "Unsqueeze": ([chain("Unsqueeze", "v", "axes")],
                  [tensor([1, 2, 3], "v"), tensor([0, 2], "axes", np.int64)], [1, 2, 3], "float32"),
    "Transpose": ([chain("Transpose", "r", perm=[1, 0])], [ROWS], [1, 2, 3], "float32"),
    "Transpose of a table": (
        [helper.make_node("Transpose", ["r"], ["t"]), chain("Reshape", "t", "to")],
        [tensor([[1, 3], [2, 4]], "r"), tensor([-1], "to", np.int64)], [1, 2, 3, 4], "float32"),
    "arithmetic": (
        [helper.make_node("Mul", ["v", "v"], ["w"]), chain("Sub", "w", "one")],
        [tensor([1, 2, 3], "v"), tensor(1, "one")], [0, 3, 8], "float32"),
    "Max of one": ([chain("Max", "v")], [tensor([1, 2, 3], "v")], [1, 2, 3], "float32"),
    "Min of three": (
        [helper.make_node("Mul", ["v", "v"], ["w"]), chain("Min", "five", "v", "w")],
        [tensor([0.5, 2, 7], "v"), tensor(5, "five")], [0.25, 2, 5], "float32"),
    "ConstantOfShape": (
        [chain("ConstantOfShape", "n", value=tensor([2], "value"))], [tensor([3], "n", np.int64)],
        [2, 2, 2], "float32"),
    "Expand": ([chain("Expand", "o", "n")], [tensor([2], "o"), tensor([3], "n", np.int64)], [2, 2, 2], "float32"),
    "Concat": ([chain("Concat", "v", "v", axis=0)], [tensor([1, 2], "v")], [1, 2, 1, 2], "float32"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "tensors", "values", "dtype"), CHAINS.values(), ids=CHAINS)
def test_values_are_followed_through_nodes_that_keep_them(tmp_path, nodes, tensors, values, dtype):
    channels = len(values)
    made = model([*nodes, node()], [*initializers(channels=channels)[:3], *tensors], 21)
    stored = reading(tmp_path, made).layers["layer1.0.bn1"]
    assert stored.running_var.tolist() == np.array(values, np.float64).tolist()
    assert stored.dtypes["running_var"] == dtype
    assert stored.unread == {}


def test_what_was_followed_is_what_the_reference_computes(tmp_path):
    """Every chain above, run by ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    for name, (nodes, tensors, *_) in CHAINS.items():
        if "bfloat16" in name:
            continue  # NumPy has no such type to compare with
        out = helper.make_tensor_value_info("layer1.0.bn1.running_var", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "graph", [], [out], tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        with np.errstate(all="ignore"):
            expected = ReferenceEvaluator(made).run(None, {})[0].ravel()
        channels = expected.size
        made = model([*nodes, node()], [*initializers(channels=channels)[:3], *tensors], 21)
        stored = reading(tmp_path, made).layers["layer1.0.bn1"]
        assert stored.running_var.tolist() == expected.astype(np.float64).tolist(), name


UNREAD = {
    "an input": ([], "layer1.0.bn1.running_var is an input of the graph. Export with the weights as constants"),
    "computed": ([chain("Relu", "x")], "is computed by a Relu node"),
    "behind a Cast of an input": ([chain("Cast", "x", to=1)], "x is an input of the graph"),
    "a call of nothing": ([chain("Missing", "x", domain="mine")], "is computed by a Missing node"),
    "a shape that does not fit": (
        [chain("Reshape", "layer1.0.bn1.running_mean", "two")], "a Reshape node that cannot be followed"),
    "twice as large each time": (
        [helper.make_node("Concat", ["two"] * 2, ["c0"], axis=0),
         *(helper.make_node("Concat", [f"c{i}"] * 2, [f"c{i + 1}"], axis=0) for i in range(40)),
         chain("Identity", "c40")],
        "is computed by a Concat node"),
    "too large": ([chain("ConstantOfShape", "large")], "more than 4,194,304 values"),
    "itself": ([chain("Identity", "layer1.0.bn1.running_var")], "is computed by a Identity node"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "why"), UNREAD.values(), ids=UNREAD)
def test_statistics_that_are_no_constants_are_never_ok(tmp_path, nodes, why):
    tensors = [*initializers()[:3], tensor([2], "two", np.int64), tensor([2**40], "large", np.int64)]
    made = model([*nodes, node()], tensors)
    if not nodes:
        made.graph.input.append(helper.make_tensor_value_info("layer1.0.bn1.running_var", TensorProto.FLOAT, [3]))
    stored = reading(tmp_path, made).layers["layer1.0.bn1"]
    assert (stored.running_mean, stored.running_var) == (None, None)
    assert why in stored.unread["running_var"]
    assert stored.unread["running_mean"] == "of no use without running_var."
    diagnosis = examine(tmp_path / "m.onnx")
    assert diagnosis.findings == ()
    assert {"BN101", "BN102", "BN103", "BN105", "BN109", "BN110"} <= diagnosis.not_checked.keys()
    assert diagnosis.not_checked["BN103"] == "some values could not be read (layer1.0.bn1)"
    assert "BN107" in diagnosis.checked  # gamma and beta were read
    assert any(note.startswith("not checked: running_var of layer1.0.bn1: ") for note in diagnosis.notes)
    assert [row.name for row in diagnosis.layers] == ["layer1.0.bn1"]


def test_findings_in_one_layer_stand_beside_another_that_was_not_read(tmp_path):
    sick = [*initializers("sick")[:3], tensor([-1, 1, 1], "sick.running_var")]
    made = model([node("sick"), node("other", outputs=("z",))], [*sick, *initializers("other")[:2]])
    reading(tmp_path, made)
    diagnosis = examine(tmp_path / "m.onnx")
    assert [(finding.code, finding.layer) for finding in diagnosis.at_least(2)] == [("BN103", "sick")]
    assert "BN103" in diagnosis.checked
    assert "BN102" in diagnosis.not_checked


def test_an_initializer_that_is_an_input_too_is_its_default(tmp_path):
    made = model([node()], initializers())
    for tensor_ in list(made.graph.initializer):
        made.graph.input.append(helper.make_tensor_value_info(tensor_.name, TensorProto.FLOAT, [3]))
    assert reading(tmp_path, made).layers["layer1.0.bn1"].running_mean.tolist() == [2.5, 3.5, 4.5]


def body(nodes: list, tensors: list, inputs: tuple[str, ...] = ()):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *inputs)]
    return helper.make_graph(nodes, "body", values[1:], values[:1], tensors)


def test_names_of_an_inner_graph_hide_those_around_it(tmp_path):
    inner = body([node()], [tensor([9, 9, 9], "layer1.0.bn1.running_mean")])
    made = model([helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], initializers())
    assert reading(tmp_path, made).layers["layer1.0.bn1"].running_mean.tolist() == [9, 9, 9]
    inner = body([node()], [], ("layer1.0.bn1.running_mean",))
    made = model([helper.make_node("Loop", ["x", "x"], ["y"], body=inner)], initializers())
    why = reading(tmp_path, made).layers["layer1.0.bn1"].unread["running_mean"]
    assert "is an input of a graph inside a node" in why


def with_functions(nodes: list, tensors: list, functions: list):
    made = model(nodes, tensors)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    made.functions.extend(functions)
    return made


def function(name: str, nodes: list, inputs: tuple[str, ...] = ("x", "s", "b", "m", "v"), **options: object):
    return helper.make_function("mine", name, inputs, ["y"], nodes, [helper.make_opsetid("", 17)], **options)


def test_layers_in_local_functions_have_the_tensors_of_their_calls(tmp_path):
    inner = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "w"], ["y"])
    inner.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    norm = function("Norm", [helper.make_node("Cast", ["v"], ["w"], to=1), inner], attributes=["eps"])
    outer = function("Outer", [helper.make_node("Norm", ["x", "s", "b", "m", "v"], ["y"], domain="mine", eps=0.25)])
    calls = [
        helper.make_node("Norm", ["x", *(f"one.{part}" for part in PARTS)], ["a"], domain="mine", eps=0.5),
        helper.make_node("Outer", ["a", *(f"two.{part}" for part in PARTS)], ["y"], domain="mine"),
    ]
    result = reading(tmp_path, with_functions(calls, [*initializers("one"), *initializers("two")], [norm, outer]))
    assert {name: (stored.eps, stored.running_var.tolist()) for name, stored in result.layers.items()} == {
        "one": (0.5, [3.5, 4.5, 5.5]),
        "two": (0.25, [3.5, 4.5, 5.5]),
    }
    assert result.names == ()


def test_a_functions_default_and_what_a_call_leaves_out(tmp_path):
    inner = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="inner")
    inner.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    norm = function("Norm", [inner], attribute_protos=[helper.make_attribute("eps", 0.125)])
    call = helper.make_node("Norm", ["x", *(f"one.{part}" for part in PARTS[:3])], ["y"], domain="mine")
    stored = reading(tmp_path, with_functions([call], initializers("one"), [norm])).layers["one"]
    assert stored.eps == 0.125
    assert "v is left out by the call" in stored.unread["running_var"]


@pytest.mark.slow
def test_functions_that_call_each_other_without_end_are_refused(tmp_path):
    twice = [helper.make_node(f"F{(i + 1) % 2}", ["x"], ["y"], domain="mine") for i in range(2)]
    functions = [function(f"F{i}", [twice[i]] * 2, ("x",)) for i in range(2)]
    with pytest.raises(ValueError, match="at most 1,048,576 nodes"):
        reading(tmp_path, with_functions([helper.make_node("F0", ["x"], ["y"], domain="mine")], [], functions))


def external(location: str, **told: object) -> list:
    tensors = initializers()
    tensors[2].ClearField("raw_data")
    tensors[2].data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **told}.items():
        tensors[2].external_data.add(key=key, value=str(value))
    return tensors


@pytest.mark.parametrize("told", [{}, {"offset": 0}, {"offset": 8, "length": 12}])
def test_external_data_beside_the_model_are_read(tmp_path, told):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.data").write_bytes(bytes(told.get("offset", 0)) + np.float32([7, 8, 9]).tobytes())
    stored = reading(tmp_path, model([node()], external("in/m.data", **told))).layers["layer1.0.bn1"]
    assert stored.running_mean.tolist() == [7, 8, 9]
    assert stored.unread == {}


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("m.data", "are in m.data, which is missing or a link to another folder. Put the file beside"),
        ("../m.data", "are in ../m.data, which is not in the model's folder."),
        ("/etc/passwd", "are in /etc/passwd, which is not in the model's folder."),
        ("link", "are in link, which is missing or a link to another folder."),
        ("short", "are in short, which is too short."),
    ],
)
def test_external_data_that_are_not_there_are_said_to_be_unread(tmp_path, location, why):
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "short").write_bytes(bytes(3))
    stored = reading(tmp_path, model([node()], external(location))).layers["layer1.0.bn1"]
    assert why in stored.unread["running_mean"]
    assert (stored.running_mean, stored.running_var, list(stored.weight)) == (None, None, [0.5, 1.5, 2.5])


def test_external_data_of_another_length_are_refused(tmp_path):
    (tmp_path / "m.data").write_bytes(bytes(99))
    with pytest.raises(ValueError, match=r"expected 12 bytes of layer1\.0\.bn1\.running_mean in m\.data, got 99 at 0"):
        reading(tmp_path, model([node()], external("m.data", length=99)))


def test_sizes_that_contradict_each_other_are_refused(tmp_path):
    tensors = initializers()
    tensors[2].dims[0] = 5
    with pytest.raises(ValueError, match=r"expected 5 values in layer1\.0\.bn1\.running_mean, got 3"):
        reading(tmp_path, model([node()], tensors))
    with pytest.raises(ValueError, match=r"expected tensors of one size in layer layer1\.0\.bn1"):
        reading(tmp_path, model([node()], [*initializers()[:3], initializers(channels=4)[3]]))


def test_integers_are_refused_as_statistics(tmp_path):
    with pytest.raises(ValueError, match=r"expected floats in layer1\.0\.bn1\.weight, got int64"):
        reading(tmp_path, model([node()], initializers(dtype=np.int64)))


def test_without_onnx_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'batchnorm\[onnx\]'"):
        reading(tmp_path, model([node()], initializers()))


@pytest.mark.slow
def test_damaged_models_are_refused_and_nothing_else_is_raised(tmp_path):
    chance = random.Random(0)
    whole = model([node()], initializers()).SerializeToString()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(ValueError):
            reading(tmp_path, bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
