"""Guards: what has to be true of new statistics before they are used, and for as long as they are.

*Beginning.* New statistics are used if nothing of this speaks against it:

- Mix. Another mix of the same examples cannot have moved the inputs so far. Statistics of inputs whose classes only
  come in other shares fit no worse than before, and new ones would fit worse. Known with a calibrated monitor.
- Need. The deployed statistics have become unsure, or answer nearly the same whatever they are shown.
- Gain. On the latest examples the new ones carry clearly more information.
- Information. They carry most of what there was before the alarm. A window of few classes, whose statistics should not
  be used either, cannot. Half will do, after twice a window, where no mix of classes moves inputs so far, or
  where the deployed statistics are very unsure and the new ones surer.
- Crowd and energies, as during use.

*Use.* They stay in use while they carry five sevenths of the information that was asked for at the beginning, no class
takes most predictions, and every layer's energy is what it was for the examples that the statistics are of.

The numbers were chosen on two networks for digits, 12 changes at two strengths, and five orders; that of answers that
hardly depend on the input after a look at three more, two of which a half had harmed in windows of few classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from batchnorm.shift.alarm import MIX

if TYPE_CHECKING:
    from batchnorm.adaptation.answer_window import Window
    from batchnorm.adaptation.predictions import Predictions

_FEW = 32  # examples in use before their predictions are judged
_UNSURE = 0.1  # mean entropy of a prediction that is more than a good network's, in units of log K; twice: very unsure
_THAN_BEFORE = 1.5  # times the mean entropy before the alarm, where that is known
_ALIKE = 0.3  # of the information before the alarm: less is of answers that hardly depend on the input
_SURER = 0.8  # times the mean entropy under the deployed statistics
_GAIN = 1.1  # times the information under the deployed statistics


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of statistics, by windows of the last examples.

    Args:
        accept: Least information in the predictions under new statistics before they are used, as a share of what it
            was under the deployed ones before the alarm (see ``batchnorm.adaptation.predictions``).
        keep: The same during use, and before it where the inputs moved for certain; then keep^2 / accept during use.
        energy: Largest energy of a layer's inputs under statistics that do not include them yet, in units of the energy
            of those that they do include, and 1 over the least. That unit becomes 1 as the prior fades.
        crowd: Largest share of the predictions that may be of one class, on the way from its share before to 1.
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


def asked(
    window: Window,
    deployed: Window,
    before: Predictions | None,
    limits: Limits,
    furthest: tuple[float, float] | None = None,
) -> float:
    """Share of the information before the alarm that statistics have to carry to be used; see ``against_start``."""
    new, old = window.answers, deployed.answers
    # until then inputs of later layers grow with every batch, as those before lose the stored statistics' share
    is_grown = window.examples >= 2 * window.size
    if before is None or new is None or old is None or not is_grown:
        return limits.accept
    is_certain = _is_beyond_classes(furthest, new, before) or _is_much_surer(new, old, before)
    return limits.keep if is_certain else limits.accept


def against_use(window: Window, before: Predictions | None, limits: Limits, share: float) -> str | None:
    """Why the statistics of a window should no longer be used; None if nothing speaks against them.

    Args:
        window: Under the new statistics.
        before: Predictions under the deployed statistics before the alarm; None where there are none to be had.
        limits: What is asked.
        share: Of the information, that was asked for when their use began.
    """
    objection = _energies(window, limits.energy)
    answers = window.answers
    if objection or before is None or answers is None or answers.count < _FEW:
        return objection
    return _crowd(answers, before, limits.crowd) or _information(
        answers, before, share * limits.keep / limits.accept if limits.accept else 0.0
    )


def against_start(
    window: Window,
    deployed: Window,
    before: Predictions | None,
    limits: Limits,
    furthest: tuple[float, float] | None = None,
) -> str | None:
    """Why the statistics of a window should not be used yet; None if nothing speaks against them.

    Args:
        window: Under the new statistics.
        deployed: Under the deployed ones, of the same examples or nearly.
        before: As above.
        limits: What is asked.
        furthest: How far the component that moved most did, in sd, and its error; None where that is not known.
    """
    objection = _energies(window, limits.energy) or _mix(furthest)
    new, old = window.answers, deployed.answers
    share = asked(window, deployed, before, limits, furthest)
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
    """Whether no mix of K equally frequent classes, not even one class alone, moves anything so far."""
    if furthest is None or not new.doubt:  # predicted classes without probabilities do not say how many there are
        return False
    return furthest[0] - furthest[1] > math.sqrt(len(before.total) - 1)


def _is_much_surer(new: Predictions, old: Predictions, before: Predictions) -> bool:
    return new.doubt_each <= _SURER * old.doubt_each and old.doubt_each >= 2 * _unsure(before)


def _unsure(before: Predictions) -> float:
    """Mean entropy, nats, from which on predictions are less sure than they were."""
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


def _energies(window: Window, limit: float) -> str | None:
    for path, energy in window.energies.items():
        if not 1 / limit <= energy <= limit:
            return f"the energy of layer {path!r} under the new statistics is {energy:.2f} times what it should be"
    return None


def _crowd(answers: Predictions, before: Predictions, share: float) -> str | None:
    known = before.top_share if before.is_whole else 1 / len(before.total)
    top = known + share * (1 - known)
    if answers.top_share <= top:
        return None  # NaN is no such answer
    return f"{answers.top_share:.0%} of the predictions are of one class, which {top:.0%} may be"


def _information(answers: Predictions, before: Predictions, share: float) -> str | None:
    least = share * before.expected(answers.count)
    if answers.information >= least:
        return None
    return f"predictions carry {answers.information:.2f} nats of information, not the {least:.2f} asked for"
