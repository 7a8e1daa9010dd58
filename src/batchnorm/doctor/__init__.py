"""The doctor: examine a checkpoint or a model, and mend what can be mended.

``examine`` collects evidence, applies every rule to it, and changes nothing. ``treat`` returns a mended copy.
"""

from typing import Any

from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.examination import examine

__all__ = ["Diagnosis", "examine", "treat"]


def __getattr__(name: str) -> Any:
    if name != "treat":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchnorm.doctor.mending.treatment import treat

    return treat
