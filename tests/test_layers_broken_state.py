"""A layer whose parameters or statistics do not fit it is refused: kernels read and write memory by address."""

import pytest
import torch

from batchnorm import kernels
from batchnorm.kernels import ChannelStatistics, Layer, Running
from batchnorm.layers import BatchNorm1d, BatchNorm2d

X = torch.randn(4, 3, 5, 5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_values_of_another_number_of_channels_are_refused(name, size, train):
    layer = BatchNorm2d(3).train(train)
    values = torch.ones(size)
    setattr(layer, name, torch.nn.Parameter(values) if name in {"weight", "bias"} else values)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"{name} of shape \(3,\) on cpu, got \({size},\) on cpu"):
        layer(X)


@pytest.mark.parametrize("train", [True, False])
def test_a_layer_on_another_device_is_refused(train):
    layer = BatchNorm2d(3, device="meta").train(train)
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight of shape \(3,\) on cpu, got \(3,\) on meta"):
        layer(X)


def test_an_edited_num_features_does_not_reach_memory():
    layer = BatchNorm1d(3)
    layer.num_features = 5
    with pytest.raises(ValueError, match=r"weight of shape \(5,\)"):
        layer(torch.randn(4, 5))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_operators_refuse_them_too(size):
    wrong, right = torch.ones(size), torch.ones(3)
    with pytest.raises((ValueError, RuntimeError)):
        kernels.train_forward(X, wrong, None, 1e-5)
    with pytest.raises((ValueError, RuntimeError)):
        kernels.train_backward(X, X, right, wrong, None, 1e-5)
    with pytest.raises((ValueError, RuntimeError)):
        kernels.normalize(X, ChannelStatistics(right, wrong), Layer())


@pytest.mark.parametrize("size", [2, 5])
def test_the_update_refuses_them_too(size):
    wrong, right = torch.ones(size), torch.ones(3)
    running = Running(wrong, right, torch.tensor(0), torch.tensor(0), 0.1)
    with pytest.raises((ValueError, RuntimeError)):
        kernels.update_running(running, ChannelStatistics(right, right), 4)


def test_a_layer_without_a_counter_goes_on_as_torchs_does():
    layer = BatchNorm2d(3)
    layer.num_batches_tracked = None
    layer(X)
    assert not torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("value", [X.numpy(), None, [1.0]])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(TypeError, match=rf"needs a tensor, got {type(value).__name__}"):
        BatchNorm2d(3)(value)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_a_model_in_train_mode_exports_and_decomposes():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), BatchNorm2d(4))
    program = torch.export.export(model, (X,)).run_decompositions()
    torch.testing.assert_close(program.module()(X), model(X))


def test_a_layer_alone_is_no_leaf_for_fx_as_torchs_is_none():
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(torch.nn.BatchNorm2d(3))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(BatchNorm2d(3))
