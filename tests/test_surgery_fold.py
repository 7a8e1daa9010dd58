"""fold: every pair of layers, against the model in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from fingerprint import fingerprint
from torch import nn

import batchnorm as bn
from batchnorm.kernels.activations import NAMES, has_parameter
from batchnorm.surgery import Partner, fold, foldable, unfold


def quiet(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The folded model; the original is as before."""
    before = fingerprint(model)
    folded = fold(model, x, report=None)
    assert fingerprint(model) == before
    return folded


def settled(norm: nn.Module) -> nn.Module:
    """Parameters and statistics that are not those of construction, some negative gammas among them."""
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(torch.randn_like(parameter.double()) + (1 if name == "weight" else 0))
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features))
            norm.running_var.copy_(torch.rand(norm.num_features) * 2 + 0.3)
    return norm


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]


def line(model: nn.Module, folded: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> float:
    """eps sqrt(count) times the sizes of the ``count`` terms of an output, for a pair of one layer and batch norm.

    The sizes are what the folded layer makes of absolute values, and what was subtracted and added for its bias.
    """
    (layer,), norm = layers(folded), next(iter(bn.find(model).values()))
    sizes = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
        largest = sizes(x.double().abs()).max().item()
        scale = (norm.running_var.double() + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.double())
        moved = (scale.abs() * norm.running_mean.double().abs()).max().item()
        plain = copy.deepcopy(layers(model)[0]).double()
        bias = 0.0 if plain.bias is None else plain.bias.abs().max().item() * scale.abs().max().item()
        fan = plain.weight.abs().reshape(plain.weight.shape[0], -1).sum(1).max().item()
    count = layer.weight.numel() + 4
    return torch.finfo(dtype).eps * count**0.5 * (largest + moved * max(1.0, fan) + bias)


def assert_folded(model: nn.Module, x: torch.Tensor, *, kept: int = 0) -> nn.Module:
    """All but ``kept`` layers are folded; the result is right in float64, to within rounding, and in x's own type."""
    assert sum(isinstance(answer, str) for answer in foldable(model, x).values()) == kept
    wide = copy.deepcopy(model).double().eval()
    expected = wide(x.double())
    folded_wide = quiet(wide, x.double())
    assert len(bn.find(folded_wide)) == kept
    folded = quiet(model, x)
    for result, dtype in ((folded_wide, torch.float64), (folded, x.dtype)):
        got = result(x.to(dtype))
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= line(model, result, x, dtype)
    assert not any(module.training for module in folded.modules())
    return folded


CONVOLUTIONS = {
    "1d": (nn.Conv1d, nn.BatchNorm1d, (3, 8, 9)),
    "2d": (nn.Conv2d, nn.BatchNorm2d, (3, 8, 7, 6)),
    "3d": (nn.Conv3d, nn.BatchNorm3d, (2, 8, 5, 4, 6)),
    "transposed 1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (3, 8, 9)),
    "transposed 2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (3, 8, 5, 6)),
    "transposed 3d": (nn.ConvTranspose3d, nn.BatchNorm3d, (2, 8, 3, 4, 2)),
}
AFFINE = {"affine": {}, "no gamma, no beta": {"affine": False}, "no beta": {"bias": False}, "eps": {"eps": 0.5}}


@pytest.mark.parametrize("settings", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "groups"), [(8, 1), (4, 1), (12, 2), (8, 8), (16, 8)])
@pytest.mark.parametrize(("kind", "norm", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_before_batch_norm(kind, norm, shape, out, groups, bias, settings):
    """Square transposed ones and such with groups are what torch's own function gets wrong or fails at."""
    layer = kind(8, out, 3, stride=2, padding=1, groups=groups, bias=bias)
    folded = assert_folded(nn.Sequential(layer, settled(norm(out, **settings))), torch.randn(shape))
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("settings", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "groups"), [(8, 1), (12, 2), (8, 8), (16, 8)])
@pytest.mark.parametrize(("kind", "norm", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_behind_batch_norm(kind, norm, shape, out, groups, bias, settings):
    transposed = "Transpose" in kind.__name__
    layer = kind(8, out, 1 if transposed else 3, stride=1 if transposed else 2, groups=groups, bias=bias)
    assert_folded(nn.Sequential(settled(norm(8, **settings)), layer), torch.randn(shape))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_padding_and_dilation_before_batch_norm(mode, padding):
    layer = nn.Conv2d(8, 6, 3, padding=padding, dilation=2, padding_mode=mode)
    assert_folded(nn.Sequential(layer, settled(nn.BatchNorm2d(6))), torch.randn(2, 8, 7, 6))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_padding_with_values_behind_batch_norm(mode, padding):
    layer = nn.Conv2d(8, 6, 3, padding=padding, dilation=2, padding_mode=mode)
    assert_folded(nn.Sequential(settled(nn.BatchNorm2d(8)), layer), torch.randn(2, 8, 7, 6))


BORDERS = {
    "padding": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "padding on one axis": lambda: nn.Conv2d(8, 6, 3, padding=(0, 1)),
    "same": lambda: nn.Conv2d(8, 6, 3, padding="same"),
    "transposed kernel": lambda: nn.ConvTranspose2d(8, 6, 3),
    "transposed stride": lambda: nn.ConvTranspose2d(8, 6, 1, stride=2),
    "transposed output padding": lambda: nn.ConvTranspose2d(8, 6, 1, dilation=2, output_padding=1),
}


@pytest.mark.parametrize("make", BORDERS.values(), ids=BORDERS)
def test_borders_that_a_shift_does_not_reach(make):
    """A layer behind is left if there is a shift, and folded if there is none, which is then exact."""
    x, norm = torch.randn(2, 8, 7, 6), settled(nn.BatchNorm2d(8))
    model = nn.Sequential(norm, make())
    assert "so a bias cannot replace the shift of the layer" in foldable(model, x)["0"]
    assert bn.find(quiet(model, x)).keys() == {"0"}
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    assert_folded(model, x)


@pytest.mark.parametrize("padding", ["valid", "same", 0])
def test_padding_of_nothing_is_none(padding):
    kernel = 1 if padding == "same" else 3
    model = nn.Sequential(settled(nn.BatchNorm2d(8)), nn.Conv2d(8, 6, kernel, padding=padding))
    assert_folded(model, torch.randn(2, 8, 7, 6))


@pytest.mark.parametrize("settings", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_linear_layer(before, bias, settings):
    norm, linear = settled(nn.BatchNorm1d(8, **settings)), nn.Linear(8, 8, bias=bias)
    assert_folded(nn.Sequential(linear, norm) if before else nn.Sequential(norm, linear), torch.randn(5, 8))


@pytest.mark.parametrize("before", [True, False])
def test_a_linear_layer_on_another_axis_is_left(before):
    """(N, C, L) with C == L, which torch's own function folds to something else."""
    norm, linear = settled(nn.BatchNorm1d(8)), nn.Linear(8, 8)
    model = nn.Sequential(linear, norm) if before else nn.Sequential(norm, linear)
    x = torch.randn(5, 8, 8)
    (reason,) = foldable(model, x).values()
    assert "channels on another axis than the layer, whose inputs have 3 axes" in reason
    folded = quiet(model, x)
    assert torch.equal(folded(x), copy.deepcopy(model).eval()(x))
    (reason,) = foldable(model).values()
    assert "pass an example to check this" in reason


def test_other_channels_than_those_of_the_linear_layer_are_seen_without_an_example():
    (reason,) = foldable(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(4))).values()
    assert reason == "'0' makes 6 channels on another axis: the layer normalizes 4 channels"


def test_an_unbatched_convolution_is_left():
    """BatchNorm1d takes (C, L) for (N, C)."""
    model, x = nn.Sequential(nn.Conv1d(3, 5, 1), settled(nn.BatchNorm1d(5))), torch.randn(3, 5)
    assert "another axis than the layer, whose inputs have 2 axes" in foldable(model, x)["1"]
    assert torch.equal(quiet(model, x)(x), model.eval()(x))


NORMS = {
    "ours": lambda: bn.BatchNorm2d(6),
    "ours without gamma": lambda: bn.BatchNorm2d(6, weight=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
    "frozen": lambda: bn.freeze(nn.BatchNorm2d(6)),
    "ours, frozen": lambda: bn.freeze(bn.BatchNorm2d(6), affine=True),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_layers_of_all_makers(make, before):
    norm, conv = settled(make()), nn.Conv2d(6, 6, 3)
    model = nn.Sequential(conv, norm) if before else nn.Sequential(norm, conv)
    folded = assert_folded(model, torch.randn(2, 6, 5, 5))
    back = unfold(folded)
    assert type(back[int(before)]) is type(norm)


@pytest.mark.parametrize("act", [None, *NAMES])
def test_an_activation_of_a_layer_is_still_applied(act):
    x = torch.randn(2, 3, 5, 5)
    norm = settled(bn.BatchNorm2d(6, act=act, act_param=0.3 if has_parameter(act) else None))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 3)).double().eval()
    folded = quiet(model, x.double())
    assert not bn.find(folded)
    torch.testing.assert_close(folded(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)


def test_a_layer_with_an_activation_is_not_folded_into_what_is_behind_it():
    model = nn.Sequential(settled(bn.BatchNorm2d(6, act="relu")), nn.Conv2d(6, 6, 3))
    reason = foldable(model, torch.randn(2, 6, 5, 5))["0"]
    assert reason == "'1' is behind an activation or a residual of the layer"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_other_types_are_computed_wide_and_rounded_once(make, dtype):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), settled(make(6))).to(dtype)
    folded = assert_folded(model, torch.randn(2, 3, 5, 5, dtype=dtype))
    conv, norm = model[0].double(), model[1].double()
    scale = 1 / (norm.running_var + norm.eps).sqrt() * norm.weight
    assert torch.equal(folded[0].weight, (conv.weight * scale[:, None, None, None]).to(dtype))
    assert torch.equal(folded[0].bias, (norm.bias - norm.running_mean * scale).to(dtype))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_memory_format_and_requires_grad_of_a_weight_stay(kind, groups):
    model = nn.Sequential(kind(4, 6, 3, bias=False, groups=groups), settled(nn.BatchNorm2d(6)))
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = quiet(model, torch.randn(2, 4, 5, 5))
    assert folded[0].weight.stride() == model[0].weight.stride()
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad


def test_several_layers_in_a_row_go_into_one():
    x = torch.randn(2, 8, 5, 5)
    norms = [settled(nn.BatchNorm2d(8)) for _ in range(4)]
    model = nn.Sequential(*norms[:2], nn.Conv2d(8, 8, 3), *norms[2:]).double().eval()
    assert foldable(model) == {
        "0": Partner("2", "behind"),
        "1": Partner("2", "behind"),
        "3": Partner("2", "before"),
        "4": Partner("2", "before"),
    }
    folded = quiet(model, x.double())
    assert not bn.find(folded)
    torch.testing.assert_close(folded(x.double()), model(x.double()), rtol=1e-11, atol=1e-11)
    back = unfold(folded)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("order", ["1, 2", "2, 1"])
def test_folding_again_undoes_to_the_weights_of_the_beginning(order):
    x = torch.randn(2, 3, 5, 5).double()
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), settled(nn.BatchNorm2d(6))).double().eval()
    again = quiet(model, x).append(settled(nn.BatchNorm2d(6)).double()).eval()
    folded = quiet(again, x)
    assert not bn.find(folded)
    torch.testing.assert_close(folded(x), again(x), rtol=1e-11, atol=1e-11)
    if order == "2, 1":  # in which modules come back
        folded._modules = dict(sorted(folded._modules.items(), reverse=True))
    back = unfold(folded)
    assert back.get_submodule("0").bias is None
    assert torch.equal(back.get_submodule("0").weight, model[0].weight)
