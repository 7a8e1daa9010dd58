"""What differs between two plain values, in three kinds: shape (keys, codes, order, counts), numbers, words.

Numbers may differ as the bits of a float type do between processors: AVX2 and AVX512 add in another order, and what is
computed from such sums keeps about half of the digits, 12 of 24 bits of float32. Figures that are rounding errors
themselves, of the size of a few eps, agree in nothing but that size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may be apart: relative to the largest of their list, and absolutely."""

    relative: float
    absolute: float

    def allows(self, a: float, b: float, scale: float = 0.0, digit: float = 0.0) -> bool:
        """Whether two numbers are one; ``digit`` is what one unit of the last printed place is worth."""
        if a == b or (a != a and b != b):
            return True
        return abs(a - b) <= self.absolute + digit + self.relative * max(abs(a), abs(b), scale)


FLOAT32 = Tolerance(2.0**-12, 8 * 2.0**-23)
FLOAT64 = Tolerance(2.0**-26, 8 * 2.0**-52)
# evidence multiplies a bet for each observation, so that its logarithm adds up what rounding does to all of them
EVIDENCE = Tolerance(2.0**-5, 2.0**-3)
# of trainings at rates at which they nearly diverge, where no number outlives another order of additions
ANY = Tolerance(float("inf"), float("inf"))


@dataclass(frozen=True)
class Difference:
    """One place in which two values differ: of shape, number or words."""

    place: str
    kind: str
    before: Any
    now: Any

    def __str__(self) -> str:
        texts = map(repr, (self.before, self.now))
        before, now = (text if len(text) <= 600 else f"{text[:600]}... ({len(text)} characters)" for text in texts)
        return f"{self.kind} at {self.place}\n    before: {before}\n    now:    {now}"


def differences(before: Any, now: Any, tolerance: Tolerance = FLOAT32, place: str = "") -> Iterator[Difference]:
    """All places in which two plain values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        yield from _of_dicts(before, now, tolerance, place)
    elif isinstance(before, list) and isinstance(now, list):
        yield from _of_lists(before, now, tolerance, place)
    elif isinstance(before, str) and isinstance(now, str):
        yield from _of_texts(before, now, tolerance, place)
    elif _is_number(before) and _is_number(now) and isinstance(before, float) | isinstance(now, float):
        if not tolerance.allows(before, now):
            yield Difference(place, "number", before, now)
    elif type(before) is not type(now) or before != now:
        yield Difference(place, "shape", before, now)


def _of_dicts(before: dict, now: dict, tolerance: Tolerance, place: str) -> Iterator[Difference]:
    for key in before.keys() - now.keys():
        yield Difference(f"{place}/{key}", "shape", before[key], "(gone)")
    for key in now.keys() - before.keys():
        yield Difference(f"{place}/{key}", "shape", "(not there)", now[key])
    for key, value in before.items():
        if key in now:
            yield from differences(value, now[key], tolerance, f"{place}/{key}")


def _of_lists(before: list, now: list, tolerance: Tolerance, place: str) -> Iterator[Difference]:
    if before and now and all(map(_is_number, chain(before, now))) and len(before) == len(now):
        scale = max(map(abs, before))
        for index, (a, b) in enumerate(zip(before, now, strict=True)):
            is_exact = isinstance(a, int) and isinstance(b, int)
            if a != b and (is_exact or not tolerance.allows(a, b, scale)):
                yield Difference(f"{place}/{index}", "shape" if is_exact else "number", a, b)
        return
    if len(before) != len(now):
        kind = "words" if all(isinstance(x, str) and " " in x for x in [*before, *now] if x) else "shape"
        yield Difference(place, kind, before, now)
        return
    for index, (a, b) in enumerate(zip(before, now, strict=True)):
        yield from differences(a, b, tolerance, f"{place}/{index}")


def _of_texts(before: str, now: str, tolerance: Tolerance, place: str) -> Iterator[Difference]:
    """Texts are equal but for numbers within the tolerance; one with a space in it is words, others are names."""
    if before == now:
        return
    if _NUMBER.split(before) == _NUMBER.split(now):
        pairs = zip(_NUMBER.findall(before), _NUMBER.findall(now), strict=True)
        if all(a == b or tolerance.allows(_value(a), _value(b), digit=_digit(a)) for a, b in pairs):
            return
        yield Difference(place, "number", before, now)
    else:
        yield Difference(place, "words" if " " in before + now else "shape", before, now)


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def _digit(text: str) -> float:
    """One unit of the last place of a number that was rounded to be printed; 0 of whole numbers, which are counts."""
    mantissa, _, exponent = text.partition("e")
    places = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - places) if places or exponent else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
