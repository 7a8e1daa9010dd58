"""oneDNN: its batch normalization primitives with ReLU fused, through the C interface of version 3.

No tensor is allocated in a call, which no framework above it achieves.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path

from worker import Unsupported, arrays, means, serve

# numbers from dnnl_types.h of version 3
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8
TYPES = {"bfloat16": 2, "float32": 3}
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 17, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256
WORKSPACE_QUERY = 135
CPU, DEFAULT_STREAM = 1, 1
ALLOCATE = ctypes.c_void_p(-1)
library = None


class Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_int), ("memory", ctypes.c_void_p))


class Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


def load():
    global library  # noqa: PLW0603 - one library a process
    bundled = Path(sys.prefix) / "lib" / "libdnnl.so.3"
    path = str(bundled) if bundled.exists() else ctypes.util.find_library("dnnl")
    if path is None:
        raise ImportError("no libdnnl found; pip install onednn-cpu-gomp brings it")
    library = ctypes.CDLL(path)
    library.dnnl_version.restype = ctypes.POINTER(Version)
    for name in ("dnnl_primitive_desc_query_md", "dnnl_memory_desc_query"):
        getattr(library, name).restype = ctypes.c_void_p
    library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    version = library.dnnl_version().contents
    if version.major != 3:
        raise ImportError(f"version 3 is needed, got {version.major}")
    return f"{version.major}.{version.minor}.{version.patch}"


def made(function, *arguments):
    """The object that a function of the library makes through its first argument."""
    result = ctypes.c_void_p()
    if status := getattr(library, function)(ctypes.byref(result), *arguments):
        raise Unsupported(f"{function} answers status {status}")
    return result


def describe(shape, kind, channels_last):
    strides, order = [0] * len(shape), list(range(len(shape)))
    if channels_last:
        order = [0, *order[2:], 1]
    step = 1
    for axis in reversed(order):
        strides[axis], step = step, step * shape[axis]
    many = ctypes.c_int64 * 12
    return made("dnnl_memory_desc_create_with_strides", len(shape), many(*shape), kind, many(*strides))


def memory(description, engine, values=None):
    """Memory of the library's own making, filled with an array where one is given."""
    result = made("dnnl_memory_create", description, engine, ALLOCATE)
    if values is not None:
        ctypes.memmove(handle(result), values.ctypes.data, values.nbytes)
    return result


def handle(held):
    address = ctypes.c_void_p()
    library.dnnl_memory_get_data_handle(held, ctypes.byref(address))
    return address


def narrow(values, dtype):
    """float32 rounded to bfloat16, as 16-bit integers; float32 as it is."""
    import numpy as np

    return values if dtype == "float32" else ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def read(held, shape, dtype):
    import numpy as np

    kind = np.float32 if dtype == "float32" else np.uint16
    result = np.empty(shape, kind)
    ctypes.memmove(result.ctypes.data, handle(held), result.nbytes)
    return result if dtype == "float32" else (result.astype(np.uint32) << 16).view(np.float32)


def prepare(case):
    import numpy as np

    if case["residual"]:
        raise Unsupported("its fused addition is for GPUs only")
    if case["dtype"] not in TYPES:
        raise Unsupported(f"no {case['dtype']}")
    shape, dtype = case["shape"], case["dtype"]
    engine = made("dnnl_engine_create", CPU, ctypes.c_size_t(0))
    stream = made("dnnl_stream_create", engine, DEFAULT_STREAM)
    whole = describe(shape, TYPES[dtype], case["channels_last"])
    channel = describe([shape[1]], TYPES["float32"], False)
    x, _, grad = (narrow(values, dtype) for values in arrays(case))
    ones, zeros = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)

    flags = USE_SCALE | USE_SHIFT | (FUSE_RELU if case["relu"] else 0) | (0 if case["train"] else USE_GLOBAL_STATS)
    kind = FORWARD_TRAINING if case["train"] else FORWARD_INFERENCE
    eps, none = ctypes.c_float(1e-5), None
    forward = made(
        "dnnl_batch_normalization_forward_primitive_desc_create", engine, kind, whole, whole, eps, flags, none
    )
    held = {SRC: memory(whole, engine, x), DST: memory(whole, engine)}
    held |= {MEAN: memory(channel, engine, zeros), VARIANCE: memory(channel, engine, ones)}
    held |= {SCALE: memory(channel, engine, ones), SHIFT: memory(channel, engine, zeros)}
    workspace = ctypes.c_void_p(library.dnnl_primitive_desc_query_md(forward, WORKSPACE_QUERY, 0))
    if library.dnnl_memory_desc_get_size(workspace):
        held[WORKSPACE] = memory(workspace, engine)
    calls = [execution(forward, stream, held)]
    if case["backward"]:
        create = "dnnl_batch_normalization_backward_primitive_desc_create"
        backward = made(create, engine, BACKWARD, whole, whole, whole, eps, flags, forward, none)
        held = {index: place for index, place in held.items() if index not in {DST, SHIFT}}
        held |= {DIFF_DST: memory(whole, engine, grad), DIFF_SRC: memory(whole, engine)}
        held |= {DIFF_SCALE: memory(channel, engine), DIFF_SHIFT: memory(channel, engine)}
        calls.append(execution(backward, stream, held))

    def call():
        for execute in calls:
            execute()

    call()
    lying = [shape[0], *shape[2:], shape[1]] if case["channels_last"] else shape
    y = read(calls[0].held[DST], lying, dtype)
    return call, means(y, read(held[DIFF_SRC], lying, dtype)) if case["backward"] else means(y)


def execution(description, stream, held):
    primitive = made("dnnl_primitive_create", description)
    arguments = (Argument * len(held))(*(Argument(index, place.value) for index, place in held.items()))

    def execute():
        if status := library.dnnl_primitive_execute(primitive, stream, len(held), arguments):
            raise RuntimeError(f"dnnl_primitive_execute answers status {status}")
        library.dnnl_stream_wait(stream)

    execute.held = held
    return execute


if __name__ == "__main__":
    serve(load, prepare)
