"""checkpoint.read: the numbers of every format are those that were saved."""

from __future__ import annotations

import collections
import io
import subprocess
import sys
import zipfile
from array import array

import pytest
import torch
from checkpoint_files import in_safetensors, legacy, mean, number, numbers, saved, tensor, trained, zipped
from torch import nn

from batchnorm.checkpoint import Checkpoint, Stored, read

FORMATS = {"zip": saved, "legacy": legacy}
EVERY_FORMAT = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)


def reading(tmp_path, data: bytes, name: str = "c.pt") -> Checkpoint:
    (tmp_path / name).write_bytes(data)
    return read(tmp_path / name)


def layer(dtype: torch.dtype = torch.float32, channels: int = 3) -> nn.BatchNorm1d:
    result = nn.BatchNorm1d(channels, dtype=dtype)
    result.running_mean.copy_(torch.tensor([0.5, -3.25, 1000.0, 2.0, 7.0])[:channels])
    result.running_var.copy_(torch.tensor([1.5, 2.0**-10, 4.0, 3.0, 1.0])[:channels])
    result.num_batches_tracked.fill_(12345678901)
    return result


def assert_equal(stored: Stored, expected: nn.Module) -> None:
    for key in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(expected, key)
        values = getattr(stored, key)
        assert values == (None if tensor is None else array("d", tensor.double().tolist())), key
        if tensor is not None:
            assert stored.dtypes[key] == str(tensor.dtype).removeprefix("torch.")
    assert stored.num_batches_tracked == int(expected.num_batches_tracked)


@EVERY_FORMAT
def test_every_layer_has_the_numbers_that_were_saved(tmp_path, write):
    net = trained()
    result = reading(tmp_path, write(net.state_dict()))
    assert (result.format, result.path, result.prefix) == ("pt", str(tmp_path / "c.pt"), "")
    assert list(result.layers) == ["1", "2.1"]
    assert result.copies == {"": result.layers}
    assert result.names == ("0.weight", "0.bias", "2.0.weight", "2.0.bias")
    assert result.keys == {"1": ("1",), "2.1": ("2.1",)}
    assert [stored.channels for stored in result.layers.values()] == [4, 5]
    assert [stored.name for stored in result.layers.values()] == ["1", "2.1"]
    assert_equal(result.layers["1"], net[1])
    assert_equal(result.layers["2.1"], net[2][1])


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_read_exactly(tmp_path, write, dtype):
    expected = layer(dtype)
    assert_equal(reading(tmp_path, write(expected.state_dict())).layers[""], expected)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint64]
)
def test_whole_numbers_are_read_too(tmp_path, dtype):
    values = torch.tensor([0, 1, 100]).to(dtype)
    stored = reading(tmp_path, saved({"running_mean": values})).layers[""]
    assert stored.running_mean.tolist() == values.double().tolist()


def test_the_other_byte_order_is_turned_around(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        values = torch.tensor([1.0, -2.5, 300.0]).to(dtype)
        swapped = torch.tensor(values.view(torch.uint8).view(3, -1).flip(1).flatten().tolist(), dtype=torch.uint8)
        data = saved({"running_mean": swapped.view(dtype)})
        # as a machine of the other order says it; the record's CRC must fit
        data = rewritten(data, "byteorder", b"big")
        assert reading(tmp_path, data).layers[""].running_mean.tolist() == values.double().tolist()


def rewritten(data: bytes, record: str, content: bytes) -> bytes:
    old, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(f"/{record}") else old.read(name))
    return file.getvalue()


@EVERY_FORMAT
def test_views_of_one_storage_are_told_apart(tmp_path, write):
    base = torch.arange(60.0).reshape(3, 5, 4)
    views = {
        "running_mean": base[1, :3, 2],
        "running_var": base[2, 0, :3],
        "bias": base[:, 1, 1],
        "weight": base[:, 0, 0],
    }
    stored = reading(tmp_path, write(views)).layers[""]
    for key, view in views.items():
        assert getattr(stored, key).tolist() == view.tolist()
    transposed = {"running_mean": base[0].T, "running_var": base[0].T}
    assert reading(tmp_path, write(transposed)).layers[""].running_mean.tolist() == base[0].T.flatten().tolist()


def test_expanded_and_empty_tensors_are_read(tmp_path):
    data = {"a.running_mean": torch.zeros(1).expand(6), "b.running_mean": torch.zeros(0)}
    layers = reading(tmp_path, saved(data)).layers
    assert [len(stored.running_mean) for stored in layers.values()] == [6, 0]


def test_what_is_not_stored_is_none(tmp_path):
    plain = nn.BatchNorm1d(3, affine=False)
    stored = reading(tmp_path, saved(plain.state_dict())).layers[""]
    assert (stored.weight, stored.bias) == (None, None)
    assert stored.dtypes == {"running_mean": "float32", "running_var": "float32", "num_batches_tracked": "int64"}
    assert (stored.eps, stored.momentum) == (None, None)


def test_one_statistic_is_enough_to_tell_a_layer(tmp_path):
    data = {"a.running_var": torch.ones(2), "b.num_batches_tracked": torch.tensor(7), "b.weight": torch.ones(3)}
    layers = reading(tmp_path, saved(data | {"c.weight": torch.ones(3)})).layers
    assert list(layers) == ["a", "b"]
    assert layers["a"].running_mean is None
    assert (layers["b"].num_batches_tracked, layers["b"].channels) == (7, 3)


@pytest.mark.parametrize(
    ("counter", "count"), [(torch.tensor(5.0), 5), (torch.tensor(torch.nan), None), (torch.ones(2), None)]
)
def test_a_counter_that_is_no_number_is_none(tmp_path, counter, count):
    data = {"running_mean": torch.ones(2), "num_batches_tracked": counter}
    assert reading(tmp_path, saved(data)).layers[""].num_batches_tracked == count


def test_a_weight_of_another_size_is_not_gamma(tmp_path):
    """A convolution with batch norm inside has both."""
    data = {"running_mean": torch.ones(2), "weight": torch.ones(2, 3, 1, 1)}
    assert reading(tmp_path, saved(data)).layers[""].weight is None


def test_nan_and_infinity_are_read_as_they_are(tmp_path):
    data = {"running_mean": torch.tensor([torch.nan, torch.inf, 0.0])}
    assert str(reading(tmp_path, saved(data)).layers[""].running_mean.tolist()) == "[nan, inf, 0.0]"


@EVERY_FORMAT
def test_everything_that_weights_only_loads_is_read(tmp_path, write):
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "with state"
    data = {
        "net": layer().state_dict(),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "parameter": parameter,
        "sparse": torch.eye(2).to_sparse(),
        "device": torch.device("cpu"),
        "size": torch.Size([2]),
        "dtype": torch.float16,
        "counter": collections.Counter([1, 1, 2]),
        "plain": [{1, 2}, bytearray(b"a"), b"b", 1 + 2j, 2**70, -5, 1e300, None, True, ("a", 1), "é"],
        "meta": torch.ones(2, device="meta"),
        "uint16": torch.ones(2, dtype=torch.uint16),
    }
    if write is legacy:
        del data["float8"], data["uint16"]
    result = reading(tmp_path, write(data))
    torch.load(result.path, weights_only=True)
    assert_equal(result.layers["net"], layer())


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_that_torch_can_use_is_read(tmp_path, protocol):
    data = {"state_dict": layer().state_dict(), "epoch": 70000, "flags": [True, False, -1, 2**40, 0.5, {1}]}
    assert_equal(reading(tmp_path, saved(data, pickle_protocol=protocol)).layers[""], layer())


def test_a_frozenset_is_a_plain_value(tmp_path):
    assert list(reading(tmp_path, saved({"bn.x": layer().state_dict(), "tags": frozenset("a")})).layers) == ["bn.x"]


def test_numpy_scalars_carry_no_code_and_are_left_out(tmp_path):
    import numpy as np

    data = {"model": layer().state_dict(), "best": np.float64(0.5), "mean": np.float32(3)}
    assert list(reading(tmp_path, saved(data)).layers) == [""]


def test_a_file_without_a_checksum_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(layer().state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(reading(tmp_path, data).layers[""], layer())


def test_a_file_without_batch_norm_has_no_layers(tmp_path):
    result = reading(tmp_path, saved(nn.Linear(2, 2).state_dict()))
    assert (result.layers, result.copies, result.names) == ({}, {}, ("weight", "bias"))
    assert reading(tmp_path, saved({})).layers == {}


def test_content_decides_and_not_the_suffix(tmp_path):
    for name in ("c.onnx", "c.safetensors", "c.pth.tar", "c"):
        assert list(reading(tmp_path, saved(layer().state_dict()), name).layers) == [""]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_have_the_numbers_that_were_saved(tmp_path, dtype):
    expected, header, data = layer(dtype), {"__metadata__": {"format": "pt"}}, b""
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64"}
    for key, value in {"conv.weight": torch.ones(2, 2), **expected.state_dict(prefix="module.bn.")}.items():
        content = bytes(value.reshape(-1).view(torch.uint8).tolist())
        dtype_name = names[str(value.dtype).removeprefix("torch.")]
        offsets = [len(data), len(data) + len(content)]
        header[key] = {"dtype": dtype_name, "shape": list(value.shape), "data_offsets": offsets}
        data += content
    result = reading(tmp_path, in_safetensors(header, data))
    assert (result.format, result.prefix) == ("safetensors", "module.")
    assert_equal(result.layers["bn"], expected)


def test_pickles_by_hand_are_read_as_the_hostile_ones_are_written(tmp_path):
    """So that what is refused elsewhere is refused for its one fault."""
    data = zipped(mean(tensor(numbers(4), numbers(1))), _0=array("f", [1, 2, 3, 4]).tobytes())
    assert reading(tmp_path, data).layers["bn"].running_mean.tolist() == [1, 2, 3, 4]
    assert number(-129) == b"\x8a\x02\x7f\xff"


def test_reading_loads_neither_torch_nor_numpy(tmp_path):
    (tmp_path / "c.pt").write_bytes(saved(layer().state_dict()))
    code = (
        "import sys; from batchnorm.checkpoint import read; read(sys.argv[1]); "
        "print({'torch', 'numpy', 'onnx', 'pickle'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.pt")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
