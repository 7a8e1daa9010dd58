"""why MODEL at the edges: every sentence with extreme values, batches that are no rows, and questions that fail."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from batchnorm import ablation, report
from batchnorm.ablation import model_as_it_is
from batchnorm.ablation.answers import Answers
from batchnorm.ablation.arm_training import train
from batchnorm.ablation.arms import ONCE, SCALED, WITH, WITHOUT
from batchnorm.ablation.effort import Cost, StudyPlan, plan
from batchnorm.ablation.grid import Grid
from batchnorm.ablation.question_criteria import CRITERIA, judge
from batchnorm.ablation.questions import (
    input_scales,
    noise_of_layers,
    received_shift,
    smoothness,
    speed_and_rates,
    test_statistics,
)
from batchnorm.ablation.questions.test_statistics import HeldOutReading, ModelReadings
from batchnorm.ablation.study import Study
from batchnorm.ablation.user_data import Data, is_rows
from batchnorm.ablation.user_model import Subject
from batchnorm.ablation.watched_runs import WatchedRun
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Result
from batchnorm.experiment.figures_in_words import share, times
from batchnorm.experiment.judgement import Status
from batchnorm.experiment.outcomes import ClaimOutcome
from batchnorm.experiment.paired_seeds import Arrival
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.instruments.loss_landscape import Roughness
from batchnorm.reporting.formats import rendered

STEPS, SEEDS = 40, 2
RATES = (0.01, 0.1)
INF, NAN = math.inf, math.nan


def no_nonsense(text: str) -> None:
    """No NaN, infinity or endless digits, and nothing told beside itself."""
    assert not re.search(r"\b(nan|inf|None)\b", text), text
    assert not re.search(r"\d{10,}|\d{1,3}(,\d{3}){4,}", text), text
    assert not re.search(r"(\d\S* in batches of \d+) and \1", text), text
    assert not re.search(r"\b1 (layers|steps|seeds|arms)\b", text), text
    assert not re.search(r"at (least|most) any number", text), text


# -- the runs -----------------------------------------------------------------------------------------------------


def falling(start: float, end: float, by: int) -> Tensor:
    return torch.tensor([max(0.0, 1 - n / by) * (start - end) + end for n in range(STEPS)])


def diverged(after: int) -> Tensor:
    return torch.cat([torch.full((after,), 2.0), torch.full((STEPS - after,), INF)])


CURVES = {
    "fast": [falling(2, 0.01, 5)] * 2,
    "slow": [falling(2, 0.01, 30)] * 2,
    "late in a seed": [falling(2, 0.01, 5), falling(2, 0.5, 30)],
    "flat": [torch.full((STEPS,), 2.0)] * 2,
    "diverged": [diverged(3)] * 2,
    "diverged at once": [diverged(0)] * 2,
    "diverged in a seed": [falling(2, 0.01, 5), diverged(3)],
    "zero": [torch.zeros(STEPS)] * 2,
    "to zero": [falling(2, 0, 10)] * 2,
    "negative": [falling(-1, -40, 10)] * 2,
    "huge": [falling(1e30, 1e29, 10)] * 2,
    "tiny": [falling(1e-30, 1e-33, 10)] * 2,
}


def landscape(beta: float) -> Roughness:
    return Roughness(*(torch.full((6,), beta) for _ in range(len(Roughness.__dataclass_fields__))))


def watched(drift: float, beta: float, failed: str = "") -> WatchedRun:
    moved = {"a": torch.full((10,), drift), "b": torch.full((10,), drift)}
    model = SUBJECT.fresh(0)
    return WatchedRun(model, range(0, 44, 4), moved, {"a": 0.1, "b": drift}, range(0, 36, 6), landscape(beta), failed)


def about(batches: list | None = None, make: object = None) -> Subject:
    batches = batches or [(torch.randn(16, 3), torch.randint(2, (16,))) for _ in range(6)]
    make = make or (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    return Subject("m.py:make", make, Data.of(batches)).to_device()


SUBJECT = about()


def study(with_: str, without: str, *, runs: tuple[WatchedRun, WatchedRun] | None = None) -> Study:
    curves = {WITH: CURVES[with_], WITHOUT: CURVES[without], ONCE: CURVES["slow"], SCALED: CURVES[with_]}
    losses = {arm: torch.stack([torch.stack([c, c]) for c in curve]) for arm, curve in curves.items()}
    chosen = StudyPlan(tuple(losses), 0, SEEDS, STEPS, RATES, Cost(1, 1, 1, 1))
    looks = runs or (watched(0.1, 1.0), watched(0.2, 3.0))
    seen = {(arm, n): [run] * SEEDS for arm, run in zip((WITH, WITHOUT), looks, strict=True) for n in range(2)}
    return Study(SUBJECT, chosen, Grid(RATES, losses), seen)


def told(result: Result) -> list[str]:
    texts = [verdict.statement for verdict in result.verdicts]
    return texts + [text for chart in result.charts for text in (chart.title, chart.alt)]


def answers(results: dict[str, Result], **more: object) -> Answers:
    results = {name: replace(r, charts=[chart for chart in r.charts if chart.rows]) for name, r in results.items()}
    claims = [
        ClaimOutcome(Claim(name, name.title(), "S.", "A.", "R.", "N.", (), run=lambda *_: None), result, 1.0)
        for name, result in results.items()
    ]
    return Answers(RunSettings(0, SEEDS), claims, "batchnorm why", model="m.py:make", steps=STEPS, **more)


@pytest.mark.parametrize(("with_", "without"), list(itertools.product(CURVES, CURVES)))
def test_every_sentence_about_training_holds_for_every_outcome(with_: str, without: str) -> None:
    made = study(with_, without)
    results = {
        "speed": speed_and_rates.measure(made), "rates": speed_and_rates.measure_rates(made),
        "scale": input_scales.measure(made), "shift": received_shift.measure(made), "smooth": smoothness.measure(made),
    }  # fmt: skip
    whole = answers(results, idle=made.idle(), late=made.late(), advice=made.advice())
    for text in (*itertools.chain.from_iterable(map(told, results.values())), whole.headline, whole.second):
        no_nonsense(text)
    for card in whole.cards:
        no_nonsense(f"{card.what} {card.figure} {card.note}")
    if WITHOUT in made.idle():
        assert "as fast" not in whole.headline
        assert "No gain" not in whole.headline
    if WITH in made.idle():
        assert not whole.headline.startswith("Yes")
    json.loads(whole.to_json())
    no_nonsense(re.sub(r"\|[^|]*\|$", "", rendered(report.report(whole), "md")))


def test_a_page_of_diverged_runs_is_drawn() -> None:
    made = study("diverged at once", "diverged at once")
    results = {"speed": speed_and_rates.measure(made), "rates": speed_and_rates.measure_rates(made)}
    assert "No answer" in re.sub(r"<[^>]+>", " ", report.render(answers(results, idle=made.idle())))


EXTREMES = (0.0, 1e-30, 1e-12, 0.3, 1e12, 1e30, INF, NAN)


@pytest.mark.parametrize(("plain", "normed"), list(itertools.product(EXTREMES, EXTREMES)))
def test_every_sentence_about_looks_holds_for_every_number(plain: float, normed: float) -> None:
    made = study("fast", "slow", runs=(watched(normed, normed), watched(plain, plain)))
    for result in (received_shift.measure(made), smoothness.measure(made)):
        for text in told(result):
            no_nonsense(text)
        for verdict in result.verdicts:
            if {plain, normed} & {0.0, INF} or math.isnan(plain) or math.isnan(normed):
                assert verdict.status is Status.INVALID
    no_nonsense(" ".join(f"{card.figure} {card.note}" for card in answers({"shift": received_shift.measure(made)} | {
        "speed": speed_and_rates.measure(made)}).cards))  # fmt: skip


def test_a_run_that_could_not_be_looked_at_leaves_the_other_questions() -> None:
    made = study("fast", "slow", runs=(watched(0.1, 1.0), watched(0.1, 1.0, "IndexError: 7")))
    assert received_shift.measure(made).verdicts[0].statement == "a run could not be measured: IndexError: 7"
    assert {v.status for v in smoothness.measure(made).verdicts} == {Status.INVALID}
    assert speed_and_rates.measure(made).verdicts[0].status is Status.SUPPORTED


# -- the headline and what stands below it -------------------------------------------------------------------------


def of(values: list[float], sentence: str = "s", **more: object) -> Answers:
    return answers({"speed": Result([judge("speed-steps", values, sentence)], [])}, **more)


def test_an_arm_that_learned_in_no_seed_is_never_as_fast() -> None:
    idle = of([0.0, 0.0], idle=("without",))
    assert idle.headline.startswith(
        f"Not shown in {STEPS} steps: with batch norm the model learns, without batch norm it does not"
    )
    other = of([0.0, 0.0], idle=("with",))
    assert other.headline.startswith(
        f"No: without batch norm the model learns, with batch norm it does not learn in {STEPS} steps"
    )
    late = of([0.0, 0.0], late=("with", "without"))
    assert late.headline.startswith(f"No difference is shown in {STEPS} steps")
    assert of([0.0, 0.0]).headline.startswith("No: without batch norm the model learns as fast")


@given(st.lists(st.floats(-3000, 3000), min_size=2, max_size=6), st.sampled_from([(), ("with",), ("without",)]))
def test_headlines_hold_for_every_effect(values: list[float], idle: tuple[str, ...]) -> None:
    made = of(values, idle=idle)
    no_nonsense(made.headline)
    no_nonsense(" ".join(card.figure + card.note for card in made.cards))


def test_a_question_whose_criteria_differ_is_not_shown_as_a_whole() -> None:
    small = judge("test-time-small", [1.0, 1.1], "s")
    stored = judge("test-time-stored", [0.5, 0.5], "s")
    speed_ = Result([judge("speed-steps", [2.0, 2.1], "s")], [])
    mixed = answers({"speed": speed_, "test time": Result([small, stored], [])})
    assert small.status is Status.SUPPORTED
    assert stored.status is Status.OPPOSITE
    assert mixed.second == "Test Time in part: test-time-small shown here, test-time-stored the opposite.".replace(
        "Test Time", "Test time"
    )
    agreed = answers({"speed": speed_, "test time": Result([small], [])})
    assert agreed.second == "Shown here: test time."


# -- test time ------------------------------------------------------------------------------------------------------

LOSSES = (0.0, 1e-12, 0.3, 0.3, -2.0, 1e30, INF, NAN, None)


@pytest.mark.parametrize(("population", "other"), list(itertools.product(LOSSES, LOSSES)))
def test_every_sentence_about_test_time_holds_for_every_loss(population: float | None, other: float | None) -> None:
    def reading(loss: float | None) -> HeldOutReading | None:
        return None if loss is None else HeldOutReading(loss, 0.5)

    batch = {} if other is None else {4: reading(other)}
    found = [ModelReadings(batch, reading(other), reading(population), alone) for alone in (0.0, NAN)]
    for verdict in (
        test_statistics._judge_small(found),
        test_statistics._judge_stored(found),
        test_statistics._judge_alone(found),
    ):
        no_nonsense(verdict.statement)
    stored = test_statistics._judge_stored(found)
    if population == 0 and other is not None:
        assert "is 0" in stored.statement
    if stored.estimate is not None:
        card = answers({"speed": Result([judge("speed-steps", [2, 2.1], "s")], []), "t": Result([stored], [])}).cards[
            -1
        ]
        no_nonsense(card.figure)


def test_a_mean_of_shares_is_told_as_one_beside_losses_of_the_other_direction() -> None:
    found = [
        ModelReadings({}, HeldOutReading(a, None), HeldOutReading(b, None), 0.0) for a, b in ((0.02, 0.01), (9.0, 10.0))
    ]
    sentence = test_statistics._judge_stored(found).sentence
    assert "4.51 by running averages, and 5 by population statistics (seed by seed +45.0%)" in sentence


# -- noise, scale, depth, census ------------------------------------------------------------------------------------


def test_noise_in_batches_of_the_smallest_size_is_told_once() -> None:
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(20)]
    subject = about(batches)
    sentence = noise_of_layers.measure(subject, [subject.fresh(0)], range(2)).verdicts[0].sentence
    assert sentence.startswith("The noise power is 0.")
    assert sentence.count("in batches of") == 1
    no_nonsense(sentence)


@pytest.mark.parametrize(
    "x", [torch.zeros(8, 3), torch.full((8, 3), NAN), torch.full((8, 3), INF),
        torch.randn(8, 3) * torch.tensor([1e-19, 1, 1e18])],
    ids=["constant", "nan", "infinite", "far apart"],
)  # fmt: skip
def test_the_spread_of_any_features_is_told(x: Tensor) -> None:
    result = input_scales.spread(x, range(2))
    for text in told(result):
        no_nonsense(text)
    if not bool(x.isfinite().all()) or not bool(x.any()):
        assert result.verdicts[0].statement == "not one of the 3 features has a finite variance above 0"


@pytest.mark.parametrize("broken", [None, NAN, INF, 0.0])
def test_depth_and_census_of_any_model_are_told(broken: float | None) -> None:
    subject = about()
    model = subject.fresh(0)
    with torch.no_grad():
        if broken is not None:
            model[0].weight.fill_(broken)
            model[1].weight.fill_(broken)
            model[1].running_var.fill_(broken)
    for result in (
        model_as_it_is.measure_depth(subject, [model], range(2)),
        model_as_it_is.measure_census(subject, [model], range(2)),
    ):
        for text in told(result):
            no_nonsense(text)
    depth = model_as_it_is.measure_depth(subject, [model], range(2)).verdicts[0]
    assert depth.statement == "there is only one batch norm layer, so the first is the last"


def test_ratios_and_shares_of_every_size_are_words() -> None:
    assert [times(r) for r in (0.5, 1.0, 99.96, 1e5, 3.2e29, INF)] == [
        "0.5",
        "1.0",
        "100.0",
        "100000",
        "3e+29",
        "any number of",
    ]
    assert [share(v) for v in (0.041, -0.5, 9.9, 31261632.9)] == ["+4.1%", "-50.0%", "+990.0%", "3e+07 times more"]
    natural = CRITERIA["speed-steps"].natural
    assert (natural(3), natural(5000), natural(-5000)) == (8, INF, 0)


# -- medians --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_median_of_an_even_number_lies_between_the_two_in_the_middle(values: list[float]) -> None:
    found = paired_seeds.median(torch.tensor(values, dtype=torch.float64))
    assert float(found) == pytest.approx(float(np.median(values)), abs=1e-9)


def test_a_seed_that_never_arrives_counts_in_the_median() -> None:
    assert str(Arrival(torch.tensor([5.0, 20.0]), 40)) == "12.5"
    assert str(Arrival(torch.tensor([5.0, INF]), 40)) == "more than 40"
    assert str(Arrival(torch.tensor([INF, INF]), 40)) == "more than 40"
    assert str(Arrival(torch.tensor([5.0, 7.0, INF]), 40)) == "7 (1 of 3 seeds never)"
    table = torch.tensor([[1.0, INF], [3.0, INF], [INF, 2.0], [9.0, 4.0]])
    assert paired_seeds.median(table, 0).tolist() == [6.0, INF]
    (row,) = paired_seeds.curve([1], torch.tensor([[1.0, 3.0]]))
    assert row["y"] == 2.0


# -- batches that are no rows ----------------------------------------------------------------------------------------


class Graphs(nn.Module):
    """A graph network: nodes, and edges by the numbers of their ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def of(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]]) / 4
        return self.last(torch.relu(self.bn(hidden)))


class OfMapping(Graphs):
    def forward(self, x: Tensor, edge_index: Tensor, y: Tensor | None = None) -> Tensor:
        return self.of(x, edge_index)


class OfPair(Graphs):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.of(*pair)


class Graph:
    """A batch of a class of its own."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor) -> None:
        self.store = {"edge_index": edge_index, "x": x}
        self.y = y

    def to(self, device: object) -> "Graph":
        return Graph(self.store["x"].to(device), self.store["edge_index"].to(device), self.y.to(device))


class OfObject(Graphs):
    def forward(self, graph: Graph) -> Tensor:
        return self.of(graph.store["x"], graph.store["edge_index"])


class OfMatrix(Graphs):
    """Adjacency as a square matrix, which is as long as the nodes are many."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, adjacency = pair
        hidden = self.first(x)
        return self.last(torch.relu(self.bn(hidden + adjacency @ hidden)))


def graphs(even: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(10):
        count = 24 if even else 18 + i
        x = torch.randn(count, 4, generator=generator)
        found.append((x, torch.randint(0, count, (2, 3 * count), generator=generator), (x[:, 0] > 0).long()))
    return found


def matrices() -> list:
    return [((x, torch.eye(len(x))[edges[0, : len(x)]] / 4), y) for x, edges, y in graphs(even=True)]


WHOLE = {
    "mapping": (OfMapping, lambda: [{"x": x, "edge_index": e, "y": y} for x, e, y in graphs()]),
    "pair": (OfPair, lambda: [((x, e), y) for x, e, y in graphs()]),
    "pair of one size": (OfPair, lambda: [((x, e), y) for x, e, y in graphs(even=True)]),
    "object": (OfObject, lambda: [Graph(*graph) for graph in graphs()]),
    "square matrix": (OfMatrix, matrices),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_batches_that_are_no_rows_are_trained_with_and_asked_about_whole(kind: str) -> None:
    make, batches = WHOLE[kind]
    subject = about(batches(), make)
    assert subject.data.pool is None
    assert subject.data.whole
    chosen = plan(subject, steps=12, seeds=2, rates=(0.01, 0.1))
    found = ablation.train_and_ask(subject, chosen, "batchnorm why")
    keys = {v.criterion.key for v in found.by_key.values()}
    assert {"speed-steps", "shift-drift", "smooth-equal", "noise-slope", "test-time-stored", "test-time-alone"} <= keys
    assert not [v.statement for v in found.by_key.values() if "could not be measured: " in v.statement]
    assert found.by_key["test-time-stored"].status is not Status.INVALID
    assert (
        found.by_key["test-time-alone"].statement
        == "batches are not rows of 2 examples or more, no output has a row for each example, or layers store no "
        "statistics"
    )
    ablation.look(subject, subject.fresh(0), range(2), "batchnorm why")


@pytest.mark.slow
def test_a_model_of_several_inputs_has_its_target_behind_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.last(torch.relu(self.bn(self.first(x) + self.first(z))))

    batches = [(torch.randn(16, 3), torch.randn(16, 3), torch.randint(2, (16,))) for _ in range(6)]
    subject = about(batches, Two)
    assert subject.data.pool is not None
    found = ablation.train_and_ask(subject, plan(subject, steps=12, seeds=2, rates=(0.01, 0.1)), "batchnorm why")
    assert not [v.statement for v in found.by_key.values() if "could not be measured: " in v.statement]


def test_rows_are_tensors_of_one_length() -> None:
    x, y = torch.randn(6, 3), torch.zeros(6)
    assert all(map(is_rows, ((x, y), {"x": x, "k": 3, "s": "word"}, [x, (y, torch.tensor(1.0))])))
    assert not any(map(is_rows, ((x, torch.zeros(2, 9)), {"x": x, "edges": torch.zeros(2, 9)}, Graph(x, y, y))))


# -- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing",
    [{"noise": noise_of_layers, "shift": received_shift}, {"test-time": test_statistics, "smooth": smoothness}],
)
def test_questions_that_fail_are_told_beside_the_others(failing: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Result:
        raise IndexError("index 21 is out of bounds\nfor dimension 0")

    for module in failing.values():
        monkeypatch.setattr(module, "measure", broken)
    subject = about()
    said = []
    found = ablation.train_and_ask(
        subject, plan(subject, steps=12, seeds=2, rates=(0.01, 0.1)), "batchnorm why", say=said.append
    )
    broke = "it could not be measured: IndexError: index 21 is out of bounds for dimension 0"
    told = {v.criterion.key: v.statement for v in found.by_key.values()}
    assert {key for key in CRITERIA if key.startswith(tuple(failing))} == {k for k, v in told.items() if v == broke}
    assert len(said) == len(found.outcomes)
    assert found.by_key["speed-steps"].estimate is not None
    assert report.render(found)


@pytest.mark.slow
def test_an_arm_that_cannot_be_trained_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.ablation import arms

    def broken(*_: object) -> None:
        raise KeyError("first")

    monkeypatch.setattr(arms, "fix", broken)
    monkeypatch.setattr(arms, "normalize_inputs", broken)
    subject = about([(torch.randn(16, 3) * 50, torch.randint(2, (16,))) for _ in range(6)])
    found = ablation.train_and_ask(subject, plan(subject, steps=12, seeds=2, rates=(0.01, 0.1)), "batchnorm why")
    assert found.by_key["speed-once"].statement == "the arm normalized once could not be trained: KeyError: 'first'"
    for key in ("scale-inputs", "scale-instead"):
        assert (
            found.by_key[key].statement == "the arm with normalized inputs only could not be trained: KeyError: 'first'"
        )
    assert found.by_key["speed-steps"].estimate is not None


def test_a_loss_that_refuses_what_diverged_is_divergence() -> None:
    def strict(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not bool(output.isfinite().all()):
            raise ValueError("all elements must be finite")
        return output.square().mean()

    made = about(make=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)))
    losses, _ = train(replace(made, loss=strict), WITH, 0, 1e30, 10)
    assert losses[0].isfinite()
    assert losses[-1].isinf()


def test_a_failure_that_is_no_divergence_is_raised() -> None:
    def never(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(replace(about(), loss=never), WITH, 0, 0.1, 3)


# -- the estimate -----------------------------------------------------------------------------------------------------


def test_the_estimate_is_of_runs_looks_and_questions() -> None:
    cost = Cost(step=0.5, run=3.0, looks=7.0, questions=11.0)
    made = StudyPlan((WITH, WITHOUT, ONCE), 0, 2, 10, (0.1, 0.2), cost)
    # 3 arms at 2 rates and 4 runs that are looked at, of two seeds
    assert made.estimate == 2 * ((3 * 2 + 4) * (3 + 10 * 0.5) + 4 * 7 + 11)
    assert made.seconds == 0.5


def test_time_that_a_step_takes_beside_the_model_is_in_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("batchnorm.ablation.effort.time.perf_counter", lambda: float(next(clock)))
    calls = []
    monkeypatch.setattr("batchnorm.ablation.effort.train", lambda *args: calls.append(args[-1]) or next(clock))
    plan(about(), steps=10, seeds=2)
    assert calls == [1, 1, 3]  # a step of a second: few do
