"""What stands before and behind an ONNX layer: activations by what they are, weights by what they can do."""

import numpy as np
import pytest

from batchnorm.checkpoint import read
from batchnorm.doctor import examine

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def saved(path, before=(), behind=(), *, var=(1.0, 1.0), outputs=("z",), extra=(), source="x", opset=15, **changes):
    values = {"s": [1, 1], "b": [0, 0], "m": [0.5, 0.5], "v": var} | changes
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    norm = helper.make_node("BatchNormalization", [source, "s", "b", "m", "v"], ["y"])
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", *outputs)]
    graph = helper.make_graph([*before, norm, *behind], "g", described[:1], described[1:], [*tensors, *extra])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    path.write_bytes(model.SerializeToString())
    return path


def node(kind, inputs=("y",), output="z", **attributes):
    return helper.make_node(kind, list(inputs), [output], **attributes)


BEHIND = {
    "relu": ([node("Relu")], {}, "relu"),
    "hard swish": ([node("HardSwish")], {}, "hardswish"),
    "clip to 6": ([node("Clip", ("y", "lo", "hi"))], {"lo": 0.0, "hi": 6.0}, "relu6"),
    "clip from 0": ([node("Clip", ("y", "lo"))], {"lo": 0.0}, "relu"),
    "clip of another kind": ([node("Clip", ("y", "lo", "hi"))], {"lo": -1.0, "hi": 6.0}, ""),
    "clip by inputs": ([node("Clip", ("y", "x"))], {}, ""),
    "clip by attributes": ([node("Clip", min=0.0, max=6.0)], {"opset": 9}, "relu6"),
    "an addition": ([node("Add", ("y", "x"))], {}, ""),
    "a relu and an addition": ([node("Relu"), node("Add", ("y", "x"), "w")], {"outputs": ("z", "w")}, ""),
    "two relus": ([node("Relu"), node("Relu", output="w")], {"outputs": ("z", "w")}, "relu"),
    "also an output": ([node("Relu")], {"outputs": ("z", "y")}, ""),
    "leaky": ([node("LeakyRelu")], {}, ""),
    "elu of another slope": ([node("Elu", alpha=3.0)], {}, ""),
    "of another domain": ([node("Relu", domain="my.own")], {}, ""),
    "nothing": ([], {"outputs": ("y",)}, ""),
}


@pytest.mark.parametrize("name", BEHIND)
def test_the_activation_behind_a_layer_is_what_alone_reads_it(name, tmp_path):
    behind, changes, act = BEHIND[name]
    file = read(saved(tmp_path / "m.onnx", behind=behind, **changes))
    assert list(file.activations.values()) == ([act] if act else [])


def test_a_channel_that_no_relu_lets_through_is_named_and_one_before_an_addition_is_not(tmp_path):
    for behind, channels in ((node("Relu"), (1,)), (node("Add", ("y", "x")), None)):
        found = examine(saved(tmp_path / "m.onnx", behind=[behind], b=[1.0, -4.0])).findings
        assert [f.channels for f in found if f.code == "BN106"] == ([channels] if channels else [])


WEIGHTS = np.arange(1, 13, dtype=np.float32)
BEFORE = {
    "convolution": ("Conv", WEIGHTS.reshape(2, 6, 1, 1), {}, lambda w: np.linalg.norm(w.reshape(2, -1), axis=1)),
    "transposed": ("ConvTranspose", WEIGHTS.reshape(3, 2, 2, 1), {}, lambda w: np.sqrt((w**2).sum((0, 2, 3)))),
    "product": ("MatMul", WEIGHTS.reshape(6, 2), {}, lambda w: np.linalg.norm(w, axis=0)),
    "linear": ("Gemm", WEIGHTS.reshape(2, 6), {"transB": 1}, lambda w: np.linalg.norm(w, axis=1)),
    "linear as it is": ("Gemm", WEIGHTS.reshape(6, 2), {}, lambda w: np.linalg.norm(w, axis=0)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_norms_of_weights_before_a_layer_are_those_of_its_channels(name, tmp_path):
    kind, weights, attributes, norms = BEFORE[name]
    before = [helper.make_node(kind, ["x", "w"], ["c"], **attributes)]
    extra = [numpy_helper.from_array(weights, "w")]
    file = read(saved(tmp_path / "m.onnx", before, outputs=("y",), extra=extra, source="c", var=(1.0, 0.0)))
    (found,) = file.filters.values()
    np.testing.assert_allclose(found, norms(weights.astype(np.float64)), rtol=1e-15)


@pytest.mark.parametrize(("scale", "fires"), [(1.0, True), (1e-9, False)])
def test_a_variance_that_decayed_with_its_filter_is_no_danger(scale, fires, tmp_path):
    weights = np.ones((2, 3, 1, 1), np.float32)
    weights[1] *= scale
    before = [helper.make_node("Conv", ["x", "w"], ["c"])]
    extra = [numpy_helper.from_array(weights, "w")]
    path = saved(tmp_path / "m.onnx", before, [node("Relu")], extra=extra, source="c", var=(1.0, 0.0))
    assert ("BN105" in {finding.code for finding in examine(path).findings}) is fires


def test_a_feature_right_before_a_layer_is_magnified(tmp_path):
    found = examine(saved(tmp_path / "m.onnx", outputs=("y",), var=(1.0, 0.0))).findings
    assert [finding.channels for finding in found if finding.code == "BN105"] == [(1,)]


QUANTUM = {"scale": np.float32(0.5)}
MOVED = {
    "a bias": ([node("Add", ("c0", "bias"), "c")], True),
    "a cast": ([node("Cast", ("c0",), "c", to=1)], True),
    "a rounding": ([node("QuantizeLinear", ("c0", "scale"), "q"), node("DequantizeLinear", ("q", "scale"), "c")], True),
    "a sum of two": ([node("Add", ("c0", "x"), "c")], None),
    "an activation": ([node("Relu", ("c0",), "c")], None),
    "another order of axes": ([node("Transpose", ("c0",), "c")], False),
    "an operator of one's own": ([node("Mine", ("c0",), "c", domain="my.own")], False),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_keeps_a_channel_s_values_is_looked_through(name, tmp_path):
    """True where the product's weights count, None where something else is before it, False where that is unknown."""
    between, seen = MOVED[name]
    weights = WEIGHTS.reshape(6, 2)
    before = [helper.make_node("MatMul", ["x", "w"], ["c0"]), *between]
    extra = [numpy_helper.from_array(weights, "w"), *(numpy_helper.from_array(v, n) for n, v in QUANTUM.items())]
    extra.append(numpy_helper.from_array(np.ones(2, np.float32), "bias"))
    file = read(saved(tmp_path / "m.onnx", before, outputs=("y",), extra=extra, source="c", var=(1.0, 0.0)))
    if seen is False:
        assert file.filters == {}
    elif seen is None:
        assert list(file.filters.values()) == [None]
    else:
        np.testing.assert_allclose(list(file.filters.values()), [np.linalg.norm(weights, axis=0)], rtol=1e-6)


def test_a_branch_that_reads_a_result_too_leaves_no_activation_alone(tmp_path):
    inner = helper.make_graph(
        [node("Neg", output="n")], "branch", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)]
    )
    branches = helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner)
    extra = [numpy_helper.from_array(np.array(True), "c")]
    file = read(saved(tmp_path / "m.onnx", behind=[node("Relu"), branches], outputs=("z", "w"), extra=extra))
    assert file.activations == {}


def test_names_in_a_branch_and_in_a_function_are_their_own(tmp_path):
    """A Relu that reads the same name in another function is not behind this layer."""
    values = {"s": [1, 1], "b": [0, 0], "m": [0.5, 0.5], "v": [1, 1]}
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    names = ["x", *values]
    opset = [helper.make_opsetid("", 15)]
    norm = helper.make_function("own", "Norm", names, ["y"], [node("BatchNormalization", names)], opset)
    norm.node[0].output[0] = "y"
    relu = helper.make_function("own", "Act", ["y"], ["z"], [node("Relu")], opset)
    both = helper.make_function(
        "own", "Both", names, ["z"], [node("BatchNormalization", names, "y"), node("Relu")], opset
    )

    def acts(*nodes):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "out")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
        model = helper.make_model(
            graph, functions=[norm, relu, both], opset_imports=[*opset, helper.make_opsetid("own", 1)]
        )
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        return list(read(tmp_path / "m.onnx").activations.values())

    called = {"domain": "own"}
    assert acts(node("Norm", names, "y", **called), node("Act", ("y",), "out", **called)) == []
    assert acts(node("Both", names, "out", **called)) == ["relu"]


def test_functions_that_call_each_other_without_end_are_refused(tmp_path):
    """Names are followed through 64 calls."""
    values = {"s": [1.0], "b": [0.0], "m": [0.5], "v": [1.0]}
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    names, opset = ["x", *values], [helper.make_opsetid("", 15), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function(
            "own", f"F{i}", names, ["y"],
            [node(f"F{i + 1}", names, "y", domain="own") if i < 99 else node("BatchNormalization", names, "y")], opset,
        )
        for i in range(100)
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node("F0", names, "y", domain="own")], "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, functions=functions, opset_imports=opset)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="at most 64 nested calls of functions"):
        read(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("gammas", "inputs", "places"),
    [
        ("ss", ("x", "u"), 2),  # one layer on two inputs
        ("st", ("x", "x"), 0),  # two heads on one tensor: their statistics are equal, and stored once
        ("st", ("x", "u"), 0),
        ("ss", ("x", "x"), 0),  # the same call twice
    ],
)
def test_a_layer_is_shared_if_all_its_tensors_are_and_its_inputs_are_not(gammas, inputs, places, tmp_path):
    values = {"s": [1, 2], "t": [3, 4], "b": [0, 1], "m": [0.5, 0.5], "v": [1, 2]}
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    nodes = [
        helper.make_node("BatchNormalization", [x, gamma, "b", "m", "v"], [f"y{i}"], f"n{i}")
        for i, (gamma, x) in enumerate(zip(gammas, inputs, strict=True))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "u", "y0", "y1")]
    graph = helper.make_graph(nodes, "g", ends[:2], ends[2:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    found = [finding for finding in examine(tmp_path / "m.onnx").findings if finding.code == "BN302"]
    assert [f"at {places} places" in finding.measured for finding in found] == [True] * bool(places)


def test_a_dead_channel_s_denormal_variance_is_told_once(tmp_path):
    """Beta and the ReLU behind make the channel a constant; BN106 names it, and nothing is slow where nothing runs."""
    found = examine(saved(tmp_path / "m.onnx", behind=[node("Relu")], var=(1.0, 1e-40), b=[1.0, -4.0])).findings
    assert [(f.code, f.channels) for f in found if f.code in {"BN104", "BN106"}] == [("BN106", (1,))]
    found = examine(saved(tmp_path / "m.onnx", behind=[node("Relu")], var=(1.0, 1e-40), b=[1.0, 4.0])).findings
    assert [(f.code, f.channels) for f in found if f.code in {"BN104", "BN106"}] == [("BN104", (1,))]
