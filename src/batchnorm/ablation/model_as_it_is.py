"""The questions that need no training, for one model: inputs, depth, gamma and beta, noise, test time.

The answers do not show whether batch norm helps to learn. Intervals are over random draws of examples, not over
trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.ablation.question_criteria import CRITERIA, judge
from batchnorm.ablation.questions import noise_of_layers, test_statistics
from batchnorm.ablation.questions.input_scales import inputs, spread
from batchnorm.ablation.study import Measure
from batchnorm.ablation.user_data import examples_in, first_examples
from batchnorm.ablation.user_model import Subject, kept_buffers, received
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Claim, Numbers, Result, chart, claim
from batchnorm.experiment.figures_in_words import Figure, in_words, known
from batchnorm.instruments.gamma_and_beta import census
from batchnorm.instruments.signal_propagation import resemblance, sample
from batchnorm.instruments.snapshots import Layers, Snapshot
from batchnorm.layers import batch_norms
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.reporting.charts.chart_data import Chart, Role, Rows
from batchnorm.reporting.text import many

_EXAMPLES = 128  # the most examples for the stable rank
_LAYERS = 16  # the most layers in a chart


def claims(subject: Subject, model: nn.Module, seeds: range) -> list[Claim]:
    """The claims that need no training; the claim on input scales only if the inputs have several features."""
    x = inputs(subject.data)
    claims_to_ask = (
        [claim("ablation", "scale-as-it-is", lambda _, __: spread(x, seeds))]
        if x is not None and x.shape[1] > 1
        else []
    )
    questions: dict[str, tuple[Measure, Mapping[str, Figure]]] = {
        "depth": (measure_depth, {"examples": _EXAMPLES}),
        "census": (measure_census, {}),
        "noise": (noise_of_layers.measure, noise_of_layers.FIGURES),
        "test-time": (test_statistics.measure, test_statistics.FIGURES),
    }
    for name, (measure, figures) in questions.items():
        run = partial(_run, measure, subject, model, seeds)
        claims_to_ask.append(claim("ablation", name, run, of_what="Your model as it is", **figures))
    return claims_to_ask


def _run(measure: Measure, subject: Subject, model: nn.Module, seeds: range, *_: object) -> Result:
    return measure(subject, [model], seeds)


# -- depth ----------------------------------------------------------------------------------------------------


def measure_depth(subject: Subject, models: Sequence[nn.Module], seeds: Sequence[int]) -> Result:
    """How similar the examples are in the inputs of each layer, in eval mode."""
    model, batch = models[0], subject.data.train[0]
    batch = first_examples(batch, examples_in(batch) if subject.data.whole else _EXAMPLES)
    with kept_buffers(model):
        model.eval()
        values_by_layer = {path: sample(x[:_EXAMPLES])[0] for path, x in received(model, batch).items() if x.ndim > 1}
    ranks = {path: [_rank(values, seed) for seed in seeds] for path, values in values_by_layer.items()}
    paths = [*ranks]
    if not paths:
        return Result(CRITERIA.unjudged("depth", "no batch norm layer ran on the first batch"), [])
    first, last = (torch.tensor(ranks[path]) for path in (paths[0], paths[-1]))
    alone = "there is only one batch norm layer, so the first is the last" if len(paths) == 1 else ""
    verdict = judge(
        "depth-rank", (last / first).log2().tolist(),
        "The stable rank of a layer's inputs is {first:.3g} at the first ({first_layer}) and {last:.3g} at the last "
        "({last_layer}) of {layers} batch norm layers.",
        failed_guard=alone, first=first.mean(), first_layer=_named(paths[0]), last=last.mean(),
        last_layer=_named(paths[-1]), layers=len(paths),
    )  # fmt: skip
    title = verdict.heading
    if alone:
        title = f"The stable rank of the inputs of {_named(paths[0])} is {known(float(first.mean()), 3)}"
    return Result([verdict], [_depth_chart(values_by_layer, title)], _depth_numbers(values_by_layer))


def _named(path: str) -> str:
    return path or "the model itself"


def _rank(values: Tensor, seed: int) -> float:
    half = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[: max(2, len(values) // 2)]
    return resemblance(values[half])["stable_rank"]


def _depth_numbers(seen: dict[str, Tensor]) -> Numbers:
    ends = {"first": next(iter(seen.values())), "last": list(seen.values())[-1]}
    numbers: Numbers = {}
    for name, values in ends.items():
        cosine = resemblance(values)["cosine"]
        numbers[f"mean cosine between examples, {name} layer"] = paired_seeds.mean(torch.tensor([cosine]))
        numbers[f"mean square of a value, {name} layer"] = paired_seeds.mean(values.square().mean().reshape(1))
    return numbers


def _depth_chart(seen: dict[str, Tensor], title: str) -> Chart:
    panels = {
        "stable rank": lambda values: resemblance(values)["stable_rank"],
        "mean square": lambda values: float(values.square().mean()),
    }
    rows: Rows = []
    for panel, read in panels.items():
        for depth, values in enumerate(seen.values(), start=1):
            y = read(values)
            if 0 < y < float("inf"):
                rows.append({"x": depth, "y": paired_seeds.figures(y), "series": "received", "panel": panel})
    return chart("ablation", "depth", "depth", rows, {"received": "with"}, title=title)


# -- gamma and beta -------------------------------------------------------------------------------------------


def measure_census(_: Subject, models: Sequence[nn.Module], seeds: Sequence[int]) -> Result:
    """Gamma, beta and dead channels of every layer."""
    stored = {path: layer for path, layer in batch_norms(models[0]).items() if has_stored_statistics(layer)}
    if not stored:
        return Result(CRITERIA.unjudged("census", "the batch norm layers store no statistics"), [])
    layers = Layers(stored)
    numbers_by_layer = census(layers, Snapshot.of(layers))
    dead = numbers_by_layer["dead"]
    worst = int(dead.argmax())
    # the value has no sampling error, so it is the same for all seeds and the interval has no width
    verdict = judge(
        "census-dead", [float(dead.mean())] * len(seeds),
        "{dead:.1%} of channels are dead, mean over {layers}"
        + ("; most at {worst}, {most:.1%}." if dead.any() else "."),
        dead=dead.mean(), layers=many(len(stored), "layer"), worst=_named(layers.names[worst]), most=dead[worst],
    )  # fmt: skip
    numbers: Numbers = {
        "median |gamma|, smallest and largest over layers": _range(numbers_by_layer["gamma"]),
        "median beta, smallest and largest over layers": _range(numbers_by_layer["beta"]),
        "share active behind a ReLU by beta / |gamma|, smallest and largest over layers": _range(
            numbers_by_layer["active"]
        ),
    }
    return Result([verdict], [_census_chart(layers.names, numbers_by_layer["gamma"])], numbers)


def _range(values: Tensor) -> str:
    return in_words("{least:.3g} to {most:.3g}", least=values.min(), most=values.max())


def _census_chart(names: Sequence[str], gamma: Tensor) -> Chart:
    indices = paired_seeds.evenly(len(names), _LAYERS).tolist()
    role: dict[str, Role] = {"gamma": "with"}
    title = f"The median |gamma| of a layer lies between {known(float(gamma.min()))} and {known(float(gamma.max()))}"
    rows = [{"label": _named(names[i]), "value": paired_seeds.figures(gamma[i]), "series": "gamma"} for i in indices]
    return chart("ablation", "census", "census", rows, role, title=title)
