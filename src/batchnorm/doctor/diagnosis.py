"""Diagnosis: the findings of an examination, the checks that did not run, and the layers."""

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
    """The result of ``examine``. It is a value without a reference to the model.

    ``findings`` are ordered: errors first, then by code, then in the model's order. ``checked`` has the codes of rules
    that ran. ``not_checked`` maps the codes of the other selected rules to the reason. ``silenced`` counts findings
    that the layer's batchnorm_ignore, ``per_layer`` or a baseline left out.
    """

    def to_html(self) -> str:
        """One HTML page without scripts and without other files, readable without its styles."""
        return page(self)

    def __str__(self) -> str:
        return "\n".join(concise(self))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002
        return {"text/plain": str(self), "text/html": fragment(blocks(self))}
