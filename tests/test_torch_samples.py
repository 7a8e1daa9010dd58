"""PyTorch's own module samples for batch norm, and the checks of its module tests, on our layers.

The samples are those of torch.testing._internal (ModuleInfo for nn.BatchNorm1d, 2d and 3d, and OpInfo for
nn.functional.batch_norm). What is expected is torch.nn's layer in float64. Checks that compare devices need an
accelerator and are not here. The end of a run prints which samples passed how many checks.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like

from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
INFOS = [info for info in module_db if info.module_cls in OURS]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# forward mode makes torch load formulas of its own that still use the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def module_inputs(info, dtype, training, requires_grad=False):
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)


class Sample:
    """One ModuleInput: its layer of ours, torch.nn's in float64 with the same state, and its input."""

    def __init__(self, info, index: int, dtype: torch.dtype, training: bool) -> None:
        given = module_inputs(info, dtype, training)[index]
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        self.options, self.shape = (args, kwargs), given.forward_input.args[0].shape
        (self.x,) = given.forward_input.args
        self.ours = OURS[info.module_cls](*args, **kwargs, dtype=dtype).train(training)
        self.theirs = info.module_cls(*args, **kwargs, dtype=torch.float64).train(training)
        for parameter in self.ours.parameters():
            nn.init.normal_(parameter)
        self.theirs.load_state_dict(self.ours.state_dict(), strict=True)


def cases(dtypes):
    """Every sample of every class in both modes."""
    return [
        pytest.param((info, index, dtype, training), id=_name(info, given, dtype, training))
        for info in INFOS
        for dtype in dtypes
        for training in (True, False)
        for index, given in enumerate(module_inputs(info, dtype, training))
    ]


def _name(info, given, dtype, training) -> str:
    parts = (info.module_cls.__name__, dtype, "train" if training else "eval", given.desc or "affine")
    return " ".join(str(part).removeprefix("torch.") for part in parts)


@pytest.fixture
def sample(request, record_property) -> Sample:
    info, index, dtype, training = request.param
    record_property("PyTorch sample", _name(info, module_inputs(info, dtype, training)[index], dtype, training))
    return Sample(*request.param)


def every_sample(*dtypes):
    return pytest.mark.parametrize("sample", cases(dtypes or DTYPES), indirect=True)


def assert_close(found, expected) -> None:
    """At the tolerances that PyTorch's own tests use for the type of ``found``."""
    torch.testing.assert_close(found.double(), expected.double(), **_tolerances(found.dtype))


def _tolerances(dtype: torch.dtype) -> dict[str, float]:
    rtol = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6, torch.float64: 1e-7}[dtype]
    return {"rtol": rtol, "atol": 1e-7 if dtype == torch.float64 else 1e-5}


# --- ModuleInfo -------------------------------------------------------------------------------------------


@every_sample()
def test_forward_and_stored_statistics_are_torch_nns(sample):
    x = sample.x
    y = sample.ours(x)
    assert y.dtype == x.dtype
    assert_close(y, sample.theirs(x.double()))
    if x.numel():  # torch.nn counts an empty batch, ours does not
        for found, expected in zip(sample.ours.buffers(), sample.theirs.buffers(), strict=True):
            torch.testing.assert_close(found.double(), expected.double(), **_tolerances(wide_dtype(x.dtype)))


@every_sample()
def test_gradients_are_torch_nns(sample):
    x, wide = sample.x.clone().requires_grad_(), sample.x.double().requires_grad_()
    cotangent = torch.randn(sample.shape).to(x.dtype)
    sample.ours(x).backward(cotangent)
    sample.theirs(wide).backward(cotangent.double())
    assert_close(x.grad, wide.grad)
    for ours, theirs in zip(sample.ours.parameters(), sample.theirs.parameters(), strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_close(ours.grad, theirs.grad)


@every_sample(torch.float64)
def test_first_and_second_derivatives_agree_with_finite_differences(sample):
    layer, parameters = sample.ours, dict(sample.ours.named_parameters())

    def call(x, *values):
        state = dict(zip(parameters, values, strict=True)) | {n: b.clone() for n, b in layer.named_buffers()}
        return torch.func.functional_call(layer, state, (x,))

    inputs = (sample.x.clone().requires_grad_(), *parameters.values())
    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@every_sample()
def test_values_that_do_not_lie_side_by_side_give_the_same(sample):
    if sample.x.numel() == 0:
        assert noncontiguous_like(sample.x).is_contiguous()  # no values lie apart: the check is an empty one
    results = []
    for x in (sample.x, noncontiguous_like(sample.x)):
        layer, x = copy.deepcopy(sample.ours), x.detach().requires_grad_()
        cotangent = torch.ones(sample.shape, dtype=x.dtype)
        y = layer(x)
        y.backward(cotangent if x.is_contiguous() else noncontiguous_like(cotangent))
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for contiguous, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


@every_sample()
@pytest.mark.parametrize("module_format", ["contiguous", "channels last"])
def test_the_memory_format_of_the_input_is_that_of_the_output(sample, module_format):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(sample.x.ndim)
    formats = [torch.contiguous_format] if last is None else [torch.contiguous_format, last]
    expected = copy.deepcopy(sample.ours)(sample.x)
    layer = sample.ours.to(memory_format=last) if last and module_format == "channels last" else sample.ours
    for memory_format in formats:
        y = copy.deepcopy(layer)(sample.x.contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, expected)


@every_sample()
def test_a_pickled_layer_computes_the_same(sample):
    file = io.BytesIO()
    torch.save(sample.ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert repr(loaded) == repr(sample.ours)
    assert torch.equal(loaded(sample.x), sample.ours(sample.x))
    for a, b in zip(loaded.buffers(), sample.ours.buffers(), strict=True):
        assert torch.equal(a, b)


@every_sample()
def test_a_layer_prints_its_class_and_what_torch_nn_prints(sample):
    assert str(sample.ours) == str(sample.theirs)


@every_sample()
def test_factory_arguments_reach_every_parameter_and_buffer(sample):
    dtype, (args, kwargs) = sample.x.dtype, sample.options
    for device in ("cpu", "meta"):
        layer = type(sample.ours)(*args, **kwargs, device=device, dtype=dtype)
        assert all(p.dtype == dtype and p.device.type == device for p in layer.parameters())
        for buffer in layer.buffers():
            assert buffer.device.type == device
            assert buffer.dtype in (wide_dtype(dtype), torch.long)  # torch.nn stores halves in halves


@every_sample()
def test_a_layer_moves_to_meta_and_back_to_memory(sample):
    layer, names = sample.ours, list(sample.ours.state_dict())
    layer.to("meta")
    assert all(value.is_meta for value in layer.state_dict().values())
    layer.to_empty(device="cpu").load_state_dict(sample.theirs.state_dict())
    assert list(layer.state_dict()) == names
    assert_close(layer(sample.x), sample.theirs(sample.x.double()))


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_train_and_eval_mode_differ_where_pytorch_says_so(info):
    assert info.train_and_eval_differ
    for index, given in enumerate(module_inputs(info, torch.float64, training=True)):
        sample = Sample(info, index, torch.float64, training=True)
        y = sample.ours(sample.x)
        differ = not torch.equal(y, sample.ours.eval()(sample.x))
        assert differ == (given.desc not in {"not_tracking_stats", "zero_batch"})


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_pytorchs_error_samples_raise_the_same_error(info):
    """torch.nn notices in forward, ours at the latest there, with the same type and words."""
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert len(errors) == 2
    for error in errors:
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        given, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with pytest.raises(error.error_type, match=error.error_regex):
            OURS[info.module_cls](*given.args, **given.kwargs)(*called.args, **called.kwargs)


def test_no_sample_of_pytorch_is_left_out():
    expected = sum(
        len(module_inputs(info, dtype, training)) for info in INFOS for dtype in DTYPES for training in (True, False)
    )
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(cases(DTYPES)) == len({case.id for case in cases(DTYPES)}) == expected


# --- OpInfo -----------------------------------------------------------------------------------------------

(OPERATOR,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_the_functional_form_are_computed_or_refused_as_by_torch_nns_layers(dtype, record_property):
    samples, refused = list(OPERATOR.sample_inputs("cpu", dtype)), 0
    for number, sample in enumerate(samples):
        record_property("PyTorch sample", f"functional {str(dtype).removeprefix('torch.')} {number}")
        x, (mean, var, weight, bias), options = sample.input, sample.args, dict(sample.kwargs)
        theirs = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.ndim]
        layer = _layer_of(theirs, x, mean, var, weight, bias, **options)
        if x.ndim == 1:  # nn.functional takes the shape (0,), no layer does
            refused += 1
            for refusing in (layer, theirs(1)):
                with pytest.raises(ValueError, match=r"\(N, C\)|expected 2D or 3D input"):
                    refusing(x)
            continue
        wide = [None if t is None else t.double() for t in (x, mean, var, weight, bias)]
        assert_close(layer(x), F.batch_norm(*wide, **options))
        if mean is not None:
            for found, expected in zip((layer.running_mean, layer.running_var), wide[1:3], strict=True):
                torch.testing.assert_close(found.double(), expected, **_tolerances(wide_dtype(dtype)))
    assert (len(samples), refused) == (12, 2)


def _layer_of(theirs, x, mean, var, weight, bias, *, training=False, momentum=0.1, eps=1e-5):
    channels = x.shape[1] if x.ndim > 1 else 1
    layer = OURS[theirs](channels, eps, momentum, weight is not None, mean is not None, dtype=x.dtype)
    values = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    state = layer.state_dict() | {name: v for name, v in values.items() if v is not None and v.numel()}
    layer.load_state_dict(state)
    return layer.train(training)
