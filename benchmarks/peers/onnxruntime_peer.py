"""ONNX Runtime: BatchNormalization of opset 15 and Relu, forward passes of contiguous float32 tensors."""

from __future__ import annotations

import os

from worker import Unsupported, arrays, means, serve


def load():
    import onnx  # noqa: F401 - builds the graph
    import onnxruntime

    return onnxruntime.__version__


def prepare(case):
    import numpy as np
    import onnxruntime

    if case["backward"]:
        raise Unsupported("it runs forward passes")
    if case["channels_last"] or case["dtype"] != "float32":
        raise Unsupported("its BatchNormalization takes contiguous float32 tensors")
    x = arrays(case)[0]
    channels = case["shape"][1]
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model(case), options, providers=["CPUExecutionProvider"])
    given = {"x": x, "gamma": ones, "beta": zeros, "mean": zeros, "var": ones}
    return lambda: session.run(None, given), means(session.run(None, given)[0])


def model(case):
    """The graph as bytes. Statistics are inputs, as a graph of constants alone could be computed beforehand."""
    from onnx import TensorProto, helper

    names = ["x", "gamma", "beta", "mean", "var"]
    shapes = [case["shape"], *4 * [[case["shape"][1]]]]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    last = "y" if case["relu"] else "z"
    results = ["z", "new_mean", "new_var"] if case["train"] else ["z"]
    arguments = {"epsilon": 1e-5, "momentum": 0.9, "training_mode": int(case["train"])}
    nodes = [helper.make_node("BatchNormalization", names, results, **arguments)]
    if case["relu"]:
        nodes.append(helper.make_node("Relu", ["z"], ["y"]))
    shapes_out = {last: case["shape"]} | {name: [case["shape"][1]] for name in results[1:]}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes_out.items()]
    graph = helper.make_graph(nodes, "case", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return made.SerializeToString()


if __name__ == "__main__":
    serve(load, prepare)
