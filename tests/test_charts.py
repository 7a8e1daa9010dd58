"""Drawings: shared scales, colours by meaning, gaps, and what cannot be drawn."""

from __future__ import annotations

import dataclasses
import re

import pytest
from sample_verdicts import (
    PAIR,
    accuracies,
    drift,
    four_units,
    groups,
    learning,
    noise_power,
    one_series,
    picture,
    sample,
    usable_rates,
)

from batchnorm.reporting.charts.chart_data import Axis, Chart
from batchnorm.reporting.charts.drawings import panels, with_gaps
from batchnorm.reporting.charts.scales import log_ticks, scale
from batchnorm.reporting.charts.series import legend, looks
from batchnorm.reporting.charts.svg import to_specification, to_svg

DRAWN = [learning, usable_rates, noise_power, accuracies, one_series, four_units, drift, groups]


def lines(values: list[float], **axes: Axis) -> Chart:
    rows = [{"x": n + 1, "y": y, "series": "with"} for n, y in enumerate(values)]
    return Chart("lines", "A title", "alt", rows, **{"x": Axis("x"), "y": Axis("y"), **axes}, series={"with": "with"})


def scales(drawing, channel: str) -> list[dict]:
    """The scale of every mark of a drawing."""
    return [layer["encoding"][channel]["scale"] for layer in drawing.to_dict(validate=False)["layer"]]


@pytest.mark.parametrize("make", DRAWN)
def test_every_kind_of_drawing_is_valid_by_the_librarys_own_schema(make):
    panels(make())[0].drawing.to_dict(validate=True)


@pytest.mark.parametrize("make", [learning, four_units, drift])
@pytest.mark.parametrize("channel", ["x", "y"])
def test_panels_of_a_chart_share_their_scales(make, channel):
    drawn = panels(make())
    assert len(drawn) > 1
    every = [scale for panel in drawn for scale in scales(panel.drawing, channel)]
    assert all(scale == every[0] for scale in every)
    assert len(every[0]["domain"]) == 2


def test_a_scale_holds_every_value_of_every_panel_with_its_interval():
    chart = four_units()
    shared = scale(chart, "y")
    assert shared.low <= min(row["p2"] for row in chart.rows)
    assert shared.high >= max(row["p98"] for row in chart.rows)


def test_panels_come_row_by_row_in_the_order_of_their_first_appearance():
    drawn = panels(four_units())
    assert [panel.row for panel in drawn] == ["without batch norm"] * 4 + ["with batch norm"] * 4
    assert [panel.column for panel in drawn[:4]] == [f"unit a[2]{n}" for n in range(1, 5)]


def test_a_panel_without_data_is_drawn_empty_so_that_columns_stay_aligned():
    chart = four_units()
    missing = {"row": "with batch norm", "panel": "unit a[2]3"}
    rows = [row for row in chart.rows if any(row[key] != value for key, value in missing.items())]
    drawn = panels(dataclasses.replace(chart, rows=rows))
    assert len(drawn) == 8
    assert "var(--with)" in to_svg(drawn[5].drawing, "a")
    assert "var(--with)" not in to_svg(drawn[6].drawing, "a")


def test_each_role_has_its_own_colour_and_series_of_one_role_differ():
    look = looks(groups())
    assert look["no batch norm"].colour == "var(--without)"
    assert look["groups of 4"].colour == "var(--with)"
    blue = [look[f"groups of {m}"] for m in (4, 16, 64, 512)]
    assert all(one.colour.startswith("var(--with") and "without" not in one.colour for one in blue)
    assert len({one.colour for one in blue}) == len({one.shape for one in blue}) == 4


def test_theory_is_dashed_in_the_plain_colour_of_its_role():
    look = looks(drift())
    assert look["noise floor with"].dash
    assert look["noise floor with"].colour == look["with batch norm"].colour
    assert not look["with batch norm"].dash


def test_the_legend_shows_a_symbol_only_where_the_chart_does():
    assert [key.symbol for key in legend(learning())] == [False, False]  # 100 steps, one series a role
    assert [key.symbol for key in legend(usable_rates())] == [True, True]  # 7 values
    assert [key.symbol for key in legend(noise_power())] == [True, True, False]  # the last is theory
    assert [(key.line, key.symbol) for key in legend(accuracies())] == [(False, True)] * 2


@pytest.mark.slow
def test_colours_follow_the_page_and_none_is_fixed():
    for make in DRAWN:
        svg = to_svg(panels(make())[0].drawing, "a")
        colours = re.findall(r'(?:fill|stroke)="([^"]+)"', svg)
        assert colours
        assert all(colour.startswith("var(--") or colour in {"none", "transparent"} for colour in colours), make


def test_the_same_drawing_gives_the_same_text_also_with_clipped_marks():
    first, second = (to_svg(panels(groups())[0].drawing, "a") for _ in range(2))
    assert "clip-path" in first
    assert first == second


def test_names_inside_a_drawing_begin_with_its_prefix():
    svg = to_svg(panels(groups())[0].drawing, "noise-2-1")
    names = re.findall(r'id="([^"]+)"', svg)
    assert names
    assert all(name.startswith("noise-2-1-") for name in names)
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) == set(names)


def test_text_in_a_drawing_is_escaped():
    chart = one_series()
    chart = dataclasses.replace(chart, rows=[{**chart.rows[0], "label": "<b onload=x>&"}])
    svg = to_svg(panels(chart)[0].drawing, "a")
    assert "<b" not in svg
    assert "&lt;b onload=x&gt;&amp;" in svg


def test_an_interactive_drawing_leaves_the_wheel_to_the_page_and_zooms_only_numbers():
    moving = to_specification(panels(noise_power())[0].drawing, zoom=True)
    assert moving["layer"][0]["params"][0]["select"]["zoom"] == "wheel![event.shiftKey]"
    still = to_specification(panels(accuracies())[0].drawing, zoom=False)
    assert not any("params" in layer for layer in still["layer"])


def test_a_series_has_symbols_in_all_panels_or_in_none():
    def symbols(drawing) -> int:
        specification = drawing.to_dict(validate=False)
        return len(specification["datasets"][specification["layer"][-1]["data"]["name"]])

    rows = [{"x": x, "y": 1.0, "series": "with batch norm", "panel": "long"} for x in range(40)]
    rows += [{"x": x, "y": 1.0, "series": "with batch norm", "panel": "short"} for x in range(5)]
    chart = Chart("lines", "t", "a", rows, Axis("x"), Axis("y"), PAIR)
    assert [symbols(panel.drawing) for panel in panels(chart)] == [0, 0]
    chart = dataclasses.replace(chart, rows=rows[30:])
    assert [symbols(panel.drawing) for panel in panels(chart)] == [10, 5]


# -- gaps -----------------------------------------------------------------------------------------------------


def row(x: float, y: float | None, series: str) -> dict:
    return {"x": x, "y": y, "series": series}


def test_a_line_breaks_where_a_series_lacks_a_value_that_others_have():
    rows = [row(x, 1.0, "a") for x in range(6)] + [row(x, 2.0, "b") for x in (0, 1, 3, 4)]
    gaps = [r for r in with_gaps(rows) if r["y"] is None]
    assert [(r["x"], r["series"]) for r in gaps] == [(2, "b")]  # 5 lies behind b's end: it just ends


def test_a_series_on_another_grid_keeps_its_line():
    rows = [row(x, 1.0, "a") for x in range(0, 20, 2)] + [row(x, 2.0, "b") for x in range(20)]
    assert all(r["y"] is not None for r in with_gaps(rows))


def test_theory_on_two_points_keeps_its_line():
    rows = [row(x, 1.0, "a") for x in range(9)] + [row(x, 2.0, "theory") for x in (0, 8)]
    assert all(r["y"] is not None for r in with_gaps(rows, ["theory"]))


def test_a_value_between_two_gaps_is_drawn_as_a_symbol():
    rows = [row(x, 1.0, "with batch norm") for x in range(40)]
    rows += [row(x, 2.0, "without batch norm") for x in range(40) if x not in {19, 21}]
    symbols = panels(Chart("lines", "t", "a", rows, Axis("x"), Axis("y"), PAIR))[0].drawing.to_dict(validate=False)
    data = symbols["datasets"][symbols["layer"][-1]["data"]["name"]]
    assert [(r["x"], r["series"]) for r in data] == [(20, "without batch norm")]


# -- scales ---------------------------------------------------------------------------------------------------


def test_the_margin_of_a_scale_stays_between_zero_and_all_of_a_share():
    shared = scale(lines([0.01, 0.99], y=Axis("share", percent=True)), "y")
    assert (shared.low, shared.high) == (0, 1)


@pytest.mark.parametrize(
    ("values", "percent", "ends"),
    [
        ([-1.0, -0.01], False, (-1 - 0.04 * 0.99, 0)),
        ([-0.5, 0.0], False, (-0.5 - 0.04 * 0.5, 0)),
        ([1.01, 2.0], True, (1, 2 + 0.04 * 0.99)),
        ([1.01, 2.0], False, (1.01 - 0.04 * 0.99, 2 + 0.04 * 0.99)),
        ([-0.01, 1.01], True, (-0.01 - 0.04 * 1.02, 1.01 + 0.04 * 1.02)),
        ([1.0, 1.0], True, (0.96, 1)),
        ([-5.0, -5.0], False, (-5.2, -4.8)),
        ([0.0, 0.0], True, (0, 1)),
    ],
)
def test_no_margin_crosses_zero_or_all_of_a_share(values, percent, ends):
    shared = scale(lines(values, y=Axis("y", percent=percent)), "y")
    assert (shared.low, shared.high) == pytest.approx(ends, rel=1e-15)


def test_a_constant_value_still_gets_a_scale_of_some_width():
    for value in (0.0, 5.0, -5.0):
        shared = scale(lines([value, value]), "y")
        assert shared.low <= value < shared.high or shared.low < value <= shared.high


def test_a_domain_that_is_set_is_taken_as_it_is_and_cuts_off_what_lies_outside():
    shared = scale(groups(), "y")
    assert (shared.low, shared.high, shared.nice) == (0, 1, False)
    assert all(layer["mark"]["clip"] for layer in panels(groups())[0].drawing.to_dict(validate=False)["layer"][:-1])


def test_a_logarithmic_axis_marks_measured_values_where_they_are_few():
    assert scale(noise_power(), "x").ticks == [2, 4, 8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize(("low", "high"), [(1, 3), (2.1, 4.8), (0.9, 110), (3e-5, 0.2), (1e-9, 1e6)])
def test_a_logarithmic_axis_has_two_to_eight_ticks_within_its_ends(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def labels(drawing) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", to_svg(drawing, "a"))


def test_every_tick_of_a_logarithmic_axis_is_labelled_and_small_ones_shortly():
    sizes = ["2", "4", "8", "16", "32", "64", "128", "256", "512"]
    assert labels(panels(noise_power())[0].drawing)[:9] == sizes
    assert {"1e-6", "0.0001", "0.01", "1"} <= set(labels(panels(lines([1e-6, 1.0], y=Axis("y", log=True)))[0].drawing))


def test_a_symbol_on_the_edge_of_a_set_scale_stays_whole_and_one_beyond_it_is_left_out():
    drawing = panels(lines([0.0, 1.0, 5.0], y=Axis("y", domain=(0, 1))))[0].drawing.to_dict(validate=False)
    symbols = drawing["layer"][-1]
    assert [row["y"] for row in drawing["datasets"][symbols["data"]["name"]]] == [0.0, 1.0]
    assert "clip" not in symbols["mark"]


# -- categories -----------------------------------------------------------------------------------------------


def dots(names: list[str], series: list[str]) -> Chart:
    rows = [{"label": name, "value": n, "series": one} for n, name in enumerate(names) for one in series]
    return Chart("dots", "A title", "alt", rows, Axis("x"), None, PAIR)


def test_a_long_category_takes_two_lines():
    name = "noise floor with batch norm and half the noise"
    svg = to_svg(panels(dots([name, "short"], ["with batch norm"]))[0].drawing, "a")
    assert re.findall(r"<tspan[^>]*>([^<]+)</tspan>", svg) == ["noise floor with batch", "norm and half the noise"]


def test_series_get_lanes_of_their_own_only_where_a_category_has_several():
    one, both = (
        panels(dots(["a", "b"], series))[0].drawing.to_dict(validate=False) for series in (list(PAIR)[:1], list(PAIR))
    )
    assert all("yOffset" not in layer["encoding"] for layer in one["layer"])
    assert all("yOffset" in layer["encoding"] for layer in both["layer"])
    assert one["height"] < both["height"]


def test_categories_stand_in_their_order_of_appearance():
    assert labels(panels(dots(["b", "a", "c"], list(PAIR)))[0].drawing)[-3:] == ["b", "a", "c"]


# -- what cannot be drawn -------------------------------------------------------------------------------------


def test_a_logarithmic_axis_refuses_zero_and_names_the_chart():
    message = (
        "a logarithmic y axis needs positive values, got 0.0 in 'A title'. Leave such rows out, or use a linear axis."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        panels(lines([1.0, 0.0], y=Axis("y", log=True)))


def test_a_logarithmic_axis_refuses_a_negative_end_of_an_interval():
    chart = noise_power()
    chart = dataclasses.replace(chart, rows=[{**chart.rows[0], "low": -0.1}])
    with pytest.raises(ValueError, match=r"needs positive values, got -0\.1 in .The noise of"):
        panels(chart)


def test_a_value_that_is_not_finite_is_refused():
    message = "y values must be finite, got nan in 'A title'. Leave such rows out; the chart then shows a gap."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        panels(lines([1.0, float("nan")]))


def test_a_chart_without_rows_is_refused():
    message = "a chart needs at least one y value, got none in 'A title'. Leave the chart out."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        panels(lines([]))


def test_a_missing_axis_is_refused():
    chart = dataclasses.replace(lines([1.0]), x=None)
    with pytest.raises(
        ValueError, match=r"^a chart of lines needs an axis for x, got None in 'A title'\. Add the axis\.$"
    ):
        panels(chart)


def test_a_row_of_no_known_series_is_refused():
    chart = dataclasses.replace(lines([1.0]), series={"without": "without"})
    message = "every row's series must be one of without, got 'with' in 'A title'. Add it to the chart's series."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        panels(chart)


def test_the_sample_has_every_kind_of_chart():
    kinds = {chart.kind for outcome in sample().outcomes for chart in outcome.result.charts}
    assert kinds == {"lines", "points", "dots", "ribbons", "picture"}
    assert picture().kind == "picture"
