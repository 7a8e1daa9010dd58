"""Claim "test time": batches of M against running them one by one, votes against pairs, and the contract."""

import itertools

import pytest
import torch
from lecture_runs import EPS32, QUICK, one_network, quick

from batchnorm.experiment.claim import Result
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.instruments.companion_examples import disagreement
from batchnorm.layers import BatchNorm1d
from batchnorm.lecture import data_sets
from batchnorm.lecture.claims import mini_batch_noise, single_examples
from batchnorm.lecture.claims.single_examples import PARTITIONS, POPULATION, TEST, Trained, train
from batchnorm.lecture.networks import Ensemble, fully_connected
from batchnorm.lecture.rate_sweep import SIZES, digits
from batchnorm.population import recalibrate


@pytest.fixture(scope="module")
def result() -> Result:
    return quick("test-time").result


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(QUICK)


@pytest.mark.slow
def test_the_same_settings_give_the_same_result_whatever_ran_before(result: Result) -> None:
    mini_batch_noise.measure_noise(mini_batch_noise.train_arm(QUICK, BatchNorm1d).ensemble, QUICK)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    seen: list[float] = []
    again = single_examples.run(QUICK, seen.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.to_dict() == result.to_dict()
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_test_examples_are_never_trained_on(trained: Trained) -> None:
    fitted, unseen = data_sets.split(len(digits()), len(digits()) - TEST, 1)
    assert not set(fitted.tolist()) & set(unseen.tolist())
    assert torch.equal(trained.test.x[1], digits().x[unseen])


def test_every_size_divides_the_test_examples_so_that_none_is_left_out() -> None:
    assert all(TEST % size == 0 and single_examples.ALONE % size == 0 for size in single_examples.MEASURED)


# -- statistics of the test batch -----------------------------------------------------------------------------


def test_logits_in_batches_are_those_of_running_each_batch_by_itself_in_train_mode(trained: Trained) -> None:
    found = single_examples.logits_in_batches(trained.ensemble, trained.test.x, 16, QUICK)
    assert found.shape == (2, PARTITIONS, TEST, 10)
    net, x = one_network(trained.ensemble, 1, SIZES).train(), trained.test.x[1]
    random = torch.Generator().manual_seed(1)
    for partition in range(2):
        order = torch.randperm(TEST, generator=random)
        for batch in order.split(16):
            with torch.no_grad():
                expected = net(x[batch])
            # four layers of 64 terms each, whose rounding normalization by 16 examples amplifies some times
            torch.testing.assert_close(found[1, partition, batch], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_accuracy_in_batches_is_the_share_of_right_answers_counted_directly(trained: Trained) -> None:
    measured = single_examples.measure_batches(trained, QUICK)
    row = single_examples.MEASURED.index(128)
    net, random, right = one_network(trained.ensemble, 0, SIZES).train(), torch.Generator().manual_seed(0), 0
    for _ in range(PARTITIONS):
        for batch in torch.randperm(TEST, generator=random).split(128):
            right += int((net(trained.test.x[0, batch]).argmax(-1) == trained.test.y[0, batch]).sum())
    # a logit that ties to rounding may go either way: allow one answer in a thousand
    assert float(measured.accuracy[row, 0]) == pytest.approx(right / (PARTITIONS * TEST), abs=1e-3)


def test_running_examples_in_batches_leaves_the_stored_statistics_alone(trained: Trained) -> None:
    before = {name: buffer.clone() for name, buffer in trained.ensemble.buffers.items()}
    single_examples.logits_in_batches(trained.ensemble, trained.test.x, 8, QUICK)
    single_examples.refusal_of_one(trained)
    assert all(torch.equal(before[name], buffer) for name, buffer in trained.ensemble.buffers.items())


def test_flip_rate_is_the_share_of_pairs_of_partitions_that_disagree() -> None:
    predictions = torch.randint(3, (2, 5, 40))
    pairs = list(itertools.combinations(range(5), 2))
    expected = sum((predictions[:, a] != predictions[:, b]).double().mean(1) for a, b in pairs) / len(pairs)
    torch.testing.assert_close(disagreement(predictions), expected, rtol=0, atol=1e-12)


def test_flip_rate_is_zero_where_all_agree_and_one_where_no_two_do() -> None:
    same, different = torch.zeros(1, 3, 7, dtype=torch.long), torch.arange(3)[None, :, None].expand(1, 3, 7)
    assert disagreement(same).tolist() == [0.0]
    assert disagreement(different).tolist() == [1.0]


@pytest.mark.slow
def test_train_mode_refuses_a_batch_of_one_and_the_numbers_say_so(result: Result) -> None:
    said = result.numbers["a batch of 1 in train mode"]
    assert said.startswith(
        "refused: BatchNorm1d needs more than 1 value per channel, got shape (1, 64): one value has no variance"
    )


# -- stored statistics ----------------------------------------------------------------------------------------


def test_readings_are_the_accuracies_of_one_network_in_eval_mode(trained: Trained) -> None:
    x, y = trained.test.x[1], trained.test.y[1]
    net = one_network(trained.ensemble, 1, SIZES)
    running = (net.eval()(x).argmax(-1) == y).float().mean()
    fitted, _ = data_sets.split(len(digits()), len(digits()) - TEST, 1)
    recalibrate(net, [digits().x[fitted]])
    population = (net.eval()(x).argmax(-1) == y).float().mean()
    # a tie to rounding may move one answer of TEST
    assert float(trained.reading(single_examples.EMA).accuracy[1]) == pytest.approx(float(running), abs=1.5 / TEST)
    assert float(trained.reading(POPULATION).accuracy[1]) == pytest.approx(float(population), abs=1.5 / TEST)


def test_an_early_reading_is_that_of_a_run_that_stops_there(trained: Trained) -> None:
    short = train(RunSettings(seeds=2, effort=20 / single_examples.STEPS))
    for kind in (single_examples.EMA, POPULATION):
        early, last = trained.reading(kind, 20), short.reading(kind)
        assert (last.step, early.step) == (20, 20)
        assert torch.equal(early.loss, last.loss)


@pytest.mark.slow
def test_the_answer_of_a_batch_norm_layer_alone_is_the_same_to_the_bit_in_any_batch(trained: Trained) -> None:
    alone = single_examples.measure_alone(trained, QUICK)
    assert alone.layer_same_bits == 1.0
    # products over 64 inputs, five layers deep, where only the order of addition differs
    assert float(alone.largest.max()) < 5 * 64 * EPS32


@pytest.mark.slow
def test_the_measure_of_alone_against_in_batches_finds_a_network_that_uses_the_batch(trained: Trained) -> None:
    leaky = Ensemble(fully_connected(SIZES, norm=_MeanOfBatch), trained.exact.parameters, trained.exact.buffers)
    found = single_examples.measure_alone(Trained(trained.ensemble, leaky, trained.test, trained.readings), QUICK)
    assert float(found.largest.min()) > 0.01
    assert found.layer_same_bits < 0.5


class _MeanOfBatch(BatchNorm1d):
    """A layer with a bug: in eval mode it subtracts the mean of the batch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch.nn's name
        return super().forward(input - 0.1 * input.mean(0, keepdim=True))


@pytest.mark.slow
def test_the_verdict_on_batches_of_two_is_the_difference_of_accuracies(result: Result, trained: Trained) -> None:
    batches, population = (
        single_examples.measure_batches(trained, QUICK),
        trained.reading(POPULATION).accuracy,
    )
    estimate = result.verdicts[0].estimate
    assert estimate is not None
    expected = (population.double() - batches.accuracy[0]).tolist()
    assert estimate.values == pytest.approx(expected, abs=1e-9)
    share = f"{float(population.mean()):.1%}"
    assert share in result.verdicts[0].sentence
