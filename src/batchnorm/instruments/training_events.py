"""Events: changes between two looks that a user should know, with the code of the doctor's rule if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.processes.membership import ranks_as_words
from batchnorm.reporting.text import many

_STALE = 4.0  # standard errors; noise alone gives about 1
_CALM = 2.0  # an alarm ends at a lower value than it begins, so that noise does not switch it on and off
# looks in a row; a batch with a rare large example changes a running average for a shorter time
_LASTING = 3


@final
@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """A message about a change of state; ``code`` is a rule of the doctor, or None if there is no such rule."""

    message: str
    layer: str | None = None
    code: str | None = None


@final
@dataclass(frozen=True, slots=True)
class _Alarm:
    """An alarm about a quantity: when it begins, when it ends, its message, and how many looks it must last."""

    quantity: str
    code: str | None
    begins: Callable[[float], bool]
    ends: Callable[[float], bool]
    message: str
    looks: int = 1

    def event(self, begun: Sequence[tuple[str, float]]) -> TrainingEvent:
        """One event for all layers whose alarms began at this look; the message shows the first layer's value."""
        layer, value = begun[0]
        others = f"; {len(begun) - 1} more layers likewise" if len(begun) > 1 else ""
        return TrainingEvent(self.message.format(value=value) + others, layer, self.code)


_TABLE = (
    _Alarm(
        "staleness",
        "BN116",
        lambda t: t > _STALE,
        lambda t: t < _CALM,
        "stored means are {value:.1f} standard errors from the batches' (1 is noise): eval mode lags behind",
        looks=_LASTING,
    ),
    _Alarm(
        "short_var",
        "BN116",
        lambda t: t > _STALE,
        lambda t: t < _CALM,
        "stored variances are {value:.1f} standard errors below the batches' (1 is noise): eval mode lags behind",
        looks=_LASTING,
    ),
    _Alarm(
        "m_eff",
        "BN201",
        lambda m: m < 8,
        lambda m: m > 16,
        "a batch's mean varies as much as a mean of {value:.1f} independent values: normalization is noisy",
    ),
    _Alarm("gamma", "BN111", lambda g: g < 1e-3, lambda g: g > 1e-2, "the median |gamma| is only {value:.2g}"),
    _Alarm("dead", "BN106", lambda d: d > 0.5, lambda d: d < 0.4, "{value:.0%} of the channels are dead"),
)


@final
class Events:
    """The states of layers; a state is reported when it begins, and again only if it ended in between.

    NaN in stored statistics, and passes that could not be separated, are reported only once.
    """

    def __init__(self) -> None:
        self._on: set[tuple[str, str]] = set()
        self._looks: dict[tuple[str, str], int] = {}  # looks in a row at which an alarm's condition was met
        self._updates: dict[str, bool] = {}

    def of(
        self, layers: Sequence[str], values: Mapping[str, Sequence[float | None]], *, early: bool
    ) -> Iterator[TrainingEvent]:
        """Events of one look; without staleness if ``early``, when averages still contain initial values."""
        for watched in _TABLE:
            if early and watched.code == "BN116":
                continue
            row = zip(layers, values.get(watched.quantity, ()), strict=False)
            begun = [(layer, v) for layer, v in row if v is not None and self._turns_on(watched, layer, v)]
            if begun:
                yield watched.event(begun)

    def _turns_on(self, watched: _Alarm, layer: str, value: float) -> bool:
        key = watched.quantity, layer
        if key in self._on:
            if watched.ends(value):
                self._on.discard(key)
                self._looks[key] = 0
            return False
        self._looks[key] = self._looks.get(key, 0) + 1 if watched.begins(value) else 0
        if self._looks[key] < watched.looks:
            return False
        self._on.add(key)
        return True

    def of_passes(self, layers: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> Iterator[TrainingEvent]:
        """Report once the layers whose passes within a step could not be separated, so that noise is not measured."""
        rows = zip(layers, values.get("noise", ()), values.get("staleness", ()), strict=False)
        mixed = [layer for layer, noise, staleness in rows if noise is None and staleness is not None]
        if mixed and ("passes", "") not in self._on:
            self._on.add(("passes", ""))
            others = f"; {len(mixed) - 1} more layers likewise" if len(mixed) > 1 else ""
            yield TrainingEvent(
                "several passes in a step could not be separated, so noise, m_eff, dropout and gap are not measured. "
                f"If the training calls a compiled model, pass the compiled model to watch{others}",
                mixed[0],
            )

    def of_updates(self, updating: Mapping[str, bool]) -> Iterator[TrainingEvent]:
        """Report layers whose statistics stopped or started to change between two looks."""
        for layer, moves in updating.items():
            if self._updates.get(layer, moves) != moves:
                yield TrainingEvent(
                    "statistics change again" if moves else "statistics no longer change: frozen, or not used", layer
                )
        self._updates = dict(updating)

    def of_poison(self, finite: Mapping[str, bool]) -> Iterator[TrainingEvent]:
        """Report layers whose stored statistics became NaN or infinite."""
        for layer, is_finite in finite.items():
            key = "poison", layer
            if not is_finite and key not in self._on:
                self._on.add(key)
                yield TrainingEvent("a stored mean or variance is NaN or infinite", layer, "BN102")


# -- messages about a training that was not measured -----------------------------------------------------------


def no_steps(foreign: int) -> str:
    """Why no step was counted, and what to do; ``foreign`` is the number of steps of other models' optimizers."""
    remedy = "If no torch.optim optimizer steps, or it steps in a compiled function, call run.step() after each step."
    if not foreign:
        return f"watch saw no step of an optimizer. {remedy}"
    return (
        "watch saw no step of an optimizer that has one of the model's parameters, but "
        f"{many(foreign, 'step')} of other optimizers. Make the optimizer with model.parameters(), and again if "
        "parameters are replaced. If it trains copies of the parameters, call run.step() after each step."
    )


def foreign_steps(number: int, optimizer: str) -> str:
    """Message: the optimizer of the last ``number`` steps has none of the model's parameters."""
    return (
        f"{number} steps in a row were of {optimizer}, which has none of the model's parameters, though the model's "
        "statistics change: nothing is measured. If the optimizer trains copies of the parameters, or replaced ones, "
        "call run.step() after each step"
    )


def too_short(steps: int, least: int) -> str:
    """Message: no look was possible in this many steps."""
    return (
        f"nothing was measured in {many(steps, 'step')}: a look needs {least} steps or more that update statistics, "
        "and time within the budget. Train for longer, lower every=, or raise budget="
    )


def not_the_first(rank: int, ranks: Sequence[int]) -> str:
    """Why this rank has no records."""
    return (
        f"rank {rank} has no records: of ranks {', '.join(map(str, ranks))}, rank {ranks[0]} measures and writes the "
        f"log. Read it on rank {ranks[0]}, or pass watch a group= whose first rank is {rank}."
    )


def not_watching(ranks: Sequence[int]) -> str:
    """Message: these ranks left no statistics to compare."""
    return (
        f"the stored statistics are not compared with those of {ranks_as_words(ranks)}, which did not watch these "
        "layers by then: call watch on every rank"
    )


def stopped_watching(ranks: Sequence[int], step: int) -> str:
    """Message: these ranks left statistics before, but none after this step of the training."""
    return (
        f"{ranks_as_words(ranks)} left no stored statistics to compare after step {step} of the training: a rank that "
        "has ended, trains slowly, or would exceed the budget of its watch"
    )


def postponed(looks: int, budget: float) -> str:
    """Message: this many looks were put off."""
    return f"{looks} looks were put off to stay under {budget:.1%} of the time"


NO_PROBE = "no probe was measured: no forward hook of the model ran in train mode, as in a compiled model; pass probe="
