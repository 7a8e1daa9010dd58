"""MLflow: a sink that logs measurements as metrics of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from batchnorm.integrations.metric_sending import MetricSending
from batchnorm.integrations.missing_packages import needed

if TYPE_CHECKING:
    from mlflow.entities import Metric

_BATCH = 1000  # the largest number of metrics that MLflow accepts at once
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")


@final
class MLflowSink:
    """A sink for ``watch(model, sinks=[...])``: one metric for each quantity and layer.

    Args:
        run_id: The run that gets the metrics. None: the active run; if no run is active, the sink starts a run and
            ends it in ``close``.

    Raises:
        ModuleNotFoundError: If mlflow is not installed.
        mlflow.exceptions.MlflowException: If the tracking store cannot be reached or has no run ``run_id``.

    Attributes:
        run_id: The run that gets the metrics.
    """

    def __init__(self, run_id: str | None = None) -> None:
        with needed("mlflow", "mlflow"):
            import mlflow

        self._client = mlflow.MlflowClient()
        active = mlflow.active_run()
        self._owns = run_id is None and active is None
        self.run_id: str = run_id or (active or mlflow.start_run()).info.run_id
        self._client.get_run(self.run_id)  # a missing run raises before the training
        self._delivery = MetricSending("MLflow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a metric for each number; after a failure these numbers are lost."""
        metrics = self._metrics(step, values)
        for first in range(0, len(metrics), _BATCH):
            if not self._delivery.is_open:
                return
            with self._delivery:
                self._client.log_batch(self.run_id, metrics[first : first + _BATCH])

    def _metrics(self, step: int, values: Mapping[str, float]) -> Sequence[Metric]:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        return [Metric(metric_name(name), value, now, step) for name, value in values.items()]

    def close(self) -> None:
        """End the run if the sink started it and it is still the active run."""
        if not self._owns:
            return
        import mlflow

        active = mlflow.active_run()
        with self._delivery:
            if active is not None and active.info.run_id == self.run_id:
                mlflow.end_run()


def metric_name(name: str) -> str:
    """A name that MLflow accepts: letters, digits, underscores, dashes, dots, spaces, colons and slashes.

    A model that is a batch norm layer itself has the name "", which becomes "model".
    """
    parts = [part if part.strip(".") else "model" for part in _NOT_ALLOWED.sub("_", name).split("/")]
    return "/".join(parts)
