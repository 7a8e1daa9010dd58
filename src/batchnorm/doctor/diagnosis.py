"""Diagnosis: what an examination found, what it could not look at, and the layers it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from batchnorm.doctor.diagnosis_report import blocks, page
from batchnorm.doctor.diagnosis_value import DiagnosisValue
from batchnorm.doctor.family_text import concise
from batchnorm.reporting.html import fragment


@final
@dataclass(frozen=True, slots=True)
class Diagnosis(DiagnosisValue):
    """What ``examine`` returns. A value: it holds no model and changes nothing.

    ``findings`` are ordered: errors first, then by code and layer. ``checked`` has the codes of rules that ran,
    ``not_checked`` maps the others to the reason. ``silenced`` counts findings left out by ignore or a baseline.
    """

    def to_html(self) -> str:
        """One page that stands alone: no script, readable without its styles."""
        return page(self)

    def __str__(self) -> str:
        return "\n".join(concise(self))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002
        return {"text/plain": str(self), "text/html": fragment(blocks(self))}
