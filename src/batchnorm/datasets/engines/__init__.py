"""Engines: what computes the partial statistics of all pieces, on one machine or on several.

An engine has two methods, ``partials`` and ``merged``. Every engine runs ``attempt`` of ``attempts`` where its workers
are, and merges by the tree of ``merging``. The threads of this process are the default; the other engines are adapters.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from batchnorm.argument_types import require_type, require_whole_number

if TYPE_CHECKING:
    from batchnorm.datasets.engines.protocol import Engine

# the name of an engine: its module and class in this package, and the module that it needs
_TABLE = {
    "threads": ("threads", "Threads", "concurrent.futures"),
    "ray": ("ray_data", "RayData", "ray.data"),
    "dask": ("dask_cluster", "DaskCluster", "distributed"),
    "spark": ("spark_session", "SparkEngine", "pyspark"),
}
ENGINES = tuple(_TABLE)


def engine(name: str, *, address: str | None = None, workers: int | None = None) -> Engine:
    """The engine with this name. Nothing is started or connected before ``partials`` is called.

    Args:
        name: A name in ``ENGINES``.
        address: The cluster; None starts local workers. For the engine threads it must be None.
        workers: Number of threads or local workers; None means one for each processor.

    Raises:
        ValueError: If there is no such engine, the threads get an address, or ``workers`` is below 1.
        TypeError: If the name is no string, or ``workers`` no whole number.
        ModuleNotFoundError: If the engine's package is not installed.
    """
    require_type(name, str, "engine must be a name", f"Choose one of {', '.join(ENGINES)}.")
    if name not in _TABLE:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}. Choose one of them.")
    if address is not None and name == "threads":
        raise ValueError(f"the engine threads runs in this process, got the address {address!r}. Choose engine ray.")
    if workers is not None and address is not None:
        raise ValueError(f"the cluster at {address} has its own workers, got workers={workers}. Leave one of them out.")
    if workers is not None:
        require_whole_number(workers, "workers", "Pass workers=4.")
        if workers < 1:
            raise ValueError(f"workers must be 1 or more, got {workers}. Leave it out for one for each processor.")
    module, kind, needed = _TABLE[name]
    if find_spec(needed.partition(".")[0]) is None:
        raise ModuleNotFoundError(
            f"engine {name} needs {needed}, not installed here. Run: pip install 'batchnorm[{name}]'"
        )
    return getattr(import_module(f"{__name__}.{module}"), kind)(address, workers)
