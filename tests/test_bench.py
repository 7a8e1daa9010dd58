import json
import math

import pytest
import torch

from batchnorm import bench, paired_timing

TINY = ((4, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 2, 2, 2))


@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize("name", bench.CASES)
def test_both_sides_of_a_case_compute_the_same(name, shape):
    case, inputs = bench.CASES[name], bench.CaseInputs.of(shape)
    sides = bench.layers(shape, "float32", case)
    results = []
    for run in (
        sides["ours"],
        bench.composed(case, sides["torch"]),
        bench.composed(case, sides["torch"], inplace=True),
    ):
        layer = sides["ours"] if run is sides["ours"] else sides["torch"]
        results.append(bench.call(case, run, list(layer.parameters()), inputs)())
    for theirs in results[1:]:
        # rounding of a sum of a few dozen values of size 1
        torch.testing.assert_close(results[0], theirs, rtol=1e-5, atol=1e-5)


def test_no_gradient_adds_up_in_the_inputs():
    inputs = bench.CaseInputs.of((4, 3))
    case = bench.CASES["residual"]
    layer = bench.layers((4, 3), "float32", case)["ours"]
    bench.call(case, layer, list(layer.parameters()), inputs)()
    assert inputs.x.grad is None
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_inputs_have_their_type_and_layout(dtype):
    for shape, layout in (((2, 3, 4, 4), torch.channels_last), ((2, 3, 2, 2, 2), torch.channels_last_3d)):
        inputs = bench.CaseInputs.of(shape, dtype, channels_last=True)
        for tensor in (inputs.x, inputs.residual, inputs.grad):
            assert tensor.dtype == getattr(torch, dtype)
            assert tensor.is_contiguous(memory_format=layout)


def test_traffic_moves_tensors_of_the_size_asked_for():
    assert bench.traffic(4000).keys() == {"copy", "triad", "read"}
    assert all(move() > 0 for move in bench.traffic(4000).values())


def test_a_race_runs_everyone_once_a_round_in_changing_order():
    order = []
    field = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    run = paired_timing.race(field, rounds=20)
    assert {name: len(seconds) for name, seconds in run.seconds.items()} == {"a": 20, "b": 20, "c": 20}
    orders = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(names) == list("abc") for names in orders)
    assert len(set(orders)) > 3


def test_a_race_out_of_budget_ends_after_three_rounds():
    assert len(paired_timing.race({"a": lambda: 1.0}, rounds=9, budget=-1).seconds["a"]) == 3


def test_ratios_are_taken_inside_rounds():
    run = paired_timing.Race({"fast": [1.0, 10.0, 100.0], "slow": [3.0, 30.0, 300.0], "copy": [0.5, 5.0, 50.0]})
    assert run.ratio({"slow": 1}, {"fast": 1}) == paired_timing.Spread(3.0, 3.0, 3.0)
    assert run.ratio({"slow": 1}, {"fast": 1, "copy": 2}) == paired_timing.Spread(1.5, 1.5, 1.5)
    assert run.time({"fast": 1, "copy": 2}).median == 20.0


def test_the_share_of_others_is_a_share_and_our_own_work_is_not_in_it():
    with paired_timing.others() as busy:
        pass
    assert set(busy) <= {"others"}
    assert all(share >= 0 for share in busy.values())


def test_a_system_that_does_not_tell_leaves_the_share_out(monkeypatch):
    monkeypatch.setattr(paired_timing, "_seconds", lambda pid: float("x"))
    with paired_timing.others() as busy:
        pass
    assert busy == {}


def test_a_spread_is_median_and_quartiles():
    assert paired_timing.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == paired_timing.Spread(3.0, 2.0, 4.0)


def test_a_timed_call_is_warmed_up_and_repeated():
    calls = []
    contestant = paired_timing.timed(lambda: calls.append(None), aimed_seconds=0.0)
    before = len(calls)
    assert before >= 1
    contestant()
    assert len(calls) > before


@pytest.fixture(scope="module")
def short():
    return bench.short_table(TINY, rounds=3)


def test_the_short_table_is_json_with_a_row_for_each_shape_and_case(short):
    assert json.loads(json.dumps(short, allow_nan=False)) == short
    assert short.keys() == {"schema_version", "environment", "threads", "rows"}
    assert short["threads"] == torch.get_num_threads()
    assert [(tuple(row["shape"]), row["case"]) for row in short["rows"]] == [(s, c) for s in TINY for c in bench.SHORT]


def test_the_numbers_of_the_short_table_are_sane(short):
    for row in short["rows"]:
        assert row["rounds"] == 3
        assert (row["dtype"], row["channels_last"]) == ("float32", False)
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours_ms", "torch_ms", "limit_ms"))
        for key in ("ratio", "to_limit"):
            low, high = row[f"{key}_quartiles"]
            assert 0 < low <= row[key] <= high


def test_threads_are_set_for_the_table_and_put_back():
    before = torch.get_num_threads()
    assert bench.short_table([(4, 3)], threads=1, rounds=3)["threads"] == 1
    assert torch.get_num_threads() == before


def test_the_short_table_takes_half_types_with_channels_last():
    rows = bench.short_table([(2, 3, 4, 4)], "bfloat16", channels_last=True, rounds=3)["rows"]
    assert {(row["dtype"], row["channels_last"]) for row in rows} == {("bfloat16", True)}


def test_progress_is_told_and_default_shapes_fit_the_layout(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((2, 3, 4, 4), (4, 3)))
    shares = []
    rows = bench.short_table(channels_last=True, rounds=3, progress=shares.append)["rows"]
    assert {tuple(row["shape"]) for row in rows} == {(2, 3, 4, 4)}
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_shape_is_read_from_text():
    assert bench.parse_shape("32x64x56x56") == (32, 64, 56, 56)
    assert bench.parse_shape("256X512") == (256, 512)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("32,64", "numbers joined by x, got '32,64'. Write 32x64x56x56"),
        ("", "numbers joined by x, got ''"),
        ("-1x3", "numbers joined by x, got '-1x3'"),
        ("7", "at least 2 values per channel, got 7. Write"),
        ("0x3", "at least 2 values per channel, got 0x3"),
        ("1x3", "at least 2 values per channel, got 1x3"),
        ("1x2x3x4x5x6", "got 1x2x3x4x5x6"),
    ],
)
def test_text_that_names_no_shape_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        bench.parse_shape(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, .* got 'int8'. Leave dtype out"),
        ({"shapes": [(4, 3)], "channels_last": True}, "needs shapes of 4 or 5 axes, got 4x3. Leave"),
        ({"shapes": [(1, 3)]}, "at least 2 values per channel, got 1x3. Write"),
        ({"threads": 0}, "threads must be 1 or more, got 0. Leave threads out"),
        ({"rounds": 2}, "rounds must be 3 or more, because a spread is shown, got 2. Pass 21"),
    ],
)
def test_wrong_arguments_of_the_short_table_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bench.short_table(**({"shapes": [(4, 3)]} | arguments))


def test_float64_needs_twice_the_memory_of_other_types(monkeypatch):
    shape = (2, 3, 4, 4)
    monkeypatch.setattr(bench, "_memory", lambda: 12 * 4 * math.prod(shape))
    for dtype in ("float32", "bfloat16"):
        assert bench.CaseInputs.of(shape, dtype).x.shape == shape
    with pytest.raises(ValueError, match="12 tensors of a shape must fit in memory"):
        bench.CaseInputs.of(shape, "float64")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "bench.json"
    bench.write({"rows": []}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        bench.write({"rows": [float("nan")]}, path)
    assert json.loads(path.read_text()) == {"rows": []}
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
