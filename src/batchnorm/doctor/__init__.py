"""The doctor: examine a checkpoint or a model, and mend what can be mended.

``examine`` collects evidence and lets every rule look at it; it changes nothing. ``treat`` returns a mended copy.
"""

from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.examination import examine

__all__ = ["Diagnosis", "examine"]
