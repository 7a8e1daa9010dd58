"""Lazy layers: as torch.nn's, they become a layer of a known size at the first batch, with all settings of ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import pack_sequence

import batchnorm
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy_layers import OURS_LAZY, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

CASES = {
    "rows": (LazyBatchNorm1d, BatchNorm1d, (6, 3)),
    "lines": (LazyBatchNorm1d, BatchNorm1d, (4, 3, 5)),
    "images": (LazyBatchNorm2d, BatchNorm2d, (4, 3, 5, 2)),
    "volumes": (LazyBatchNorm3d, BatchNorm3d, (2, 3, 4, 2, 3)),
}
cases = pytest.mark.parametrize(("lazy", "kind", "shape"), CASES.values(), ids=CASES)
OPTIONS = [
    {},
    {"affine": False},
    {"weight": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64, "momentum": None, "eps": 1e-3},
    {"dtype": torch.bfloat16},
    {"act": "leaky_relu", "act_param": 0.2, "memory": "save", "padding": "keep", "single_element": "population"},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def check_same(layer, right):
    assert type(layer) is type(right)
    assert repr(layer) == repr(right)
    assert layer.state_dict().keys() == right.state_dict().keys()
    for name, value in right.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
        assert layer.state_dict()[name].dtype == value.dtype
    assert not layer._forward_pre_hooks


@cases
@options
def test_the_first_batch_makes_it_a_layer_of_its_size(lazy, kind, shape, options):
    layer, right = lazy(**options), kind(3, **options)
    assert isinstance(layer, kind)
    x = torch.randn(shape, dtype=options.get("dtype"))
    assert torch.equal(layer(x), right(x))
    check_same(layer, right)


@cases
@options
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half and back"])
def test_a_copy_and_a_cast_before_the_first_batch_keep_the_types(lazy, kind, shape, options, how):
    layer, right = lazy(**options), kind(3, **options)
    if how == "half and back":
        layer, right = (each.half().to(options.get("dtype", torch.float32)) for each in (layer, right))
    else:
        layer = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(shape, dtype=options.get("dtype"))
    assert torch.equal(layer(x), right(x))
    check_same(layer, right)


def test_a_copy_is_another_layer():
    layer = LazyBatchNorm1d()
    other = copy.deepcopy(layer)
    other(torch.randn(4, 3))
    assert is_lazy(layer.weight)
    assert layer(torch.randn(4, 2)).shape == (4, 2)
    assert not any(map(is_lazy, [*other.parameters(), *other.buffers()]))


@cases
def test_channels_last(lazy, kind, shape):
    layer, x = lazy(axis=-1), torch.randn(shape).movedim(1, -1)
    assert torch.equal(layer(x), kind(3, axis=-1)(x))
    assert layer.num_features == 3


@cases
def test_a_state_of_a_known_size_is_loaded_before_the_first_batch_and_kept(lazy, kind, shape):
    trained, layer = kind(3), lazy()
    with torch.no_grad():
        trained.weight.normal_()
    trained(2 + torch.randn(shape))
    layer.load_state_dict(trained.state_dict())
    assert layer.num_features == 3
    x = torch.randn(shape)
    assert torch.equal(layer.eval()(x), trained.eval()(x))
    check_same(layer, trained)


def test_a_state_with_missing_keys_is_completed_and_what_was_loaded_stays():
    layer = LazyBatchNorm1d()
    layer.load_state_dict({"running_mean": torch.tensor([1.0, 2.0])}, strict=False)
    layer.eval()(torch.randn(4, 2))
    assert layer.running_mean.tolist() == [1, 2]
    assert layer.running_var.tolist() == layer.weight.tolist() == [1, 1]
    layer = LazyBatchNorm1d()
    layer.load_state_dict(BatchNorm1d(2).state_dict())
    with pytest.raises(ValueError, match="needs 2 channels on axis 1"):
        layer(torch.randn(4, 3))


def test_a_state_without_a_size_loads_into_a_lazy_layer():
    layer, other = LazyBatchNorm1d(), nn.LazyBatchNorm1d()
    layer.load_state_dict(other.state_dict())
    assert layer(torch.randn(4, 3)).shape == (4, 3)


def test_the_meta_device():
    layer = LazyBatchNorm2d(device="meta")
    assert layer(torch.randn(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    assert layer.running_mean.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(2, 3, 4, 4)).isfinite().all()


def test_packed_and_nested_sequences_and_masks_give_the_size():
    packed = pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    nested = torch.nested.nested_tensor([torch.randn(5, 4), torch.randn(3, 4)], layout=torch.jagged)
    for x in (packed, nested):
        layer = LazyBatchNorm1d()
        layer(x)
        assert layer.num_features == 4
    layer = LazyBatchNorm1d()
    layer(torch.randn(2, 4, 5), lengths=[5, 2])
    assert layer.num_features == 4
    layer = LazyBatchNorm1d()
    layer(input=torch.randn(2, 4))
    assert layer.num_features == 4


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(3), ValueError, r"LazyBatchNorm1d needs \(N, C\) or \(N, C, L\), got \(3,\)"),
        ([1.0], TypeError, "LazyBatchNorm1d needs a tensor, got list"),
    ],
)
def test_a_wrong_first_input_leaves_it_lazy(x, error, words):
    layer = LazyBatchNorm1d()
    with pytest.raises(error, match=words):
        layer(x)
    assert is_lazy(layer.weight)
    assert layer(torch.randn(4, 3)).shape == (4, 3)


def test_unknown_and_wrong_settings_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'color'"):
        LazyBatchNorm1d(color=1)
    with pytest.raises(ValueError, match="padding must be 'zero' or 'keep'"):
        LazyBatchNorm1d(padding="reflect")
    with pytest.raises(TypeError, match="eps must be a number"):
        LazyBatchNorm1d("small")


@pytest.mark.parametrize("theirs", OURS_LAZY, ids=lambda kind: kind.__name__)
def test_convert_and_revert_exchange_the_lazy_layers_too(theirs):
    model = nn.Sequential(nn.LazyLinear(3), theirs(dtype=torch.float16), nn.BatchNorm1d(3))
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    ours = batchnorm.convert(model)
    assert type(ours[1]) is OURS_LAZY[theirs]
    assert type(model[1]) is theirs
    back = batchnorm.revert(ours)
    assert type(back[1]) is theirs
    assert vars(back[1]).keys() == vars(model[1]).keys()
    shape = (4, 3, *[2] * {"1": 0, "2": 2, "3": 3}[theirs.__name__[-2]])
    x = torch.randn(shape)
    assert torch.equal(back[1].float()(x), theirs()(x))
    y = ours[1](x.half())
    assert type(ours[1]) is OURS_LAZY[theirs].cls_to_become
    assert ours[1].running_var.dtype == torch.float32
    assert y.isfinite().all()
    assert len(seen) == 2
    model[1] = OURS_LAZY[theirs](act="relu")
    with pytest.raises(ValueError, match="layers constructed with one: 1"):
        batchnorm.revert(model)
    model[1] = OURS_LAZY[theirs](axis=-1)
    with pytest.raises(ValueError, match="got axis=-1 at '1'"):
        batchnorm.for_export(model)
