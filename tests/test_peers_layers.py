"""Defects of the peers' layers and tools: each is shown in the peer where it is installed, and absent in ours.

A test that fails in its peer's part says that the peer was repaired: then that part goes. Peers that are not installed
are computed from their formulas.
"""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import other_frameworks
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.population.freezing import Frozen
from batchnorm.surgery.conversion import convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it decorates with torch.jit
    from torch.fx.experimental.optimization import fuse


def trained(norm: nn.Module) -> nn.Module:
    """A layer in eval mode whose statistics and parameters are not at their initial values."""
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    return norm.eval()


def error(found: Tensor, right: Tensor) -> float:
    return (found - right).detach().abs().max().item()


# --- folding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_transposed_convolution_is_folded_right_for_all_groups(groups):
    conv, norm = nn.ConvTranspose2d(8, 8, 3, groups=groups).eval(), trained(nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 5, 5)
    right = norm(conv(x))
    if groups == 1:
        theirs = fuse_conv_bn_eval(copy.deepcopy(conv), norm)  # without transpose=True
        assert error(theirs(x), right) > 0.01
    else:
        with pytest.raises(RuntimeError):
            fuse_conv_bn_eval(copy.deepcopy(conv), norm, transpose=True)(x)
    folded = bn.fold(nn.Sequential(conv, norm), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert error(folded(x), right) < 1e-5


def test_a_linear_layer_is_folded_without_gamma_and_beta_and_not_along_another_axis():
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(nn.Linear(4, 4).eval(), nn.BatchNorm1d(4, affine=False).eval())
    model, x = nn.Sequential(nn.Linear(4, 4), trained(nn.BatchNorm1d(4, affine=False))).eval(), torch.randn(3, 4)
    folded = bn.fold(model, x)
    assert len([module for module in folded.modules() if isinstance(module, nn.BatchNorm1d)]) == 0
    assert error(folded(x), model(x)) < 1e-5
    # (N, C, L) with C == L: the linear layer's features are axis 2, the channels axis 1
    linear, norm, x = nn.Linear(4, 4).eval(), trained(nn.BatchNorm1d(4)), torch.randn(3, 4, 4)
    right = norm(linear(x))
    assert error(fuse_linear_bn_eval(copy.deepcopy(linear), norm)(x), right) > 0.01
    assert error(bn.fold(nn.Sequential(linear, norm).eval(), x)(x), right) < 1e-5


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3))

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


def test_a_convolution_that_is_called_twice_is_not_folded_into():
    model, x = CalledTwice().eval(), torch.randn(2, 3, 4, 4)
    right = model(x)
    assert error(fuse(copy.deepcopy(model))(x), right) > 0.01
    assert error(bn.fold(model, x)(x), right) < 1e-5


def test_what_fx_leaves_unfolded_is_folded():
    for parts in ((nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)), (nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))):
        model, x = nn.Sequential(*parts).eval(), torch.randn(2, 3, 4, 4)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                trained(module)
        theirs, ours = fuse(copy.deepcopy(model)), bn.fold(model, x)
        assert any(isinstance(module, nn.BatchNorm2d) for module in theirs.modules())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
        assert error(ours(x), model(x)) < 1e-5


# --- stored statistics ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NaN or infinity in the batch statistics:RuntimeWarning")
def test_one_nan_does_not_stay_in_the_stored_statistics():
    layers = [nn.BatchNorm1d(2), BatchNorm1d(2)]
    for layer in layers:
        layer(torch.tensor([[torch.nan, 0.0], [1.0, 1.0], [2.0, 3.0]]))
        for _ in range(50):
            layer(torch.randn(8, 2))
    theirs, ours = (bool(torch.isfinite(layer.running_mean).all()) for layer in layers)
    assert (theirs, ours) == (False, True)


def test_half_precision_layers_keep_statistics_in_float32():
    x = 400 + 300 * torch.randn(64, 2)
    theirs, ours = nn.BatchNorm1d(2, momentum=1.0).half(), BatchNorm1d(2, momentum=1.0).half()
    for layer in (theirs, ours):
        layer(x.half())
    assert torch.isinf(theirs.running_var).all()
    assert torch.allclose(ours.running_var, x.half().float().var(0), rtol=1e-3)
    theirs, ours = nn.BatchNorm1d(1).bfloat16(), BatchNorm1d(1).bfloat16()
    batch = torch.full((8, 1), 5.0).bfloat16()
    for _ in range(300):
        theirs(batch)
        ours(batch)
    assert abs(theirs.running_mean.item() - 5) > 0.05  # it stalls: 0.1 of the rest is below half a unit of bfloat16
    assert abs(ours.running_mean.item() - 5) < 1e-5


def test_an_empty_batch_is_not_counted():
    theirs, ours = nn.BatchNorm1d(2), BatchNorm1d(2)
    theirs(torch.zeros(0, 2))
    ours(torch.zeros(0, 2))
    assert (int(theirs.num_batches_tracked), int(ours.num_batches_tracked)) == (1, 0)


def test_a_frozen_layer_stays_frozen_in_train_mode_and_keeps_its_statistics():
    for model in (nn.Sequential(nn.BatchNorm1d(2)), bn.freeze(nn.Sequential(nn.BatchNorm1d(2)))):
        model.requires_grad_(False)
        model[0].eval()
        model.train()
        model(torch.randn(8, 2))
        is_ours = isinstance(model[0], Frozen)
        assert (int(model[0].num_batches_tracked) == 0) == is_ours


def test_a_frozen_layer_computes_the_same_in_train_and_eval_mode():
    """Lightning's freeze_module sets track_running_stats=False: train mode then uses the batch's statistics."""
    x = 5 + torch.randn(64, 2)
    theirs = nn.BatchNorm1d(2)
    theirs.track_running_stats = False
    assert error(theirs.train()(x), theirs.eval()(x)) > 4
    ours = bn.freeze(nn.Sequential(nn.BatchNorm1d(2)))
    assert torch.equal(ours.train()(x), ours.eval()(x))


# --- transforms and inputs --------------------------------------------------------------------------------


def test_an_ensemble_trains_under_vmap():
    """torch.nn's layer refuses shared statistics in torch's words, ours says how to give each model its own."""
    for layer, message in ((nn.BatchNorm1d(2), "were not batched"), (BatchNorm1d(2), "for each model")):
        with pytest.raises(RuntimeError, match=message):
            vmap(layer)(torch.randn(3, 8, 2))
    parameters, buffers = stack_module_state([BatchNorm1d(2) for _ in range(3)])
    one = BatchNorm1d(2)
    vmap(lambda p, b, x: functional_call(one, (p, b), (x,)))(parameters, buffers, torch.randn(3, 8, 2))
    assert buffers["num_batches_tracked"].tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_differentiation_in_train_mode():
    x = torch.randn(8, 2).double()
    with pytest.raises(RuntimeError):
        jvp(nn.BatchNorm1d(2).double(), (x,), (torch.ones_like(x),))
    _, tangent = jvp(BatchNorm1d(2).double(), (x,), (torch.ones_like(x),))
    assert error(tangent, torch.zeros_like(x)) < 1e-12  # a shift of all values changes nothing


def test_jagged_tensors_and_float64_inputs_of_a_float32_layer():
    jagged = torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(5, 2)], layout=torch.jagged)
    for call in (lambda layer: layer(jagged), lambda layer: layer(torch.randn(8, 2).double())):
        with pytest.raises(RuntimeError):
            call(nn.BatchNorm1d(2))
        assert call(BatchNorm1d(2)).shape[-1] == 2


def test_padding_does_not_move_valid_positions():
    valid = torch.arange(100) < torch.tensor([100, 60, 40, 24]).unsqueeze(1)  # 44 % padding
    x = torch.where(valid.unsqueeze(1), 3 + torch.randn(4, 1, 100), 0)
    theirs, ours = (y.squeeze(1)[valid] for y in (nn.BatchNorm1d(1)(x), BatchNorm1d(1)(x, mask=valid)))
    assert theirs.mean() > 0.7
    assert theirs.std() < 0.7
    assert abs(ours.mean()) < 1e-5
    assert abs(ours.std(correction=0) - 1) < 1e-4


def test_a_variance_far_from_zero_is_not_lost_in_float32():
    """E[x^2] - E[x]^2 in float32, flax's default: 0.1 or less than 0, in place of 1e-4."""
    x = 1000 + 0.01 * torch.randn(10_000, 1)
    theirs = (x.square().mean() - x.mean().square()).item()
    layer = BatchNorm1d(1, momentum=1.0)
    layer(x)
    right = x.double().var().item()
    assert abs(theirs - right) > 1e-2
    assert abs(layer.running_var.item() - right) < 1e-6 * right


def test_an_activation_of_a_subclass_is_not_lost():
    """convert_sync_batchnorm copies torch.nn's arguments alone: the activation and forward hooks go."""
    ours, hooked = BatchNorm2d(3, act="relu"), []
    ours.register_forward_hook(lambda *_: hooked.append(1))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(ours)))
    x = torch.randn(4, 3, 2, 2)
    mine = convert(nn.Sequential(ours), sync=True)
    assert not theirs[0]._forward_hooks
    mine(x)
    assert hooked == [1]
    assert (mine(x) >= 0).all()
    assert (theirs.eval()(x) < 0).any()


def test_complex_inputs_and_channels_on_the_last_axis():
    z = torch.complex(torch.randn(16, 3), torch.randn(16, 3))
    with pytest.raises(RuntimeError):
        nn.BatchNorm1d(3)(z)
    y = BatchNorm1d(3, dtype=torch.complex64)(z)
    assert error(y.abs().square().mean(0), torch.ones(3)) < 1e-4
    rows = torch.randn(4, 5, 3)  # (N, L, C)
    with pytest.raises(RuntimeError):
        nn.BatchNorm1d(3)(rows)
    right = nn.BatchNorm1d(3)(rows.transpose(1, 2)).transpose(1, 2)
    assert error(BatchNorm1d(3, axis=-1)(rows), right) < 1e-5


def test_activation_checkpointing_counts_a_batch_once():
    counts = []
    for kind in (nn.BatchNorm1d, BatchNorm1d):
        layer, x = kind(3), torch.randn(8, 3, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        counts.append(int(layer.num_batches_tracked))
    assert counts == [2, 1]


def test_a_mean_of_variances_is_not_the_variance_of_ranks_with_different_means():
    """timm's distribute_bn(reduce=True): ranks with means 0 and 6."""
    ranks = [6 * i + torch.randn(4000, 1, dtype=torch.float64) for i in range(2)]
    layers = [nn.BatchNorm1d(1, momentum=1.0).double() for _ in ranks]
    for layer, x in zip(layers, ranks, strict=True):
        layer(x)
    right = torch.cat(ranks).var(0)
    theirs = sum(layer.running_var for layer in layers) / 2
    ours = bn.merge_statistics(layers, counts=[4000, 4000])["running_var"]
    assert theirs.item() < 0.15 * right.item()
    assert error(ours, right) < 1e-12 * right.item()


def test_the_first_batches_do_not_inflate_the_stored_variance():
    """equinox's formula divides m + (1 - m) var by 1 - m^count: 103 for a true variance of 4 and m = 0.99."""
    x, m = 2 * torch.randn(100_000, 1), 0.99
    theirs = ((m * 1 + (1 - m) * x.var()) / (1 - m)).item()
    layer = BatchNorm1d(1, momentum=1 - m)
    layer(x)
    assert theirs > 100
    assert 1 < layer.running_var.item() < 4


def test_a_layer_used_at_two_sites_is_named_by_the_doctor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(5 * self.second(self.norm(self.first(x))) + 10)

    found = bn.examine(Twice(), list(torch.randn(4, 16, 3))).findings
    assert any(("norm" in finding.layer and "twice" in f"{finding}") or "2 " in f"{finding}" for finding in found)


@pytest.mark.parametrize(("value", "code"), [(-1.0, "BN103"), (0.0, "BN105")])
def test_stored_variances_that_break_eval_mode_are_named_by_the_doctor(value, code):
    """torch.nn's layer gives NaN for a negative variance, and multiplies by 316 for 0, without a word."""
    layer = nn.BatchNorm1d(2)
    layer.running_var[0] = value
    y = layer.eval()(torch.ones(1, 2))[0, 0]
    assert torch.isnan(y) if value < 0 else y > 300
    layer.num_batches_tracked.fill_(100)
    assert code in {finding.code for finding in bn.examine(nn.Sequential(layer)).findings}


def test_the_epsilon_of_keras_is_imported():
    """Left at torch's 1e-5, a layer of Keras with variance 1e-4 and eps 1e-3 has a third of its scale."""
    config = {"name": "bn", "axis": -1, "momentum": 0.99, "epsilon": 1e-3, "center": False, "scale": False}
    state = other_frameworks.read((config, [np.zeros(1, "f4"), np.full(1, 1e-4, "f4")]))["bn"]
    x = torch.full((1, 1), 0.01)
    right, wrong = 0.01 / math.sqrt(1e-4 + 1e-3), 0.01 / math.sqrt(1e-4 + 1e-5)
    assert abs(state.layer(1).eval()(x).item() - right) < 1e-6
    assert abs(right / wrong - 0.3) < 0.02
