"""Question "noise": how much noise do mini-batch statistics add at each layer, and how does it fall with the batch?

For example i, m_i is the mean and v_i the variance of a channel's values over the positions of the example (v_i = 0 if
there are no positions). The values are standardized: over all examples the mean of m_i is 0, and the mean of
v_i + m_i^2 is 1. The values of a batch of M examples have the mean d and the standard deviation s:

    d = mean m_i,    s^2 = mean v_i + mean m_i^2 - d^2

The noise power is computed from d and s as in ``instruments.batch_noise``; for M independent normal values it is
1.5 / M to first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from batchnorm.ablation.question_criteria import CRITERIA, judge
from batchnorm.ablation.questions.speed_and_rates import wide_axis
from batchnorm.ablation.user_data import examples_in
from batchnorm.ablation.user_model import Subject, kept_buffers, own_statistics, received
from batchnorm.experiment import paired_seeds
from batchnorm.experiment.claim import Numbers, Result, chart
from batchnorm.experiment.judgement import Verdict
from batchnorm.instruments.batch_noise import dropout_rate, log_slope, noise_power
from batchnorm.reporting.charts.chart_data import Chart

_EXAMPLES = 512  # with this number of examples no further batch is read
_DRAWS = 128  # batches of each size
_SMALLEST, _LARGEST = 4, 256
_LAYERS = 16  # the most layers in the chart by layer

# The noise in words, for a card and, with more words, for the verdict
POWER = "is {also}{power:.2g} in batches of {size}"
NOISE = POWER + ", as with dropout at {dropout:.1%}; it varies as the batch size to the power {slope:.2f}"

Parts = tuple[Tensor, Tensor]  # m_i and v_i of every example and channel, (N, C) each


def sizes(examples: int) -> list[int]:
    """The batch sizes to measure: powers of two from 4 to at most 256 and at most ``examples``."""
    sizes_to_measure = []
    size = _SMALLEST
    while size <= min(_LARGEST, examples):
        sizes_to_measure.append(size)
        size *= 2
    return sizes_to_measure


def layer_parts(subject: Subject, model: nn.Module) -> dict[str, Parts]:
    """Standardized m_i and v_i of each layer's inputs in eval mode, by path in the order of the forward."""
    parts_by_layer: dict[str, list[Parts]] = {}
    count = 0
    with kept_buffers(model):
        model.eval()
        for batch in [*subject.data.train, *subject.data.held]:
            if count >= _EXAMPLES:
                break
            count += examples_in(batch)
            for path, x in received(model, batch).items():
                parts_by_layer.setdefault(path, []).append(_parts(x))
    own = own_statistics(model)
    return {path: _standardized(parts) for path, parts in parts_by_layer.items() if path in own}


def _parts(x: Tensor) -> Parts:
    values = x.double().reshape(*x.shape[:2], -1).cpu()  # (N, C, positions)
    return values.mean(2), values.var(2, correction=0)


def _standardized(parts: Sequence[Parts]) -> Parts:
    means, inside = (torch.cat(part) for part in zip(*parts, strict=True))
    var = inside.mean(0) + means.var(0, correction=0)
    varies = var > 0
    return ((means - means.mean(0)) / var.sqrt())[:, varies], (inside / var)[:, varies]


def power(parts: Parts, size: int, random: torch.Generator) -> Tensor:
    """Noise power of batches of ``size`` drawn with replacement, mean over draws and channels; NaN without channels."""
    means, inside = parts
    drawn = torch.randint(len(means), (_DRAWS, size), generator=random)
    counts = torch.zeros(_DRAWS, len(means), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(_DRAWS, size, dtype=torch.float64))
    weights = counts / size  # (draws, N)
    d = weights @ means  # (draws, C)
    return noise_power(d, (weights @ (inside + means.square()) - d.square()).clamp_min(0)).mean()


def powers(layers: Mapping[str, Parts], measured: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Noise power at each size, path -> (sizes,), without layers whose noise power is 0 or NaN."""
    random = torch.Generator().manual_seed(seed)
    noise = {path: torch.stack([power(parts, size, random) for size in measured]) for path, parts in layers.items()}
    return {path: values for path, values in noise.items() if bool((values > 0).all())}


def measure(subject: Subject, models: Sequence[nn.Module], seeds: Sequence[int]) -> Result:
    """The noise at every layer; ``models`` has one model for each seed, or one model for all seeds."""
    layers = [layer_parts(subject, model) for model in models]
    examples = min((len(parts[0]) for by_layer in layers for parts in by_layer.values()), default=0)
    measured = sorted({*sizes(examples), *([subject.data.size] if _SMALLEST <= subject.data.size <= examples else [])})
    each = [powers(layers[n % len(layers)], measured, seed) for n, seed in enumerate(seeds)]
    paths = [path for path in each[0] if all(path in by_layer for by_layer in each)]
    if not paths or len(measured) < 2:
        few = f"there are only {examples} examples"
        reason = few if paths else "no layer uses batch statistics, or its noise power is 0 or not finite"
        return Result(CRITERIA.unjudged("noise", reason), [])
    stacked = torch.stack(
        [torch.stack([by_layer[path] for path in paths]) for by_layer in each]
    )  # (seeds, layers, sizes)
    return _result(subject, stacked, paths, measured)


def _result(subject: Subject, noise: Tensor, paths: Sequence[str], measured: Sequence[int]) -> Result:
    whole = noise.mean(1)  # (seeds, sizes)
    slopes = [float(log_slope(values, measured)) for values in whole]
    at = min(measured, key=lambda size: abs(size - subject.data.size))
    own = whole[:, measured.index(at)].mean()
    verdict = judge(
        "noise-slope", slopes, f"The noise power {NOISE}.", power=own, size=at, dropout=dropout_rate(own),
        also=f"{float(whole[:, 0].mean()):.2g} in batches of {measured[0]} and " if at != measured[0] else "",
        slope=sum(slopes) / len(slopes),
    )  # fmt: skip
    numbers: Numbers = {}
    for index, size in enumerate(measured):
        rate = 100 * dropout_rate(float(whole[:, index].mean()))
        numbers[f"batches of {size}, dropout with the same noise power, %"] = paired_seeds.figures(rate, 3)
    return Result([verdict], [_chart(whole, measured, verdict), _layer_chart(noise, paths, measured, at)], numbers)


def _chart(whole: Tensor, measured: Sequence[int], verdict: Verdict) -> Chart:
    rows = paired_seeds.curve(measured, whole.T, middle=torch.mean, positive=True, series="measured")
    rows += [{"x": m, "y": paired_seeds.figures(1.5 / m), "series": "1.5 / M"} for m in measured]
    return chart(
        "ablation", "noise", "main", rows, {"measured": "with", "1.5 / M": "neutral"}, dashed=("1.5 / M",),
        title=verdict.heading, sentence=verdict.sentence,
    )  # fmt: skip


def _layer_chart(noise: Tensor, paths: Sequence[str], measured: Sequence[int], at: int) -> Chart:
    values = noise[:, :, measured.index(at)].mean(0)  # (layers,)
    indices = paired_seeds.evenly(len(paths), _LAYERS).tolist()
    rows = [
        {"label": paths[i] or "the layer", "value": paired_seeds.figures(values[i]), "series": "noise"} for i in indices
    ]
    worst = int(values.argmax())
    most = f"In batches of {at} the noise is largest at {paths[worst] or 'the layer'}: {float(values[worst]):.2g}"
    return chart(
        "ablation", "noise", "layer", rows, {"noise": "with"}, x=wide_axis(f"noise power in batches of {at}", rows),
        title=most, at=at,
    )  # fmt: skip


# For the texts of the question
FIGURES = {"examples": _EXAMPLES, "draws": _DRAWS}
