"""The rules that a user names: by code (BN101), by the beginning of codes (BN1), or by slug."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from batchnorm.rules import FAMILIES, RULES

if TYPE_CHECKING:
    from collections.abc import Iterable


def codes(given: str | Iterable[str]) -> tuple[str, ...]:
    """The codes, or beginnings of codes, of the rules that ``given`` names. A text may name several, with commas.

    Raises:
        ValueError: If a name is not known. The message offers the most similar name.
    """
    texts = [given] if isinstance(given, str) else given
    return tuple(_code(name.strip()) for text in texts for name in text.split(",") if name.strip())


def _code(name: str) -> str:
    by_slug = {rule.slug: code for code, rule in RULES.items()}
    upper = name.upper()
    if upper.startswith("BN") and any(code.startswith(upper) for code in RULES):
        return upper
    if name.lower() in by_slug:
        return by_slug[name.lower()]
    raise ValueError(f"no rule {name!r}. {nearest(name, [*RULES, *by_slug, *FAMILIES])}")


def nearest(name: str, known: Iterable[str], otherwise: str = "batchnorm rules lists all.") -> str:
    """A question that offers the most similar name; ``otherwise`` if no name is similar."""
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"Did you mean {lower[close[0]]!r}?" if close else otherwise
