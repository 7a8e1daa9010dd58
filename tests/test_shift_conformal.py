"""Conformal p-values and the bets on them: what the proofs need, and that they fail without it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.shift import Reference, conformal
from batchnorm.shift.conformal import BETS, CELLS, Bag, cells_of, factors
from batchnorm.shift.e_processes import EProcesses, highest, multiplied
from batchnorm.shift.evidence import ShiftEvidence
from batchnorm.shift.layer_evidence import KINDS
from batchnorm.shift.scores import KIND_OF, Scores

DOUBLE = torch.float64
CONFIDENT = 4.0  # standard errors: a normal one is beyond with 3e-5


def oracle(calibration: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """From the definition: of all until now, how many are in the same cell, the one below it, or a higher one."""
    seen, found = list(calibration), []
    for value in stream:
        seen.append(value)
        found.append(sum(other >= value - 1 for other in seen) / len(seen))
    return np.array(found)


CELL = st.integers(0, CELLS - 1) | st.integers(0, 3)


@given(st.lists(CELL, min_size=1, max_size=20), st.lists(CELL, min_size=1, max_size=200), st.data())
@settings(max_examples=60, deadline=None)
def test_p_values_are_those_of_the_definition_in_batches_of_any_size(
    known: list[int], more: list[int], data: st.DataObject
) -> None:
    bag, left, found = Bag.of(torch.tensor(known)[:, None]), torch.tensor(more)[:, None], []
    while len(left):
        n = data.draw(st.integers(1, len(left)))
        found.append(bag.p_values(left[:n]))
        bag, left = bag.with_(left[:n]), left[n:]
    assert torch.cat(found)[:, 0].tolist() == oracle(np.array(known), np.array(more)).tolist()
    assert bag.observations == len(known) + len(more)
    assert bag.is_whole


@given(st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_scores_do_not_know_each_other(rows: list[list[int]]) -> None:
    cells = torch.tensor(rows)
    together = Bag.of(cells[:1]).p_values(cells[1:])
    for i in range(3):
        assert torch.equal(Bag.of(cells[:1, i : i + 1]).p_values(cells[1:, i : i + 1])[:, 0], together[:, i])


@given(st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_no_bet_gains_on_the_grid_of_p_values(t: int) -> None:
    p = torch.arange(1, t + 1, dtype=DOUBLE) / t
    mean = factors(p[None]).exp().mean(1)  # (bets, t) -> (bets,)
    assert bool((mean <= 1 + 64 * np.finfo(float).eps * math.log2(t + 2)).all())


def test_bets_are_decreasing_functions_and_add_up_over_observations() -> None:
    p = torch.linspace(0.01, 1, 40, dtype=DOUBLE)
    each = torch.cat([factors(row[None, None]) for row in p], 1)  # (bets, 40)
    assert bool((each.diff(dim=1) < 0).all())
    torch.testing.assert_close(factors(p[:, None])[:, 0], each.sum(1))


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=50))
def test_cells_rise_with_scores_whatever_their_size(values: list[float]) -> None:
    scores = torch.tensor(sorted(values), dtype=DOUBLE)
    cells = cells_of(scores[:, None], torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE))[:, 0]
    assert bool((cells.diff() >= 0).all())
    assert 0 <= int(cells.min()) <= int(cells.max()) < CELLS


# -- exact, whatever the law --------------------------------------------------------------------------------------

LAWS = {
    "discrete": lambda n, random: torch.poisson(torch.full((n, 1), 0.3, dtype=DOUBLE), generator=random),
    "heavy tails": lambda n, random: (
        torch.randn(n, 1, generator=random, dtype=DOUBLE) / torch.rand(n, 1, generator=random, dtype=DOUBLE)
    ),
    "constant": lambda n, random: torch.zeros(n, 1, dtype=DOUBLE),
    "rare": lambda n, random: (torch.rand(n, 1, generator=random, dtype=DOUBLE) < 0.002).double() * 1e6,
}


def streams_of(law: str, *, count: int, calibration: int, length: int, grows: bool = True) -> Tensor:
    """P-values of many streams, (length, streams), each with a calibration of its own."""
    random = torch.Generator().manual_seed(7)
    drawn = LAWS[law](count * (calibration + length), random).reshape(calibration + length, count)
    cells = cells_of(drawn, torch.zeros(count, dtype=DOUBLE), torch.ones(count, dtype=DOUBLE))
    bag, found = Bag.of(cells[:calibration]), []
    for t in range(calibration, calibration + length):
        found.append(bag.p_values(cells[t : t + 1]))
        bag = bag.with_(cells[t : t + 1]) if grows else bag
    return torch.cat(found)


@pytest.mark.parametrize("law", LAWS)
def test_p_values_are_no_smaller_than_uniform_ones(law: str) -> None:
    p = streams_of(law, count=1500, calibration=10, length=10)
    for u in (0.1, 0.2, 0.5, 0.9):
        # each stream's last p-value: independent of one another
        share = float((p[-1] <= u).double().mean())
        assert share <= u + CONFIDENT * math.sqrt(u * (1 - u) / 1500)


@pytest.mark.parametrize("law", LAWS)
def test_a_product_of_bets_reaches_1_of_alpha_in_alpha_of_the_streams(law: str) -> None:
    p, alpha = streams_of(law, count=1500, calibration=10, length=100), 0.1
    for bet in range(BETS):
        wealth = torch.stack([factors(row[None])[bet] for row in p]).cumsum(0).exp()
        share = float((wealth.amax(0) >= 1 / alpha).double().mean())
        assert share <= alpha + CONFIDENT * math.sqrt(alpha * (1 - alpha) / 1500)


@pytest.mark.slow
def test_a_bag_that_the_stream_does_not_grow_breaks_the_promise() -> None:
    """Ten clean observations taken as exact: what lies beyond them by chance does so again and again."""
    alpha = 0.1
    rang = {}
    for grows in (True, False):
        p = streams_of("heavy tails", count=500, calibration=10, length=1000, grows=grows)
        wealth = torch.stack([factors(row[None]) for row in p]).cumsum(0).exp()  # (length, bets, streams)
        rang[grows] = float((wealth.mean(1).amax(0) >= 1 / alpha).double().mean())
    error = CONFIDENT * math.sqrt(alpha * (1 - alpha) / 500)
    assert rang[True] <= alpha + error
    assert rang[False] > alpha + error


@pytest.mark.slow
def test_scores_learned_on_the_observations_in_the_bag_break_the_law() -> None:
    """Fifty observations of 600 channels: each is nearer to a center that it had a part in than new ones are."""
    random = torch.Generator().manual_seed(3)
    u, streams, found = 0.1, 400, {True: 0, False: 0}
    for _ in range(streams):
        x = torch.randn(151, 600, generator=random, dtype=DOUBLE)
        teach, bag, new = x[:50], x[50:150], x[150:]
        for is_apart, learned in ((True, teach), (False, bag)):
            scores = [(rows - learned.mean(0)).square().sum(1, keepdim=True) for rows in (bag, new)]
            middle, width = scores[0].median(0).values, scores[0].std(0)
            cells = [cells_of(rows, middle, width) for rows in scores]
            found[is_apart] += int(Bag.of(cells[0]).p_values(cells[1])[0, 0] <= u)
    error = CONFIDENT * math.sqrt(u * (1 - u) / streams)
    assert found[True] / streams <= u + error
    assert found[False] / streams > u + error


# -- several scores -----------------------------------------------------------------------------------------------


def best_stop(orders: list[tuple[int, ...]], *, calibration: int, of: tuple[float, ...]) -> float:
    """Largest expectation of a weighted mean of two scores' products, over all times to stop that know both.

    Six observations come in any order, from one of several worlds, equally likely. The first score is the place of one
    in its world, the second is what the world's order says. Bets have a mean of 1 exactly on the grid of p-values.
    """
    nodes: dict[tuple[tuple[int, int], ...], float] = defaultdict(float)
    for order, perm in itertools.product(orders, itertools.permutations(range(6))):
        path: tuple[tuple[int, int], ...] = ()
        nodes[path] += 1
        for t in range(calibration, 6):
            first = sum(perm[i] >= perm[t] for i in range(t + 1))
            second = sum(order[perm[i]] >= order[perm[t]] for i in range(t + 1))
            path = (*path, (first, second))
            nodes[path] += 1

    def wealth(path: tuple[tuple[int, int], ...]) -> float:
        products = [1.0, 1.0]
        for t, ranks in enumerate(path, calibration + 1):
            bets = [(i / t) ** -0.5 for i in range(1, t + 1)]
            products = [w * bets[rank - 1] * t / sum(bets) for w, rank in zip(products, ranks, strict=True)]
        return sum(weight * product for weight, product in zip(of, products, strict=True))

    later: dict[tuple[tuple[int, int], ...], float] = defaultdict(float)
    best = 0.0
    for path in sorted(nodes, key=len, reverse=True):
        best = max(wealth(path), later[path] / nodes[path])
        later[path[:-1]] += nodes[path] * best
    return best


def test_an_average_over_scores_is_no_e_process_of_their_common_past_and_one_score_is() -> None:
    """So the largest is taken, each divided by their number: exactly, by all orders of six observations."""
    orders = [(5, 1, 2, 4, 3, 0), (2, 5, 0, 3, 1, 4)]
    assert best_stop(orders, calibration=2, of=(0.5, 0.5)) > 1.05
    assert best_stop([tuple(range(6))], calibration=2, of=(0.5, 0.5)) == pytest.approx(1, abs=1e-12)


def reference(layers: int = 2, channels: int = 4, *, n: int = 200, seed: int = 0) -> Reference:
    """Calibrated with normal observations."""
    total = layers * channels
    ones, layer = torch.ones(total, dtype=DOUBLE), torch.ones(layers, dtype=DOUBLE)
    known = Reference(
        tuple(f"bn{i}" for i in range(layers)), (channels,) * layers, 0 * ones, ones, 0.1 * ones, ones, 0.1 * layer,
        None, None, "example", 0, "none",
    )  # fmt: skip
    z = torch.randn(n, total, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return known.calibrated(z, z.square())


@pytest.mark.parametrize("is_spread", [True, False])
def test_evidence_is_the_largest_of_all_scores_with_weights_that_sum_to_one(is_spread: bool) -> None:
    known = reference()
    evidence = ShiftEvidence.start(known, is_spread=is_spread)
    z = torch.randn(24, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    evidence = evidence.after(z, z.square())
    assert evidence.ranks is not None
    of_scores = evidence.ranks.log.exp().mean(0).numpy()  # (scores,): all of the first kind, and so on
    weight = np.array([1 / (KIND_OF.count(kind) * len(KINDS) * 2) for kind in KIND_OF for _ in range(2)])
    assert weight.sum() == pytest.approx(1)
    half = 1 if is_spread else 2  # e-SR rings at the limit with t / limit only
    assert evidence.log == pytest.approx(math.log((weight * of_scores).max() / half), abs=1e-9)


def test_evidence_from_a_checkpoint_is_the_average_over_layers_and_kinds() -> None:
    """One layer that moved among many: its evidence divided by their number, and no more."""
    logs = {}
    for layers in (1, 10):
        known = replace(reference(layers), clean=None)
        z = torch.zeros(40, 4 * layers, dtype=DOUBLE)
        z[:, :4] = 1.0
        logs[layers] = ShiftEvidence.start(known).after(z, torch.ones_like(z))
    one, ten = logs[1], logs[10]
    assert float(ten.log_layers[0]) == pytest.approx(one.log)
    assert ten.log == pytest.approx(math.log((math.exp(one.log) + 9 * float(ten.log_layers[1].exp())) / 10))
    kinds = ten.log_kinds[:, 0].exp()
    assert len(kinds) == 2
    assert float(ten.log_layers[0].exp()) == pytest.approx(float(kinds.mean()))


@pytest.mark.slow
def test_evidence_of_many_clean_layers_is_not_their_sum() -> None:
    """A thousand layers, each of which rings alone in 1 of 100 streams, may not ring together in all."""
    known = replace(reference(layers=1000, channels=1), clean=None)
    evidence = ShiftEvidence.start(known)
    assert evidence.log == pytest.approx(0, abs=1e-9)
    assert ShiftEvidence.start(reference(layers=100, channels=1)).log <= 1e-9


# -- replicas -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_replicas_with_one_calibration_are_the_largest_of_them_by_their_number(
    logs: list[list[float]], is_spread: bool
) -> None:
    made = []
    for factors_ in logs:
        wealth = EProcesses.start((1, 1), is_spread=is_spread)
        for factor in factors_:
            wealth = wealth.bet(torch.tensor([[factor]], dtype=DOUBLE), 2)
        made.append(wealth)
    log_weight = -math.log(len(made)) if is_spread else 0.0
    together, each = highest(made, log_weight), [float(wealth.log) for wealth in made]
    most = max(each) + log_weight
    assert float(together.log) <= most + 1e-9
    if len(made) == 1 or not is_spread:
        assert float(together.log) == pytest.approx(most, abs=1e-9)
    else:  # of what has not started yet, the least counts
        assert float(together.log.exp()) >= math.exp(most) - 0.5 / len(made)
    assert together.updates == sum(map(len, logs))


@pytest.mark.parametrize("is_spread", [True, False])
def test_replicas_that_share_a_calibration_keep_the_promise_and_products_of_them_would_not(is_spread: bool) -> None:
    """A hundred replicas beside ten clean observations: where these lie low, all of them win at first."""
    random, count, alpha, replicas, length = torch.Generator().manual_seed(5), 300, 0.01, 100, 8
    limit = -math.log(alpha) if is_spread else math.log(2 * replicas * length / alpha)
    calibration = torch.randn(10, count, generator=random, dtype=DOUBLE)
    made = []
    unit = torch.zeros(count, dtype=DOUBLE), torch.ones(count, dtype=DOUBLE)
    for _ in range(replicas):
        wealth, bag = EProcesses.start((BETS, count), is_spread=is_spread), Bag.of(cells_of(calibration, *unit))
        for _ in range(length):
            cells = cells_of(torch.randn(1, count, generator=random, dtype=DOUBLE), *unit)
            wealth = wealth.bet(factors(bag.p_values(cells)), 1)
            bag = bag.with_(cells)
        made.append(wealth)
    error = CONFIDENT * math.sqrt(alpha * (1 - alpha) / count)
    largest = highest(made, -math.log(replicas) if is_spread else 0.0).log_mean
    assert float((largest >= limit).double().mean()) <= alpha + error
    if is_spread:
        product = multiplied(made, replicas).log_mean
        assert float((product >= limit).double().mean()) > alpha + error


def test_replicas_that_share_a_calibration_ring_with_e_sr_as_soon_as_one_does() -> None:
    """Divided by their number it would not: what each gains is the number of its own observations."""
    known = reference()
    clean, moved = (ShiftEvidence.start(known, is_spread=False) for _ in range(2))
    z = torch.randn(80, 8, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    clean, moved = clean.after(z, z.square()), moved.after(z + 3, (z + 3).square())
    assert clean.ranks is not None
    assert moved.ranks is not None
    together = replace(clean, ranks=highest([clean.ranks, moved.ranks], 0.0))
    assert together.log == pytest.approx(moved.log)


# -- learning, and after an alarm ---------------------------------------------------------------------------------


def test_the_bag_grows_with_the_stream_until_an_alarm() -> None:
    evidence = ShiftEvidence.start(reference())
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    assert evidence.bag is not None
    grown, kept = evidence.after(z, z.square()).bag, evidence.after(z, z.square(), learns=False).bag
    assert grown is not None
    assert kept is not None
    assert grown.observations == evidence.bag.observations + 8 == 108
    assert torch.equal(kept.counts, evidence.bag.counts)


def test_scores_have_one_kind_each_and_rise_with_what_they_are_named_after() -> None:
    known = reference(layers=1, channels=20)
    assert known.clean is not None
    scores: Scores = known.clean.scores
    still, one = torch.zeros(1, 20, dtype=DOUBLE), torch.ones(1, 20, dtype=DOUBLE)
    base = scores.of(still, 0.5 * one)
    assert base.shape == (1, len(KIND_OF))

    def rises(z: Tensor, q: Tensor) -> set[str]:
        return {KIND_OF[i] for i in ((scores.of(z, q) - base)[0] > 1e-9).nonzero().flatten().tolist()}

    assert {"mean", "component means"} <= rises(still + 2, 0.5 * one)
    assert {"energy up", "channel energy"} <= rises(still, 5 * one)
    assert {"energy down", "channel energy"} <= rises(still, 0.05 * one)


def test_conformal_cells_are_in_range_for_scores_far_away() -> None:
    far = torch.tensor([[-1e30, 0.0, 1e30]], dtype=DOUBLE).T
    middle, width = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    assert conformal.cells_of(far, middle, width).flatten().tolist() == [0, CELLS // 2, CELLS - 1]
    infinite = far * 1e300
    assert conformal.cells_of(infinite[[0, 2]], middle, width).flatten().tolist() == [0, CELLS - 1]
