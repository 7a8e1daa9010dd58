"""Sources: files of a format, cut into pieces, which are read block by block.

``pieces`` finds the files, checks that they agree in their columns, and cuts them. A new format is a file with a class
of pieces and a function ``plan``, and a row in the table of ``formats``.
"""

from batchnorm.datasets.sources.options import Options
from batchnorm.datasets.sources.planning import pieces

__all__ = ["Options", "pieces"]
