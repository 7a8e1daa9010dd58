"""Remedies: a table of the remedies of each finding, as small functions. The table needs no torch.

A remedy of numbers returns the values that a layer should store, from its stored values and eps. A remedy of settings
changes one live layer. A remedy that needs data has no function here: the layer is measured again.

Eval mode computes (x - mean) gamma / sqrt(var + eps) + beta. Let mean and sd = sqrt(var + eps) become mean' and sd'.
For x one sd from the mean, the output then moves by at most |sd / sd' - 1| + |mean - mean'| / sd' of its standard
deviation. The ``effect`` of a change is the largest move over the channels, plus the changes of gamma and beta.
"""

from __future__ import annotations

import math
import statistics
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from batchnorm.rules.bn1_stored_statistics import HALF, ROUNDING, TINY
from batchnorm.rules.finding import Fix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.nn.modules.batchnorm import _BatchNorm

    from batchnorm.checkpoint import Stored
    from batchnorm.rules.finding import Finding

# the tensors of a layer that eval mode uses
TENSORS = ("running_mean", "running_var", "weight", "bias")
EPS = 1e-5  # torch's default, if a file does not store eps


@final
@dataclass(frozen=True, slots=True)
class Remedy:
    """One way to mend a finding: what it needs, its name, and its function."""

    fix: Fix
    words: str
    store: Callable[[Stored, float], Stored] | None = None  # called with the stored values and eps
    setting: Callable[[_BatchNorm], None] | None = None  # changes a live layer; eval outputs stay the same


@final
@dataclass(frozen=True, slots=True)
class Change:
    """A layer's stored values before and after, and the remedies as codes and words: ("BN103 variance 0",)."""

    layer: str
    before: Stored
    after: Stored
    words: tuple[str, ...]
    eps: float

    @property
    def effect(self) -> float:
        """Largest change of an eval output, in its standard deviations; infinite if it was NaN or infinite before."""
        return effect(self.before, self.after, self.eps)


def zero_variance(stored: Stored, eps: float) -> Stored:
    """Set negative and denormal variances to 0, if sqrt(var + eps) changes by less than its rounding."""
    tiny = TINY.get(stored.dtypes.get("running_var", ""), TINY["float32"])
    return _with(stored, "running_var", lambda var: 0.0 if var < tiny and abs(var) <= ROUNDING * eps else var)


def typical_statistics(stored: Stored, eps: float) -> Stored:  # noqa: ARG001 - a remedy's arguments
    """Replace impossible means and variances by the lower median of the layer's possible ones; by 0 and 1 without any.

    Nothing is known about such a channel. With the median its outputs have a size like those of other channels. A
    variance of 0 would magnify them by 1/sqrt(eps), 316 at eps = 1e-5.
    """
    mean = statistics.median_low(_finite(stored.running_mean) or [0.0])
    var = statistics.median_low([value for value in _finite(stored.running_var) if value >= 0] or [1.0])
    new = _with(stored, "running_mean", lambda value: value if math.isfinite(value) else mean)
    return _with(new, "running_var", lambda value: value if 0 <= value < math.inf else var)


def neutral_affine(stored: Stored, eps: float) -> Stored:  # noqa: ARG001 - a remedy's arguments
    """Set a gamma that is NaN or infinite to 1, and such a beta to 0, as in a new layer."""
    new = _with(stored, "weight", lambda value: value if math.isfinite(value) else 1.0)
    return _with(new, "bias", lambda value: value if math.isfinite(value) else 0.0)


def wide_statistics(stored: Stored, eps: float) -> Stored:  # noqa: ARG001 - a remedy's arguments
    """Store half precision statistics as float32: the same values, and enough digits for further updates."""
    wide = {
        key: "float32"
        for key, dtype in stored.dtypes.items()
        if key in {"running_mean", "running_var"} and dtype in HALF
    }
    return replace(stored, dtypes={**stored.dtypes, **wide})


def new_counter(stored: Stored, eps: float) -> Stored:  # noqa: ARG001 - a remedy's arguments
    """Set num_batches_tracked to 0, if it is missing."""
    if stored.num_batches_tracked is not None:
        return stored
    return replace(stored, num_batches_tracked=0, dtypes={**stored.dtypes, "num_batches_tracked": "int64"})


def track(layer: _BatchNorm) -> None:
    """Set track_running_stats to True, so that train mode updates the stored statistics again."""
    layer.track_running_stats = True


def freeze(layer: _BatchNorm) -> None:
    """Fix the stored statistics, as gamma and beta are fixed."""
    from batchnorm.population import freeze

    freeze(layer)


def usual_momentum(layer: _BatchNorm) -> None:
    """Set momentum to 1 - momentum if that is between 0 and 0.5, else to torch's default of 0.1."""
    other = 1 - (layer.momentum or 0.0)
    layer.momentum = other if 0 < other < 0.5 else 0.1


MEASURED = Remedy(Fix.DATA, "statistics measured anew")
_TYPICAL = Remedy(Fix.UNSAFE, "the median of the other channels", store=typical_statistics)

# The remedies of each code, the better one first. For findings of other codes with ``Fix.DATA``, statistics are
# measured again. BN001 (an eval layer in training) and BN003 (a frozen layer that learns) have none, as they may be
# intended.
REMEDIES: dict[str, tuple[Remedy, ...]] = {
    "BN002": (Remedy(Fix.SAFE, "frozen", setting=freeze),),
    "BN004": (Remedy(Fix.SAFE, "track_running_stats on", setting=track),),
    "BN007": (Remedy(Fix.SAFE, "momentum 0.1", setting=usual_momentum),),
    "BN008": (Remedy(Fix.SAFE, "1 - momentum", setting=usual_momentum),),
    "BN101": (MEASURED,),
    "BN102": (MEASURED, _TYPICAL),
    "BN103": (Remedy(Fix.SAFE, "variance 0", store=zero_variance), MEASURED, _TYPICAL),
    "BN104": (Remedy(Fix.SAFE, "variance 0", store=zero_variance),),
    "BN107": (Remedy(Fix.UNSAFE, "gamma 1, beta 0", store=neutral_affine),),
    "BN108": (Remedy(Fix.SAFE, "float32", store=wide_statistics),),
    "BN112": (Remedy(Fix.SAFE, "counter 0", store=new_counter),),
    "BN114": (MEASURED,),
    "BN115": (MEASURED,),
    "BN116": (MEASURED,),
    "BN209": (MEASURED,),
    "BN401": (MEASURED,),
    "BN507": (Remedy(Fix.SAFE, "prefix taken off the names"),),
}


def remedies(finding: Finding) -> tuple[Remedy, ...]:
    """The remedies of a finding, the better one first; () if there are none."""
    return REMEDIES.get(finding.code, (MEASURED,) if finding.fixable is Fix.DATA else ())


def needs_data(finding: Finding) -> bool:
    """Whether a finding is mended by a new measurement of its layer."""
    return finding.fixable is Fix.DATA


def prescribe(
    stored: Mapping[str, Stored], findings: Iterable[Finding], eps: Callable[[str], float], *, unsafe: bool
) -> dict[str, Change]:
    """The change of each layer that can be mended without data. A finding whose remedy changes nothing is skipped."""
    changes: dict[str, Change] = {}
    for finding in findings:
        for remedy in remedies(finding) if finding.layer in stored else ():
            if remedy.store is not None and (unsafe or remedy.fix is Fix.SAFE):
                layer = finding.layer
                change = changes.get(layer) or Change(
                    layer=layer, before=stored[layer], after=stored[layer], words=(), eps=eps(layer)
                )
                after = remedy.store(change.after, change.eps)
                # two findings may have the same remedy: "BN103 variance 0" and "BN104 variance 0"
                shared = remedy.fix is Fix.SAFE and not is_same(remedy.store(change.before, change.eps), change.before)
                if shared or not is_same(after, change.after):
                    words = (*change.words, f"{finding.code} {remedy.words}")
                    changes[layer] = replace(change, after=after, words=words)
    return changes


def is_same(a: Stored, b: Stored) -> bool:
    """Whether two layers store the same values, bit for bit and in the same types."""
    counters = a.num_batches_tracked == b.num_batches_tracked
    return counters and dict(a.dtypes) == dict(b.dtypes) and not any(changed(a, b, key) for key in TENSORS)


def changed(before: Stored, after: Stored, key: str) -> list[int]:
    """Channels whose numbers differ. NaN equals NaN, and 0.0 differs from -0.0."""
    old, new = getattr(before, key), getattr(after, key)
    if old is None or new is None:
        return list(range(len(new or old or ())))
    if old.tobytes() == new.tobytes():
        return []
    return [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if repr(a) != repr(b)]


def effect(before: Stored, after: Stored, eps: float) -> float:
    """Largest change of an eval output between two states of a layer, as defined in the module's docstring."""
    return max((abs(change) for change in _effects(before, after, eps)), default=0.0)


def _effects(before: Stored, after: Stored, eps: float) -> Iterator[float]:
    for channel in sorted({channel for key in TENSORS for channel in changed(before, after, key)}):
        mean, var, gamma, beta = _channel(before, channel)
        new_mean, new_var, new_gamma, new_beta = _channel(after, channel)
        if not (var + eps > 0 and new_var + eps > 0 and all(map(math.isfinite, (mean, var, gamma, beta)))):
            yield math.inf
        else:
            sd, new_sd = math.sqrt(var + eps), math.sqrt(new_var + eps)
            yield abs(sd / new_sd - 1) + abs(mean - new_mean) / new_sd + abs(new_gamma - gamma) + abs(new_beta - beta)


def _channel(stored: Stored, channel: int) -> tuple[float, ...]:
    """Mean, variance, gamma and beta of a channel. Missing values are replaced by 0, 1, 1 and 0, without effect."""
    values = zip(TENSORS, (0.0, 1.0, 1.0, 0.0), strict=True)
    tensors = ((getattr(stored, key) or (), default) for key, default in values)
    return tuple(tensor[channel] if channel < len(tensor) else default for tensor, default in tensors)


def _finite(values: array[float] | None) -> list[float]:
    return [value for value in values or () if math.isfinite(value)]


def _with(stored: Stored, key: str, change: Callable[[float], float]) -> Stored:
    values: Any = getattr(stored, key)
    new: dict[str, Any] = {key: array("d", map(change, values or ()))}
    return stored if values is None else replace(stored, **new)
