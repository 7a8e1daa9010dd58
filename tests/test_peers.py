"""Defects of the peers' estimators of population statistics: each is shown in the peer, and absent in recalibrate.

The peers are ``torch.optim.swa_utils.update_bn`` and fvcore's ``precise_bn``, as installed. A test that fails in
its peer's part says that the peer was repaired: then that part goes.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from fingerprint import fingerprint
from small_networks import Written
from torch import nn
from torch.optim.swa_utils import update_bn

from batchnorm import freeze, recalibrate

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its package decorates with torch.jit
    from fvcore.nn.precise_bn import update_bn_stats

U = 2.0**-53


def one_layer(size: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(size))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def stored(net: nn.Sequential) -> tuple[float, float]:
    return net[0].running_mean.item(), net[0].running_var.item()


# 98 values of 0 and 2 of 100: mean 2, m2 = 98 * 4 + 2 * 98^2 = 19600, unbiased variance 19600 / 99 = 198 to 3 digits
UNEVEN = [torch.zeros(98, 1), torch.full((2, 1), 100.0)]


def test_a_small_batch_counts_by_its_size():
    theirs, ours = one_layer(), one_layer()
    update_bn(UNEVEN, theirs)
    assert stored(theirs) == (50, 0)
    recalibrate(ours, UNEVEN)
    assert stored(ours) == (2, pytest.approx(19600 / 99, rel=2.0**-24))


def test_the_stored_variance_is_the_unbiased_one_as_in_training():
    theirs, ours = one_layer(), one_layer()
    update_bn_stats(theirs, UNEVEN, 2)
    assert stored(theirs) == (2, pytest.approx(196, rel=1e-6))
    recalibrate(ours, UNEVEN)
    assert stored(ours)[1] == pytest.approx(torch.cat(UNEVEN).double().var().item(), rel=2.0**-24)


def test_a_last_batch_of_one_is_a_batch():
    batches = [column(1, 2), column(6)]
    for peer in (lambda net: update_bn(batches, net), lambda net: update_bn_stats(net, batches, 2)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            peer(one_layer())
    net = one_layer()
    recalibrate(net, batches)
    assert stored(net) == (3, 7)


def test_batches_may_be_dicts_of_the_models_arguments():
    def model():
        return Written(lambda net, x: net.norm(x.float()), norm=nn.BatchNorm1d(1))

    batch = {"x": column(1, 3)}
    for peer in (lambda net: update_bn([batch], net), lambda net: update_bn_stats(net, [batch], 1)):
        with pytest.raises(AttributeError):
            peer(model())
    assert recalibrate(model(), [batch])["norm"].mean.item() == 2


def test_a_layer_in_eval_mode_keeps_its_statistics_and_its_mode():
    net = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    net[0].eval().running_mean.fill_(7)
    theirs = copy.deepcopy(net)
    update_bn([column(1, 3)], theirs)
    assert theirs[0].training
    assert theirs[0].running_mean.item() == 2
    assert list(recalibrate(net, [column(1, 3)])) == ["1"]
    assert not net[0].training
    assert net[0].running_mean.item() == 7


def test_a_frozen_layer_keeps_its_statistics():
    theirs, ours = freeze(one_layer()), freeze(one_layer())
    for net in (theirs, ours):
        net[0].running_mean.fill_(7)
    update_bn([column(1, 3)], theirs)
    assert stored(theirs) == (0, 1), "reset, although the layer stayed frozen"
    with pytest.warns(RuntimeWarning, match="measured nothing"):
        assert recalibrate(ours, [column(1, 3)]) == {}
    assert stored(ours) == (7, 1)


class Interrupting:
    """One batch, and then the user loses patience."""

    def __iter__(self):
        yield column(1, 3)
        raise KeyboardInterrupt


def test_an_interrupt_leaves_no_trace():
    theirs = one_layer().eval()
    with pytest.raises(KeyboardInterrupt):
        update_bn(Interrupting(), theirs)
    assert theirs.training
    assert theirs[0].momentum is None
    assert theirs[0].running_mean.item() != 0

    precise = one_layer()
    with pytest.raises(KeyboardInterrupt):
        update_bn_stats(precise, Interrupting(), 2)
    assert precise[0].momentum == 1
    assert len(precise[0]._forward_pre_hooks) == 1

    net = one_layer().eval()
    before = fingerprint(net)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(net, Interrupting())
    assert fingerprint(net) == before


def test_a_loader_shorter_than_asked_for_is_no_error():
    batches = [column(1, 3)] * 5
    theirs = one_layer()
    with pytest.raises(AssertionError, match="for 7 iterations, but the dataloader stops at 4 iterations"):
        update_bn_stats(theirs, batches, 7)  # it stopped at 5
    assert theirs[0].momentum == 1
    assert len(theirs[0]._forward_pre_hooks) == 1
    net = one_layer()
    assert recalibrate(net, batches, max_examples=14)["0"].count.item() == 10


# float32 has 24 bits: E[x^2] - E[x]^2 loses (mean / std)^2 = 1e10 of them
FAR = (torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01 + 1000).float()


def test_the_variance_of_values_far_from_zero_is_right_in_float32():
    truth = FAR.double().var().item()
    theirs, ours = one_layer(), one_layer()
    update_bn_stats(theirs, FAR.split(16), 4)
    assert abs(stored(theirs)[1] / truth - 1) > 0.5
    recalibrate(ours, FAR.split(16))
    assert stored(ours)[1] == pytest.approx(truth, rel=2.0**-24)


def test_the_variance_of_values_far_from_zero_is_right_in_float64():
    values = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e6
    truth = (values - 1e6).var().item()  # the subtraction is exact
    theirs, ours = one_layer().double(), one_layer().double()
    update_bn_stats(theirs, values.split(16), 4)
    assert abs(stored(theirs)[1] / truth - 1) > 0.5
    recalibrate(ours, values.split(16))
    # means wrong by 1e6 u move deviations of 1e-3 by 1e9 u
    assert stored(ours)[1] == pytest.approx(truth, rel=1e9 * U)


def test_a_layer_used_twice_is_pooled_over_its_uses():
    def twice():
        return Written(lambda net, x: net.norm(x) + net.norm(x + 4), norm=nn.BatchNorm1d(1))

    with pytest.raises(AssertionError, match="Some BN layers are reused"):
        update_bn_stats(twice(), [column(1, 3)], 1)
    moments = recalibrate(twice(), [column(1, 3)])["norm"]
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (4, 4, 20)


def test_buffers_are_written_in_place():
    """An exponential average or a DDP wrapper holds on to the buffers that the model had."""
    theirs, ours = one_layer(), one_layer()
    held = theirs[0].running_mean, ours[0].running_mean
    update_bn_stats(theirs, [column(1, 3)], 1)
    recalibrate(ours, [column(1, 3)])
    assert theirs[0].running_mean is not held[0]
    assert ours[0].running_mean is held[1]


def test_a_model_in_eval_mode_is_measured_too():
    theirs, ours = one_layer().eval(), one_layer().eval()
    update_bn_stats(theirs, [column(1, 3)], 1)
    assert stored(theirs) == (0, 1), "left as it was, without a word"
    recalibrate(ours, [column(1, 3)])
    assert stored(ours) == (2, 2)
    assert not ours.training


def test_a_nan_does_not_get_into_stored_statistics():
    batches = [column(1, 2, 6), column(math.nan, 1)]
    for peer in (lambda net: update_bn(batches, net), lambda net: update_bn_stats(net, batches, 2)):
        theirs = one_layer()
        peer(theirs)
        assert math.isnan(stored(theirs)[0])
    net = one_layer()
    with pytest.warns(RuntimeWarning, match="NaN or infinity in the input of '0'"):
        recalibrate(net, batches)
    assert stored(net) == (3, 7)


def test_an_empty_loader_is_refused_and_does_not_reset_statistics():
    theirs, ours = one_layer(), one_layer()
    for net in (theirs, ours):
        net[0].running_mean.fill_(7)
    update_bn([], theirs)
    assert stored(theirs) == (0, 1)
    with pytest.raises(ValueError, match="at least one batch, got an empty loader"):
        recalibrate(ours, [])
    assert stored(ours) == (7, 1)


def test_dropout_is_off_and_random_numbers_are_not_used_up():
    x = torch.ones(1000, 1)
    theirs, ours = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)) for _ in range(2))
    state = torch.get_rng_state()
    recalibrate(ours, [x])
    assert ours[1].running_var.item() == 0
    assert torch.get_rng_state().equal(state)
    update_bn([x], theirs)
    assert theirs[1].running_var.item() > 0.9  # values 0 and 2
    assert not torch.get_rng_state().equal(state)


def test_statistics_of_a_second_layer_do_not_depend_on_the_batch_size():
    """Both peers normalize the first layer by each batch, so what the second one gets has the noise of the batch."""
    x = torch.randn(64, 1).exp()
    net = nn.Sequential(nn.BatchNorm1d(1), nn.ReLU(), nn.BatchNorm1d(1))

    def spread(estimate: object) -> float:
        found = []
        for size in (2, 64):
            model = copy.deepcopy(net)
            estimate(model, x.split(size))
            found.append(model[2].running_var.item())
        return abs(found[0] / found[1] - 1)

    assert spread(lambda model, batches: update_bn(batches, model)) > 0.1
    assert spread(lambda model, batches: update_bn_stats(model, batches, len(batches))) > 0.1
    # float32 inputs of the second layer carry errors of a few 2^-24, and so do their variances
    assert spread(recalibrate) < 20 * 2.0**-24
