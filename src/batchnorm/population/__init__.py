"""Statistics for test time: measure them, keep them, and let nothing else change them.

``recalibrate`` replaces the running averages of training by exact population statistics, ``freeze`` makes
layers use what they store whatever mode they are put in, and ``preserve_state`` shields a model from tools.
"""

from batchnorm.population.freezing import freeze, frozen, unfreeze
from batchnorm.population.recalibration import recalibrate
from batchnorm.population.state_shield import preserve_state

__all__ = ["freeze", "frozen", "preserve_state", "recalibrate", "unfreeze"]
