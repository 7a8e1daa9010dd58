"""Adaptation: moves a deployed model's statistics to inputs that differ from its training data, and back again.

``adapt`` measures a data set, ``Adapter`` follows a live stream after a ``ShiftMonitor``'s alarm, under guards, and
``DomainBank`` keeps one set of statistics for each domain where a model works. Weights are never changed.
"""

from batchnorm.adaptation.adapter import Adapter, Event
from batchnorm.adaptation.bank import DomainBank
from batchnorm.adaptation.estimation import adapt, adapted
from batchnorm.adaptation.guards import Limits
from batchnorm.population.stored_statistics import Statistics

__all__ = ["Adapter", "DomainBank", "Event", "Limits", "Statistics", "adapt", "adapted"]
