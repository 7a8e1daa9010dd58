"""Population statistics for test time: measure them, keep them, and protect them from changes.

``recalibrate`` replaces running averages by exact population statistics, ``freeze`` makes layers use their stored
statistics in every mode, and ``preserve_state`` protects a model from tools.
"""

from batchnorm.population.freezing import freeze, frozen, unfreeze
from batchnorm.population.recalibration import recalibrate
from batchnorm.population.state_shield import preserve_state

__all__ = ["freeze", "frozen", "preserve_state", "recalibrate", "unfreeze"]
