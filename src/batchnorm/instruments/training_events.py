"""Events: changes between two looks that a user should know, each with the doctor's code for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from batchnorm.reporting.text import many

# standard errors: noise alone has 1; a doctor's finding begins where chance ends
_STALE = 4.0
_CALM = 2.0  # an alarm ends well below where it began, or it would flicker
# looks in a row: a batch with a rare large example is in an average for a while, and then no longer
_LASTING = 3


@final
@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """Something that began, in words; ``code`` is a rule of the doctor, None where there is no such rule."""

    message: str
    layer: str | None = None
    code: str | None = None


@final
@dataclass(frozen=True, slots=True)
class _Alarm:
    """A state of a quantity: its beginning, its end, its message, and the looks it must last."""

    quantity: str
    code: str | None
    begins: Callable[[float], bool]
    ends: Callable[[float], bool]
    message: str
    looks: int = 1

    def event(self, begun: Sequence[tuple[str, float]]) -> TrainingEvent:
        """One event for all layers that began at once, in the words of the first."""
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
        "a batch's mean is worth {value:.1f} independent values: normalization is that noisy",
    ),
    _Alarm("gamma", "BN111", lambda g: g < 1e-3, lambda g: g > 1e-2, "the median |gamma| fell to {value:.2g}"),
    _Alarm("dead", "BN106", lambda d: d > 0.5, lambda d: d < 0.4, "{value:.0%} of the channels are dead"),
)


@final
class Events:
    """States of layers; each is reported when it begins, and again only after it has ended."""

    def __init__(self) -> None:
        self._on: set[tuple[str, str]] = set()
        self._looks: dict[tuple[str, str], int] = {}  # in a row in which a state could begin
        self._updates: dict[str, bool] = {}

    def of(
        self, layers: Sequence[str], values: Mapping[str, Sequence[float | None]], *, early: bool
    ) -> Iterator[TrainingEvent]:
        """Events of one look; an ``early`` one, whose averages still hold initial values, says nothing of staleness."""
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
        """Layers whose passes within a step could not be separated, so that their noise is unknown; reported once."""
        rows = zip(layers, values.get("noise", ()), values.get("staleness", ()), strict=False)
        mixed = [layer for layer, noise, staleness in rows if noise is None and staleness is not None]
        if mixed and ("passes", "") not in self._on:
            self._on.add(("passes", ""))
            others = f"; {len(mixed) - 1} more layers likewise" if len(mixed) > 1 else ""
            yield TrainingEvent(
                "several passes in a step, which could not be told apart as in a model that was compiled elsewhere: "
                "noise, m_eff, dropout and gap are not measured. Give watch the compiled model that the training "
                f"calls{others}",
                mixed[0],
            )

    def of_updates(self, updating: Mapping[str, bool]) -> Iterator[TrainingEvent]:
        """Layers whose statistics stopped or started to move between two looks."""
        for layer, moves in updating.items():
            if self._updates.get(layer, moves) != moves:
                yield TrainingEvent(
                    "statistics move again" if moves else "statistics no longer move: frozen, or not used", layer
                )
        self._updates = dict(updating)

    def of_poison(self, finite: Mapping[str, bool]) -> Iterator[TrainingEvent]:
        """Layers whose stored statistics became NaN or infinite."""
        for layer, is_finite in finite.items():
            key = "poison", layer
            if not is_finite and key not in self._on:
                self._on.add(key)
                yield TrainingEvent("a stored mean or variance is NaN or infinite", layer, "BN102")


# -- messages about a training that was not measured -----------------------------------------------------------


def no_steps(foreign: int) -> str:
    """Why no step was counted, and what to do; ``foreign`` is the number of steps of other models' optimizers."""
    remedy = "Call run.step() after each step if no torch.optim one takes them, or one inside of a compiled function."
    if not foreign:
        return f"watch saw no step of an optimizer. {remedy}"
    return (
        f"watch saw no step of an optimizer that holds one of the model's parameters, and {many(foreign, 'step')} of "
        "others. Make the optimizer after parameters are replaced, and give it model.parameters(). Call run.step() "
        "after each step if it trains copies of them."
    )


def foreign_steps(number: int, optimizer: str) -> str:
    """Warns of this many steps in a row by an optimizer without the model's parameters."""
    return (
        f"{number} steps in a row of {optimizer}, which holds none of the model's parameters while its statistics "
        "move: nothing is measured. If it trains copies of them, or parameters that were replaced, call run.step() "
        "after each step"
    )


def too_short(steps: int, least: int) -> str:
    """Says that no look was possible in this many steps."""
    return (
        f"nothing was measured in {many(steps, 'step')}: a look takes {least} or more in which statistics are updated, "
        "and time for it within the budget. Train for longer, or set every= lower or budget= higher"
    )


def postponed(looks: int, budget: float) -> str:
    """Says that this many looks had to wait."""
    return f"{looks} looks were put off to stay under {budget:.1%} of the time"


NO_PROBE = "no probe was taken: the model's forward hooks never ran, as in a compiled model; pass probe="
