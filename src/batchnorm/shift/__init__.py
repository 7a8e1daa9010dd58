"""Covariate shift after deployment: fresh statistics against stored ones, with a promise about false alarms.

``ShiftMonitor`` observes a model. What it bets on is in ``betting``, how the bets are kept in ``e_processes`` and
``evidence``, what they bet against in ``alarm_reference``, what an observation is in ``observation_units``, and what an
alarm says in ``alarm``.
"""

from batchnorm.shift.alarm import Alarm, LayerShift
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.monitor import ShiftMonitor

__all__ = ["Alarm", "LayerShift", "Reference", "ShiftMonitor"]
