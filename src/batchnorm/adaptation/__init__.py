"""Adaptation: a deployed model's statistics moved to inputs that are not what it was trained with, and moved back.

``adapt`` measures a data set, ``Adapter`` follows a live stream once a ``ShiftMonitor`` has rung, under guard, and
``DomainBank`` keeps one set of statistics for each place where a model works. Weights are never changed.
"""

from batchnorm.adaptation.adapter import Adapter, Event
from batchnorm.adaptation.bank import DomainBank
from batchnorm.adaptation.estimation import adapt, adapted
from batchnorm.adaptation.guards import Limits
from batchnorm.population.stored_statistics import Statistics

__all__ = ["Adapter", "DomainBank", "Event", "Limits", "Statistics", "adapt", "adapted"]
