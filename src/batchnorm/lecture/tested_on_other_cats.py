"""Networks that learned from black cats, tested on other pictures with stored and with re-estimated statistics.

With re-estimated statistics, a convolution without padding followed by batch norm has the same output for x and for
c x + d if c > 0: conv(c x + d) = c conv(x) + d sum(w), and batch norm removes scale and offset of a channel. So a
change of contrast and brightness is repaired except for eps. Noise, and a change with c < 0, are not repaired exactly.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.adaptation import Adapter, Statistics
from batchnorm.experiment.run_settings import RunSettings
from batchnorm.layers import BatchNorm2d, batch_norms
from batchnorm.lecture import data_sets
from batchnorm.lecture.networks import Norm
from batchnorm.lecture.painted_cats import PAINTINGS, paint, with_share
from batchnorm.moments import Moments
from batchnorm.population import recalibrate
from batchnorm.shift import ShiftMonitor

RATES = (0.01, 0.03, 0.1, 0.3)
STEPS = 160
BATCH = 32
# Numbers of silhouettes, of 1989; the other 400 are test examples
PARTS = {"train": 1000, "validation": 189, "adaptation": 400}
NUMBERS = (8, 32, 128, PARTS["adaptation"])
COUNTED = ("coloured", "contrast")  # shifts that are repaired with each number of images in NUMBERS
STREAMED = ("black", "coloured")  # pictures that a monitor observes
CAT, SHARE = 0, 1 / 20  # class of cats, and its share in the shift "mix"
SHIFTS = (*PAINTINGS, "mix")
LAYERS = (1, 2, 3)
# Number of pictures between two readings of the evidence, and in all: each picture for adaptation once
LOOK, STREAM = 8, PARTS["adaptation"]
ALPHA = 0.01


@dataclass(frozen=True, slots=True)
class Findings:
    """Measurements, one value for each seed, by these keys:

    - ("without", shift), ("with", shift): test accuracy without and with batch norm, with stored statistics
    - ("again", shift): test accuracy with batch norm and re-estimated statistics
    - ("again", shift, number): test accuracy with statistics re-estimated on this number of images
    - ("moved", shift, layer): distance between re-estimated and stored statistics of a layer, in standard deviations
    - ("rate", arm): best learning rate
    - ("changed",): share of test answers that differ between black and contrast after re-estimation
    - ("evidence", shift, number): log10 of the evidence of an uncalibrated monitor after this number of images
    - ("rang", shift): number of images until this monitor's alarm at ALPHA; infinity without an alarm
    - ("adapted", shift): number of images until a guarded adapter used new statistics; infinity if it never did
    - ("guarded", shift): test accuracy with the adapter's statistics after all images
    """

    values: dict[tuple[str | int, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    def __getitem__(self, key: tuple[str | int, ...]) -> Tensor:
        """The values of all seeds for a key, (seeds,), float64."""
        return torch.tensor(self.values[key], dtype=torch.float64)

    def mean(self, *key: str | int) -> float:
        """Mean over seeds."""
        return float(self[key].mean())


def measure(settings: RunSettings, tick: Callable[[], None]) -> Findings:
    """Train both arms of every seed on black cats, and test them on every shift.

    Args:
        settings: Seeds and effort.
        tick: Called after the training of each network: for each seed, arm and rate of RATES.
    """
    findings = Findings()
    for seed in settings.all_seeds:
        models = {}
        for arm, norm in (("without", None), ("with", BatchNorm2d)):
            rate, models[arm] = _tuned(norm, seed, settings.steps(STEPS), tick)
            findings.values["rate", arm].append(rate)
        _test(findings, seed, models["without"], models["with"])
    return findings


# -- training -------------------------------------------------------------------------------------------------


def convolutional(norm: Norm | None) -> nn.Sequential:
    """Three convolutions of 8, 16 and 32 channels and a linear layer, (N, 3, 28, 28) -> (N, 2).

    There is no padding, since a border of zeros would not change with the picture's contrast. Both arms are initialized
    as in He et al. 2015.
    """
    net, channels = nn.Sequential(), 3
    for layer, (out, kernel, stride) in enumerate(((8, 4, 2), (16, 3, 2), (32, 3, 1)), start=1):
        net.add_module(f"w{layer}", nn.Conv2d(channels, out, kernel, stride))  # 28 -> 13 -> 6 -> 4
        if norm is not None:
            net.add_module(f"norm{layer}", norm(out))
        net.add_module(f"act{layer}", nn.ReLU())
        channels = out
    net.add_module("flat", nn.Flatten())
    net.add_module("w4", nn.Linear(channels * 4 * 4, 2))
    for name, parameter in net.named_parameters():
        if name.startswith("w"):
            nn.init.kaiming_normal_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    for module in net if norm is not None else ():
        if isinstance(module, nn.Conv2d):  # removed afterwards, so that both arms draw the same weights
            module.register_parameter("bias", None)
    return net


def parts(seed: int) -> dict[str, Tensor]:
    """Part ("train", "validation", "adaptation", "test") -> indices of its silhouettes for a seed."""
    order, _ = data_sets.split(len(data_sets.cats()), len(data_sets.cats()), seed)
    sizes = [*PARTS.values(), len(order) - sum(PARTS.values())]
    return dict(zip([*PARTS, "test"], order.split(sizes), strict=True))


def painted(name: str, seed: int) -> data_sets.Examples:
    """Pictures of all silhouettes in one painting, with their classes."""
    return data_sets.Examples(paint(name, data_sets.cats().x, seed), data_sets.cats().y)


def _tuned(norm: Norm | None, seed: int, steps: int, tick: Callable[[], None]) -> tuple[float, nn.Sequential]:
    """The rate with the best accuracy on black validation images (the smallest such rate), and its network."""
    black, part = painted("black", seed), parts(seed)
    trained = {}
    for rate in RATES:
        trained[rate] = _trained(norm, seed, rate, black[part["train"]], steps)
        tick()
    best = max(RATES, key=lambda rate: accuracy(trained[rate], black[part["validation"]]))
    return best, trained[best]


def _trained(norm: Norm | None, seed: int, rate: float, examples: data_sets.Examples, steps: int) -> nn.Sequential:
    """A network trained by SGD with momentum 0.9 and a rate that falls linearly to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = convolutional(norm)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with warnings.catch_warnings():
        # no warning for a rate that is too large: its divergence is a result here
        warnings.filterwarnings("ignore", "NaN or infinity in the batch statistics", RuntimeWarning)
        for picked in data_sets.batch_indices(torch.arange(len(examples)), BATCH, steps, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(examples.x[picked]), examples.y[picked]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# -- testing --------------------------------------------------------------------------------------------------


def _test(findings: Findings, seed: int, without: nn.Sequential, with_norm: nn.Sequential) -> None:
    answers = {}
    for shift in SHIFTS:
        fresh, test = shifted(shift, seed)
        repaired = adapted(with_norm, fresh.x)
        answers[shift] = _answers(repaired, test.x)
        for series, model in (("without", without), ("with", with_norm), ("again", repaired)):
            findings.values[series, shift].append(accuracy(model, test))
        for layer, distance in zip(LAYERS, distances(with_norm, repaired), strict=True):
            findings.values["moved", shift, layer].append(distance)
        for number in NUMBERS if shift in COUNTED else ():
            findings.values["again", shift, number].append(accuracy(adapted(with_norm, fresh.x[:number]), test))
    learned = painted("black", seed)[parts(seed)["train"]].x
    for shift in STREAMED:
        fresh, test = shifted(shift, seed)
        _listen(findings, shift, with_norm, fresh.x)
        _follow(findings, shift, with_norm, learned, fresh.x, test)
    findings.values[("changed",)].append(float((answers["black"] != answers["contrast"]).double().mean()))


def _listen(findings: Findings, shift: str, model: nn.Sequential, x: Tensor) -> None:
    """Record the evidence and the alarm of an uncalibrated monitor on a stream of images."""
    monitor = ShiftMonitor(model, ALPHA, examples=None, budget=None, batch=BATCH)
    rang = float("inf")
    with monitor, torch.no_grad():
        for number in range(LOOK, STREAM + 1, LOOK):
            model(x[number - LOOK : number])
            findings.values["evidence", shift, number].append(monitor.log_evidence / math.log(10))
            rang = min(rang, number if monitor.alarm else rang)
    findings.values["rang", shift].append(rang)


def _follow(
    findings: Findings, shift: str, model: nn.Sequential, learned: Tensor, x: Tensor, test: data_sets.Examples
) -> None:
    """Record when an adapter adapts on the images ``x``, and its test accuracy after them.

    The adapter's monitor is calibrated on the training images.
    """
    model = copy.deepcopy(model)
    monitor = ShiftMonitor(model, ALPHA, examples=None, budget=None)
    monitor.calibrate(learned.split(100))
    with Adapter(monitor) as adapter, torch.no_grad():
        for part in x.split(LOOK):
            model(part)
        left = Statistics.of(batch_norms(model))
    left.put(batch_norms(model))
    began = (event.examples for event in adapter.history if event.state == "adapted")
    findings.values["adapted", shift].append(next(began, float("inf")))
    findings.values["guarded", shift].append(accuracy(model, test))


def shifted(shift: str, seed: int) -> tuple[data_sets.Examples, data_sets.Examples]:
    """Pictures for adaptation and pictures for testing, for one of SHIFTS."""
    examples, part = painted("black" if shift == "mix" else shift, seed), parts(seed)
    fresh, test = examples[part["adaptation"]], examples[part["test"]]
    if shift == "mix":
        return fresh[with_share(fresh.y, CAT, SHARE)], test[with_share(test.y, CAT, SHARE)]
    return fresh, test


def adapted(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A copy of the model with statistics re-estimated on the unlabelled images ``x``."""
    model = copy.deepcopy(model)
    recalibrate(model, x.split(100))
    return model


def accuracy(model: nn.Module, examples: data_sets.Examples) -> float:
    """Share of right answers."""
    return float((_answers(model, examples.x) == examples.y).double().mean())


@torch.no_grad()
def _answers(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return torch.where(
        logits.isfinite().all(1), logits.argmax(1), -1
    )  # argmax of NaN gives a class, which must not count


def distances(before: nn.Module, after: nn.Module) -> list[float]:
    """How far each layer's statistics moved, in standard deviations of ``before``, mean over channels.

    The distance is the 2-Wasserstein distance of normal distributions with these statistics.
    """
    pairs = zip(_laws(before), _laws(after), strict=True)
    return [float((old.w2(new) / old.std).mean()) for old, new in pairs]


def _laws(model: nn.Module) -> list[Moments]:
    paths = batch_norms(model)
    return [
        Moments.from_var(1, model.get_buffer(f"{path}.running_mean"), model.get_buffer(f"{path}.running_var"))
        for path in paths
    ]


def recovered(clean: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Share of the lost accuracy that was won back: one value for each seed, (seeds,), for a confidence interval.

    The mean of the values is the accuracy won by all seeds divided by the accuracy lost by all seeds, because the loss
    of a single seed may be near 0. The spread is that of this ratio by the delta method (Cochran 1977, Sampling
    Techniques, chapter 6).
    """
    lost, won = clean - before, after - before
    share = won.sum() / lost.sum()
    return share + (won - share * lost) / lost.mean()
