"""watch: the training stays the same, bit for bit, and what it did is in the log."""

import math
import warnings
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.instruments.look_schedule import Schedule
from batchnorm.instruments.training_events import Events
from batchnorm.record import QUANTITIES, Log

FREE = {name for name, quantity in QUANTITIES.items() if quantity.tier == "free"}
PROBE = {name for name, quantity in QUANTITIES.items() if quantity.tier == "probe" and quantity.of == "layer"}
NO_LIMIT = 1e9  # of the budget: what is measured may not depend on how busy the machine is


class Net(nn.Module):
    """A small network with everything that a training draws random numbers for."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.bn2 = norm(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(self.drop(x.mean((2, 3))))


def batches(steps: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], _: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def half(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], _: int) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], step: int) -> None:
    (loss_of(model, batch) / 4).backward()
    if step % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()


def twice(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], _: int) -> None:
    optimizer.zero_grad()
    (loss_of(model, batch) + model(batch[0] + 1).square().mean()).backward()
    optimizer.step()


def partly_frozen(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], step: int) -> None:
    model.train()
    model.get_submodule("bn1").eval()
    plain(model, optimizer, batch, step)


def bits(model: nn.Module) -> dict[str, object]:
    """Everything that training made of a model, to be compared with that of another one."""
    tensors = {
        **model.state_dict(),
        **{f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None},
    }
    values = {name: tensor.detach().clone().reshape(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()}
    return values | {name: module.training for name, module in model.named_modules()}


def trained(
    step: Callable[..., None], model: nn.Module, steps: int = 96, **watched: object
) -> tuple[nn.Module, bn.instruments.Watch | None]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    data = batches(steps)
    if not watched:
        for i, batch in enumerate(data):
            step(model, optimizer, batch, i)
        return model, None
    with bn.watch(model, every=10, budget=NO_LIMIT, **watched) as run:
        for i, batch in enumerate(data):
            step(model, optimizer, batch, i)
    return model, run


def made(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Net:
    torch.manual_seed(0)
    return Net(norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, bn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda norm: norm.__module__ + norm.__name__
)
@pytest.mark.parametrize("step", [plain, half, accumulated, twice, partly_frozen])
def test_trained_weights_are_the_same_bit_for_bit(
    step: Callable[..., None], norm: Callable[[int], nn.Module], tmp_path: Path
) -> None:
    alone, _ = trained(step, made(norm))
    after_alone = torch.get_rng_state()
    watched, run = trained(step, made(norm), log=tmp_path / "run")
    assert bits(watched) == bits(alone)
    assert torch.equal(torch.get_rng_state(), after_alone)
    assert run is not None
    assert {record.tier for record in run.records} == {"free", "probe"}


@pytest.mark.slow
def test_a_compiled_model_is_watched_and_trains_to_the_same_weights(tmp_path: Path) -> None:
    x, _ = batches(1)[0]

    def run_it(watched: bool) -> tuple[nn.Module, list]:
        model = made()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        torch.manual_seed(1)
        run = bn.watch(compiled, every=10, budget=NO_LIMIT, probe=x)
        with run if watched else torch.enable_grad():
            for i, batch in enumerate(batches(30)):
                plain(compiled, optimizer, batch, i)
        return model, list(run.records)

    alone, _ = run_it(False)
    model, records = run_it(True)
    assert bits(model) == bits(alone)
    assert records[0].layers == ("bn1", "bn2")
    assert {record.tier for record in records} == {"free", "probe"}


def test_the_log_has_every_quantity_of_both_tiers(tmp_path: Path) -> None:
    x, y = batches(1, size=32)[0]
    _, run = trained(plain, made(), steps=60, log=tmp_path, probe=(x, y))
    log = Log(tmp_path)
    assert log.is_finished
    assert log.layers == ("bn1", "bn2")
    free, probe = log.rows("free")[-1], log.rows("probe")[-1]
    assert set(free["values"]) == FREE
    assert set(probe["values"]) == PROBE
    assert all(value is not None for row in (*free["values"].values(), *probe["values"].values()) for value in row)
    assert set(probe["model"]) == {"loss_train", "loss_eval", "output_gap"}
    model = made()
    arrays = log.arrays(log.rows("arrays")[0])
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(
        ("quantiles_input", "quantiles_output", "running_mean", "running_var", "batch_mean", "batch_var"), (2, 5)
    )
    assert log.start["schedule"]["every"] == 10
    assert log.start["layers"][0] | {} == {
        "name": "bn1",
        "channels": 8,
        "kind": "BatchNorm2d",
        "eps": 1e-5,
        "momentum": 0.1,
    }
    assert run is not None
    assert run.steps == 60
    assert isinstance(model, Net)


def test_the_probes_losses_are_those_of_the_model_in_each_mode(tmp_path: Path) -> None:
    x, y = batches(1, size=32)[0]
    model, run = trained(plain, made(), steps=18, probe=(x, y))
    record = next(record for record in reversed(run.records) if record.tier == "probe")
    assert record.step == 18
    with torch.no_grad():
        evaluated = F.cross_entropy(model.eval()(x), y)
        model.bn1.train(), model.bn2.train()
        trained_mode = F.cross_entropy(model(x), y)
    assert record.model["loss_eval"] == pytest.approx(float(evaluated))
    assert record.model["loss_train"] == pytest.approx(float(trained_mode))


def test_noted_values_are_averaged_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.instruments.watched_training._PULSE", NO_LIMIT)
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, log=tmp_path, probe=False) as run:
        for i, batch in enumerate(batches(4)):
            plain(model, optimizer, batch, i)
            run.log(loss=torch.tensor(float(i)), accuracy=i / 10)
    (line,) = Log(tmp_path).rows("progress")
    assert line["values"] == {"loss": 1.5, "accuracy": 0.15}


class Angry:
    """A value that cannot be looked at."""

    def __float__(self) -> float:
        raise RuntimeError("not now")


NO_NUMBERS = {
    "text": "0.5", "list": [1, 2], "nested": {"a": {"b": 1}}, "huge": 10**400, "complex": 1j, "many": torch.ones(2, 3),
    "imaginary": torch.ones((), dtype=torch.complex64), "array": np.ones(3), "angry": Angry(), "empty": torch.ones(0),
    "storage_free": torch.ones((), device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_left_out_and_told_once(name: str, tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = bn.watch(model, log=tmp_path, probe=False)
    with run:
        for i, batch in enumerate(batches(4)):
            plain(model, optimizer, batch, i)
            run.log(loss=1.0, nothing=None, **{name: NO_NUMBERS[name]})
    (line,) = Log(tmp_path).rows("progress")
    assert line["values"] == {"loss": 1.0}
    (event,) = (e for e in Log(tmp_path).rows("event") if "no single number" in e["message"])
    assert f": {name} (" in event["message"]
    run = bn.watch(model, probe=False).start()
    for i, batch in enumerate(batches(4)):
        plain(model, optimizer, batch, i)
        run.log({name: NO_NUMBERS[name]})
    with pytest.warns(RuntimeWarning, match=rf"no single number: {name} \("):
        run.stop()


def test_numbers_of_every_kind_are_averaged(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {
        "bool": True, "numpy": np.float32(2), "integer": np.int64(3), "array": np.ones(1),
        "half": torch.tensor(60000.0).half(),
        "flag": torch.tensor(True), "one": torch.full((1, 1), 4.0), "graph": torch.ones((), requires_grad=True),
        "fraction": Fraction(1, 2), "decimal": Decimal("0.25"), "nan": math.nan, "infinite": -math.inf, "none": None,
    }  # fmt: skip
    expected = {
        "bool": 1, "numpy": 2, "integer": 3, "array": 1, "half": 60000, "flag": 1, "one": 4, "graph": 1,
        "fraction": 0.5, "decimal": 0.25, "nan": None, "infinite": None,
    }  # fmt: skip
    with bn.watch(model, log=tmp_path, probe=False) as run:
        for i, batch in enumerate(batches(4)):
            plain(model, optimizer, batch, i)
            run.log(given, loss=float(i))
            run.lab({"share": {"bn2": "much", "bn1": np.float64(1)}}, text="x", fine=2)
    (line,) = Log(tmp_path).rows("progress")
    assert line["values"] == {**expected, "loss": 1.5}
    assert not [event for event in Log(tmp_path).rows("event") if "no single number" in event["message"]]
    row = Log(tmp_path).rows("lab")[-1]
    assert (row["values"], row["model"]) == ({"share": [1, None]}, {"text": None, "fine": 2})


class Rows(torch.utils.data.Dataset):
    """A data set for workers."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 8, 8), float(index % 7)) + torch.arange(8.0), index % 4


def test_a_log_is_continued_while_workers_of_the_first_block_live(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = []
    for _ in range(2):
        with bn.watch(model, log=tmp_path, every=10, budget=NO_LIMIT) as run:
            loader = torch.utils.data.DataLoader(
                Rows(), 16, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
            )
            kept.append(loader)
            for i, batch in enumerate(loader):
                plain(model, optimizer, batch, i)
    assert run.steps == 64
    assert [row["reason"] for row in Log(tmp_path).rows("end")] == ["finished", "finished"]


def test_a_log_of_a_model_with_the_same_names_is_not_continued(tmp_path: Path) -> None:
    trained(plain, made(), steps=4, log=tmp_path, probe=False)
    with pytest.raises(ValueError, match=r"BatchNorm2d 'bn1' of 8 channels, expected SyncBatchNorm 'bn1' of 8"):
        trained(plain, made(nn.SyncBatchNorm), steps=4, log=tmp_path, probe=False)


def test_a_continued_log_goes_on_counting(tmp_path: Path) -> None:
    trained(plain, made(), steps=20, log=tmp_path, probe=False)
    _, run = trained(plain, made(), steps=20, log=tmp_path, probe=False)
    assert run.steps == 40
    assert [row["step"] for row in Log(tmp_path).rows("free")] == [18, 38]


def test_steps_can_be_counted_by_hand() -> None:
    model = made()
    with bn.watch(model, every=10, budget=NO_LIMIT, probe=False) as run:
        for x, _ in batches(20):
            model(x)
            run.step()
    assert run.steps == 20
    assert run.latest["m_eff"]["bn1"] is not None


def test_only_the_first_optimizer_of_the_model_is_the_clock() -> None:
    model, other = made(), nn.Linear(2, 2)
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    first, second = (torch.optim.SGD(part.parameters(), 0.1) for part in (model.conv1, model.head))
    with bn.watch(model, probe=False) as run:
        for x, _ in batches(5):
            model(x).sum().backward()
            other(torch.ones(2)).sum().backward()
            for optimizer in (theirs, first, second):
                optimizer.step()
    assert run.steps == 5


def test_a_training_without_steps_is_warned_of() -> None:
    with (
        pytest.warns(RuntimeWarning, match=r"saw no step of an optimizer\. If no .* call run\.step\(\)"),
        bn.watch(made()),
    ):
        pass


def test_hooks_are_gone_afterwards_also_when_the_training_raises(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = bits(model)

    def interrupted() -> None:
        with bn.watch(model, log=tmp_path):
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert bits(model) == before
    assert not model._forward_pre_hooks
    assert Log(tmp_path).rows("end")[0]["reason"] == "raised KeyboardInterrupt"
    plain(model, optimizer, batches(1)[0], 0)  # a hook that was left would write to a closed log


def test_an_error_of_the_measurement_does_not_end_the_training(tmp_path: Path) -> None:
    def broken(output: Tensor, batch: object) -> Tensor:
        raise ZeroDivisionError("of the user's")

    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batches(1)[0]
    run = bn.watch(model, log=tmp_path, every=10, budget=NO_LIMIT, probe=(x, y), loss=broken).start()
    for i, batch in enumerate(batches(17)):
        plain(model, optimizer, batch, i)
    with pytest.warns(
        RuntimeWarning, match=r"stopped at step 18: ZeroDivisionError: of the user's\. The training goes"
    ):
        plain(model, optimizer, (x, y), 17)
    plain(model, optimizer, (x, y), 18)
    assert run.steps == 18
    assert Log(tmp_path).rows("end")[0]["reason"] == "stopped by ZeroDivisionError"


def test_a_probe_that_could_not_be_taken_is_told(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, log=tmp_path):
        for x, y in batches(12):
            F.cross_entropy(model.forward(x), y).backward()  # past the hooks, as a compiled model may
            optimizer.step()
    assert any("no probe was measured" in event["message"] for event in Log(tmp_path).rows("event"))


def test_lazy_layers_are_known_after_their_first_pass(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    run = bn.watch(model, log=tmp_path, probe=False).start()
    model(batches(1)[0][0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i, batch in enumerate(batches(12)):
        plain(model, optimizer, batch, i)
    run.stop()
    assert Log(tmp_path).start["layers"][0]["channels"] == 4


def test_wrappers_do_not_show_in_names() -> None:
    model = made()
    run = bn.watch(nn.DataParallel(model), every=10, budget=NO_LIMIT, probe=False)
    with run:
        for x, _ in batches(18):
            model(x)
            run.step()
    assert run.latest.layers == ("bn1", "bn2")


def test_sinks_get_numbers_by_name() -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows, self.closed = [], False

        def write(self, step: int, values: dict[str, float]) -> None:
            self.rows.append((step, dict(values)))

        def close(self) -> None:
            self.closed = True

    sink = Kept()
    trained(plain, made(), steps=20, sinks=[sink])
    assert sink.closed
    names = {name for _, values in sink.rows for name in values}
    assert {"batchnorm/noise/bn1", "batchnorm/cosine/bn2", "batchnorm/cost", "batchnorm/output_gap"} <= names


class Broken:
    """A sink of which one method fails."""

    def __init__(self, method: str) -> None:
        self.method, self.calls = method, 0

    def write(self, step: int, values: dict[str, float]) -> None:
        self.calls += 1
        if self.method == "write":
            raise ConnectionError("gone")

    def close(self) -> None:
        if self.method == "close":
            raise ConnectionError("gone")


@pytest.mark.parametrize(("method", "message"), [("write", "gets no more numbers"), ("close", "could not be closed")])
def test_a_sink_that_fails_costs_its_numbers_only(method: str, message: str, tmp_path: Path) -> None:
    sink = Broken(method)
    with pytest.warns(RuntimeWarning, match=rf"Broken .*{message}.*ConnectionError: gone"):
        trained(plain, made(), steps=40, sinks=[sink], log=tmp_path)
    assert Log(tmp_path).count("free") > 1
    assert sink.calls == 1 if method == "write" else sink.calls > 1


def test_a_watch_can_be_started_again(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = bn.watch(model, log=tmp_path, every=10, budget=NO_LIMIT, probe=False)
    for _ in range(2):
        with run:
            for i, batch in enumerate(batches(20)):
                plain(model, optimizer, batch, i)
    log = Log(tmp_path)
    assert (run.steps, log.step, log.count("end"), log.count("start")) == (40, 40, 2, 2)


def test_what_was_measured_on_demand_is_in_the_log(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bn.watch(model, log=tmp_path, probe=False) as run:
        plain(model, optimizer, batches(1)[0], 0)
        run.lab({"share": {"bn2": 0.25}}, eta_beta=1.5)
    (row,) = Log(tmp_path).rows("lab")
    assert (row["step"], row["values"], row["model"]) == (1, {"share": [None, 0.25]}, {"eta_beta": 1.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, r"every must be 1 step or more, got 0"),
        ({"budget": 0.0}, r"budget must be above 0, got 0\.0\. Use 0\.02"),
        ({"probe": torch.ones(2)}, None),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str | None) -> None:
    if message is None:
        assert bn.watch(made(), **arguments)
        return
    with pytest.raises(ValueError, match=message):
        bn.watch(made(), **arguments)


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"watch needs a model with batch norm layers, got Linear without any"):
        bn.watch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"a model must be an nn\.Module, got int"):
        bn.watch(3)


def test_a_log_that_cannot_be_written_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), bn.watch(made(), log=tmp_path / "file"):
        raise AssertionError("the training began")


# -- the schedule -------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_looks_are_dense_at_first_and_then_as_far_apart_as_was_asked_for() -> None:
    schedule = Schedule(100, 1.0, Clock())
    due = [step for step in range(1, 1001) if schedule.is_due()]
    assert due[:6] == [10, 20, 30, 40, 50, 60]
    assert {b - a for a, b in zip(due[-5:], due[-4:], strict=False)} == {100}


@pytest.mark.parametrize(("step_time", "look_time"), [(0.01, 0.005), (0.001, 0.1), (1.0, 0.5)])
def test_the_cost_stays_within_the_budget(step_time: float, look_time: float) -> None:
    clock = Clock()
    schedule = Schedule(100, 0.02, clock)
    looks, costs = 0, []
    for step in count(1):
        clock.now += step_time
        if schedule.is_due():
            looks += 1
            with schedule.spending(), schedule.looking("free"):
                clock.now += look_time
        costs.append(schedule.cost)
        if step == 100_000:
            break
    # the first look comes before it is known what it takes
    first = costs.index(max(costs))
    assert all(cost <= 0.02 for cost in costs[first + int(look_time / 0.02 / step_time) + 1 :])
    assert looks > 10


# -- events -------------------------------------------------------------------------------------------------------


def test_an_event_is_told_once_until_it_has_ended() -> None:
    events, layers = Events(), ("a", "b")
    series = [1.0, 0.6, 0.55, 0.45, 0.6, 0.3, 0.6]
    told = [list(events.of(layers, {"dead": [value, None]}, early=False)) for value in series]
    assert [len(found) for found in told] == [1, 0, 0, 0, 0, 0, 1]
    assert (told[0][0].layer, told[0][0].code) == ("a", "BN106")
    (both,) = Events().of(layers, {"dead": [0.6, 0.7]}, early=False)
    assert both.message.endswith("; 1 more layers likewise")


def test_statistics_are_stale_after_three_looks_in_a_row_and_not_while_averages_begin() -> None:
    for quantity in ("staleness", "short_var"):
        events = Events()
        series = [5.0, 5.0, 1.0, 5.0, 6.0, 50.0, 3.0, 5.0, 1.0, 4.5, 4.5, 4.5]
        told = [list(events.of(("a",), {quantity: [value]}, early=False)) for value in series]
        assert [i for i, found in enumerate(told) if found] == [5, 11]
        assert told[5][0].code == "BN116"
        early = Events()
        assert not [event for _ in range(9) for event in early.of(("a",), {quantity: [50.0]}, early=True)]


def spikes(count: int, seed: int = 0) -> list[Tensor]:
    """Batches of 32 normal examples, 1 of 1,000 of which is 100 times as large."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 32, 16, generator=random)
    return list(x * torch.where(torch.rand(count, 32, 1, generator=random) < 1e-3, 100.0, 1.0))


def told_of(layer: nn.Module, data: Iterable[Tensor], folder: Path) -> set[str]:
    """Codes of events of a training that changes nothing."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    with bn.watch(layer, log=folder, every=20, budget=NO_LIMIT, probe=False):
        for x in data:
            layer(x).sum().backward()
            optimizer.step()
    return {event["code"] for event in Log(folder).rows("event")}


@pytest.mark.slow
def test_rare_large_examples_make_no_statistics_stale(tmp_path: Path) -> None:
    assert "BN116" not in told_of(nn.BatchNorm1d(16), spikes(1500), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda x, i: x * 1.02**i, lambda x, i: x + i / 20])
def test_averages_that_are_too_slow_for_a_change_are_stale(
    change: Callable[[Tensor, int], Tensor], tmp_path: Path
) -> None:
    data = [change(x, i) for i, x in enumerate(torch.randn(1000, 32, 16, generator=torch.Generator().manual_seed(1)))]
    assert "BN116" in told_of(nn.BatchNorm1d(16, momentum=0.01), data, tmp_path)


def test_freezing_and_poison_are_events(tmp_path: Path) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bn.watch(model, log=tmp_path, every=10, budget=NO_LIMIT, probe=False):
        for i, batch in enumerate(batches(60)):
            if i == 20:
                bn.freeze(model.bn2)
            if i == 40:
                with torch.no_grad():
                    model.bn1.running_var[0] = torch.nan
            plain(model, optimizer, batch, i)
    events = Log(tmp_path).rows("event")
    assert [(e["layer"], e["code"]) for e in events if "no longer change" in e["message"]] == [("bn2", None)]
    assert [(e["layer"], e["code"]) for e in events if "NaN" in e["message"]] == [("bn1", "BN102")]
