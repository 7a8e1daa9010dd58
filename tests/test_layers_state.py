"""What a layer stores: never spoiled, never narrowed, loaded and saved as torch.nn's."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from batchnorm import kernels
from batchnorm.kernels import ChannelStatistics, Running
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

PAIRS = [(BatchNorm1d, nn.BatchNorm1d), (BatchNorm2d, nn.BatchNorm2d), (BatchNorm3d, nn.BatchNorm3d)]
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["1d", "2d", "3d"])
STATISTICS = ("running_mean", "running_var")


def trained(layer: nn.Module, steps: int = 3) -> nn.Module:
    sizes = {nn.BatchNorm1d: (2,), nn.BatchNorm2d: (2, 2), nn.BatchNorm3d: (2, 2, 2)}
    trailing = next(size for cls, size in sizes.items() if isinstance(layer, cls))
    for _ in range(steps):
        layer(torch.randn(4, 3, *trailing))
    return layer


def spoiled(value: float = torch.nan) -> torch.Tensor:
    """A batch with one bad pixel in channel 1 of 3."""
    x = torch.randn(4, 3, 5, 5)
    x[2, 1, 3, 4] = value
    return x


# --- the guard --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38], ids=["nan", "inf", "-inf", "overflow"])
def test_one_bad_pixel_leaves_the_stored_statistics_of_its_channel_and_is_counted(value, compiled):
    layer = BatchNorm2d(3)
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    forward(torch.randn(4, 3, 5, 5))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="1 of 3 channels: these channels keep their running statistics"):
        forward(spoiled(value))
    for name in STATISTICS:
        old, new = before[name], getattr(layer, name)
        assert new[1] == old[1]
        assert (new[[0, 2]] != old[[0, 2]]).all()
        assert new.isfinite().all()
    assert layer.skipped_updates == 1
    assert layer.num_batches_tracked == 2
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    assert not any(name.endswith("skipped") for name, _ in layer.named_buffers())


def test_clean_batches_after_a_bad_one_lead_to_the_same_statistics_as_without_it():
    layer, other = BatchNorm2d(3, momentum=0.5), BatchNorm2d(3, momentum=0.5)
    with pytest.warns(RuntimeWarning, match="NaN"):
        layer(spoiled())
    for _ in range(60):
        x = torch.randn(4, 3, 5, 5)
        layer(x)
        other(x)
    # what is left of the start is 0.5^60 = 1e-18, so both are the same but for the last rounding
    for name in STATISTICS:
        torch.testing.assert_close(getattr(layer, name), getattr(other, name), rtol=2**-22, atol=2**-24)
    assert layer.skipped_updates == 1


def test_an_average_of_all_batches_is_not_diluted_by_a_bad_first_one():
    layer = BatchNorm1d(2, momentum=None)
    with pytest.warns(RuntimeWarning, match="this batch is left out of all running statistics"):
        layer(torch.full((4, 2), torch.nan))
    x = 10 + torch.randn(4, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=2**-21, atol=0)
    assert layer.num_batches_tracked == 1


@pytest.fixture
def quiet_operator(monkeypatch):
    """As on an accelerator, where the operator does not look at its result."""
    monkeypatch.setattr(kernels.running_statistics, "warns_at_once", lambda device: False)


def test_where_the_operator_cannot_warn_going_to_eval_does(quiet_operator):
    net = nn.Sequential(BatchNorm2d(3))
    net(spoiled())
    net(spoiled())
    with pytest.warns(RuntimeWarning, match=r"BatchNorm2d\(3\) met NaN or infinity in the statistics of 2 batches"):
        net.eval()
    net.eval()  # said once
    net.train()(torch.randn(4, 3, 5, 5))
    net.eval()  # nothing new to say
    net.train()(spoiled())
    with pytest.warns(RuntimeWarning, match="statistics of 1 batch since"):
        net.eval()


def test_where_the_operator_has_warned_going_to_eval_does_not_repeat_it():
    layer = BatchNorm2d(3)
    with pytest.warns(RuntimeWarning, match="NaN"):
        layer(spoiled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()


# --- state_dict, copies -----------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_checkpoints_go_both_ways_strictly(ours, theirs, options):
    for source, target in ((ours, theirs), (theirs, ours)):
        a, b = trained(source(3, **options)), target(3, **options)
        b.load_state_dict(a.state_dict(), strict=True)
        assert list(a.state_dict()) == list(b.state_dict())
        for name, value in a.state_dict().items():
            assert torch.equal(b.state_dict()[name], value)
            assert b.state_dict()[name].dtype == value.dtype


def test_a_checkpoint_from_before_batches_were_counted_loads():
    old = nn.BatchNorm1d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = BatchNorm1d(3)
    layer.load_state_dict(old, strict=True)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_checkpoint_is_stored_in_float32(narrow, assign):
    state = nn.BatchNorm1d(3).to(narrow).state_dict()
    layer = BatchNorm1d(3)
    layer.load_state_dict(state, assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert layer.weight.dtype == (narrow if assign else torch.float32)


def test_a_layer_made_without_memory_takes_over_a_checkpoint():
    source = trained(BatchNorm1d(3))
    with torch.device("meta"):
        layer = BatchNorm1d(3)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.eval()(torch.ones(2, 3)), source.eval()(torch.ones(2, 3)))
    trained(layer.train())
    assert layer.num_batches_tracked == 6


@pairs
@pytest.mark.parametrize("remade", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(ours, theirs, remade):
    layer = trained(ours(3, momentum=None, single_element="population"))
    other = remade(layer)
    assert repr(other) == repr(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert other.state_dict()[name].data_ptr() != value.data_ptr()
    assert other._skipped.data_ptr() != layer._skipped.data_ptr()


# --- types and devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_narrowing_a_layer_leaves_its_statistics_wide_to_the_last_digit(narrow):
    layer = trained(BatchNorm1d(3))
    before = {name: getattr(layer, name).clone() for name in STATISTICS}
    for _ in range(2):
        layer.to(narrow)
        assert layer.weight.dtype == layer.bias.dtype == narrow
        for name in STATISTICS:
            assert getattr(layer, name).dtype == torch.float32
            assert torch.equal(getattr(layer, name), before[name])
            assert name in layer._buffers
    x = torch.randn(8, 3).to(narrow)
    assert layer(x).dtype == narrow
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert layer.running_mean.dtype == torch.float32


def test_widening_and_narrowing_follow_the_layer_between_float32_and_float64():
    layer = trained(BatchNorm1d(3))
    mean = layer.running_mean.clone()
    assert layer.double().running_mean.dtype == torch.float64
    assert torch.equal(layer.running_mean, mean.double())
    assert torch.equal(layer.half().running_mean, mean)
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_given_to_the_constructor_is_that_of_the_parameters(dtype):
    layer = BatchNorm1d(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.running_mean.dtype == layer.running_var.dtype == wide
    assert layer.running_var.eq(1).all()


def test_a_small_momentum_is_not_lost_in_a_half_precision_layer():
    """From 1 towards 3 with momentum 1e-3: a step of 2e-3 is below half an ulp of bfloat16, which would stall."""
    layer = BatchNorm1d(1, momentum=1e-3).bfloat16()
    layer.running_mean.fill_(1)
    batch = ChannelStatistics(torch.full((1,), 3.0), torch.ones(1))
    for _ in range(500):
        kernels.update_running(Running(*_stored(layer), layer.momentum), batch, 4)
    # 500 steps, each rounded to float32 (u = 6e-8) a few times
    assert layer.running_mean.item() == pytest.approx(3 - 2 * 0.999**500, rel=500 * 4 * 2**-24)


def _stored(layer):
    return layer.running_mean, layer.running_var, layer.num_batches_tracked, layer._skipped


@pytest.mark.parametrize("made", [lambda: BatchNorm2d(3).to("meta"), lambda: BatchNorm2d(3, device="meta")])
def test_a_layer_without_memory_gets_some_and_works(made):
    layer = made()
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers(), layer._skipped))
    assert layer(torch.randn(4, 3, 2, 2, device="meta")).shape == (4, 3, 2, 2)
    assert layer.eval().train() is layer
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.running_var.dtype == torch.float32
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layer(x), BatchNorm2d(3)(x))
    assert layer.skipped_updates == 0


@pytest.mark.parametrize("options", [{"weight": False}, {"bias": False}, {"affine": False}], ids=str)
def test_a_layer_can_be_reset_whatever_it_has(options):
    layer = trained(BatchNorm1d(3, **options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.reset_parameters()
    fresh = BatchNorm1d(3, **options)
    for name, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
