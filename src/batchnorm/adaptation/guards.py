"""Guards: the checks that new statistics must pass before they are used and while they are in use.

*Before use.* New statistics are used if none of these guards objects:

- Mix. A different mix of the same examples does not explain how far the inputs moved. If only the shares of the classes
  changed, the deployed statistics fit as well as before and new ones would fit worse. Needs a calibrated monitor.
- Need. Predictions under the deployed statistics have become uncertain, or hardly depend on the input.
- Gain. On the latest examples, predictions under the new statistics carry clearly more information.
- Information. They carry most of the information of the predictions before the alarm. A window of few classes fails
  here, and its statistics should not be used. After two windows half is enough if no mix of classes moves inputs so
  far, or if predictions are very uncertain under the deployed statistics and less so under the new ones.
- Crowd and energies, as during use.

*During use.* New statistics stay in use while predictions carry five sevenths of the information that was required at
the start, no class takes most predictions, and every layer's energy is what it was on the examples of the statistics.

The limits were chosen on two networks for digits, 12 shifts at two strengths, and five orders. The limit for
predictions that hardly depend on the input follows three more networks: one half had harmed two of them in windows of
few classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from batchnorm.adaptation.answer_window import PredictionWindow
from batchnorm.adaptation.predictions import Predictions
from batchnorm.shift.alarm import MIX

_FEW = 32  # examples in use before their predictions are judged
_UNSURE = 0.1  # mean entropy above which predictions are uncertain, in units of log K; twice this is very uncertain
_THAN_BEFORE = 1.5  # times the mean entropy before the alarm, if that is known
_ALIKE = 0.3  # of the information before the alarm: with less, predictions hardly depend on the input
_SURER = 0.8  # times the mean entropy under the deployed statistics
_GAIN = 1.1  # times the information under the deployed statistics


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """Requirements on new statistics, checked on windows of the latest examples.

    Args:
        accept: Least information in the predictions before new statistics are used, as a share of the information
            under the deployed ones before the alarm (see ``batchnorm.adaptation.predictions``).
        keep: The same share, required before use if the inputs moved for certain; during use it is then
            keep^2 / accept.
        energy: Largest energy of a layer's inputs under statistics that do not include them yet, in units of the energy
            of the included ones; the smallest is 1 / energy. That unit becomes 1 as the prior fades.
        crowd: Largest share of predictions in one class: this fraction of the way from its share before to 1.
    """

    accept: float = 0.7
    keep: float = 0.5
    energy: float = 3.0
    crowd: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.accept <= 1:
            raise ValueError(f"Limits need 0 <= keep <= accept <= 1, got keep {self.keep} and accept {self.accept}.")
        if not self.energy > 1:
            raise ValueError(f"Limits need an energy above 1, got {self.energy}. 3 is usual.")
        if not 0 < self.crowd <= 1:
            raise ValueError(f"Limits need a crowd above 0 and at most 1, got {self.crowd}. 1 switches it off.")


def required_share(
    window: PredictionWindow,
    deployed: PredictionWindow,
    before: Predictions | None,
    limits: Limits,
    furthest: tuple[float, float] | None = None,
) -> float:
    """Share of the information before the alarm that new statistics must keep to be used; see ``against_start``."""
    new, old = window.answers, deployed.answers
    # in earlier batches the inputs of later layers still grow, because the stored statistics lose weight before them
    is_grown = window.examples >= 2 * window.size
    if before is None or new is None or old is None or not is_grown:
        return limits.accept
    is_certain = _is_beyond_classes(furthest, new, before) or _is_much_surer(new, old, before)
    return limits.keep if is_certain else limits.accept


def against_use(window: PredictionWindow, before: Predictions | None, limits: Limits, share: float) -> str | None:
    """Why the statistics of a window should no longer be used; None if no guard objects.

    Args:
        window: Under the new statistics.
        before: Predictions under the deployed statistics before the alarm; None if there are none.
        limits: The requirements.
        share: Share of the information that was required when use began.
    """
    objection = _energies(window, limits.energy)
    answers = window.answers
    if objection or before is None or answers is None or answers.count < _FEW:
        return objection
    return _crowd(answers, before, limits.crowd) or _information(
        answers, before, share * limits.keep / limits.accept if limits.accept else 0.0
    )


def against_start(
    window: PredictionWindow,
    deployed: PredictionWindow,
    before: Predictions | None,
    limits: Limits,
    furthest: tuple[float, float] | None = None,
) -> str | None:
    """Why the statistics of a window should not be used yet; None if no guard objects.

    Args:
        window: Under the new statistics.
        deployed: Under the deployed ones, on nearly the same examples.
        before: Predictions under the deployed statistics before the alarm; None if there are none.
        limits: The requirements.
        furthest: Largest movement of a principal component, in sd, and its error; None if unknown.
    """
    objection = _energies(window, limits.energy) or _mix(furthest)
    new, old = window.answers, deployed.answers
    share = required_share(window, deployed, before, limits, furthest)
    if objection or before is None or new is None:
        return objection
    if old is None:
        return "the deployed statistics have not answered any of these examples"
    return (
        (None if _is_beyond_classes(furthest, new, before) else _need(old, before))
        or _gain(new, old)
        or _crowd(new, before, limits.crowd)
        or _information(new, before, share)
    )


def _mix(furthest: tuple[float, float] | None) -> str | None:
    if furthest is None or furthest[0] - furthest[1] > MIX:
        return None
    return (
        f"another mix of known examples could look like this: nothing moved further than {furthest[0]:.2f} sd for sure"
    )


def _is_beyond_classes(furthest: tuple[float, float] | None, new: Predictions, before: Predictions) -> bool:
    """Whether the inputs moved further than any mix of K equally frequent classes can, even a single class."""
    if furthest is None or not new.doubt:  # the number of classes is unknown without probabilities
        return False
    return furthest[0] - furthest[1] > math.sqrt(len(before.total) - 1)


def _is_much_surer(new: Predictions, old: Predictions, before: Predictions) -> bool:
    return new.doubt_each <= _SURER * old.doubt_each and old.doubt_each >= 2 * _unsure(before)


def _unsure(before: Predictions) -> float:
    """Mean entropy, nats, above which predictions are less certain than before."""
    usual = before.doubt_each if before.is_whole else 0.0
    return max(_UNSURE * math.log(len(before.total)), _THAN_BEFORE * usual)


def _need(old: Predictions, before: Predictions) -> str | None:
    if old.doubt_each >= _unsure(before) or old.information < _ALIKE * before.expected(old.count):
        return None
    return f"the deployed statistics are as sure as ever: {old.doubt_each:.2f} nats of entropy in a prediction"


def _gain(new: Predictions, old: Predictions) -> str | None:
    if new.information > _GAIN * old.information:
        return None
    return (
        f"predictions carry {new.information:.2f} nats of information, hardly more than the {old.information:.2f} "
        "under the deployed statistics"
    )


def _energies(window: PredictionWindow, limit: float) -> str | None:
    for path, energy in window.energies.items():
        if not 1 / limit <= energy <= limit:
            return f"the energy of layer {path!r} under the new statistics is {energy:.2f} times what it should be"
    return None


def _crowd(answers: Predictions, before: Predictions, share: float) -> str | None:
    known = before.top_share if before.is_whole else 1 / len(before.total)
    top = known + share * (1 - known)
    if answers.top_share <= top:
        return None  # also for NaN
    return f"{answers.top_share:.0%} of the predictions are of one class, at most {top:.0%} may be"


def _information(answers: Predictions, before: Predictions, share: float) -> str | None:
    least = share * before.expected(answers.count)
    if answers.information >= least:
        return None
    return f"predictions carry {answers.information:.2f} nats of information, below the required {least:.2f}"
