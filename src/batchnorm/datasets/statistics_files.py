"""Files of statistics: safetensors bytes with the structure as JSON."""

from __future__ import annotations

import json
from dataclasses import fields

from batchnorm.datasets.column_statistics import ColumnStatistics
from batchnorm.datasets.data_statistics import DataStatistics, Partial, Source


def to_bytes(statistics: DataStatistics) -> bytes:
    """The statistics as the bytes of a safetensors file."""
    from safetensors.numpy import save

    tensors = {}
    partials = [statistics.total, *statistics.groups.values()]
    for i, partial in enumerate(partials):
        for j, column in enumerate(partial.columns.values()):
            for each in fields(column):
                tensors[f"{i}.{j}.{each.name}"] = getattr(column, each.name)
    about = {
        "rows": [p.rows for p in partials],
        "columns": [list(p.columns) for p in partials],
        "groups": list(statistics.groups),
        "by": statistics.by,
        "sources": [[s.file, s.fingerprint, s.size, s.rows] for s in statistics.sources],
    }
    return save(tensors, {"about": json.dumps(about)})


def from_bytes(data: bytes) -> DataStatistics:
    """The statistics in the bytes of ``to_bytes``."""
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
    tensors = load(data)
    partials = [
        Partial(
            rows,
            {
                name: ColumnStatistics(*(tensors[f"{i}.{j}.{each.name}"] for each in fields(ColumnStatistics)))
                for j, name in enumerate(columns)
            },
        )
        for i, (rows, columns) in enumerate(zip(about["rows"], about["columns"], strict=True))
    ]
    groups = dict(zip(about["groups"], partials[1:], strict=True))
    return DataStatistics(partials[0], about["by"], groups, tuple(Source(*s) for s in about["sources"]))
