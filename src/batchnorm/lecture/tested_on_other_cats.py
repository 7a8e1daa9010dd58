"""Networks that learned from black cats, tested on other pictures: as they stand, and with re-estimated statistics.

A convolution without padding followed by batch norm takes x and c x + d to the same output for any c > 0 once its
statistics are re-estimated: conv(c x + d) = c conv(x) + d sum(w), and batch norm removes scale and offset of a
channel. So a change of contrast and brightness is repaired but for eps; nothing like it holds for noise, or for c < 0.
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
# Of 1989 silhouettes; the other 400 are for testing
PARTS = {"train": 1000, "validation": 189, "adaptation": 400}
NUMBERS = (8, 32, 128, PARTS["adaptation"])
COUNTED = ("coloured", "contrast")  # shifts that are repaired with every one of NUMBERS
STREAMED = ("black", "coloured")  # that a monitor listens to
CAT, SHARE = 0, 1 / 20
SHIFTS = (*PAINTINGS, "mix")
LAYERS = (1, 2, 3)
# Pictures between two looks at the evidence, and in all: each of those to adapt to once
LOOK, STREAM = 8, PARTS["adaptation"]
ALPHA = 0.01


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured, one value for each seed, by these keys:

    - ("without" or "with" or "again", shift): test accuracy without and with batch norm as it stands, and re-estimated
    - ("again", shift, number): the latter with that many images
    - ("moved", shift, layer): distance of its re-estimated statistics from the stored ones, standard deviations
    - ("rate", arm): best learning rate
    - ("changed",): share of test answers that contrast changes after re-estimation
    - ("evidence", shift, number): log10 of a monitor's evidence after so many images; it has the model alone
    - ("rang", shift): images until its alarm at ALPHA; infinity if there was none
    - ("adapted", shift): images until a guarded adapter used new statistics; infinity if it did not
    - ("guarded", shift): test accuracy with the statistics that it left after all of them
    """

    values: dict[tuple[str | int, ...], list[float]] = field(default_factory=lambda: defaultdict(list))

    def __getitem__(self, key: tuple[str | int, ...]) -> Tensor:
        """Every seed's value, (seeds,), float64."""
        return torch.tensor(self.values[key], dtype=torch.float64)

    def mean(self, *key: str | int) -> float:
        """Mean over seeds."""
        return float(self[key].mean())


def measure(settings: RunSettings, tick: Callable[[], None]) -> Findings:
    """Both arms of every seed trained on black cats and tested on every shift.

    Args:
        settings: Seeds and effort.
        tick: Called after each trained network: for every seed, both arms and every rate of RATES.
    """
    found = Findings()
    for seed in settings.all_seeds:
        models = {}
        for arm, norm in (("without", None), ("with", BatchNorm2d)):
            rate, models[arm] = _tuned(norm, seed, settings.steps(STEPS), tick)
            found.values["rate", arm].append(rate)
        _test(found, seed, models["without"], models["with"])
    return found


# -- training -------------------------------------------------------------------------------------------------


def convolutional(norm: Norm | None) -> nn.Sequential:
    """Three convolutions of 8, 16 and 32 channels and a linear layer, (N, 3, 28, 28) -> (N, 2).

    No padding: a border of zeros would not change with the picture's contrast. Both arms start from the
    initialization of He et al. 2015.
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
        if isinstance(module, nn.Conv2d):  # drawn and dropped, so that both arms get the same weights
            module.register_parameter("bias", None)
    return net


def parts(seed: int) -> dict[str, Tensor]:
    """Which silhouettes a seed trains, tunes, adapts and tests on."""
    order, _ = data_sets.split(len(data_sets.cats()), len(data_sets.cats()), seed)
    sizes = [*PARTS.values(), len(order) - sum(PARTS.values())]
    return dict(zip([*PARTS, "test"], order.split(sizes), strict=True))


def painted(name: str, seed: int) -> data_sets.Examples:
    """All silhouettes in one painting, with their classes."""
    return data_sets.Examples(paint(name, data_sets.cats().x, seed), data_sets.cats().y)


def _tuned(norm: Norm | None, seed: int, steps: int, tick: Callable[[], None]) -> tuple[float, nn.Sequential]:
    """The rate whose network answers most black validation images right (the smallest of equals), and that network."""
    black, part = painted("black", seed), parts(seed)
    trained = {}
    for rate in RATES:
        trained[rate] = _trained(norm, seed, rate, black[part["train"]], steps)
        tick()
    best = max(RATES, key=lambda rate: accuracy(trained[rate], black[part["validation"]]))
    return best, trained[best]


def _trained(norm: Norm | None, seed: int, rate: float, examples: data_sets.Examples, steps: int) -> nn.Sequential:
    """A network after SGD with momentum 0.9 and a rate that falls to 0 in a straight line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = convolutional(norm)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with warnings.catch_warnings():
        # too large a rate diverges, which is an outcome here and no reason to warn
        warnings.filterwarnings("ignore", "NaN or infinity in the batch statistics", RuntimeWarning)
        for picked in data_sets.batch_indices(torch.arange(len(examples)), BATCH, steps, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(examples.x[picked]), examples.y[picked]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# -- testing --------------------------------------------------------------------------------------------------


def _test(found: Findings, seed: int, without: nn.Sequential, with_norm: nn.Sequential) -> None:
    answers = {}
    for shift in SHIFTS:
        fresh, test = shifted(shift, seed)
        repaired = adapted(with_norm, fresh.x)
        answers[shift] = _answers(repaired, test.x)
        for series, model in (("without", without), ("with", with_norm), ("again", repaired)):
            found.values[series, shift].append(accuracy(model, test))
        for layer, distance in zip(LAYERS, distances(with_norm, repaired), strict=True):
            found.values["moved", shift, layer].append(distance)
        for number in NUMBERS if shift in COUNTED else ():
            found.values["again", shift, number].append(accuracy(adapted(with_norm, fresh.x[:number]), test))
    learned = painted("black", seed)[parts(seed)["train"]].x
    for shift in STREAMED:
        fresh, test = shifted(shift, seed)
        _listen(found, shift, with_norm, fresh.x)
        _follow(found, shift, with_norm, learned, fresh.x, test)
    found.values[("changed",)].append(float((answers["black"] != answers["contrast"]).double().mean()))


def _listen(found: Findings, shift: str, model: nn.Sequential, x: Tensor) -> None:
    """The alarm of a monitor that has only the model, while images arrive one after another."""
    monitor = ShiftMonitor(model, ALPHA, examples=None, budget=None, batch=BATCH)
    rang = float("inf")
    with monitor, torch.no_grad():
        for number in range(LOOK, STREAM + 1, LOOK):
            model(x[number - LOOK : number])
            found.values["evidence", shift, number].append(monitor.log_evidence / math.log(10))
            rang = min(rang, number if monitor.alarm else rang)
    found.values["rang", shift].append(rang)


def _follow(
    found: Findings, shift: str, model: nn.Sequential, learned: Tensor, x: Tensor, test: data_sets.Examples
) -> None:
    """The answers of an adapter on the same images; its monitor was calibrated on the training images."""
    model = copy.deepcopy(model)
    monitor = ShiftMonitor(model, ALPHA, examples=None, budget=None)
    monitor.calibrate(learned.split(100))
    with Adapter(monitor) as adapter, torch.no_grad():
        for part in x.split(LOOK):
            model(part)
        left = Statistics.of(batch_norms(model))
    left.put(batch_norms(model))
    began = (event.examples for event in adapter.history if event.state == "adapted")
    found.values["adapted", shift].append(next(began, float("inf")))
    found.values["guarded", shift].append(accuracy(model, test))


def shifted(shift: str, seed: int) -> tuple[data_sets.Examples, data_sets.Examples]:
    """Pictures of one kind of SHIFTS to adapt to, and others to test on."""
    examples, part = painted("black" if shift == "mix" else shift, seed), parts(seed)
    fresh, test = examples[part["adaptation"]], examples[part["test"]]
    if shift == "mix":
        return fresh[with_share(fresh.y, CAT, SHARE)], test[with_share(test.y, CAT, SHARE)]
    return fresh, test


def adapted(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A copy with the same weights and the statistics of the unlabelled images ``x``."""
    model = copy.deepcopy(model)
    recalibrate(model, x.split(100))
    return model


def accuracy(model: nn.Module, examples: data_sets.Examples) -> float:
    """Share of right answers."""
    return float((_answers(model, examples.x) == examples.y).double().mean())


@torch.no_grad()
def _answers(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)  # argmax of NaN is a class, but no answer


def distances(before: nn.Module, after: nn.Module) -> list[float]:
    """How far each layer's statistics moved, in standard deviations of ``before``, mean over channels.

    The 2-Wasserstein distance of normal laws with these statistics.
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
    """Share of the lost accuracy that each seed won back, (seeds,).

    No seed is divided by its own loss, which may be small. The mean is the accuracy won by all seeds over the accuracy
    lost by all; the spread is that of this ratio by the delta method (Cochran 1977, Sampling Techniques, chapter 6).
    """
    lost, won = clean - before, after - before
    share = won.sum() / lost.sum()
    return share + (won - share * lost) / lost.mean()
