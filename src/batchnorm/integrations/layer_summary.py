"""Summary: three numbers per quantity, for loggers that draw a chart for every name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

_PREFIX = "batchnorm/"


def summary(values: Mapping[str, float]) -> dict[str, float]:
    """Minimum, median and maximum of each quantity over the layers; numbers of the whole model stay the same.

    ``values`` has the names that a ``Sink`` gets: ``batchnorm/noise/layer1.0.bn1`` is one of the values of which
    ``batchnorm/noise/median`` is the median. Numbers that the user logged (``loss``) are left out, because the logger
    has them already.
    """
    of_model: dict[str, float] = {}
    of_layers: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        _, _, rest = name.partition(_PREFIX)
        quantity, slash, _ = rest.partition("/")
        if slash:
            of_layers[quantity].append(value)
        elif quantity:
            of_model[name] = value
    rows = {
        f"{_PREFIX}{quantity}/{kind}": number
        for quantity, row in of_layers.items()
        for kind, number in (("min", min(row)), ("median", median(row)), ("max", max(row)))
    }
    return rows | of_model
