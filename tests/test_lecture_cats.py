"""Black cats, coloured cats: the painting, why re-estimation repairs an affine shift, and the claim itself."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from functools import partial

import pytest
import torch
from lecture_runs import SETTINGS, quick
from torch import nn

from batchnorm import lecture
from batchnorm.experiment.judgement import Status
from batchnorm.layers import BatchNorm2d
from batchnorm.lecture import data_sets, tested_on_other_cats
from batchnorm.lecture.claim_criteria import CRITERIA
from batchnorm.lecture.claims import black_cats
from batchnorm.lecture.painted_cats import BRIGHTNESS, CONTRAST, LIGHT, NOISE, PAINTINGS, mosaic, paint, with_share
from batchnorm.lecture.tested_on_other_cats import (
    Findings,
    adapted,
    convolutional,
    distances,
    parts,
    recovered,
    shifted,
)
from batchnorm.population import recalibrate
from batchnorm.reporting.png import png

QUICK = SETTINGS["cats"]  # 20 steps a network
short = partial(quick, "cats")


# Pictures are float32 of 0 to 1, each value rounded two or three times by 6e-8: far inside assert_close's 1e-5.


def few() -> torch.Tensor:
    """40 silhouettes, cats and dogs."""
    return data_sets.cats().x[::50]


# -- painting -------------------------------------------------------------------------------------------------


def test_black_cats_are_black_on_a_light_ground_and_shaded_at_their_edges():
    shapes = few()
    picture = paint("black", shapes, 0)
    assert picture.shape == (len(shapes), 3, 28, 28)
    assert (picture.movedim(1, -1)[shapes == 1] == 0).all()
    assert picture.movedim(1, -1)[shapes == 0].min() >= LIGHT
    assert picture.max() <= 1
    ground = picture.amax((2, 3), keepdim=True)  # every silhouette has pixels that are all ground
    torch.testing.assert_close(picture, ground * (1 - shapes[:, None]))


def test_coloured_cats_differ_from_black_ones_in_colour_and_not_in_shape():
    shapes = few()
    black, coloured = (paint(name, shapes, 0) for name in ("black", "coloured"))
    # what was added to black is one colour for each silhouette, times the silhouette
    colour = torch.stack([picture[:, shape == 1][:, 0] for picture, shape in zip(coloured, shapes, strict=True)])
    torch.testing.assert_close(coloured - black, colour[:, :, None, None] * shapes[:, None])
    assert len(colour.unique(dim=0)) == len(shapes)
    assert coloured.min() >= 0
    assert coloured.max() <= 1


def test_contrast_and_inversion_are_affine_maps_of_the_same_black_pictures():
    black = paint("black", few(), 7)
    assert torch.equal(paint("contrast", few(), 7), CONTRAST * black + BRIGHTNESS)
    assert torch.equal(paint("inverted", few(), 7), 1 - black)
    assert BRIGHTNESS >= 0
    assert CONTRAST + BRIGHTNESS <= 1


def test_noise_has_mean_zero_and_the_standard_deviation_that_is_stated():
    added = paint("noise", few(), 1) - paint("black", few(), 1)
    error = 5 * NOISE / math.sqrt(added.numel())  # five standard errors; that of the sd is smaller by sqrt 2
    assert abs(added.mean()) < error
    assert abs(added.std() - NOISE) < error


@pytest.mark.parametrize("name", PAINTINGS)
def test_a_painting_is_the_same_for_a_seed_and_another_for_the_next(name):
    assert torch.equal(paint(name, few(), 4), paint(name, few(), 4))
    assert not torch.equal(paint(name, few(), 4), paint(name, few(), 5))


def test_one_in_twenty_is_a_cat_where_the_class_mix_shifts():
    for examples in shifted("mix", 0):
        expected = len(examples) / 20
        assert abs(int((examples.y == 0).sum()) - expected) <= 0.5  # to the nearest image
        assert len(examples) > 150


def test_a_share_keeps_every_example_of_the_other_classes_in_order():
    picked = with_share(torch.tensor([0, 1, 0, 1, 1, 0, 1]), 0, 0.2)
    assert picked.tolist() == [0, 1, 3, 4, 6]


def test_a_share_that_would_need_more_examples_than_there_are_says_so():
    with pytest.raises(
        ValueError, match=r"a share of 0.9 needs 18 examples of class 0, got 1\. Take a smaller share\."
    ):
        with_share(torch.tensor([0, 1, 1]), 0, 0.9)


def decoded(file: bytes) -> torch.Tensor:
    """Pixels (H, W, 3) of a PNG file of 8-bit red, green, blue without filters; each chunk's checksum is checked."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(file):
        (length,) = struct.unpack(">I", file[at : at + 4])
        kind, body = file[at + 4 : at + 8], file[at + 8 : at + 8 + length]
        assert struct.unpack(">I", file[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, compression, filters, interlace = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, compression, filters, interlace) == (8, 2, 0, 0, 0)
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + 3 * width)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape(height, width, 3)


def test_a_png_holds_the_picture_rounded_to_256_values_and_cut_to_them():
    picture = torch.rand(3, 5, 7) * 1.4 - 0.2
    expected = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(decoded(png(picture)), expected)


def test_a_mosaic_shows_rows_side_by_side_with_every_pixel_enlarged():
    rows = [torch.rand(4, 3, 2, 3), torch.rand(4, 3, 2, 3)]
    whole = mosaic(rows, zoom=2)
    assert whole.shape == (3, 8, 24)
    assert torch.equal(whole[:, 4:8:2, 6:12:2], rows[1][1])
    assert torch.equal(whole[:, 1::2, 1::2], whole[:, ::2, ::2])


# -- why re-estimation repairs an affine shift ----------------------------------------------------------------


def one_layer(padding: int = 0) -> nn.Sequential:
    """A convolution and batch norm with gamma and beta that are not 1 and 0, in float64."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, padding, bias=False), BatchNorm2d(8)).double().eval()
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net


def normalized(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Output with the statistics of ``x``, less beta."""
    with torch.no_grad():
        return adapted(net, x)(x) - net[1].bias.view(1, -1, 1, 1)


def test_re_estimated_statistics_undo_contrast_and_brightness_up_to_eps():
    """With variance V of a channel: gamma c (u - m) / sqrt(c^2 V + eps), so the outputs differ by a known factor."""
    net, black = one_layer(), paint("black", few(), 0).double()
    before, after = normalized(net, black), normalized(net, CONTRAST * black + BRIGHTNESS)
    with torch.no_grad():
        var = net[0](black).var((0, 2, 3)).view(1, -1, 1, 1)
    eps = net[1].eps
    factor = ((var + eps) / (var + eps / CONTRAST**2)).sqrt()
    # 48 products and sums in float64 round by about 1e-15 of values up to 10, divided by sd of 0.1 or more
    torch.testing.assert_close(after, before * factor, rtol=0, atol=1e-12)
    bound = before.abs() * eps * (1 / CONTRAST**2 - 1) / var  # 1 - sqrt(1 - t) <= t
    assert ((after - before).abs() <= bound + 1e-12).all()


def test_re_estimated_statistics_keep_the_sign_that_inversion_turns():
    net, black = one_layer(), paint("black", few(), 0).double()
    torch.testing.assert_close(normalized(net, 1 - black), -normalized(net, black), rtol=0, atol=1e-12)


def test_a_border_of_zeros_would_break_the_repair():
    net, black = one_layer(padding=2), paint("black", few(), 0).double()
    before, after = normalized(net, black), normalized(net, CONTRAST * black + BRIGHTNESS)
    assert (after - before).abs().max() > 0.1


def test_a_whole_network_answers_as_before_once_its_statistics_are_re_estimated():
    net = convolutional(partial(BatchNorm2d, eps=1e-12)).double().eval()
    black = paint("black", few(), 0).double()
    recalibrate(net, [black])
    with torch.no_grad():
        before = net(black)
        changed, repaired, inverted = (
            model(x)
            for model, x in (
                (net, CONTRAST * black + BRIGHTNESS),
                (adapted(net, CONTRAST * black + BRIGHTNESS), CONTRAST * black + BRIGHTNESS),
                (adapted(net, 1 - black), 1 - black),
            )
        )
    # layer 1 differs by eps (1 / c^2 - 1) / V, 1e-9 for V of 0.01; each later layer divides by its own sd
    torch.testing.assert_close(repaired, before, rtol=0, atol=1e-6)
    assert (changed - before).abs().max() > 0.1
    assert (inverted - before).abs().max() > 0.1


def test_statistics_of_the_same_images_do_not_move_and_less_contrast_moves_the_first_layer_only():
    net = convolutional(BatchNorm2d).eval()
    black = paint("black", few(), 0)
    net = adapted(net, black)
    assert distances(net, adapted(net, black)) == [0, 0, 0]
    first, *others = distances(net, adapted(net, CONTRAST * black + BRIGHTNESS))
    # the sd alone moves by 1 - c; later layers see what they saw, but for eps and float32: 1e-5 / c^2 / V for V of 0.1
    assert first > 1 - CONTRAST - 1e-3
    assert max(others) < 1e-2


def test_adapting_leaves_the_model_as_it_was():
    net = convolutional(BatchNorm2d).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    again = adapted(net, paint("coloured", few(), 0))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in net.named_parameters())
    assert not torch.equal(net.get_buffer("norm1.running_mean"), again.get_buffer("norm1.running_mean"))


# -- the share that is won back -------------------------------------------------------------------------------


def test_the_share_won_back_is_what_all_seeds_won_over_what_all_lost():
    clean, before = torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.5, 0.7, 0.9])
    after = torch.tensor([0.8, 0.7, 0.9])  # the last seed lost nothing, so it has no share of its own
    shares = recovered(clean, before, after)
    torch.testing.assert_close(shares.mean(), torch.tensor(0.3 / 0.6))
    assert shares.isfinite().all()


def test_equal_shares_of_unequal_losses_have_no_spread():
    clean, before = torch.full((4,), 0.9).double(), torch.tensor([0.5, 0.6, 0.7, 0.88]).double()
    shares = recovered(clean, before, before + 0.25 * (clean - before))
    torch.testing.assert_close(shares, torch.full((4,), 0.25).double())


# -- the claim ------------------------------------------------------------------------------------------------


def test_no_silhouette_is_in_two_parts_of_a_seed():
    found = parts(1)
    assert {name: len(index) for name, index in found.items()} == {**tested_on_other_cats.PARTS, "test": 400}
    assert torch.cat(list(found.values())).unique().numel() == len(data_sets.cats())


def test_both_arms_start_by_one_rule():
    """He et al. 2015: sd sqrt(2 / fan in), which 32 x 144 values meet within five standard errors."""
    for norm in (None, BatchNorm2d):
        weight = convolutional(norm).get_parameter("w3.weight")
        expected = math.sqrt(2 / 144)
        assert abs(weight.std().item() - expected) < 5 * expected / math.sqrt(2 * weight.numel())
    assert (convolutional(None).get_parameter("w1.bias") == 0).all()


@pytest.mark.slow
def test_every_criterion_of_the_claim_is_judged_the_main_one_first():
    keys = [verdict.criterion.key for verdict in short()[0].verdicts]
    assert keys == [key for key in CRITERIA if key.startswith("cats-")]
    assert keys[0] == "cats-shift"
    assert len(keys) == 7


@pytest.mark.slow
def test_every_verdict_has_finite_effects_or_says_which_guard_failed():
    for verdict in short()[0].verdicts:
        assert verdict.sentence.endswith(".")
        assert "nan" not in verdict.sentence
        if verdict.status == Status.INVALID:
            assert verdict.criterion.guard
            assert verdict.failed_guard
        else:
            assert verdict.estimate is not None
            assert len(verdict.estimate.values) == QUICK.seeds
            assert all(map(math.isfinite, verdict.estimate.values))


@pytest.mark.slow
def test_charts_are_json_able_and_finite_and_declare_their_series():
    result, _ = short()
    json.dumps(result.to_dict()["charts"], allow_nan=False)
    json.dumps(dict(result.numbers), allow_nan=False)
    assert [chart.kind for chart in result.charts] == ["picture", "dots", "points", "dots", "lines"]
    for chart in result.charts[1:]:
        assert {row["series"] for row in chart.rows} == set(chart.series)
        assert set(chart.dashed) <= set(chart.series)
        numbers = [row[key] for row in chart.rows for key in ("x", "y", "value", "low", "high") if key in row]
        assert all(math.isfinite(number) for number in numbers)
        assert chart.alt


@pytest.mark.slow
def test_the_picture_shows_ten_silhouettes_in_five_paintings():
    row = short()[0].charts[0].rows[0]
    pixels = decoded(base64.b64decode(row["png"]))
    assert row["width"] == pixels.shape[1] == 10 * 28 * 3
    assert pixels.shape[0] == len(PAINTINGS) * 28 * 3
    assert (pixels[:84] == 0).any()  # black cats first
    assert not (pixels[168:252] == 0).any()  # less contrast: no black


@pytest.mark.slow
def test_progress_rises_to_one():
    _, steps = short()
    assert len(steps) == QUICK.seeds * 2 * len(tested_on_other_cats.RATES)
    assert list(steps) == sorted(steps)
    assert steps[-1] == 1


@pytest.mark.slow
def test_a_second_run_gives_the_same_numbers_whatever_the_threads_and_leaves_the_random_state_and_threads_alone():
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    torch.set_num_threads(threads + 1)
    try:
        state = torch.get_rng_state()
        again = lecture.run("cats", QUICK).result
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert again.to_dict() == short()[0].to_dict()


@pytest.mark.slow
def test_networks_that_have_not_learned_make_the_claim_invalid():
    """Twenty steps are too few to reach 85%."""
    main = short()[0].verdicts[0]
    assert main.status == Status.INVALID
    assert main.failed_guard.endswith("on black cats")


def made_up(**accuracy: tuple[float, float, float]) -> Findings:
    """Findings of two equal seeds: for each shift accuracy without, with, and re-estimated; black is 0.9."""
    found = Findings()
    for shift in tested_on_other_cats.SHIFTS:
        values = accuracy.get(shift, (0.9, 0.9, 0.9))
        for series, value in zip(("without", "with", "again"), values, strict=True):
            found.values[series, shift] += [value, value]
    return found


def test_a_repair_is_judged_by_the_share_of_what_was_lost():
    verdict = black_cats._repair(made_up(contrast=(0.6, 0.5, 0.9)), "affine")
    assert verdict.status == Status.SUPPORTED
    assert verdict.sentence == (
        "Contrast × 0.3, brightness + 0.3: 50.0% with stored, 90.0% with new statistics (100% of 40.0 points won back)."
    )


def test_a_repair_of_a_shift_that_cost_little_is_not_judged():
    verdict = black_cats._repair(made_up(noise=(0.6, 0.87, 0.9)), "noise")
    assert verdict.status == Status.INVALID
    assert verdict.failed_guard == "only 3.0 points lost"


def test_losing_accuracy_by_re_estimation_under_another_class_mix_is_the_opposite():
    verdict = black_cats._mix(made_up(mix=(0.9, 0.9, 0.8)))
    assert verdict.status == Status.OPPOSITE
    assert "10.0 points lost" in verdict.sentence


@pytest.mark.parametrize(
    ("rang", "words"),
    [
        ((8.0, 8.0, 24.0), "raises its alarm after 8 coloured pictures (3 of 3 seeds"),
        ((8.0, math.inf, math.inf), "raises its alarm in fewer than half of the seeds (1 of 3 seeds"),
        ((math.inf,) * 3, "raises its alarm in no seed (0 of 3 seeds"),
    ],
)
def test_the_title_says_in_how_many_seeds_there_is_an_alarm(rang, words):
    found = made_up()
    for shift in tested_on_other_cats.STREAMED:
        for number in range(tested_on_other_cats.LOOK, tested_on_other_cats.STREAM + 1, tested_on_other_cats.LOOK):
            found.values["evidence", shift, number] += [0.0, 0.0, 0.0]
        found.values["adapted", shift] += [math.inf] * 3
        found.values["guarded", shift] += [0.9] * 3
        found.values["rang", shift] += rang if shift == "coloured" else (math.inf,) * 3
    assert words in black_cats._alarm(found).title


def test_the_claim_says_that_these_are_silhouettes_and_not_photographs():
    assert "not photographs" in black_cats.CLAIM.arms
    assert "photographs" in black_cats.CLAIM.not_shown


def test_a_monitor_that_has_only_the_model_hears_coloured_cats_and_not_black_ones():
    black = tested_on_other_cats.painted("black", 0)
    part = parts(0)
    torch.manual_seed(0)
    model = tested_on_other_cats._trained(BatchNorm2d, 0, 0.1, black[part["train"]], 60)
    found = Findings()
    for shift in tested_on_other_cats.STREAMED:
        tested_on_other_cats._listen(found, shift, model, shifted(shift, 0)[0].x)
    assert found.mean("rang", "black") == math.inf
    assert found.mean("rang", "coloured") <= 100
    last = found.mean("evidence", "coloured", tested_on_other_cats.STREAM)
    assert last > 2 > found.mean("evidence", "black", tested_on_other_cats.STREAM)


@pytest.mark.slow
def test_a_guarded_adapter_repairs_coloured_cats_and_leaves_black_ones_alone():
    black, part = tested_on_other_cats.painted("black", 0), parts(0)
    torch.manual_seed(0)
    model = tested_on_other_cats._trained(BatchNorm2d, 0, 0.1, black[part["train"]], 160)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Findings()
    for shift in tested_on_other_cats.STREAMED:
        fresh, test = shifted(shift, 0)
        tested_on_other_cats._follow(found, shift, model, black[part["train"]].x, fresh.x, test)
        found.values["with", shift].append(tested_on_other_cats.accuracy(model, test))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.mean("adapted", "black") == math.inf
    assert found.mean("guarded", "black") == found.mean("with", "black")
    assert found.mean("adapted", "coloured") <= 200
    # 400 test pictures: five standard errors of a difference are 0.17 at most, and pairing makes them less
    assert found.mean("guarded", "coloured") > found.mean("with", "coloured") + 0.1
    assert "(it began in 1 of 1 seeds)" in black_cats._repaired(found)
