"""Covariate shift after deployment: fresh statistics against stored ones, with a promise about false alarms.

``ShiftMonitor`` observes a model. What it bets on is in ``betting``, how the bets are kept in ``wealth`` and
``evidence``, what they bet against in ``reference``, what an observation is in ``units``, and what an alarm says in
``alarm``.
"""

from batchnorm.shift.alarm import Alarm, LayerShift
from batchnorm.shift.monitor import ShiftMonitor
from batchnorm.shift.reference import Reference

__all__ = ["Alarm", "LayerShift", "Reference", "ShiftMonitor"]
