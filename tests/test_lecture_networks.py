import pytest
import torch

from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.lecture.ensemble_training import accuracies, losses, sgd
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.tested_on_other_cats import convolutional

SIZES = (6, 5, 4, 3)


def weights(net):
    return [p for name, p in net.named_parameters() if name.startswith("w") and name.endswith("weight")]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_both_arms_of_a_seed_start_from_the_same_weights(activation):
    arms = []
    for norm in (None, BatchNorm1d):
        torch.manual_seed(3)
        arms.append(weights(fully_connected(SIZES, activation, norm)))
    assert len(arms[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*arms, strict=True))


def test_both_arms_of_the_convolutional_net_start_from_the_same_weights():
    arms = []
    for norm in (None, BatchNorm2d):
        torch.manual_seed(3)
        arms.append(weights(convolutional(norm)))
    assert all(torch.equal(a, b) for a, b in zip(*arms, strict=True))


def test_an_ensemble_trains_as_its_networks_do_one_by_one():
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    rates = torch.tensor([0.1, 0.3])
    indices = torch.stack([torch.randperm(40)[:32].view(2, 16) for _ in range(2)])
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [1, 2])

    from batchnorm.lecture.data_sets import Examples

    sgd(ensemble, Examples(x, y), indices, rates)
    for i, seed in enumerate([1, 2]):
        torch.manual_seed(seed)
        net = fully_connected(SIZES)
        optimizer = torch.optim.SGD(net.parameters(), lr=float(rates[i]))
        for batch in indices[i]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(ensemble.parameters[name][i], p)
        for name, b in net.named_buffers():
            torch.testing.assert_close(ensemble.buffers[name][i], b)


def test_making_an_ensemble_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    Ensemble.of(lambda: fully_connected(SIZES), [1, 2], repeat=3)
    assert torch.equal(state, torch.get_rng_state())


def test_statistics_can_be_kept_in_train_mode():
    ensemble = Ensemble.of(lambda: fully_connected(SIZES), [1, 2])
    before = {k: v.clone() for k, v in ensemble.buffers.items()}
    ensemble(torch.randn(8, 6), train=True, keep_statistics=True)
    assert all(torch.equal(v, before[k]) for k, v in ensemble.buffers.items())
    ensemble(torch.randn(8, 6), train=True)
    assert not torch.equal(before["norm1.running_mean"], ensemble.buffers["norm1.running_mean"])


def test_losses_and_accuracies_are_per_network_and_a_diverged_one_answers_nothing():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[torch.nan, 0.0], [0.0, torch.nan]]])
    y = torch.tensor([0, 0])
    assert accuracies(logits, y).tolist() == [0.5, 0.0]
    expected = torch.nn.functional.cross_entropy(logits[0], y)
    torch.testing.assert_close(losses(logits, y)[0], expected)
    assert losses(logits, y)[1].isnan()
