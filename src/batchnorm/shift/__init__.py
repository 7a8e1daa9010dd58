"""Covariate shift after deployment: new inputs are compared with stored statistics, with a bound on false alarms.

``ShiftMonitor`` observes a model. ``betting`` computes bets against clean data, ``e_processes`` and ``evidence``
combine them, ``alarm_reference`` contains the bounds of clean data, ``observation_units`` defines what one observation
is, and ``alarm`` describes an alarm.
"""

from batchnorm.shift.alarm import Alarm, LayerShift
from batchnorm.shift.alarm_reference import Reference
from batchnorm.shift.monitor import ShiftMonitor

__all__ = ["Alarm", "LayerShift", "Reference", "ShiftMonitor"]
