"""Wrong input to a layer is named, with what to do; what a layer prints says how it differs from torch.nn's."""

from __future__ import annotations

import re

import pytest
import torch

import batchnorm
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            BatchNorm2d,
            (8, 3, 5),
            r"BatchNorm2d needs \(N, C, H, W\), got \(8, 3, 5\)\. Use BatchNorm1d for \(N, C, L\)\.",
        ),
        (BatchNorm2d, (8, 3), r"got \(8, 3\)\. Use BatchNorm1d for \(N, C\)\."),
        (BatchNorm1d, (8, 3, 5, 5), r"BatchNorm1d needs \(N, C\) or \(N, C, L\), got .* Use BatchNorm2d for \(N, C, H"),
        (BatchNorm1d, (8, 3, 5, 5, 5), r"Use BatchNorm3d for \(N, C, D, H, W\)\."),
        (
            BatchNorm3d,
            (8, 3, 5, 5),
            r"BatchNorm3d needs \(N, C, D, H, W\), got .* Use BatchNorm2d for \(N, C, H, W\)\.",
        ),
        (BatchNorm3d, (1, 3, 1, 1, 1, 1), r"got \(1, 3, 1, 1, 1, 1\)\. Flatten the axes after the channels\."),
        (BatchNorm1d, (3,), r"got \(3,\)\. Add the batch axis with x\.unsqueeze\(0\)\."),
        (BatchNorm1d, (), r"got \(\)\. Add the batch axis"),
        (BatchNorm2d, (8, 5, 4, 4), r"BatchNorm2d\(3\) needs 3 channels on axis 1, got \(8, 5, 4, 4\)\.$"),
        (
            BatchNorm2d,
            (8, 4, 4, 3),
            r"on axis 1, got \(8, 4, 4, 3\)\. The last axis has this size: .* axis=-1, or .* x\.movedim",
        ),
        (BatchNorm1d, (8, 4), r"BatchNorm1d\(3\) needs 3 channels on axis 1, got \(8, 4\)\.$"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_wrong_shape_is_named_with_what_to_do(layer, shape, message, training):
    layer = layer(3).train(training)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int64, r"BatchNorm1d needs a floating-point input, got torch\.int64\. Call x\.float\(\) first\."),
        (torch.bool, r"got torch\.bool\. Call x\.float\(\) first\."),
        (
            torch.complex64,
            r"got torch\.complex64\. Use .*dtype=torch\.complex64.*, or normalize x\.real and x\.imag separately",
        ),
    ],
    ids=str,
)
def test_a_wrong_type_is_named_with_what_to_do(dtype, message):
    with pytest.raises(TypeError, match=message):
        BatchNorm1d(3)(torch.zeros(4, 3, dtype=dtype))


@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
def test_an_eps_that_is_not_positive_is_refused_when_made_and_when_used(eps):
    with pytest.raises(ValueError, match=f"eps must be positive, got {eps}. It keeps a constant channel from"):
        BatchNorm1d(3, eps)
    layer = BatchNorm1d(3)
    layer.eps = eps
    for training in (True, False):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}."):
            layer.train(training)(torch.randn(4, 3))


@pytest.mark.parametrize("eps", [0, 0.0])
def test_an_eps_of_zero_is_as_torchs_for_eval_mode_alone(eps):
    layer, theirs, x = BatchNorm1d(3, eps), torch.nn.BatchNorm1d(3, eps), torch.randn(4, 3)
    layer.running_var[0] = theirs.running_var[0] = 0
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x), equal_nan=True)
    for one in (layer.train(), theirs.train()):
        with pytest.raises(ValueError, match=f"eps must be positive during training, but got {eps}"):
            one(x)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["mkldnn", "sparse"])
def test_a_layout_that_no_kernel_reads_is_named_with_what_to_do(layout, training):
    x = torch.randn(4, 3, 2, 2)
    x = x.to_mkldnn() if layout == "mkldnn" else x.to_sparse()
    with pytest.raises(TypeError, match=r"needs a dense tensor, got layout torch\..*Call x\.to_dense\(\) first"):
        BatchNorm2d(3).train(training)(x)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_input_is_named_with_what_to_do():
    x = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.quint8\. Call x\.dequantize\(\) first"):
        BatchNorm1d(3)(x)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("BatchNorm1d", (3,)), ("BatchNorm1d", (2, 3, 4, 4)), ("BatchNorm2d", (2, 3)), ("BatchNorm3d", (2, 3, 4, 4)),
     ("BatchNorm1d", (1, 3)), ("BatchNorm2d", (1, 3, 1, 1)), ("BatchNorm2d", (2, 4, 5, 5))],
    ids=str,
)  # fmt: skip
def test_what_torchs_layer_says_of_a_shape_is_part_of_what_ours_says(kind, shape):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        getattr(torch.nn, kind)(3)(torch.randn(shape))
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        {"BatchNorm1d": BatchNorm1d, "BatchNorm2d": BatchNorm2d, "BatchNorm3d": BatchNorm3d}[kind](3)(
            torch.randn(shape)
        )


def test_an_unknown_policy_for_single_values_is_refused():
    with pytest.raises(ValueError, match="single_element must be 'error' or 'population', got 'ignore'"):
        BatchNorm1d(3, single_element="ignore")


def test_what_is_ours_can_only_be_given_by_name():
    with pytest.raises(TypeError, match="positional arguments"):
        BatchNorm1d(3, 1e-5, 0.1, True, True, None, None, False)


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "track_running_stats=True)"),
        ({"single_element": "population"}, "track_running_stats=True, single_element='population')"),
        ({"weight": False}, "track_running_stats=True, weight=False)"),
        ({"affine": False, "weight": False}, "track_running_stats=True)"),
    ],
    ids=str,
)
def test_a_layer_prints_torchs_line_and_what_differs(options, ending):
    printed = repr(BatchNorm2d(3, **options))
    assert printed.startswith("BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=")
    assert printed.endswith(ending)


def test_a_layer_prints_how_many_updates_it_skipped():
    layer = BatchNorm1d(2)
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        layer(torch.tensor([[1.0, torch.nan], [2.0, 0.0]]))
    assert repr(layer).endswith("track_running_stats=True, skipped_updates=1)")
    assert "skipped" not in repr(BatchNorm1d(2, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.quint8, "float32"])
def test_a_dtype_without_gradients_is_refused(dtype):
    for make in (lambda: BatchNorm1d(3, dtype=dtype), lambda: batchnorm.LazyBatchNorm2d(dtype=dtype)):
        with pytest.raises(TypeError, match=r"a dtype must be floating-point or complex, got .*torch.float32"):
            make()
