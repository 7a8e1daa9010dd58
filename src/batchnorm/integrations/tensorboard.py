"""TensorBoard: a sink that writes measurements as scalars."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from batchnorm.integrations.metric_sending import MetricSending
from batchnorm.integrations.missing_packages import needed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@final
class TensorBoardSink:
    """A sink for ``watch(model, sinks=[...])``: one scalar for each quantity and layer.

    Args:
        target: A folder, or a SummaryWriter. The sink flushes a SummaryWriter at the end, but does not close it.

    Raises:
        ModuleNotFoundError: If ``target`` is a folder and tensorboard is not installed.
    """

    def __init__(self, target: SummaryWriter | str | os.PathLike[str]) -> None:
        self._owns = isinstance(target, (str, os.PathLike))
        self._writer = _opened(target) if isinstance(target, (str, os.PathLike)) else target
        self._delivery = MetricSending("TensorBoard")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar for each number; after a failure these numbers are lost."""
        if not self._delivery.is_open:
            return
        with self._delivery:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush, and close the writer if the sink opened it."""
        with self._delivery:
            self._writer.flush()
            if self._owns:
                self._writer.close()


def _opened(folder: str | os.PathLike[str]) -> SummaryWriter:
    with needed("tensorboard", "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.fspath(folder))
