"""Guards: what has to be true of new statistics before they are used, and for as long as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from batchnorm.adaptation.predictions import Predictions
    from batchnorm.adaptation.window import Window

_FEW = 32  # examples in use before their predictions are judged


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of statistics, by windows of the last examples.

    Args:
        accept: Least information in the predictions under new statistics before they are used, as a share of what it
            was under the deployed ones before the alarm (see ``batchnorm.adaptation.predictions``). On three networks
            for digits and 11 corruptions that statistics repair it never fell below 0.76; on streams of one class after
            the other it never rose above 0.60 if they were clean, and 0.71 if not (windows of 64).
        keep: The same during use.
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


def against(window: Window, before: Predictions | None, limits: Limits, *, in_use: bool) -> str | None:
    """Why the statistics of a window should not be used; None if nothing speaks against them.

    Args:
        window: Under the new statistics.
        before: Predictions under the deployed statistics before the alarm; None where there are none to be had.
        limits: What is asked.
        in_use: Whether they are in use already.
    """
    return _energies(window, limits.energy) or _answers(window, before, limits, in_use)


def less_than(window: Window, deployed: Window) -> str | None:
    """Why the deployed statistics are better, if their predictions carry more information on the same examples."""
    new, old = window.answers, deployed.answers
    if new is None or old is None or new.information > old.information:
        return None
    return (
        f"predictions carry less information than under the deployed statistics, {new.information:.2f} nats against "
        f"{old.information:.2f}"
    )


def _energies(window: Window, limit: float) -> str | None:
    for path, energy in window.energies.items():
        if not 1 / limit <= energy <= limit:
            return f"the energy of layer {path!r} under the new statistics is {energy:.2f} times what it should be"
    return None


def _answers(window: Window, before: Predictions | None, limits: Limits, in_use: bool) -> str | None:
    answers = window.answers
    if answers is None or before is None or (in_use and answers.count < _FEW):
        return None
    known = before.top_share if before.is_whole else 1 / len(before.total)
    top = known + limits.crowd * (1 - known)
    if not answers.top_share <= top:  # NaN objects too
        return f"{answers.top_share:.0%} of the predictions are of one class, which {top:.0%} may be"
    least = (limits.keep if in_use else limits.accept) * before.expected(answers.count)
    if not answers.information >= least:
        return f"predictions carry {answers.information:.2f} nats of information, not the {least:.2f} asked for"
    return None
