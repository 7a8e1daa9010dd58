"""Several processes: the ranks of a process group normalize a batch by the moments of the batches of all ranks.

Each rank measures its own batch. ``exchange_of`` returns the ``kernels.Group`` that merges the moments: with one
collective in the forward pass and one in the backward pass, each of one tensor. All ranks combine the same numbers in
the order of the ranks, so the stored statistics have the same bits on all of them.

Before its first exchange a layer compares itself with the layers that the other ranks are calling (``agreement``). An
exchange that fails names the layer and the ranks (``failures``).
"""

from batchnorm.processes.exchange import Exchange, TooFewValuesError, alone, exchange_of, group_of, is_alone
from batchnorm.processes.membership import (
    NamedGroup,
    check_process_group,
    group_named,
    is_synchronized,
    ranks_in_words,
)

__all__ = [
    "Exchange",
    "NamedGroup",
    "TooFewValuesError",
    "alone",
    "check_process_group",
    "exchange_of",
    "group_named",
    "group_of",
    "is_alone",
    "is_synchronized",
    "ranks_in_words",
]
